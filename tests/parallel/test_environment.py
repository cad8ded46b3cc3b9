"""Responses that an environment answers: what models read, every layout, a resumed run, what goes wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from examples.transcripts.calculator import reply as calculator
from megatron_simct.alignment import Tokenizer, load_tokenizer
from megatron_simct.config.flags import parse_config
from megatron_simct.config.options import (
    Config,
    InterfaceConfig,
    ModelConfig,
    RolloutConfig,
    TeacherJobConfig,
    TeacherOptions,
)
from megatron_simct.config.run_file import read_run_file
from megatron_simct.data.prompts import Reader
from megatron_simct.data.rendering import ChatTemplate, render_prompt
from megatron_simct.evaluation.called import NoAnswer
from megatron_simct.evaluation.environment import Environment, as_message
from megatron_simct.job import build_job
from megatron_simct.job_parts.engines import with_turns
from megatron_simct.launch.commands import command_of
from megatron_simct.loading import Pair, Teacher
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.preflight.check import check_run
from megatron_simct.prompt_files import Message
from megatron_simct.records import Asked, Prompt, Rollout
from megatron_simct.rollout.engine import Sampling, rollout_from_row, rollout_row
from megatron_simct.rollout.held_out import equals_label, response_text
from megatron_simct.rollout.turns import TurnsEngine
from tests import transcripts
from tests.distributed import run_ranks
from tests.huggingface import save_byte_fallback, save_byte_level
from tests.runs import assert_same_run, metrics, run

pytest.importorskip("transformers")

NO_STOP = (  # a blank before the end of a turn, as Llama-2 has it
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def reader(folder: Path, template: str | None = None) -> Reader:
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(str(folder)), ChatTemplate.load(str(folder), flag="--hf-checkpoint")


class Scripted:
    """An engine whose responses are given: for each sample the texts of its turns, ended or not."""

    def __init__(self, tokenizer: Tokenizer, script: dict[int, list[str]], *, stop: int) -> None:
        self._tokenizer, self._script, self._stop = tokenizer, script, stop
        self.seeds: list[int] = []
        self.read: list[Prompt] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        self.seeds.append(sampling.seed)
        self.read += prompts
        return [self._rollout(prompt) for prompt in prompts]

    def publish(self, weight_version: int) -> None: ...

    def _rollout(self, prompt: Prompt) -> Rollout:
        text = self._script[prompt.sample_id].pop(0)
        ids = np.append(self._tokenizer.encode(text.encode()), np.int32(self._stop)).astype(np.int32)
        assert prompt.room is not None
        cut = ids[: prompt.room]
        return Rollout(
            sample_id=prompt.sample_id,
            weight_version=7,
            student_ids=cut,
            logprobs=np.arange(len(cut), dtype=np.float32),
            finish="stop" if len(cut) == len(ids) else "length",
        )


ASKED = [{"role": "user", "content": "How many apples?"}]


def _talk(
    rank: int,
    world_size: int,
    student: Reader,
    teachers: Sequence[Reader],
    script: dict[int, list[str]],
    most: int,
    chat: bool,
) -> tuple[list[Rollout], Scripted]:
    tokenizer, template = student
    engine = Scripted(tokenizer, script, stop=318)
    turns = TurnsEngine(
        engine,
        replies=lambda talks: {i: as_message(calculator(messages)) for i, messages in talks.items()},
        in_replica=lambda replies: replies,
        student=student,
        teachers=lambda prompt: teachers,
    )
    prompts = []
    for number in script:
        if chat:
            assert template is not None
            ids = [of.render(ASKED, side) for side, of in (student, *teachers) if of is not None]
        else:
            ids = [render_prompt("How many apples?", side) for side, _ in (student, *teachers)]
        asked = Asked(prompt=ASKED if chat else "How many apples?", row={})
        prompts.append(Prompt(sample_id=number, student_ids=ids[0], teacher_ids=ids[1], asked=asked))
    return turns.generate(prompts, Sampling(temperature=1.0, max_response_len=most, seed=5)), engine


def text_of(tokenizer: Tokenizer, marks: dict[int, str], ids: Sequence[int]) -> str:
    return b"".join(
        marks[i].encode() if i in marks else tokenizer.table.bytes_of(i) for i in map(int, ids)
    ).decode()


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    root = tmp_path_factory.mktemp("sides")
    save_byte_level(root / "student")
    save_byte_fallback(root / "teacher")
    save_byte_fallback(root / "no_stop")
    return {
        "student": reader(root / "student"),
        "teacher": reader(root / "teacher", transcripts.TEACHER_TEMPLATE),
        "no_stop": reader(root / "no_stop", NO_STOP),
    }


def test_both_models_read_the_conversation_in_their_own_templates(sides: dict[str, Reader]) -> None:
    student, teacher = sides["student"], sides["teacher"]
    script = {0: ["calculator(12 + 7)", "calculator(19 + 1)", "Tom has 20."], 4: ["yes"]}
    ((rollouts, engine),) = run_ranks(1, _talk, student, [teacher], script, 1000, True)
    assert [rollout.sample_id for rollout in rollouts] == [0, 4]
    assert engine.seeds == [5, 5 + (1 << 40), 5 + (2 << 40)]  # a turn's draws are its own
    answers = ["calculator(12 + 7)", "calculator(19 + 1)", "Tom has 20."]
    messages = [
        *ASKED,
        {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": "19"},
        {"role": "assistant", "content": answers[1]},
        {"role": "user", "content": "20"},
        {"role": "assistant", "content": answers[2]},
    ]
    talk = rollouts[0].transcript
    assert talk is not None and talk.counts["turns"] == 3 and rollouts[0].weight_version == 7
    for (tokenizer, chat), turns, marks in (
        (student, talk.student, {317: "<|im_start|>", 318: "<|im_end|>"}),
        (teacher, talk.teachers[0], {1: "<s>", 2: "</s>"}),
    ):
        assert chat is not None
        whole = chat.text(messages, answered=True)
        asked = chat.text(ASKED)
        # Some tokenizers put a blank before each text between special tokens, where both do so.
        ids = [*chat.render(ASKED, tokenizer), *turns.ids]
        spelled = text_of(tokenizer, marks, ids).replace("</s> ", "</s>").replace("<s> ", "<s>")
        assert whole.startswith(asked) and whole.startswith(spelled) and len(whole) - len(spelled) < 2
        contents = [turns.ids[a : b - 1] for a, b in turns.spans]
        assert [tokenizer.decode(content).decode() for content in contents] == answers
        assert all(int(turns.ids[b - 1]) in tokenizer.table.stop_ids for _, b in turns.spans)
    # The next prompt is what was read and written, token by token.
    (again,) = [prompt for prompt in engine.read if prompt.room is not None and prompt.room < 900][:1] or [
        None
    ]
    assert again is None or again.student_ids.tolist()[: len(rollouts[0].student_ids)]
    assert len(rollouts[0].logprobs) == len(rollouts[0].label_ids)
    starts = [a for a, _ in talk.student.spans.tolist()]
    ends = [b for _, b in talk.student.spans.tolist()]
    assert rollouts[0].logprobs.tolist() == [
        k for a, b in zip(starts, ends, strict=True) for k in range(b - a)
    ]
    assert response_text(rollouts[0], student[0], {}) == "Tom has 20."
    labelled = [
        Prompt(sample_id=0, student_ids=rollouts[0].student_ids, teacher_ids=np.zeros(0), label="yes")
    ]
    assert equals_label(labelled, [rollouts[1]], tokenizer=student[0]) == [True]
    assert equals_label(labelled, [rollouts[0]], tokenizer=student[0]) == [False]
    for rollout in rollouts:  # stored, and read back
        again_read = rollout_from_row(json.loads(json.dumps(rollout_row(rollout))))
        assert rollout_row(again_read) == rollout_row(rollout) and again_read.transcript is not None


def test_a_stop_token_that_one_template_has_not_is_no_label(sides: dict[str, Reader]) -> None:
    script = {0: ["calculator(12 + 7)", "19"]}
    ((rollouts, _),) = run_ranks(1, _talk, sides["student"], [sides["no_stop"]], script, 1000, True)
    talk = rollouts[0].transcript
    assert talk is not None
    for (tokenizer, _), turns in ((sides["student"], talk.student), (sides["no_stop"], talk.teachers[0])):
        last = [int(turns.ids[b - 1]) in tokenizer.table.stop_ids for _, b in turns.spans]
        assert last == [False, True]
    assert len(rollouts[0].logprobs) == len(rollouts[0].label_ids)


def test_without_chat_templates_the_reply_follows_the_stop_token(sides: dict[str, Reader]) -> None:
    student, teacher = ((tokenizer, None) for tokenizer, _ in (sides["student"], sides["teacher"]))
    script = {3: ["calculator(12 + 7)", " 19."]}
    ((rollouts, _),) = run_ranks(1, _talk, student, [teacher], script, 1000, False)
    talk = rollouts[0].transcript
    assert talk is not None
    for (tokenizer, _), turns, stop in (
        (student, talk.student, 318),
        (teacher, talk.teachers[0], 2),
    ):
        ids = turns.ids.tolist()
        assert text_of(tokenizer, {stop: "|"}, ids) == "calculator(12 + 7)|19 19.|"


class _Calculator:
    """An Environment in this process."""

    @staticmethod
    def replies(talks: Mapping[int, Sequence[Message]]) -> dict[int, Message | None]:
        return {number: as_message(calculator(messages)) for number, messages in talks.items()}


def _mixed(
    rank: int, world_size: int, student: Tokenizer, teachers: dict[str, Tokenizer]
) -> dict[str, list[int]]:
    """The tokens of each teacher of a row that mixes two of them, as the parts of a job write them."""
    pair = Pair(
        student=student,
        teachers=tuple(
            Teacher(
                of=TeacherOptions(name=name, prefix="", model=ModelConfig(), job=TeacherJobConfig()),
                tokenizer=tokenizer,
                alignment_map=None,
                interface=InterfaceConfig(interface="bytes"),
            )
            for name, tokenizer in teachers.items()
        ),
    )
    engine = Scripted(student, {0: ["calculator(12 + 7)", "19"]}, stop=318)
    config = Config(rollout=RolloutConfig(environment="module:function"))
    environment: Any = _Calculator()
    with process_groups(config.parallel, seed=0) as groups:
        turns = with_turns(config, groups, pair, engine, environment, scored=True)
        prompt = Prompt(
            sample_id=0,
            student_ids=student.encode(b"12 + 7?"),
            teacher_ids=np.zeros(1, np.int32),
            teacher="b",
            mixture=(("b", 0.75), ("a", 0.25)),
            asked=Asked(prompt="12 + 7?", row={}),
        )
        (rollout,) = turns.generate([prompt], Sampling(temperature=1.0, max_response_len=100, seed=0))
    assert rollout.transcript is not None
    found = [of_one.ids.tolist() for of_one in rollout.transcript.teachers]
    return dict(zip([name for name, _ in prompt.mixture], found, strict=True))


def test_all_teachers_of_a_row_read_the_conversation(sides: dict[str, Reader]) -> None:
    (student, _), (other, _) = sides["student"], sides["teacher"]
    teachers = {"a": student, "b": other, "c": other}
    (found,) = run_ranks(1, _mixed, student, teachers)
    assert list(found) == ["b", "a"]
    for name, ids in found.items():
        stop = teachers[name].table.stop_ids[0]
        assert text_of(teachers[name], {stop: "|"}, ids) == "calculator(12 + 7)|1919|"


def test_a_template_that_refuses_a_reply_is_named(sides: dict[str, Reader], tmp_path: Path) -> None:
    save_byte_fallback(tmp_path)
    teacher = reader(
        tmp_path,
        "{% for m in messages %}{% if m.role == 'user' and loop.index > 1 %}"
        "{{ raise_exception('one question') }}{% endif %}{{ m.role + ' ' + m.content }}{% endfor %}",
    )
    words = "--environment: --hf-checkpoint .* does not render a reply of the role 'user': one question"
    with pytest.raises(Exception, match=words):
        run_ranks(1, _talk, sides["student"], [teacher], {0: ["calculator(12 + 7)"]}, 1000, True)


def test_a_conversation_ends_where_no_response_fits_behind_the_reply(sides: dict[str, Reader]) -> None:
    student, teacher = sides["student"], sides["teacher"]

    def talk(most: int) -> Rollout:
        script = {0: ["calculator(12 + 7)", "nineteen"]}
        ((rollouts, _),) = run_ranks(1, _talk, student, [teacher], script, most, True)
        return rollouts[0]

    whole = talk(1000).transcript
    assert whole is not None
    of_teacher = whole.teachers[0]
    second = max(int(whole.student.spans[1, 0]), int(of_teacher.spans[1, 0]))
    cut = talk(second + 1)
    assert cut.transcript is not None and cut.transcript.counts["turns"] == 2
    short = talk(second)
    assert short.transcript is not None and short.transcript.counts["turns"] == 1
    assert (
        short.finish == "stop"
        and short.student_ids.tolist() == whole.student.ids[: whole.student.spans[0, 1]].tolist()
    )


# The function


FUNCTIONS = """
import os, time

def asks(messages):
    said = sum(message["role"] == "assistant" for message in messages)
    return "the cat 12" if said < 3 else None

def trouble(messages):
    match messages[-1]["content"]:
        case "raise":
            raise LookupError("no such thing")
        case "hang":
            time.sleep(600)
        case "leave":
            os._exit(3)
        case "number":
            return 3
        case "message":
            return {"role": "tool", "content": "4"}
        case "none":
            return None
    return "fine"
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_environment.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}")
    return tmp_path


def test_what_a_function_does_wrong_ends_its_own_conversation_only(module: Path) -> None:
    said: list[str] = []
    environment = Environment("my_environment:trouble", timeout_s=15.0, workers=2, say=said.append)
    texts = ["fine", "raise", "hang", "leave", "number", "message", "none", "fine"]
    talks = {i: [*ASKED, {"role": "assistant", "content": text}] for i, text in enumerate(texts)}
    found = environment.replies(talks)
    environment.close()
    fine = {"role": "user", "content": "fine"}
    assert [found[i] for i in (0, 5, 6, 7)] == [fine, {"role": "tool", "content": "4"}, None, fine]
    assert [found[i] for i in (1, 2, 3, 4)] == [None] * 4
    for number, words in enumerate(("LookupError: no such thing", "no answer in 15 s", "its process ended")):
        assert said[number] == f" --environment: sample {number + 1} ends without a reply: {words}"
    assert "neither a text" in said[3] and len(said) == 4
    with pytest.raises(NoAnswer, match="surrogate"):
        as_message("\ud800")
    with pytest.raises(ValueError, match="^--environment my_environment:other: AttributeError"):
        Environment("my_environment:other", timeout_s=1.0, workers=1)


# Training


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student's random weights end a response soon."""
    root = tmp_path_factory.mktemp("transcripts")
    transcripts.build_files(root)
    path = root / "student" / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"][318] *= 8
    save_file(weights, path, metadata={"format": "pt"})
    return root


def command_line(files: Path, *flags: str) -> list[str]:
    return transcripts.command_line(
        files,
        *("--simct-on", "sampled", "--environment", "my_environment:asks"),
        *("--rollout-max-response-len", "96", *flags),
    )


def _step(rank: int, world_size: int, files: Path, *flags: str) -> tuple[Any, ...]:
    """What was sampled, the sums and the gradient norm of a step, and those of its responses apart."""
    resolved = parse_config(command_line(files, *flags))
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        records = job.prompts.batch(0), job.engine.generate(job.prompts.batch(0), job.sampling)
        found = []
        for prompts, rollouts in (records, transcripts.apart(*records)) if world_size == 1 else (records,):
            report = job.updater.step(transcripts.micro_batches(job, prompts, rollouts))
            found.append(({name: float(value) for name, value in report.sums.items()}, report.grad_norm))
        sampled = {r.sample_id: (r.student_ids.tolist(), r.transcript.counts) for r in records[1]}
        if job.environment is not None:
            job.environment.close()
        return sampled, found


FIXED = ("--lr", "0", "--min-lr", "0")
LAYOUTS = [
    (2, ("--tensor-model-parallel-size", "2")),
    (2, ("--pipeline-model-parallel-size", "2")),
    (2, ("--micro-batch-size", "2")),
    (2, ("--context-parallel-size", "2")),
    (1, ("--max-tokens-per-gpu", "300", "--rollout-engine-batch-size", "3")),
]


@pytest.mark.parametrize("interface", ["paper", "bytes"])
def test_every_layout_samples_and_trains_alike(files: Path, module: Path, interface: str) -> None:
    flags = (*FIXED, "--simct-interface", interface)
    ((sampled, ((sums, norm), (apart, norm_apart))),) = run_ranks(1, _step, files, *flags)
    assert sum(counts["turns"] for _, counts in sampled.values()) > 12  # of 8 samples
    # Each response is trained on behind just what it was sampled behind.
    assert sums["rollout_gap_largest"] < 1e-4
    assert sums["loss"] == pytest.approx(apart["loss"], rel=1e-5) and norm == pytest.approx(
        norm_apart, rel=1e-5
    )
    for ranks, layout in LAYOUTS:
        results = run_ranks(ranks, _step, files, *flags, *layout)
        together = {i: talk for found, _ in results for i, talk in found.items()}
        assert together == sampled, layout
        for _, ((of_rank, norm_of_rank),) in ((None, [f[0]]) for _, f in results):
            assert of_rank["loss"] == pytest.approx(sums["loss"], rel=1e-5), layout
            assert norm_of_rank == pytest.approx(norm, rel=1e-5), layout


def _train(folder: Path, files: Path, iterations: int, *flags: str) -> str:
    saved = ("--save", str(folder / "save"), "--load", str(folder / "save"), "--run-dir", str(folder / "run"))
    steps = (
        "--train-iters",
        str(iterations),
        "--optimizer",
        "adam",
        "--lr",
        "1e-3",
        "--rollout-batch-size",
        "4",
    )
    ((code, out, error),) = run_ranks(1, run, command_line(files, *saved, *steps, *flags))
    assert code == 0, error
    return out


def test_a_resumed_run_and_a_replayed_one_equal_an_undisturbed_one(files: Path, module: Path) -> None:
    kept = str(module / "kept")
    _train(module / "once", files, 4, "--save-debug-rollout-data", kept)
    _train(module / "twice", files, 2)
    _train(module / "twice", files, 4)
    assert_same_run(module / "twice", module / "once")
    steps = [row for row in metrics(module / "once") if row["kind"] == "step"]
    assert len(steps) == 4 and all(row["turns"] > 1 and 0 < row["between_turns"] < 1 for row in steps)
    assert all(row["rollout_logprob_difference_largest"] < 1e-4 for row in steps)
    assert all("masked_blank" not in row for row in steps)
    _train(module / "replayed", files, 4, "--load-debug-rollout-data", kept)
    assert metrics(module / "replayed") == metrics(module / "once")
    # With another template of the teacher the replies would be in other tokens.
    other = module / "other-teacher"
    shutil.copytree(files / "teacher", other)
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(template.replace("[assistant]", "[model]"))
    flags = ("--load-debug-rollout-data", kept, "--teacher-hf-checkpoint", str(other))
    ((code, _, error),) = run_ranks(1, run, command_line(files, *flags, "--rollout-batch-size", "4"))
    assert code == 1 and "or with other tokenizers or chat templates of the student or its teacher" in error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--environment", "nowhere"), "--environment nowhere: must be MODULE:FUNCTION"),
        (
            ("--environment", "a:b", "--simct-interface", "sft"),
            "--environment: not with --simct-interface sft",
        ),
        (("--environment", "a:b", "--simct-on", "given"), "--environment: not with --simct-on given"),
        (("--environment", "a:b", "--reference-kl-weight", "1"), "not with --reference-kl-weight"),
        (("--environment-timeout-seconds", "1"), "--environment-timeout-seconds needs --environment"),
        (
            ("--environment", "a:b", "--environment-timeout-seconds", "300"),
            "--environment-timeout-seconds 300: a turn of 8 conversations in 4 processes may wait 600 "
            "seconds, and other ranks wait 10 minutes; lower it or --rollout-wave-size, or raise",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(files: Path, flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        transcripts.config(files, "--simct-on", "sampled", *flags).check(data_parallel_size=1)


def test_the_run_file_of_the_example_runs(files: Path, tmp_path: Path) -> None:
    """On small models, two steps."""
    example = Path(__file__).parents[2] / "examples" / "transcripts"
    values = {
        "hf_checkpoint": files / "student",
        "teacher_hf_checkpoint": files / "teacher",
        "prompt_data": example / "problems.jsonl",
        "make_vocab_size_divisible_by": 8,
        "teacher_make_vocab_size_divisible_by": 4,
        "rollout_max_prompt_len": 160,
        "rollout_max_response_len": 32,
        "tensor_model_parallel_size": 1,
        "sequence_parallel": "false",
        "bf16": "false",
        "train_iters": 2,
    }
    overrides = [f"student.{key}={value}" for key, value in values.items()]
    overrides += [f"run_dir={tmp_path}", "cluster.student.gpus_per_node=0"]
    run_file = read_run_file(str(example / "sample.yaml"), overrides)
    report = check_run(run_file)
    assert not report.failed, [f.message for f in report.findings if f.level == "fail"]
    ((code, _, error),) = run_ranks(1, run, command_of(run_file.student)[2:])
    assert code == 0, error


def test_the_calculator_replies_to_a_sum_alone() -> None:
    said: Callable[[str], list[dict[str, Any]]] = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    assert calculator(said("calculator(12 + 7)")) == "19" and calculator(said("19 books")) is None
    command = [sys.executable, "-c", "import examples.transcripts.calculator as c; print(c.CALL.pattern)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).returncode == 0

"""The whole quick start with two steps in each stage: real torchrun, two ranks, real tokenizers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.hints import run as hints
from examples.quickstart import run as quickstart
from examples.stages import Stage
from examples.transcripts import calculator
from examples.transcripts import run as transcripts
from examples.two_teachers import run as two_teachers
from megatron_simct.commands import evaluate, select_responses
from megatron_simct.config.flags import parse_config
from megatron_simct.config.options import Config
from megatron_simct.data.prompts import read_prompts
from megatron_simct.losses import comparisons
from tests.printed import commands_of, same_but_for_numbers

ROOT = Path(__file__).resolve().parents[2]
QUICK_START = ROOT / "docs" / "quickstart.md"
FIRST_HOUR = ROOT / "docs" / "first_hour.md"
needs_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("mistral_common") is None,
    reason="mistral-common is not installed: pip install --no-deps -r examples/quickstart/requirements.txt",
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A checkout in which the quick start has run, with two steps in each stage. Its
    output is in `printed`.
    """
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("megatron_simct", "tools", "examples"):
        (folder / name).symlink_to(ROOT / name)
    command = [sys.executable, "examples/quickstart/run.py", "--smoke"]
    command += ["--run-dir", str(folder / "runs" / "quickstart")]
    (folder / "printed").write_text(_run(command, folder))
    return folder


def _run(command: list[str], folder: Path) -> str:
    """The output of the command and its errors, as a person in `folder` sees them in a pipe."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


@needs_tokenizers
def test_quickstart_smoke(checkout) -> None:
    folder = checkout / "runs" / "quickstart"
    summary = json.loads((folder / "summary.json").read_text())
    assert {
        "teacher_accuracy",
        "student_accuracy_before",
        "student_accuracy_after",
        "student_sampled_before",
        "student_sampled_after",
        "interface",
        "seed",
        "seconds",
    } <= summary.keys()
    assert summary["interface"] == "paper" and summary["seconds"] > 0
    assert "<svg" in (folder / "report.html").read_text() and (folder / "curves.png").stat().st_size > 10_000
    printed = (checkout / "printed").read_text()
    _compare(QUICK_START.read_text().split("```")[1], printed[printed.index("   Held-out accuracy") :])

    rows = [json.loads(line) for line in (folder / "distil-paper" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["iteration"] for row in steps] == [1, 2]
    for row in steps:
        assert row["rollout_logprob_gap"] < 1e-4
        covered = row["coverage_one_to_one"] + row["coverage_unit"]
        dropped = sum(value for name, value in row.items() if name.startswith("dropped_"))
        assert abs(covered + dropped - 1) < 1e-6


@needs_tokenizers
def test_a_warm_up_on_the_teachers_answers_is_a_chain_of_commands_that_the_tools_accept(tmp_path) -> None:
    options = quickstart.parse(["--warm-up", "teacher", "--processes", "1", "--run-dir", str(tmp_path)])
    recipe = quickstart.Recipe(options, tmp_path)
    distil = recipe.distil("bytes", "distil")
    chain = [*recipe.warm_start, distil, recipe.evaluate(distil)]
    assert [stage.name for stage in chain] == [
        *("teacher", "sample", "select", "warm-up of the student", "distil with bytes", "evaluate")
    ]
    teacher, sample, select, student, distil, evaluation = chain
    for stage in (teacher, student, distil):
        assert parse_config(list(stage.command[3:])).output.load == str(stage.output / "checkpoint")
    asked, measured = (
        evaluate._parser().parse_args(list(stage.command[2:])) for stage in (sample, evaluation)
    )
    selected = select_responses._parser().parse_args(list(select.command[2:]))
    # The output of each stage is the input of the next one.
    assert asked.pretrained_checkpoint == str(teacher.output / "checkpoint")
    assert (str(selected.responses), selected.data) == (asked.output_dir, asked.data)
    assert (
        parse_config(list(student.command[3:])).data.prompt_data == str(selected.output) == str(select.output)
    )
    assert parse_config(list(distil.command[3:])).model.pretrained_checkpoint == str(
        student.output / "checkpoint"
    )
    assert measured.pretrained_checkpoint == str(distil.output / "checkpoint")
    assert measured.data == str(tmp_path / "held_out.jsonl") != asked.data
    for before, after in zip(chain, chain[1:], strict=False):
        assert before in after.needs
    assert all(stage.resumes for stage in chain if stage is not select)


@needs_tokenizers
def test_the_example_of_two_teachers_names_the_one_that_knows_each_row(tmp_path) -> None:
    recipe = two_teachers.Recipe(two_teachers.parse(["--run-dir", str(tmp_path)]), tmp_path)

    def parsed(stage: Stage) -> Config:
        command = list(stage.command)
        return parse_config(command[command.index("megatron_simct.train") + 1 :])

    taught, warm = parsed(recipe.distil), parsed(recipe.warm_up)
    taught.check(data_parallel_size=1)
    assert taught.model.pretrained_checkpoint == warm.output.save
    assert {one.name for one in taught.teachers} == set(two_teachers.KINDS)
    keys = {"flag": "", "input_key": "prompt", "response_key": "response", "label_key": "label"}
    keys |= {"need_response": True, "need_label": True, "teachers": list(two_teachers.KINDS)}
    rows = read_prompts(taught.data.prompt_data, **keys)
    for one in taught.teachers:
        trained = parsed(recipe.teachers[one.name])
        assert one.model.pretrained_checkpoint == trained.output.save
        assert one.model.tokenizer_model == trained.model.tokenizer_model
        known = read_prompts(trained.data.prompt_data, **keys)
        assert {row.prompt for row in known} == {
            row.prompt for row in rows if row.teachers == {one.name: 1.0}
        }
        sign = 1 if one.name == "additions" else -1
        for row in known[:50]:
            a, b = map(int, re.findall(r"\d+", row.prompt))
            assert f" {a + sign * b} " in row.label
        held_out = read_prompts(trained.data.eval_prompt_data, **keys)
        assert not {row.prompt for row in held_out} & {row.prompt for row in rows}
        (other,) = set(two_teachers.KINDS) - {one.name}
        asked = evaluate._parser().parse_args(list(recipe.others[one.name].command[2:]))
        assert asked.data == parsed(recipe.teachers[other]).data.eval_prompt_data
        assert asked.pretrained_checkpoint == trained.output.save
    options = two_teachers.parse(["--run-dir", str(tmp_path), "--kd", "additions"])
    by_kd = two_teachers.Recipe(options, tmp_path)
    assert by_kd.warm_up.digest == recipe.warm_up.digest and by_kd.distil.output != recipe.distil.output
    assert by_kd.teachers["subtractions"].digest == recipe.teachers["subtractions"].digest
    resolved = parsed(by_kd.distil)
    resolved.check(data_parallel_size=1)
    names = {one.name: comparisons(resolved)[one.name].interface for one in resolved.teachers}
    assert names == {"additions": "kd", "subtractions": "bytes"}
    same = next(one for one in resolved.teachers if one.name == "additions").model
    assert same.tokenizer_model == resolved.model.tokenizer_model
    assert same.pretrained_checkpoint == parsed(by_kd.teachers["additions"]).output.save
    options = two_teachers.parse(["--run-dir", str(tmp_path), "--own-weight", "0.7"])
    other_recipe = two_teachers.Recipe(options, tmp_path)
    assert other_recipe.warm_up.digest == recipe.warm_up.digest, "a mixture begins with the same student"
    assert other_recipe.distil.output != recipe.distil.output
    keys |= {"need_response": False, "mixes": dict.fromkeys(two_teachers.KINDS)}
    mixed = read_prompts(parsed(other_recipe.distil).data.prompt_data, **keys)
    for row, (kind,) in zip(mixed, (row.teachers for row in rows), strict=True):
        assert row.teachers == pytest.approx(
            {name: 0.7 if name == kind else 0.3 for name in two_teachers.KINDS}
        )


@needs_tokenizers
def test_the_example_of_hints_is_a_chain_whose_teacher_reads_the_solution(tmp_path) -> None:
    warm_up, evaluation, distil = hints.stages(hints.parse(["--run-dir", str(tmp_path)]), tmp_path)
    trained, taught = (
        parse_config(list(stage.command[stage.command.index("megatron_simct.train") + 1 :]))
        for stage in (warm_up, distil)
    )
    start = trained.output.save
    assert taught.model.pretrained_checkpoint == taught.teacher.pretrained_checkpoint == start
    assert taught.model.folder == taught.teacher.folder and taught.interface.interface == "kd"
    asked = evaluate._parser().parse_args(list(evaluation.command[2:]))
    assert asked.pretrained_checkpoint == start and asked.data == str(tmp_path / "hinted.jsonl")
    assert warm_up in evaluation.needs and warm_up in distil.needs
    keys = {"flag": "", "input_key": "prompt", "response_key": "response", "label_key": "label"}
    rows = read_prompts(taught.data.prompt_data, need_response=False, need_label=False, **keys)
    for row in rows[:50]:
        a, b = map(int, re.findall(r"\d+", row.prompt))
        assert (
            row.teacher_prompt == f"{row.prompt} Solution: {a} + {b} = {a + b}."
            and "Solution" not in row.prompt
        )
    held_out = read_prompts(taught.data.eval_prompt_data, need_response=False, need_label=True, **keys)
    assert not {row.prompt for row in held_out} & {row.prompt for row in rows}
    warm = read_prompts(trained.data.prompt_data, need_response=True, need_label=False, **keys)
    assert sum("Solution" in row.prompt for row in warm) == len(warm) / 2


def test_the_example_of_a_calculator_is_a_chain_whose_student_asks_it(tmp_path) -> None:
    teacher, warm_up, distil = transcripts.stages(transcripts.parse(["--run-dir", str(tmp_path)]), tmp_path)
    trained, warm, taught = (
        parse_config(list(stage.command[stage.command.index("megatron_simct.train") + 1 :]))
        for stage in (teacher, warm_up, distil)
    )
    assert taught.model.pretrained_checkpoint == warm.output.save
    assert taught.teacher.pretrained_checkpoint == trained.output.save
    assert (taught.model.folder, taught.teacher.folder) == (warm.model.folder, trained.model.folder)
    vocabularies = [
        set(json.loads(Path(folder, "tokenizer.json").read_text())["model"]["vocab"])
        for folder in (taught.model.folder, taught.teacher.folder)
    ]
    assert vocabularies[0] < vocabularies[1], "the student cuts words into more tokens"
    assert set(distil.needs) == {teacher, warm_up}
    rows = [json.loads(line) for line in Path(trained.data.prompt_data).read_text().splitlines()]
    problems = [json.loads(line) for line in Path(taught.data.prompt_data).read_text().splitlines()]
    held_out = Path(taught.data.eval_prompt_data).read_text()
    for row, problem in zip(rows[:50], problems, strict=False):
        asked, call, reply, answer = row["messages"]
        assert problem == {"messages": [asked], "label": answer["content"]}
        assert calculator.reply([asked, call]) == reply["content"] and reply["content"] in answer["content"]
        assert calculator.reply([asked, call, reply, answer]) is None
        assert asked["content"] not in held_out


def test_the_example_of_a_calculator_runs(tmp_path) -> None:
    """Two steps of each stage: real torchrun, two ranks."""
    command = [sys.executable, "examples/transcripts/run.py", "--smoke", "--run-dir", str(tmp_path / "run")]
    assert "│ 2     │" in _run(command, ROOT)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["greedy"]) == list(summary["sampled"]) == ["0", "2"]


@needs_tokenizers
@pytest.mark.parametrize("number", range(8))
def test_the_first_hour_is_as_its_page_prints_it(checkout, number) -> None:
    commands = commands_of(FIRST_HOUR)
    assert len(commands) == 8
    command, expected = commands[number]
    _compare(expected, _run(["bash", "-c", command], checkout))


def _compare(expected: str, printed: str) -> None:
    assert same_but_for_numbers(expected, printed), f"the page prints\n{expected}\nfound was\n{printed}"

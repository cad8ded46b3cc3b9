"""Training on all answers of given transcripts: the step by hand in float64, every layout, a resumed run.

L = sum over answers of the interface's loss, over all labels of the step
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_simct.config.flags import parse_config
from megatron_simct.config.run_file import read_run_file
from megatron_simct.job import build_job
from megatron_simct.launch.commands import command_of
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.preflight.check import check_run
from tests.distributed import run_ranks
from tests.oracles import modes
from tests.runs import assert_same_run, metrics, run
from tests.transcripts import apart, build_files, command_line, config, given_samples, micro_batches

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("transcripts")
    build_files(root)
    return root


def _step(rank: int, world_size: int, files: Path, *flags: str) -> tuple[Any, ...]:
    """The sums, the gradient norm, and in one process the gradients of embedding and head."""
    resolved = config(files, *flags)
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        before = {name: value.detach().double() for name, value in job.updater.model.named_parameters()}
        report = job.updater.step(micro_batches(job, *given_samples(job)))
        after = {name: value.detach().double() for name, value in job.updater.model.named_parameters()}
        gradients = {
            name: before[name] - after[name]
            for name in before
            if "embedding" in name or "output_layer" in name
        }
        sums = {name: float(report.sums[name]) for name in ("loss", "num_labels", "teacher_nll_sum")}
        return sums, report.grad_norm, gradients


# By hand: transformers' models, tokens and offsets


def pieces_of(tokenizer: Any) -> list[bytes]:
    """The bytes of every id; none for a special token."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    found = []
    for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer))):
        if token in tokenizer.all_special_tokens or token.startswith("<|"):
            found.append(b"")
        elif token.startswith("<0x"):
            found.append(bytes([int(token[3:5], 16)]))
        elif "<unk>" in tokenizer.all_special_tokens or "▁" in token:
            found.append(token.replace("▁", " ").encode())
        else:
            found.append(bytes(byte_of[c] for c in token) if set(token) <= byte_of.keys() else token.encode())
    return found


def turns_of(
    folder: Path, messages: list[dict[str, str]], stop: int
) -> list[tuple[Any, list[int], list[int]]]:
    """For each answer: float64 logits [n, V] of its labels, the labels, and where each ends in its text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor(encoded.input_ids)[None]
    logits = MODELS[folder.name](ids).logits[0]
    found, position = [], 0
    for message in messages:
        begin = text.index(message["content"], position)
        position = end = begin + len(message["content"])
        if message["role"] != "assistant":
            continue
        inside = [i for i, (a, b) in enumerate(encoded.offset_mapping) if begin <= a < b <= end]
        assert encoded.offset_mapping[inside[0]][0] == begin and encoded.offset_mapping[inside[-1]][1] == end
        ends = [encoded.offset_mapping[i][1] - begin for i in inside]
        assert encoded.input_ids[inside[-1] + 1] == stop
        rows = [*inside, inside[-1] + 1]
        found.append((logits[[i - 1 for i in rows]], [encoded.input_ids[i] for i in rows], ends))
    return found


MODELS: dict[str, Any] = {}
"""transformers' models in float64, by the name of their folder."""


def by_hand(files: Path, interface: str) -> tuple[float, int, float, dict[str, torch.Tensor]]:
    """L times its labels, the labels, the gradient's norm, and the gradients of embedding and head."""
    for name in ("student", "teacher"):
        model = transformers.AutoModelForCausalLM.from_pretrained(str(files / name))
        MODELS[name] = model.double().requires_grad_(name == "student")
    student_stop, teacher_stop = 318, 2
    sides = [
        pieces_of(transformers.AutoTokenizer.from_pretrained(str(files / name)))
        for name in ("student", "teacher")
    ]
    # A character may be a byte's token and a piece, which comes later: encoding gives the piece.
    id_of = {piece: i for i, piece in enumerate(sides[1]) if piece}
    shared = {student_stop: [teacher_stop]} | {
        i: [id_of[piece]] for i, piece in enumerate(sides[0]) if piece in id_of
    }
    total, num_labels = torch.zeros((), dtype=torch.float64), 0
    for line in (files / "rows.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        both = (
            turns_of(files / "student", messages, student_stop),
            turns_of(files / "teacher", messages, teacher_stop),
        )
        for (z_s, labels_s, ends_s), (z_t, labels_t, ends_t) in zip(*both, strict=True):
            segments, kinds, replaced = [], [], []
            t = s = 0
            for end in sorted(set(ends_s) & set(ends_t)):
                te, se = ends_t.index(end) + 1, ends_s.index(end) + 1
                single = (te - t, se - s) == (1, 1) and shared.get(labels_s[s]) == [labels_t[t]]
                spelled = b"".join(sides[0][i] for i in labels_s[s:se])
                same = [i for i in shared if sides[0][i] == spelled]
                segments.append((t, te, s, se))
                kinds.append(modes.SHARED if single else modes.UNIT)
                replaced.append(same[0] if same and not single else -1)
                t, s = te, se
            segments.append((t, t + 1, s, s + 1))
            rows = modes.row_losses(
                modes.Model(z_s, labels_s),
                modes.Model(z_t.detach(), labels_t),
                segments=segments,
                kinds=[*kinds, modes.STOP],
                replaced=[*replaced, -1],
                shared=shared,
                interface=interface,
            )
            total, num_labels = total + sum(rows), num_labels + len(labels_s)
    (total / num_labels).backward()
    student = MODELS["student"]
    norm = float(torch.sqrt(sum(p.grad.square().sum() for p in student.parameters())))
    gradients = {
        "embedding": student.get_input_embeddings().weight.grad,
        "output_layer": student.get_output_embeddings().weight.grad,
    }
    return float(total.detach()), num_labels, norm, gradients


def _by_hand(rank: int, world_size: int, files: Path, interface: str) -> tuple[Any, ...]:
    return by_hand(files, interface)


@pytest.mark.parametrize("interface", ["paper", "sft", "alm"])
def test_the_step_is_that_of_the_formula(files: Path, interface: str) -> None:
    flags = ("--simct-interface", interface)
    ((sums, grad_norm, gradients),) = run_ranks(1, _step, files, *flags)
    ((total, num_labels, norm, expected),) = run_ranks(1, _by_hand, files, interface)
    assert sums["num_labels"] == num_labels > 100
    assert sums["loss"] == pytest.approx(total, rel=1e-5) and total > 1
    assert grad_norm == pytest.approx(norm, rel=1e-5)
    for name, gradient in gradients.items():
        (key,) = [key for key in expected if key in name]
        # SGD adds the gradient to weights of at most 2, whose rounding is 1.2e-7.
        torch.testing.assert_close(
            gradient[: len(expected[key])], expected[key], rtol=0, atol=3e-6 * max(1, norm), msg=name
        )
    assert len(gradients) == 2


LAYOUTS = [
    (1, ("--micro-batch-size", "4")),
    (1, ("--max-tokens-per-gpu", "300")),
    (2, ("--tensor-model-parallel-size", "2")),
    (2, ("--pipeline-model-parallel-size", "2")),
    (2, ("--micro-batch-size", "2")),
    (2, ("--context-parallel-size", "2")),
    (4, ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--max-tokens-per-gpu", "300")),
]


@pytest.mark.parametrize("interface", ["paper", "bytes"])
def test_every_layout_takes_the_same_step(files: Path, interface: str) -> None:
    flags = ("--simct-interface", interface)
    ((sums, grad_norm, _),) = run_ranks(1, _step, files, *flags)
    for ranks, layout in LAYOUTS:
        for found, norm, _ in run_ranks(ranks, _step, files, *flags, *layout):
            assert found == pytest.approx(sums, rel=1e-5), layout
            assert norm == pytest.approx(grad_norm, rel=1e-5), layout


def _routed_step(rank: int, world_size: int, argv: list[str]) -> tuple[dict[str, float], float]:
    resolved = parse_config(argv)
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        report = job.updater.step(micro_batches(job, *given_samples(job)))
        return {name: value for name, value in report.sums.items() if "loss" in name}, report.grad_norm


def test_teachers_of_their_rows_read_transcripts(files: Path, tmp_path: Path) -> None:
    """Each row's teacher scores all its answers, by its own interface: those of a run on its rows alone."""
    entries = {
        "other": {"hf_checkpoint": str(files / "teacher"), "make_vocab_size_divisible_by": 4},
        "same": {"hf_checkpoint": str(files / "student"), "make_vocab_size_divisible_by": 8},
    }
    rows = [json.loads(line) for line in (files / "rows.jsonl").read_text().splitlines()]
    names = ["other" if number % 2 else "same" for number in range(len(rows))]

    def argv(entries: dict[str, Any], rows: list[Any], *flags: str) -> list[str]:
        path = tmp_path / f"{'-'.join(entries)}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = command_line(files, "--prompt-data", str(path), "--teachers", json.dumps(entries))
        for flag in ("--teacher-hf-checkpoint", "--teacher-make-vocab-size-divisible-by"):
            at = given.index(flag)
            del given[at : at + 2]
        return [*given, "--rollout-batch-size", str(len(rows)), *flags]

    of_rows = [row | {"teacher": name} for row, name in zip(rows, names, strict=True)]
    entries["same"]["simct_interface"] = "alm"
    both = argv(entries, of_rows, "--simct-interface", "bytes")
    ((sums, grad_norm),) = run_ranks(1, _routed_step, both)
    assert sums["loss"] == pytest.approx(sums["loss/other"] + sums["loss/same"], rel=1e-6)
    for name, interface in (("other", "bytes"), ("same", "alm")):
        its_rows = [row for row, of in zip(rows, names, strict=True) if of == name]
        entry = {key: value for key, value in entries[name].items() if key != "simct_interface"}
        alone = argv({name: entry}, its_rows, "--simct-interface", interface)
        ((found, _),) = run_ranks(1, _routed_step, alone)
        assert sums[f"loss/{name}"] == pytest.approx(found["loss"], rel=1e-5, abs=1e-5)
    assert sums["loss/other"] > 1
    for ranks, layout in LAYOUTS[2:6]:
        for found, norm in run_ranks(ranks, _routed_step, [*both, *layout]):
            assert found == pytest.approx(sums, rel=1e-5, abs=1e-5), layout
            assert norm == pytest.approx(grad_norm, rel=1e-5), layout


def _both(rank: int, world_size: int, files: Path, flags: Sequence[tuple[str, ...]]) -> list[tuple[Any, Any]]:
    """Sums and gradient norm of the transcripts, and of their responses apart, under several flags."""
    found = []
    for some in flags:
        resolved = config(files, *some, "--lr", "0", "--min-lr", "0")
        with process_groups(resolved.parallel, seed=1) as groups:
            job = build_job(resolved, groups)
            whole = given_samples(job)
            sides = []
            for records in (whole, apart(*whole)):
                report = job.updater.step(micro_batches(job, *records))
                sums = {k: float(v) for k, v in report.sums.items() if not isinstance(v, str)}
                sides.append((sums, report.grad_norm))
            found.append((sides[0], sides[1]))
    return found


INTERFACES = [
    *(
        ("--simct-interface", name)
        for name in "code exact strict strict_topk uld partition topk_kl sft".split()
    ),
    ("--simct-interface", "bytes"),
    ("--simct-interface", "bytes", "--simct-byte-bounds", "any"),
    ("--simct-interface", "bpm", "--simct-divergence", "forward_kl", "--simct-child-weight", "0.5"),
]


def test_a_transcript_is_the_sum_of_its_responses_in_every_interface(files: Path) -> None:
    (found,) = run_ranks(1, _both, files, INTERFACES, timeout_s=400)
    for flags, ((sums, norm), (expected, expected_norm)) in zip(INTERFACES, found, strict=True):
        assert sums == pytest.approx(expected, rel=1e-5, abs=1e-6), flags
        assert norm == pytest.approx(expected_norm, rel=1e-5) and norm > 1e-3, flags


# Runs


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


@pytest.mark.parametrize("interface", ["paper", "bytes", "sft"])
def test_a_resumed_run_equals_an_undisturbed_one(files: Path, tmp_path: Path, interface: str) -> None:
    flags = ("--simct-interface", interface)
    _train(tmp_path / "once", files, 4, *flags)
    _train(tmp_path / "twice", files, 2, *flags)
    _train(tmp_path / "twice", files, 4, *flags)
    assert_same_run(tmp_path / "twice", tmp_path / "once")
    steps = [row for row in metrics(tmp_path / "once") if row["kind"] == "step"]
    assert len(steps) == 4 and all(row["turns"] > 1 for row in steps)
    assert all(0 < row["between_turns"] < 1 and row["masked_too_long"] == 0 for row in steps)
    assert all("student_entropy" not in row for row in steps)  # nothing was sampled


def test_what_has_no_meaning_is_refused(files: Path) -> None:
    cases = [
        (("--simct-interface", "scalar"), "--simct-on given: not with --simct-interface scalar"),
        (("--given-share", "0.5"), "--simct-on given: not with --given-share"),
        (("--reference-kl-weight", "0.5"), "--simct-on given: not with --reference-kl-weight"),
        (("--rollout-importance-weights", "2"), "--simct-on given: not with --rollout-importance-weights"),
    ]
    for flags, words in cases:
        with pytest.raises(ValueError, match=words):
            config(files, *flags).check(data_parallel_size=1)


def test_the_run_file_of_the_example_runs(files: Path, tmp_path: Path) -> None:
    """On small models, two steps."""
    example = Path(__file__).parents[2] / "examples" / "transcripts"
    values = {
        "hf_checkpoint": files / "student",
        "teacher_hf_checkpoint": files / "teacher",
        "prompt_data": example / "calculator.jsonl",
        "make_vocab_size_divisible_by": 8,
        "teacher_make_vocab_size_divisible_by": 4,
        "rollout_max_prompt_len": 128,
        "rollout_max_response_len": 128,
        "tensor_model_parallel_size": 1,
        "sequence_parallel": "false",
        "bf16": "false",
        "train_iters": 2,
    }
    overrides = [f"student.{key}={value}" for key, value in values.items()]
    overrides += [f"run_dir={tmp_path}", "cluster.student.gpus_per_node=0"]
    run_file = read_run_file(str(example / "train.yaml"), overrides)
    report = check_run(run_file)
    assert not report.failed, [f.message for f in report.findings if f.level == "fail"]
    module, *argv = command_of(run_file.student)[1:]
    assert module == "megatron_simct.train"
    ((code, out, error),) = run_ranks(1, run, argv)
    assert code == 0, error
    lines = (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert 2 < first["turns"] < 2.5 and first["masked_too_long"] > 0  # these models read 256 tokens

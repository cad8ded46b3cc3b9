"""Teachers whose rows are compared by other interfaces: the step by hand in float64, every layout, resuming,
what is refused.

L = 1 / N sum over rows of that row's loss, under the interface of its teacher; N: all labels of the step
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_simct.config.flags import parse_config
from megatron_simct.config.options import Config
from megatron_simct.config.run_file import read_run_file
from megatron_simct.job import build_job
from megatron_simct.launch.commands import command_of
from megatron_simct.loading import load_model, open_tokenizer
from megatron_simct.losses import check_comparisons, comparisons
from megatron_simct.models.build import HiddenStateModel
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.preflight.check import check_run
from megatron_simct.preflight.engines import check_engines
from megatron_simct.records import Prompt, Rollout
from megatron_simct.rollout.engine import GivenResponses
from tests.distributed import run_ranks
from tests.huggingface import save_byte_level, save_model
from tests.oracles import bytes as oracle
from tests.runs import assert_same_run, metrics, run
from tests.steps import scores_of
from tests.teacher_jobs import TeacherJob
from tests.tiny import routed, rows_of_teachers

pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parents[2] / "examples" / "two_teachers" / "own_interface.yaml"
TEACHERS = ("same", "other", "same", "same", "same", "other", "same", "same")
"""The teachers of the rows in turn. Of two data-parallel ranks only one has rows of `other`."""


@pytest.fixture(scope="module")
def rows(tiny, tmp_path_factory) -> Path:
    return rows_of_teachers(tiny, tmp_path_factory.mktemp("rows") / "rows.jsonl", TEACHERS)


@pytest.fixture(scope="module")
def teachers(tiny, tmp_path_factory) -> dict[str, Any]:
    """A model of the student's tokenizer that is compared by `kd`, forward; and one of another tokenizer that
    takes the run's interface, `bytes`."""
    same, other = tmp_path_factory.mktemp("same"), tmp_path_factory.mktemp("other")
    save_model(same, "llama", vocab_size=360, hidden_size=48, scale=0.3)
    save_model(other, "llama", vocab_size=320, hidden_size=48)
    save_byte_level(other)
    return {
        "same": {
            "hf_checkpoint": str(same),
            "tokenizer_model": str(tiny / "student.model"),
            "make_vocab_size_divisible_by": 8,
            "simct_interface": "kd",
            "simct_divergence": "forward_kl",
        },
        "other": {"hf_checkpoint": str(other)},
    }


def _step(rank: int, world_size: int, argv: list[str], with_oracle: bool) -> tuple[Any, ...]:
    """The sums, the gradient norm, and in one process the gradient and both by hand."""
    resolved = parse_config(argv)
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        student = job.updater.model
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1.2)
        before = {name: value.detach().double() for name, value in student.named_parameters()}
        tokenizer = open_tokenizer(resolved.model, prefix="")
        asked = job.prompts.batch(0)
        rollouts = GivenResponses(tokenizer).generate(asked, job.sampling)  # as if they had been sampled
        by_hand = None
        if with_oracle:
            own = load_model(resolved, resolved.model, groups, tokenizer, prefix="").double()
            own.load_state_dict(before, strict=False)
            by_hand = _by_hand(resolved, groups, own, asked, rollouts)
        pairs = [job.align(prompt, rollout) for prompt, rollout in zip(asked, rollouts, strict=True)]
        batches = job.pack(asked, rollouts, pairs, scores_of(job.teacher, pairs))
        report = job.updater.step(batches)
        after = {name: value.detach().double() for name, value in student.named_parameters()}
        gradient = {name: before[name] - after[name] for name in before} if world_size == 1 else None
        return report.sums, report.grad_norm, gradient, by_hand


def _by_hand(
    resolved: Config,
    groups: Any,
    student: HiddenStateModel,
    asked: Sequence[Prompt],
    rollouts: Sequence[Rollout],
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Sums by teacher, and the gradient of their total over the number of labels: KL(teacher || student) of
    every label of `same`, and the loss of bytes of every response of `other`."""
    tokenizers = {"": open_tokenizer(resolved.model, prefix="")}
    models = {"": student}
    for one in resolved.teachers:
        tokenizers[one.name] = open_tokenizer(one.model, prefix=one.prefix)
        loaded = load_model(resolved, one.model, groups, tokenizers[one.name], prefix=one.prefix)
        models[one.name] = loaded.double()

    def logits(name: str, prompt_ids: np.ndarray, labels: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(np.concatenate([prompt_ids, labels]).astype(np.int64))[None]
        hidden = models[name](ids, torch.arange(ids.shape[1])[None], None)[:, 0]
        return (hidden @ models[name].output_weight.T)[
            len(prompt_ids) - 1 : -1, : tokenizers[name].table.num_ids
        ]

    def side(name: str, prompt_ids: np.ndarray, labels: np.ndarray) -> oracle.Side:
        table = tokenizers[name].table
        of_labels = [int(label) for label in labels]
        return oracle.Side(table.pieces(), list(table.stop_ids), logits(name, prompt_ids, labels), of_labels)

    sums, counts = {}, {}
    for prompt, rollout in zip(asked, rollouts, strict=True):
        name, ids = prompt.teacher, rollout.student_ids
        if name == "same":
            own = torch.log_softmax(logits("", prompt.student_ids, ids), dim=1)
            target = torch.log_softmax(logits(name, prompt.teacher_ids, ids), dim=1).detach()
            value = (target.exp() * (target - own)).sum()
        else:
            text = tokenizers[""].decode(ids[:-1])
            its_labels = np.append(tokenizers[name].encode(text), tokenizers[name].table.stop_ids[:1])
            value, _ = oracle.loss(
                side("", prompt.student_ids, ids), side(name, prompt.teacher_ids, its_labels)
            )
        sums[name] = sums.get(name, 0) + value
        counts[name] = counts.get(name, 0) + len(ids)
    student.zero_grad()
    (sum(sums.values()) / sum(counts.values())).backward()
    found = {f"loss/{name}": float(value.detach()) for name, value in sums.items()}
    found |= {f"num_labels/{name}": float(count) for name, count in counts.items()}
    return found, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


SGD = (
    *("--micro-batch-size", "1", "--rollout-max-response-len", "24", "--no-rollout-shuffle"),
    *("--optimizer", "sgd", "--lr", "1", "--clip-grad", "0", "--lr-decay-style", "constant"),
)


@pytest.fixture(scope="module")
def argv(tiny, weights, rows, teachers) -> list[str]:
    return routed(tiny, rows, teachers, *weights[:2], "--simct-interface", "bytes", *SGD)


@pytest.fixture(scope="module")
def one_process(argv) -> tuple[Any, ...]:
    return run_ranks(1, _step, argv, True)[0]


def test_each_row_has_the_loss_of_its_teachers_interface(one_process) -> None:
    sums, grad_norm, gradient, (expected, expected_gradient) = one_process
    for name, value in expected.items():
        assert sums[name] == pytest.approx(value, rel=1e-5) and value > 1
    assert sums["loss"] == pytest.approx(sums["loss/same"] + sums["loss/other"], rel=1e-6)
    assert sums["num_labels"] == expected["num_labels/same"] + expected["num_labels/other"]
    norm = float(torch.sqrt(sum(value.square().sum() for value in expected_gradient.values())))
    assert grad_norm == pytest.approx(norm, rel=1e-5)
    for name, value in expected_gradient.items():
        # Weights of at most 2 are rounded by 1.2e-7 in the update.
        torch.testing.assert_close(gradient[name], value, rtol=0, atol=3e-6 * max(1, norm), msg=name)


LAYOUTS = {
    "larger": (1, ("--micro-batch-size", "4")),
    "packed": (1, ("--max-tokens-per-gpu", "100")),
    "TP2": (2, ("--tensor-model-parallel-size", "2")),
    "PP2": (2, ("--pipeline-model-parallel-size", "2")),
    "DP2": (2, ()),
    "CP2": (2, ("--context-parallel-size", "2", "--max-tokens-per-gpu", "60")),
}


def _same_in(layout: str, argv: list[str], sums: dict[str, float], grad_norm: float) -> None:
    ranks, flags = LAYOUTS[layout]
    for its, norm, *_ in run_ranks(ranks, _step, [*argv, *flags], False):
        assert its.keys() == sums.keys()
        for name in its:  # of single rows the largest, and what both models find equally likely
            if name not in ("rollout_gap_largest", "rows_same_top"):
                assert its[name] == pytest.approx(sums[name], rel=1e-5, abs=1e-4), name
        assert norm == pytest.approx(grad_norm, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_takes_the_same_step(argv, one_process, layout) -> None:
    _same_in(layout, argv, *one_process[:2])


@pytest.fixture(scope="module")
def other_needs(teachers) -> dict[str, Any]:
    """`paper` reads hidden states of its teacher, `partition` likeliest tokens and their ids."""
    return {
        "same": teachers["same"] | {"simct_interface": "paper", "simct_divergence": "reverse_kl"},
        "other": teachers["other"] | {"simct_interface": "partition", "simct_teacher_topk": 8},
    }


@pytest.fixture(scope="module")
def with_other_needs(tiny, weights, rows, other_needs) -> tuple[Any, ...]:
    return run_ranks(1, _step, routed(tiny, rows, other_needs, *weights[:2], *SGD), False)[0]


@pytest.mark.parametrize("name", ["same", "other"])
def test_each_teachers_rows_have_the_loss_that_they_have_alone(
    tiny, weights, rows, teachers, other_needs, with_other_needs, name
) -> None:
    """As an interface of the whole run, and another one beside it."""
    entry = {key: value for key, value in teachers[name].items() if not key.startswith("simct_")}
    flags = ["--simct-interface", other_needs[name]["simct_interface"]]
    flags += ["--simct-teacher-topk", "8"] if name == "other" else []
    argv = routed(tiny, rows, teachers | {name: entry}, *weights[:2], *flags, *SGD)
    its, *_ = run_ranks(1, _step, argv, False)[0]
    assert its[f"loss/{name}"] == pytest.approx(with_other_needs[0][f"loss/{name}"], rel=1e-6)
    assert its[f"loss/{name}"] > 1


@pytest.mark.parametrize("layout", ["TP2", "PP2", "DP2"])
def test_every_layout_with_other_needs(tiny, weights, rows, other_needs, with_other_needs, layout) -> None:
    argv = routed(tiny, rows, other_needs, *weights[:2], *SGD)
    _same_in(layout, argv, *with_other_needs[:2])


# Whole runs


def _train(folder: Path, argv: Sequence[str], iterations: int, ranks: int = 1) -> tuple[int, str, str]:
    saved = ("--save", str(folder / "save"), "--load", str(folder / "save"), "--run-dir", str(folder / "run"))
    steps = ("--train-iters", str(iterations), "--lr-decay-style", "constant", "--lr", "1e-2")
    code, out, error = run_ranks(ranks, run, [*argv, *saved, *steps])[0]
    return code, out, error


def test_a_resumed_run_equals_an_undisturbed_one(tiny, weights, rows, teachers, tmp_path) -> None:
    terms = ("--given-share", "0.25", "--reference-kl-weight", "0.1", "--simct-interface", "bytes")

    def argv(changed: dict[str, Any]) -> list[str]:
        return routed(tiny, rows, changed, *weights[:2], *terms)

    code, out, error = _train(tmp_path / "once", argv(teachers), 4)
    assert code == 0, error
    assert " interface of same: kd" in out and " interface of other: bytes; known failure:" in out
    for iterations in (2, 4):
        assert _train(tmp_path / "twice", argv(teachers), iterations)[0] == 0
    assert_same_run(tmp_path / "twice", tmp_path / "once")
    both = [row for row in metrics(tmp_path / "once") if "loss/other" in row]
    # What each interface measures is there, of the rows of its teachers.
    assert both and all({"loss_bytes", "loss_one_to_one", "loss/same"} <= row.keys() for row in both)
    for changed in ({"simct_interface": "paper"}, {"simct_interface": "bytes"}):
        changed = teachers | {"same": teachers["same"] | changed}
        code, _, error = _train(tmp_path / "twice", argv(changed), 6)
        assert code == 1 and "--teachers" in error and "is not that of" in error
    exact = teachers | {"other": teachers["other"] | {"simct_interface": "exact"}}
    paper = teachers | {"other": teachers["other"] | {"simct_interface": "paper"}}
    assert _train(tmp_path / "third", argv(exact), 1)[0] == 1, "no teacher takes --simct-interface bytes"
    terms = terms[:4]
    assert _train(tmp_path / "third", argv(exact), 1)[0] == 0
    code, _, error = _train(tmp_path / "third", argv(paper), 2)
    words = "its interface is not that of --teachers and --simct-interface (other exact there, paper here)"
    assert code == 1 and words in error


def test_ranks_of_different_interfaces_train_together(tiny, weights, rows, teachers, tmp_path) -> None:
    """In each step one of two data-parallel ranks has rows of one interface only."""
    content = [json.loads(line) for line in rows.read_text().splitlines()]
    for number, row in enumerate(content):
        row["teacher"] = "other" if number % 2 else "same"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    argv = routed(tiny, path, teachers, *weights[:2], "--simct-interface", "bytes", "--no-rollout-shuffle")
    code, _, error = _train(tmp_path, argv, 2, ranks=2)
    assert code == 0, error
    steps = [row for row in metrics(tmp_path) if row["kind"] == "step"]
    for row in steps:
        assert row["samples/same"] == row["samples/other"] == 0.5
        assert row["loss_bytes"] > 0 and row["loss_one_to_one"] > 0


# What the entries say


def _resolved(files: Path, one: dict[str, Any], *flags: str, two: dict[str, Any] | None = None) -> Config:
    of = {"one": {"hf_checkpoint": "/one"} | one, "two": {"hf_checkpoint": "/two"} | (two or {})}
    resolved = parse_config(routed(files, files / "train.jsonl", of, *flags))
    resolved.check(data_parallel_size=1)
    check_comparisons(resolved)
    return resolved


def test_an_entry_replaces_what_the_run_says(tiny) -> None:
    flags = ("--simct-divergence", "js", "--simct-js-beta", "0.3", "--simct-loss-memory-mib", "7")
    flags += ("--simct-interface", "bytes", "--simct-byte-bounds", "any")
    two = {"simct_js_beta": 0.2}
    found = comparisons(_resolved(tiny, {"simct_interface": "kd"}, *flags, two=two))
    kd, by_bytes = found["one"], found["two"]
    # Each takes of the run what its interface reads, and the memory is that of the ranks.
    assert (kd.interface, kd.divergence, kd.js_beta, kd.byte_bounds) == ("kd", "js", 0.3, "longest-match")
    assert (by_bytes.interface, by_bytes.divergence, by_bytes.js_beta) == ("bytes", "js", 0.2)
    assert by_bytes.byte_bounds == "any" and kd.loss_memory_mib == by_bytes.loss_memory_mib == 7
    forward = {"simct_interface": "kd", "simct_divergence": "forward_kl"}
    found = comparisons(_resolved(tiny, forward, *flags))
    assert (found["one"].divergence, found["one"].js_beta) == ("forward_kl", 0.5)


@pytest.mark.parametrize(
    ("one", "flags", "words"),
    [
        ({"simct_interface": "sft"}, (), "--teachers one.simct_interface sft: uses no teacher"),
        ({"simct_interface": "reward"}, (), "--teachers one.simct_interface reward: uses no teacher"),
        ({"simct_interface": "byte"}, (), "--teachers one.simct_interface: 'byte' is none of paper, code"),
        ({"simct_loss_memory_mib": 8}, (), "--teachers one: unknown key 'simct_loss_memory_mib'"),
        ({"simct_js_beta": 2}, (), "--teachers one.simct_js_beta 2.0: must lie strictly between"),
        ({"simct_temperature": "hot"}, (), "--teachers one.simct_temperature: 'hot' is not a value of type"),
        (
            {"simct_interface": "kd", "simct_byte_bounds": "any"},
            (),
            "--teachers one: --simct-byte-bounds has no meaning with --simct-interface kd",
        ),
        (
            {"simct_interface": "bpm"},
            (),
            "--teachers one: --simct-divergence reverse_kl: the targets of interface bpm are 0",
        ),
        (
            {"simct_interface": "partition"},
            ("--context-parallel-size", "2"),
            "--teachers one: --context-parallel-size 2: --simct-interface partition",
        ),
        (
            {"simct_interface": "bytes"},
            ("--gradient-parts-interval", "1"),
            "--teachers one: --gradient-parts-interval: --simct-interface bytes has no loss of multi-token",
        ),
        (
            {"simct_interface": "scalar"},
            ("--rollout-importance-weights", "2"),
            "--rollout-importance-weights: --simct-interface scalar already has an importance ratio",
        ),
        (
            {"simct_interface": "scalar"},
            ("--simct-on", "given"),
            "--simct-on given: not with --simct-interface scalar",
        ),
        (
            {"simct_interface": "kd"},
            ("--simct-byte-bounds", "any"),
            "--simct-byte-bounds any: no teacher of --teachers is compared so; leave it out",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(tiny, one, flags, words) -> None:
    with pytest.raises(ValueError) as refused:
        _resolved(tiny, one, *flags)
    assert words in str(refused.value)


def test_what_no_teacher_takes_is_refused(tiny) -> None:
    own = {"simct_interface": "exact"}
    with pytest.raises(ValueError, match="--simct-interface bytes: no teacher of --teachers is compared so"):
        _resolved(tiny, own, "--simct-interface", "bytes", two=own)
    assert _resolved(tiny, own, two=own).interface_names == ("exact",)


def test_rows_do_not_mix_what_is_compared_in_other_ways(tiny, weights, rows, teachers, tmp_path) -> None:
    content = [json.loads(line) for line in rows.read_text().splitlines()]
    content[4] |= {"teacher": None, "teachers": {"same": 1, "other": 1}}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    places = {
        "one comparison": ({}, 0, ""),
        "kd": (teachers["same"], 1, "only --simct-interface bytes mixes teachers, not that of same"),
        "js": ({"simct_divergence": "js"}, 1, "--simct options of same and other differ"),
    }
    for changes, expected, words in places.values():
        entry = {key: value for key, value in teachers["same"].items() if not key.startswith("simct_")}
        argv = routed(tiny, path, teachers | {"same": entry | changes}, *weights[:2])
        argv += ["--simct-interface", "bytes", "--train-iters", "1"]
        ((code, _, error),) = run_ranks(1, run, argv)
        assert code == expected and words in error, error
        assert not expected or f"--prompt-data {path}, line 5" in error


def test_tokenizers_that_kd_cannot_compare_are_named(tiny, weights, rows, teachers) -> None:
    changed = teachers | {"other": teachers["other"] | {"simct_interface": "kd"}}
    ((code, _, error),) = run_ranks(1, run, routed(tiny, rows, changed, *weights[:2]))
    assert code == 1 and "--teachers other: tokenizers " in error and "are not the same" in error


def test_the_run_file_of_the_example_runs(tiny, weights, rows, teachers, tmp_path) -> None:
    """On the tiny models, two steps, with its teachers' jobs."""
    names = {"same": "additions", "other": "subtractions"}
    content = [json.loads(line) for line in rows.read_text().splitlines()]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row | {"teacher": names[row["teacher"]]}) + "\n" for row in content))
    options: dict[str, dict[str, Any]] = {
        "student": {
            "hf_checkpoint": tiny / "student",
            "tokenizer_model": tiny / "student.model",
            "pretrained_checkpoint": dict(zip(weights[::2], weights[1::2], strict=True))[
                "--pretrained-checkpoint"
            ],
            "prompt_data": path,
            "eval_prompt_data": tiny / "held_out.jsonl",
            "make_vocab_size_divisible_by": 8,
            "train_iters": 2,
        },
        "additions": {
            "teacher_hf_checkpoint": teachers["same"]["hf_checkpoint"],
            "teacher_tokenizer_model": tiny / "student.model",
            "teacher_pretrained_checkpoint": "null",
            "teacher_make_vocab_size_divisible_by": 8,
        },
        "subtractions": {
            "teacher_hf_checkpoint": teachers["other"]["hf_checkpoint"],
            "teacher_tokenizer_model": teachers["other"]["hf_checkpoint"],
            "teacher_pretrained_checkpoint": "null",
        },
    }
    overrides = [
        f"jobs.{job}.options.{key}={value}" for job, of in options.items() for key, value in of.items()
    ]
    run_file = read_run_file(str(EXAMPLE), [*overrides, f"run_dir={tmp_path / 'run'}"])
    report = check_run(run_file)
    assert not report.failed, [f.message for f in report.findings if f.level == "fail"]
    said = {(f.side, f.check): f.message for f in report.findings}
    assert said["additions", "interface"].startswith("kd") and said["subtractions", "interface"] == "bytes"
    # `kd` reads the teacher's hidden states, `bytes` sums of its own: another amount of traffic each.
    assert said["additions", "traffic"] != said["subtractions", "traffic"]
    # Only the head of `additions` is held on the student's ranks.
    bytes_alone = read_run_file(
        str(EXAMPLE),
        [
            *(*overrides, f"run_dir={tmp_path / 'run'}"),
            "jobs.student.options.teachers.additions.simct_interface=bytes",
        ],
    )
    held = [check_run(one).plans["student"].held for one in (run_file, bytes_alone)]
    assert sum(held[0].values()) > sum(held[1].values())
    with contextlib.ExitStack() as jobs:
        for job in run_file.of_kind("teacher"):
            module, *its_flags = command_of(job)[1:]
            assert module == "megatron_simct.serve_teacher"
            jobs.enter_context(TeacherJob(tiny, (), tmp_path / "run" / job.name, *its_flags))
        ((code, out, error),) = run_ranks(1, run, command_of(run_file.student)[2:])
    assert code == 0, out + error
    assert " interface of additions: kd" in out and "loss/subtractions: " in out


def test_servers_of_log_probabilities_are_checked_for_their_teachers_interface(tmp_path) -> None:
    """A server that returns no hidden states cannot serve `kd`, whatever the run's interface is."""
    for own, level in ({"simct_interface": "kd"}, "fail"), ({}, "pass"):
        values = yaml.safe_load(EXAMPLE.read_text())
        student, additions, _ = values["jobs"]
        student["options"] |= {"teachers": {"additions": own, "subtractions": {}}, "simct_interface": "alm"}
        additions["options"] |= {
            "engine_endpoint": ["http://127.0.0.1:1"],
            "engine_answers": "prompt_logprobs",
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        found = check_engines(read_run_file(str(path)), None)
        assert [f.level for f in found if f.side == "additions" and f.check == "interface"] == [level], found

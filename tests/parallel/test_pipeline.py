"""Pipeline stages and sequence parallelism: the same steps and the same text as one process,
from the same weights.

Both ways of tying are tested: the student's embedding is tied and the teacher's is not, and
the other way round.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_simct.alignment import load_tokenizer
from megatron_simct.config.options import Config
from megatron_simct.job import build_job
from megatron_simct.loading import load_model
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.records import Prompt, Rollout
from megatron_simct.rollout import megatron_engine
from megatron_simct.rollout.decoder import Decoder
from megatron_simct.rollout.engine import Sampling
from megatron_simct.rollout.megatron_engine import MegatronEngine
from megatron_simct.train import main, train
from megatron_simct.update.checkpoint import TRACKER, load_weights, save_weights
from megatron_simct.update.step import NonFiniteError, StepReport
from tests.distributed import run_ranks
from tests.steps import scores_of
from tests.tiny import command_line, config
from tests.weights import random_weights

TP2, PP2 = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
SEQUENCE, INTERLEAVED = ("--sequence-parallel",), ("--num-virtual-stages-per-pipeline-rank", "2")
PACKED = ("--max-tokens-per-gpu", "150")
LAYOUTS = {
    "pp2": (2, PP2),
    "pp3, uneven": (3, ("--pipeline-model-parallel-size", "3")),
    "pp4": (4, ("--pipeline-model-parallel-size", "4")),
    "tp2 x pp2": (4, TP2 + PP2),
    "pp2 x dp2": (4, PP2),
    "tp2, sequence": (2, TP2 + SEQUENCE),
    "tp2 x pp2, sequence": (4, TP2 + PP2 + SEQUENCE),
    "pp2, interleaved": (2, PP2 + INTERLEAVED),
    "pp2, interleaved, packed": (2, PP2 + INTERLEAVED + PACKED),
    "tp2 x pp2, interleaved, sequence": (4, TP2 + PP2 + INTERLEAVED + SEQUENCE),
}
INTERFACES = ("paper", "strict", "sft")
TIED = ("student tied", "teacher tied")


@pytest.fixture(scope="module", params=TIED)
def files(request, tiny, tmp_path_factory) -> Path:
    """A complete job, and the checkpoints from which every layout starts."""
    folder = tmp_path_factory.mktemp("files") / "job"
    shutil.copytree(tiny, folder)
    for side in ("student", "teacher"):
        path = folder / side / "config.json"
        fields = json.loads(path.read_text())
        fields |= {"tie_word_embeddings": request.param == f"{side} tied", "num_hidden_layers": 4}
        path.write_text(json.dumps(fields))
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):  # prompts of many lengths
        row["prompt"] = "Nora has more shells. " * (i % 5) + row["prompt"]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    random_weights(folder, folder / "weights")
    return folder


def weight_flags(folder) -> tuple[str, ...]:
    return (
        *("--pretrained-checkpoint", str(folder / "weights" / "student")),
        *("--teacher-pretrained-checkpoint", str(folder / "weights" / "teacher")),
        # Adam's first step is the sign of the gradient, also of a gradient that is rounding noise,
        # unless eps is larger.
        *("--adam-eps", "1e-4"),
    )


def job_config(folder, *flags) -> Config:
    return config(folder, *weight_flags(folder), *flags)


def replicated_parameters(model) -> dict[str, torch.Tensor]:
    """The parameters that tensor parallelism does not split (the norms), under names that do not
    depend on the stage.
    """
    first = model.decoder.layers[0].layer_number - 1
    found = {}
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parts = name.split(".")
            if parts[1] == "layers":
                parts[2] = str(first + int(parts[2]))
            found[".".join(parts)] = parameter.detach().clone()
    return found


def _run(
    rank, world_size, folder, *flags
) -> tuple[list[Any], dict[str, torch.Tensor], tuple[int, torch.Tensor] | None]:
    """Every step's report, then the norms' weights, and both ends of a tied embedding."""
    resolved = job_config(folder, *flags)
    reports = []
    with process_groups(resolved.parallel, seed=resolved.training.seed) as groups:
        job = build_job(resolved, groups)
        step = job.updater.step
        widths = set()

        def recording_step(batches) -> StepReport:
            widths.update(batch.sequences.tokens.shape[1] for batch in batches)
            reports.append(step(batches))
            return reports[-1]

        job.updater.step = recording_step
        train(job)
        chunks = [ddp.module for ddp in job.updater._chunks]
        assert len(widths) > 2, "micro-batches of one length only"
        shared, norms = None, {}
        for chunk in chunks:
            norms |= replicated_parameters(chunk)
            if chunk.share_embeddings_and_output_weights and (chunk.pre_process or chunk.post_process):
                shared = groups.tp_rank, chunk.shared_embedding_or_output_weight().detach().clone()
        return [(r.sums, r.grad_norm, r.learning_rate) for r in reports], norms, shared


@pytest.fixture(scope="module")
def recorded(files, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """One process samples, trains, and leaves its rollouts."""
    rollouts = tmp_path_factory.mktemp("rollouts")
    return rollouts, {
        interface: run_ranks(
            1,
            _run,
            files,
            "--simct-interface",
            interface,
            "--save-debug-rollout-data",
            str(rollouts / interface),
        )[0]
        for interface in INTERFACES
    }


@pytest.mark.parametrize(
    "files, layout, interface",
    # Each layout with each interface. The ways of tying alternate, so that each layout and each
    # interface meets both.
    [
        (TIED[(i + j) % 2], layout, interface)
        for i, layout in enumerate(LAYOUTS)
        for j, interface in enumerate(INTERFACES)
    ],
    indirect=["files"],
)
def test_layouts_agree_with_one_process(files, recorded, layout, interface) -> None:
    rollouts, expected = recorded
    world_size, flags = LAYOUTS[layout]
    load = ("--load-debug-rollout-data", str(rollouts / interface))
    results = run_ranks(world_size, _run, files, "--simct-interface", interface, *load, *flags)
    reference_steps, reference_norms, _ = expected[interface]
    assert len(reference_steps) == 2 and len(reference_norms) == 9
    seen, copies = set(), {}
    for steps, norms, shared in results:
        for (sums, grad_norm, lr), (wanted, wanted_norm, wanted_lr) in zip(
            steps, reference_steps, strict=True
        ):
            assert sums.keys() == wanted.keys()
            assert wanted["loss"] > 0.1 and wanted_norm > 0.01
            for name, value in wanted.items():
                # Sampling and training differ by rounding: some 1e-5 at each of a hundred labels.
                least = 1e-3 if name.startswith("rollout_gap") else 1e-4
                assert math.isclose(sums[name], value, rel_tol=1e-5, abs_tol=least), name
            assert math.isclose(sums["loss"], wanted["loss"], rel_tol=1e-5)
            assert math.isclose(grad_norm, wanted_norm, rel_tol=1e-5)
            assert lr == wanted_lr
        for name, weight in norms.items():
            torch.testing.assert_close(weight, reference_norms[name], rtol=1e-5, atol=1e-6)
        seen |= norms.keys()
        if shared is not None:
            copies.setdefault(shared[0], []).append(shared[1])
    assert seen == reference_norms.keys()
    for tied in copies.values():
        assert all(torch.equal(copy, tied[0]) for copy in tied), (
            "the two ends of a tied embedding drifted apart"
        )


# Gradients that are summed during the backward pass

THREE_MICRO_BATCHES = ("--simct-interface", "paper", "--rollout-batch-size", "12")
OVERLAPPED = {
    "dp2": (2, ()),
    "pp2 x dp2": (4, PP2),
    "tp2 x dp2, sequence": (4, TP2 + SEQUENCE),
    "pp2 x dp2, interleaved": (4, (*PP2, *INTERLEAVED, "--micro-batch-size", "3")),
}


def _run_counting_buckets(rank, world_size, folder, *flags) -> tuple[Any, ...]:
    """`_run`, and the number of reductions that began in a backward pass, before Megatron waits for them."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup

    counts = {"early": 0, "late": 0}
    start, finish = BucketGroup.start_grad_sync, DistributedDataParallel.finish_grad_sync

    def counting_start(group, **kwargs) -> None:
        counts["late" if counts.get("finishing") else "early"] += 1
        start(group, **kwargs)

    def marked_finish(ddp, *args, **kwargs) -> None:
        counts["finishing"] = True
        finish(ddp, *args, **kwargs)
        counts["finishing"] = False

    BucketGroup.start_grad_sync, DistributedDataParallel.finish_grad_sync = counting_start, marked_finish
    return *_run(rank, world_size, folder, *flags), counts


@pytest.fixture(scope="module")
def recorded_at_length(files, tmp_path_factory) -> tuple[str, Any]:
    """One process samples three micro-batches a step, trains, and leaves its rollouts."""
    rollouts = str(tmp_path_factory.mktemp("three_micro_batches"))
    return rollouts, run_ranks(1, _run, files, *THREE_MICRO_BATCHES, "--save-debug-rollout-data", rollouts)[0]


@pytest.mark.parametrize("layout", OVERLAPPED)
def test_overlapped_reduction_changes_nothing(files, recorded_at_length, layout) -> None:
    """Three micro-batches a rank, small buckets, and a head whose gradient is in main_grad before the
    backward pass begins.
    """
    world_size, flags = OVERLAPPED[layout]
    rollouts, (expected, expected_norms, _) = recorded_at_length
    overlap = ("--overlap-grad-reduce", "--ddp-bucket-size", "4000")
    results = run_ranks(
        world_size, _run_counting_buckets, files, *THREE_MICRO_BATCHES, *overlap, *flags,
        *("--load-debug-rollout-data", rollouts),
    )  # fmt: skip
    for steps, norms, _, counts in results:
        # Megatron learns in the first step which gradients a bucket waits for, and overlaps from
        # the second step on.
        assert counts["early"] == counts["late"] > 0
        for (sums, grad_norm, _), (wanted, wanted_norm, _) in zip(steps, expected, strict=True):
            assert math.isclose(sums["loss"], wanted["loss"], rel_tol=1e-5)
            assert math.isclose(grad_norm, wanted_norm, rel_tol=1e-5)
        for name, weight in norms.items():
            torch.testing.assert_close(weight, expected_norms[name], rtol=1e-5, atol=1e-6)


# A whole run


def _command(rank, world_size, argv) -> int:
    return main(argv)


def test_a_whole_run_logs_what_one_process_logs(files, tmp_path) -> None:
    """Sampling, evaluation, training and saving by the command. The first rank, on the
    first stage, writes.
    """
    logs = {}
    for name, (world_size, flags) in {
        "one": (1, ()),
        "stages": (4, TP2 + PP2 + INTERLEAVED + SEQUENCE),
    }.items():
        argv = [
            *command_line(files, *weight_flags(files), *flags),
            *("--eval-prompt-data", str(files / "held_out.jsonl"), "--eval-interval", "1"),
            *("--run-dir", str(tmp_path / name), "--save", str(tmp_path / name / "save")),
        ]
        assert run_ranks(world_size, _command, argv) == [0] * world_size
        logs[name] = [
            json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        assert (tmp_path / name / "save" / TRACKER).read_text() == "2"
    assert [line["kind"] for line in logs["one"]] == [
        "evaluation",
        "step",
        "evaluation",
        "step",
        "evaluation",
    ]
    for found, wanted in zip(logs["stages"], logs["one"], strict=True):
        assert found.keys() == wanted.keys()
        assert found["kind"] == wanted["kind"]
        for name, value in wanted.items():
            if name.startswith("rollout_logprob"):  # rounding
                assert found[name] < 1e-4
            elif name != "kind" and "second" not in name and "memory" not in name:
                assert found[name] == pytest.approx(value, rel=1e-4), name


def _step_with_a_nan(rank, world_size, folder, stage, *flags) -> tuple[str, bool]:
    """The error of a step when a layer of one stage holds a nan, and whether any weight moved."""
    resolved = job_config(folder, *flags)
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        prompts = job.prompts.batch(0)
        rollouts = job.engine.generate(prompts, job.sampling)
        pairs = [job.align(prompt, rollout) for prompt, rollout in zip(prompts, rollouts, strict=True)]
        batches = job.pack(prompts, rollouts, pairs, scores_of(job.teacher, pairs))
        parameters = [p for ddp in job.updater._chunks for p in ddp.module.parameters()]
        if groups.pp.rank() == stage:
            with torch.no_grad():
                job.updater.model.decoder.layers[-1].mlp.linear_fc2.weight[0, 0] = math.nan
        before = [p.detach().clone() for p in parameters]
        with pytest.raises(NonFiniteError) as error:
            job.updater.step(batches)
        same = all(
            torch.equal(a.nan_to_num(), p.nan_to_num()) for a, p in zip(before, parameters, strict=True)
        )
        return str(error.value), same


@pytest.mark.parametrize("stage", [0, 1])
def test_a_bad_number_on_one_stage_stops_all(files, stage) -> None:
    for message, same in run_ranks(2, _step_with_a_nan, files, stage, *PP2):
        assert "loss sum nan over 96 labels" in message and "stopped before the optimizer step" in message
        assert same


# Generation

EMPTY = np.zeros(0, np.int32)
RNG = np.random.default_rng(0)
PROMPTS = [
    Prompt(sample_id=i, student_ids=RNG.integers(3, 350, n).astype(np.int32), teacher_ids=EMPTY)
    for i, n in enumerate([5, 12, 1, 8, 17])
]


SAMPLES = [replace(prompt, sample_id=100 * (i + 1) + j) for i, prompt in enumerate(PROMPTS) for j in range(3)]
CALLS = [(PROMPTS, 2), (PROMPTS[:1], 8), (PROMPTS[:3], 8), (SAMPLES, 7), (SAMPLES, 1)]
"""Prompts, and how many sequences are decoded at a time."""
STOPS = (7, 11, *range(0, 360, 24))


def _generate(rank, world_size, folder, flags) -> list[Rollout]:
    """Greedy and sampled rollouts of all calls, some of which end early."""
    resolved = job_config(folder, *flags)
    with process_groups(resolved.parallel, seed=1) as groups:
        student = load_tokenizer(resolved.model.tokenizer_model)
        model = load_model(resolved, resolved.model, groups, student, prefix="")
        rollouts = []
        for (prompts, batch_size), temperature in product(CALLS, (0.0, 1.0)):
            engine = MegatronEngine(model, groups, vocab_size=360, stop_ids=STOPS, batch_size=batch_size)
            sampling = Sampling(temperature=temperature, top_p=0.9, max_response_len=10, seed=1)
            rollouts += engine.generate(prompts, sampling)
        assert model.config.sequence_parallel is resolved.parallel.sequence_parallel, "put back"
        return rollouts


@pytest.mark.parametrize(
    "files, layouts",
    [("student tied", list(LAYOUTS)[::2]), ("teacher tied", list(LAYOUTS)[1::2])],
    indirect=["files"],
)
def test_every_layout_generates_the_same_tokens(files, layouts) -> None:
    (expected,) = run_ranks(1, _generate, files, ())
    assert len({tuple(r.student_ids.tolist()) for r in expected}) > len(SAMPLES) + len(PROMPTS)
    assert {r.finish for r in expected} == {"stop", "length"}
    for world_size, flags in map(LAYOUTS.get, layouts):
        for rollouts in run_ranks(world_size, _generate, files, flags):
            for found, wanted in zip(rollouts, expected, strict=True):
                assert found.student_ids.tolist() == wanted.student_ids.tolist()
                assert (found.sample_id, found.finish) == (wanted.sample_id, wanted.finish)
                np.testing.assert_allclose(found.logprobs, wanted.logprobs, rtol=0, atol=1e-4)
                assert found.logprobs.dtype == np.float32 and found.student_ids.dtype == np.int32


def _schedule(rank, world_size, folder, flags, prompts, batch_size, stop_ids) -> list[str]:
    """What this rank does, in its order: "prompts" and "token" for a pass, "tick" at the end of each tick."""
    resolved = job_config(folder, *flags)
    done: list[str] = []
    with process_groups(resolved.parallel, seed=1) as groups, pytest.MonkeyPatch.context() as patch:
        student = load_tokenizer(resolved.model.tokenizer_model)
        model = load_model(resolved, resolved.model, groups, student, prefix="")

        def noted(owner, name, what) -> None:
            function = getattr(owner, name)
            patch.setattr(owner, name, lambda *args: (done.append(what), function(*args))[1])

        noted(Decoder, "prefill", "prompts")
        noted(Decoder, "decode", "token")
        noted(megatron_engine, "hand_on", "tick")
        engine = MegatronEngine(model, groups, vocab_size=360, stop_ids=stop_ids, batch_size=batch_size)
        sampling = Sampling(temperature=1.0, top_p=1.0, max_response_len=10, seed=1)
        engine.generate(prompts, sampling)
    return done


def _idle(schedule) -> list[bool]:
    """For each tick of a rank, from its first to its last pass, whether it has no pass."""
    passes = " ".join(schedule).split("tick")
    busy = [bool(one.strip()) for one in passes]
    assert all(len(one.split()) <= 1 for one in passes), "two passes in a tick"
    first, last = busy.index(True), len(busy) - busy[::-1].index(True)
    return [not one for one in busy[first:last]]


@pytest.mark.parametrize("files", ["student tied"], indirect=True)
@pytest.mark.parametrize(
    "stages, virtual, flags",
    [(2, 1, PP2), (4, 1, LAYOUTS["pp4"][1]), (2, 2, PP2 + INTERLEAVED)],
    ids=["pp2", "pp4", "pp2, interleaved"],
)
def test_stages_work_at_the_same_time(files, stages, virtual, flags) -> None:
    """A token needs all stages in turn, and each has a tick of another lane meanwhile: with as many sequences
    as stages none is idle. With fewer, each is idle for the lanes that have none."""
    same = [replace(PROMPTS[0], sample_id=i) for i in range(4)]
    for number in (1, stages // 2, stages):
        for schedule in run_ranks(stages, _schedule, files, flags, same[:number], 8, ()):
            idle = _idle(schedule)
            assert len(idle) - sum(idle) == number * virtual * 10, "a pass for each token of each lane"
            assert sum(idle) <= (stages - number) * virtual * 10
            assert sum(idle) >= (stages - number) * (virtual * 10 - 1), "the first and last ticks are passes"


@pytest.mark.parametrize("files", ["student tied"], indirect=True)
def test_no_stage_is_idle_while_prompts_wait(files) -> None:
    """15 sequences of many lengths in 5 rows."""
    for schedule in run_ranks(2, _schedule, files, PP2, SAMPLES, 5, STOPS):
        idle = _idle(schedule)
        passes = [one for one in schedule if one != "tick"]
        waited = len(passes) - passes[::-1].index("prompts")
        assert waited > 20 and not any(idle[:waited])


# Checkpoints


def _load_and_save(rank, world_size, folder, flags, source, target) -> dict[str, torch.Tensor]:
    """Load from one directory, save in another; this rank's weights in between."""
    resolved = config(folder, *flags)
    with process_groups(resolved.parallel, seed=3) as groups:
        student = load_tokenizer(resolved.model.tokenizer_model)
        model = load_model(resolved, resolved.model, groups, student, prefix="")
        load_weights(model, str(source), flag="--load-it")
        if target is not None:
            save_weights(model, str(target), 2)
        return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("flags", [TP2 + PP2, TP2 + PP2 + INTERLEAVED], ids=["stages", "interleaved"])
def test_weights_go_through_pipeline_stages_and_back(files, tmp_path, flags) -> None:
    start = files / "weights" / "student"
    run_ranks(4, _load_and_save, files, flags, start, tmp_path / "stages")
    (expected,) = run_ranks(1, _load_and_save, files, (), start, None)
    (found,) = run_ranks(1, _load_and_save, files, (), tmp_path / "stages", None)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        real = slice(0, 360) if "embedding" in name or "output_layer" in name else slice(None)
        assert torch.equal(found[name][real], weight[real]), name


def _first_weights(rank, world_size, folder) -> torch.Tensor:
    """Weights of this stage's first layer, drawn at random."""
    resolved = config(folder, *PP2)
    with process_groups(resolved.parallel, seed=1) as groups:
        student = load_tokenizer(resolved.model.tokenizer_model)
        model = load_model(resolved, resolved.model, groups, student, prefix="")
        return model.decoder.layers[0].self_attention.linear_qkv.weight.detach()


def test_stages_draw_different_weights(tiny) -> None:
    first, second = run_ranks(2, _first_weights, tiny)
    assert first.std() > 0.1 and (first - second).std() > 0.1


# Refusals


def _refusal(rank, world_size, folder, *flags) -> str:
    resolved = job_config(folder, *flags)
    with (
        pytest.raises(ValueError) as error,
        process_groups(resolved.parallel, seed=1) as groups,
    ):
        build_job(resolved, groups)
    return str(error.value)


@pytest.mark.parametrize(
    "world_size, flags, words",
    [
        (3, PP2, ["world size (3)", "--pipeline-model-parallel-size (2)", "start 2 processes"]),
        (2, TP2 + PP2, ["world size (2)", "--tensor-model-parallel-size (2)", "(2) = 4; start 4 processes"]),
        (
            3,
            ("--pipeline-model-parallel-size", "3"),
            ["--pipeline-model-parallel-size 3 is more than num_layers (2)"],
        ),
        (1, ("--pipeline-model-parallel-size", "0"), ["--pipeline-model-parallel-size 0", "at least 1"]),
        (
            2,
            ("--expert-model-parallel-size", "2"),
            ["2: no experts in --hf-checkpoint", "--teacher-hf-checkpoint"],
        ),
        (
            3,
            ("--expert-model-parallel-size", "2"),
            ["--expert-model-parallel-size 2", "data-parallel size (3"],
        ),
        (
            1,
            ("--expert-tensor-parallel-size", "1"),
            ["--expert-tensor-parallel-size 1: no experts in --hf-checkpoint"],
        ),
        (1, ("--expert-model-parallel-size", "0"), ["--expert-model-parallel-size 0", "at least 1"]),
        (1, ("--tensor-model-parallel-size", "0"), ["--tensor-model-parallel-size 0", "at least 1"]),
        (2, PP2 + SEQUENCE, ["--sequence-parallel", "--tensor-model-parallel-size is 1"]),
        (1, INTERLEAVED, ["--num-virtual-stages-per-pipeline-rank 2", "--pipeline-model-parallel-size is 1"]),
        (
            2,
            PP2 + INTERLEAVED,
            ["2 x --num-virtual-stages-per-pipeline-rank 2 does not divide num_layers (2)"],
        ),
        (
            1,
            ("--num-virtual-stages-per-pipeline-rank", "0"),
            ["--num-virtual-stages-per-pipeline-rank 0", "at least"],
        ),
        (
            2,
            (*PP2, *INTERLEAVED, "--micro-batch-size", "8"),
            ["1 a step", "--pipeline-model-parallel-size (2)"],
        ),
    ],
)
def test_impossible_layouts_name_the_flag(tiny, world_size, flags, words) -> None:
    for message in run_ranks(world_size, _refusal, tiny, *flags):
        for word in words:
            assert word in message


def test_a_restart_that_would_wait_for_the_dead_is_refused(tiny, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for message in run_ranks(2, _refusal, tiny):
        assert "torchrun --max-restarts 2" in message and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in message

"""Steps with families that have norms in unusual places and soft-caps: the same in every layout. Soft-caps
reach the loss, the scorer and the sampler.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_simct.alignment import load_tokenizer
from megatron_simct.config.options import Config
from megatron_simct.job import build_job
from megatron_simct.models import families
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.records import AlignedPair, Prompt, Rollout, ScoredPair
from megatron_simct.update.step import StepReport
from tests.distributed import run_ranks
from tests.huggingface import save_model
from tests.steps import scores_of
from tests.tiny import config

pytest.importorskip("transformers")

SHAPE = {"num_hidden_layers": 4, "head_dim": 8, "vocab_size": 360, "scale": 0.2}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8} | {
    **{"linear_value_head_dim": 12, "layer_types": ["linear_attention", "full_attention"] * 2}
}
FAMILIES = {
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    "qwen3": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3_5_text": DELTA,
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
    },
}
# Each is a student whose gradient is compared with transformers'.
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 20, "n_routed_experts": 4, "n_shared_experts": 1}
OTHERS = {
    "glm4_moe": ROUTED | {"first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 20},
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "gemma3_text": {"sliding_window": 6, "num_hidden_layers": 6},
    "phi3": {"sliding_window": 6},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "qwen3_next": DELTA
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    | {"shared_expert_intermediate_size": 24},
    "solar_open": ROUTED | {"num_key_value_heads": 4},
    "dots1": ROUTED | {"first_k_dense_replace": 1, "sliding_window": 6, "max_window_layers": 2},
    "minimax_m2": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 20,
        "num_key_value_heads": 4,
    },
    "ernie4_5": {},
    "ministral3": {"sliding_window": 6},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 2.0},
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "dynamic", "alpha": 9.0, "factor": 1.0}},
    "olmo2": {"num_key_value_heads": 4},
    "olmo3": {"num_key_value_heads": 4, "sliding_window": 6},
    "exaone4": {"sliding_window": 6, "sliding_window_pattern": 2},
}
STUDENTS = (*FAMILIES, *OTHERS)
PAIRS = (("gemma2", "qwen3"), ("qwen3", "gemma2"))
TP2, PP2 = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
PACKED = ("--max-tokens-per-gpu", "114")
LAYOUTS = {
    "tp2": (2, TP2),
    "tp2, sequence": (2, (*TP2, "--sequence-parallel")),
    "tp4, more than groups": (4, ("--tensor-model-parallel-size", "4")),
    "pp2, interleaved": (2, (*PP2, "--num-virtual-stages-per-pipeline-rank", "2")),
    "packed": (1, PACKED),
    "tp2 x pp2, sequence": (4, (*TP2, *PP2, "--sequence-parallel")),
}

SEQUENCE, INTERLEAVED = ("--sequence-parallel",), ("--num-virtual-stages-per-pipeline-rank", "2")
EP2 = ("--expert-model-parallel-size", "2")
MOE_LAYOUTS = {
    "dp2": (2, ()),
    "ep2": (2, EP2),
    "ep2 x dp2": (4, EP2),
    "ep2, packed": (2, EP2 + PACKED),
    "ep4": (4, ("--expert-model-parallel-size", "4")),
    "tp2, sequence": (2, (*TP2, *SEQUENCE)),
    "tp2 x ep2, sequence": (4, (*TP2, *EP2, *SEQUENCE)),
    "pp2 x ep2": (4, (*PP2, *EP2)),
    "pp2 x ep2, interleaved": (4, (*PP2, *EP2, *INTERLEAVED)),
}


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory) -> Path:
    """The tiny job with a folder of weights for each family; the teacher has the student's tokenizer."""
    folder = tmp_path_factory.mktemp("families") / "job"
    shutil.copytree(tiny, folder)
    for family, fields in (FAMILIES | OTHERS).items():
        save_model(folder / family, family, **(SHAPE | fields), tie_word_embeddings=family == "gemma2")
    return folder


def _job_config(folder, student: str, teacher: str, *flags: str) -> Config:
    sides = ("--hf-checkpoint", str(folder / student), "--teacher-hf-checkpoint", str(folder / teacher))
    tokenizer = ("--teacher-tokenizer-model", str(folder / "student.model"))
    optimizer = ("--optimizer", "sgd", "--lr", "0.1", "--clip-grad", "0")
    return config(folder, *sides, *tokenizer, *optimizer, *flags)


def _batches(job) -> tuple[list[Rollout], list[AlignedPair], list[ScoredPair], list[Prompt]]:
    prompts = job.prompts.batch(0)
    rollouts = job.engine.generate(prompts, job.sampling)
    pairs = [job.align(prompt, rollout) for prompt, rollout in zip(prompts, rollouts, strict=True)]
    return rollouts, pairs, scores_of(job.teacher, pairs), prompts


def _steps(
    rank, world_size, folder, student, teacher, *flags
) -> list[tuple[float, float, dict[int, list[int]]]]:
    """Loss, gradient norm and this rank's texts by sample, of two steps."""
    resolved = _job_config(folder, student, teacher, *flags)
    reports = []
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        for _ in range(2):
            rollouts, pairs, scored, prompts = _batches(job)
            report = job.updater.step(job.pack(prompts, rollouts, pairs, scored))
            ids = {rollout.sample_id: rollout.student_ids.tolist() for rollout in rollouts}
            reports.append((report.sums["loss"], report.grad_norm, ids))
    return reports


@pytest.fixture(scope="module")
def alone(files) -> dict[tuple[str, str], list[Any]]:
    return {
        (student, teacher): run_ranks(1, _steps, files, student, teacher)[0]
        for student, teacher in (*PAIRS, ("qwen3_moe", "gemma2"), ("gemma2", "qwen3_moe"))
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("student, teacher", PAIRS)
def test_layouts_take_the_same_steps(files, alone, layout, student, teacher) -> None:
    world_size, flags = LAYOUTS[layout]
    for reports in run_ranks(world_size, _steps, files, student, teacher, *flags):
        assert_same_steps(reports, alone[student, teacher], rel=1e-4)


def test_a_student_with_a_gated_delta_net_takes_the_same_steps_in_every_layout(files) -> None:
    # The first gradient agrees to 5e-6; with the usual rate the second step would magnify that.
    job = (_steps, files, "qwen3_5_text", "qwen3", "--lr", "0.01")
    (expected,) = run_ranks(1, *job)
    for layout in ("tp2", "tp2 x pp2, sequence", "pp2, interleaved"):
        world_size, flags = LAYOUTS[layout]
        for reports in run_ranks(world_size, *job, *flags):
            assert_same_steps(reports, expected, rel=1e-4)


def assert_same_steps(reports, expected, *, rel) -> None:
    for (loss, norm, ids), (expected_loss, expected_norm, expected_ids) in zip(
        reports, expected, strict=True
    ):
        assert ids and all(expected_ids[sample_id] == found for sample_id, found in ids.items())
        assert loss == pytest.approx(expected_loss, rel=rel) and loss > 1
        assert norm == pytest.approx(expected_norm, rel=rel)


@pytest.mark.parametrize("layout", MOE_LAYOUTS)
def test_ranks_that_share_experts_take_the_same_steps(files, alone, layout) -> None:
    world_size, flags = MOE_LAYOUTS[layout]
    for reports in run_ranks(world_size, _steps, files, "qwen3_moe", "gemma2", *flags):
        assert_same_steps(reports, alone["qwen3_moe", "gemma2"], rel=1e-5)


@pytest.mark.parametrize("world_size, flags", [(2, EP2), (2, TP2)])
def test_only_the_teacher_has_experts(files, alone, world_size, flags) -> None:
    for reports in run_ranks(world_size, _steps, files, "gemma2", "qwen3_moe", *flags):
        assert_same_steps(reports, alone["gemma2", "qwen3_moe"], rel=1e-5)


def _refusal(rank, world_size, folder, *flags) -> str:
    resolved = _job_config(folder, "qwen3_moe", "gemma2", *flags)
    with process_groups(resolved.parallel, seed=1) as groups, pytest.raises(ValueError) as error:
        build_job(resolved, groups)
    return str(error.value)


@pytest.mark.parametrize(
    "world_size, flags, words",
    [
        (2, TP2, ["--tensor-model-parallel-size 2", "needs --sequence-parallel"]),
        (3, ("--expert-model-parallel-size", "3"), ["--expert-model-parallel-size 3", "num_experts (4)"]),
    ],
)
def test_layouts_that_experts_cannot_have_name_the_flag(files, world_size, flags, words) -> None:
    batch = ("--rollout-batch-size", "6", "--micro-batch-size", "1")
    for message in run_ranks(world_size, _refusal, files, *batch, *flags):
        assert all(word in message for word in words), message


def _own_teacher(rank, world_size, folder, family, interface) -> tuple[StepReport, list[Any]]:
    """The loss against itself of responses with the same tokens on both sides, and the
    teacher's log-probs.
    """
    resolved = _job_config(folder, family, family, "--simct-interface", interface)
    with process_groups(resolved.parallel, seed=1) as groups:
        job = build_job(resolved, groups)
        tokenizer = load_tokenizer(resolved.model.tokenizer_model)
        prompts = job.prompts.batch(0)
        texts = [f"Tom has {10 + i} apples and gets {i} more." for i in range(len(prompts))]
        rollouts = [
            Rollout(
                sample_id=prompt.sample_id,
                weight_version=0,
                student_ids=tokenizer.encode(text.encode()).astype(np.int32),
                logprobs=np.zeros(len(tokenizer.encode(text.encode())), np.float32),
                finish="length",
            )
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        pairs = [job.align(prompt, rollout) for prompt, rollout in zip(prompts, rollouts, strict=True)]
        scored = scores_of(job.teacher, pairs)
        report = job.updater.step(job.pack(prompts, rollouts, pairs, scored))
        by_id = {score.sample_id: (score.own_logit - score.lse).numpy() for score in scored}
        return report, [(pair.teacher_prompt_ids, pair.teacher_ids, by_id[pair.sample_id]) for pair in pairs]


@pytest.mark.parametrize("interface", ["paper", "bytes"])
def test_a_model_with_soft_caps_is_its_own_teacher(files, interface) -> None:
    """Loss and scorer agree. If one of them lacked the cap, they would not."""
    ((report, answers),) = run_ranks(1, _own_teacher, files, "gemma2", interface)
    assert abs(report.sums["loss"]) < 1e-5 * report.sums["num_labels"]
    model = transformers_model(files / "gemma2")
    for prompt, ids, logprobs in answers:
        np.testing.assert_allclose(
            logprobs, log_probs(model, prompt, ids).detach().numpy(), rtol=0, atol=1e-4
        )


def transformers_model(folder) -> torch.nn.Module:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(str(folder), attn_implementation="eager")


def log_probs(model, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """Log-prob of each token of the response."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
    rows = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(1, ids[len(prompt) :, None])[:, 0]


def _given_responses(rank, world_size, folder, *flags) -> list[tuple[StepReport, list[Any]]]:
    """The report of a step on given responses, and these responses, for each of STUDENTS."""
    answers = []
    for family in STUDENTS:
        sft = ("--simct-interface", "sft", "--rollout-max-response-len", "40", "--lr", "0")
        resolved = _job_config(folder, family, family, *sft, *flags)
        with process_groups(resolved.parallel, seed=1) as groups:
            job = build_job(resolved, groups)
            rollouts, pairs, scored, prompts = _batches(job)
            report = job.updater.step(job.pack(prompts, rollouts, pairs, scored))
            answers.append(
                (report, [(p.student_ids, r.student_ids) for p, r in zip(prompts, rollouts, strict=True)])
            )
    return answers


def test_the_loss_and_its_gradient_are_those_of_transformers(files) -> None:
    """Cross entropy of given responses, by autograd through transformers' own model. In one process every
    tensor's gradient is compared in tests/parity/test_families.py."""
    assert {name for name, family in families.FAMILIES.items() if not family.teacher_only} == set(STUDENTS)
    answers, *_ = run_ranks(2, _given_responses, files, *TP2, *SEQUENCE, timeout_s=300)
    for family, (report, sequences) in zip(STUDENTS, answers, strict=True):
        model = transformers_model(files / family)
        total = -sum(log_probs(model, prompt, response).sum() for prompt, response in sequences)
        count = sum(len(response) for _, response in sequences)
        (total / count).backward()
        norm = (
            sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
            ** 0.5
        )
        assert report.sums["num_labels"] == count
        assert report.sums["loss"] == pytest.approx(float(total.detach()), rel=1e-4), family
        assert report.grad_norm == pytest.approx(norm, rel=1e-3), family

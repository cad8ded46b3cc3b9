"""The normal command with families of several kinds of layers: a teacher with latent attention and experts,
and a student with a gated delta net, resumed and exported.
"""

from __future__ import annotations

import pytest

from megatron_simct.commands.convert_checkpoint import main as convert
from tests.distributed import run_ranks
from tests.huggingface import save_model
from tests.runs import run
from tests.tiny import command_line

pytest.importorskip("transformers")

TEACHER = {
    **{"num_hidden_layers": 3, "first_k_dense_replace": 1, "num_key_value_heads": 4, "n_routed_experts": 4},
    **{
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 20,
    },
    **{"q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8},
}
STUDENT = {
    **{"num_hidden_layers": 4, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 12},
}


def _convert(rank: int, world_size: int, argv: list[str]) -> int | None:
    return convert(argv)


def test_a_deepseek_teacher_and_a_qwen3_5_student(tiny, tmp_path) -> None:
    save_model(tmp_path / "teacher", "deepseek_v3", vocab_size=300, **TEACHER)
    save_model(tmp_path / "student", "qwen3_5_text", vocab_size=360, **STUDENT)
    command = command_line(
        tiny,
        *("--hf-checkpoint", str(tmp_path / "student"), "--teacher-hf-checkpoint", str(tmp_path / "teacher")),
        *("--save", str(tmp_path / "save"), "--load", str(tmp_path / "save"), "--simct-interface", "bytes"),
        *("--run-dir", str(tmp_path / "run"), "--lr-decay-style", "constant"),
    )
    tp2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--train-iters", "1")
    for world_size, flags in ((2, tp2), (1, ())):
        results = run_ranks(world_size, run, [*command, *flags])
        assert all(code == 0 for code, _, _ in results), results
    out = results[0][1]
    assert "resuming" in out and "iteration        2/       2" in out
    places = ("--load", str(tmp_path / "save"), "--hf-checkpoint", str(tmp_path / "student"))
    export = ["megatron-to-hf", *places, "--save", str(tmp_path / "export"), "--verify"]
    assert run_ranks(1, _convert, [*export, "--make-vocab-size-divisible-by", "8"]) == [0]

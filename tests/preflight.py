"""A small pair of models with everything that a run file names: real tokenizer files, chat
templates, weights.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.huggingface import save_byte_fallback, save_byte_level

ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def edit_json(path: Path, **changes: Any) -> None:
    """Set some keys to other values; None removes a key."""
    content = json.loads(path.read_text()) | changes
    write_json(path, {key: value for key, value in content.items() if value is not None})


def build_pair(folder: Path) -> None:
    """student/ and teacher/ with config, tokenizer, template and the name of a weight file; prompts.jsonl."""
    save_byte_level(folder / "student")
    save_byte_fallback(folder / "teacher")
    for side in ("student", "teacher"):
        write_json(folder / side / "config.json", ARCHITECTURE)
        (folder / side / "model.safetensors").touch()
    rows = [
        {"prompt": f"Tom has {i} apples and gets 7 more. How many?", "label": f"{i + 7}"} for i in range(20)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_values(folder: Path) -> dict[str, Any]:
    """A run file of that pair on a cluster of GPUs, for which the pre-flight only warns of random digits."""
    return {
        "run_dir": str(folder / "run"),
        "student": {
            "hf_checkpoint": str(folder / "student"),
            "prompt_data": str(folder / "prompts.jsonl"),
            "apply_chat_template": True,
            "simct_interface": "bytes",
            "rollout_max_prompt_len": 200,
            "rollout_max_response_len": 100,
            "rollout_batch_size": 16,
            "micro_batch_size": 2,
            "save_interval": 10,
            "tensor_model_parallel_size": 2,
            "bf16": True,
        },
        "teacher": {
            "teacher_hf_checkpoint": str(folder / "teacher"),
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "bf16": True,
        },
        "cluster": {
            "kind": "slurm",
            "student": {"nodes": 1, "gpus_per_node": 4},
            "teacher": {"nodes": 2, "gpus_per_node": 4},
            "time": "04:00:00",
            "device_memory_gib": 80.0,
        },
        "env": {"NCCL_DEBUG": "WARN"},
    }


def write_run(folder: Path, change: Callable[[dict[str, Any], Path], None] | None = None) -> Path:
    """run.yaml of the pair in the folder, with changes."""
    values = copy.deepcopy(run_values(folder))
    if change is not None:
        change(values, folder)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path

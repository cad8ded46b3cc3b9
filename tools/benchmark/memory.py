"""The memory of a training step beside the plan: the difference between two sizes of a
student, with each option.

    python tools/benchmark/memory.py [--layers 26 52] [--tokens 512] [--options NAME ...] [--json]

For each set of options it runs two runs of two steps on given responses, one after the other, with a process
for each rank. The students differ only in their number of layers (26 and 52 are 307 and 614 million
parameters), so the memory that a process holds beside its model and its step cancels. `measured` is the
difference of peak_memory_gib_most in metrics.jsonl: the resident memory of the fullest rank, or the memory
that torch has allocated on a GPU. `plan` is the difference of the memory plan's peak without its reserve.

On a CPU in float32 each rank of 614 million parameters holds some 11 GiB, and a step takes minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OPTIONS: dict[str, tuple[int, tuple[str, ...]]] = {
    "none": (1, ()),
    "recompute mlp": (1, ("--recompute-granularity", "selective", "--recompute-modules", "mlp")),
    "recompute all": (
        1,
        (
            *("--recompute-granularity", "full", "--recompute-method", "uniform"),
            *("--recompute-num-layers", "1"),
        ),
    ),
    "distributed optimizer": (2, ("--use-distributed-optimizer",)),
    "distributed optimizer, recompute all": (
        2,
        (
            *(
                "--use-distributed-optimizer",
                "--recompute-granularity",
                "full",
                "--recompute-method",
                "uniform",
            ),
            *("--recompute-num-layers", "1"),
        ),
    ),
    "packing": (1, ("--max-tokens-per-gpu", "TWICE")),
    "context parallel": (2, ("--context-parallel-size", "2")),
    "adapters": (1, ("--lora-rank", "8")),
    "adapters, context parallel": (2, ("--lora-rank", "8", "--context-parallel-size", "2")),
    "tensor and sequence parallel": (2, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
}
"""Name -> ranks, and flags. TWICE stands for the tokens of two sequences."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, nargs=2, default=(26, 52), help="layers of the two sizes (default: 26 52)"
    )
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size (default: 1024)")
    parser.add_argument(
        "--tokens", type=int, default=512, help="tokens of a sequence; each is a micro-batch (default: 512)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch a rank (default: 1)")
    parser.add_argument("--options", nargs="+", default=list(OPTIONS), choices=list(OPTIONS), metavar="NAME")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.options:
            sizes = [both(Path(folder) / f"{layers}", layers, name, arguments) for layers in arguments.layers]
            measured, planned = (second - first for first, second in zip(*sizes, strict=True))
            rows[name] = {"measured_gib": measured, "plan_gib": planned, "ratio": measured / planned}
            if not arguments.json:
                print(
                    f"{name:40} measured {measured:6.3f}  plan {planned:6.3f}  {measured / planned:.3f}",
                    flush=True,
                )
    if arguments.json:
        print(json.dumps(rows))


def both(folder: Path, layers: int, name: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """GiB that a run held, and GiB of its plan."""
    if not folder.exists():
        write_student(folder, layers, arguments)
    ranks, flags = OPTIONS[name]
    argv = [
        *(
            "--hf-checkpoint",
            str(folder),
            "--prompt-data",
            str(folder / "rows.jsonl"),
            "--simct-interface",
            "sft",
        ),
        *("--rollout-max-prompt-len", "8", "--rollout-max-response-len", str(arguments.tokens - 8)),
        *("--micro-batch-size", "1", "--rollout-batch-size", "2", "--train-iters", "2", "--lr", "1e-5"),
        *("--run-dir", str(folder / f"run {name}")),
        *(str(2 * arguments.tokens) if flag == "TWICE" else flag for flag in flags),
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*torchrun, "-m", "megatron_simct.train", *argv]
    # Large blocks return to the system when they are freed, so that resident memory is held memory.
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    lines = (folder / f"run {name}" / "metrics.jsonl").read_text().splitlines()
    held = max(row["peak_memory_gib_most"] for row in map(json.loads, lines) if row["kind"] == "step")
    return held, planned_gib(argv, ranks, arguments.tokens)


def write_student(folder: Path, layers: int, arguments: argparse.Namespace) -> None:
    """A student of llama's kind without weights, whose tokens are bytes, and given
    responses of full length.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir()
    ids = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    fields = {
        **{"model_type": "llama", "num_hidden_layers": layers, "hidden_size": arguments.hidden},
        **{"intermediate_size": 11 * arguments.hidden // 4, "num_attention_heads": arguments.hidden // 64},
        **{"num_key_value_heads": arguments.hidden // 128, "vocab_size": 257, "rms_norm_eps": 1e-6},
        **{
            "rope_theta": 10000.0,
            "max_position_embeddings": 2 * arguments.tokens,
            "tie_word_embeddings": False,
        },
        **{"hidden_act": "silu", "initializer_range": 0.02, "eos_token_id": 256},
    }
    (folder / "config.json").write_text(json.dumps(fields))
    if any("--lora-rank" in OPTIONS[name][1] for name in arguments.options):
        write_zeros(folder / "model.safetensors", fields)
    row = {"prompt": "a" * 8, "response": "b" * (arguments.tokens - 9)}
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)


def write_zeros(path: Path, fields: dict[str, Any]) -> None:
    """Weights to which adapters are added: a sparse file, which takes no room on the disk."""
    hidden, width, vocab = (fields[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    keys = hidden // fields["num_attention_heads"] * fields["num_key_value_heads"]
    layer = {"input_layernorm": [hidden], "post_attention_layernorm": [hidden]}
    layer |= {
        f"self_attn.{name}_proj": [rows, hidden]
        for name, rows in zip("qkv", (hidden, keys, keys), strict=True)
    }
    layer |= {"self_attn.o_proj": [hidden, hidden], "mlp.down_proj": [hidden, width]}
    layer |= {f"mlp.{name}_proj": [width, hidden] for name in ("gate", "up")}
    shapes = {"model.embed_tokens": [vocab, hidden], "model.norm": [hidden], "lm_head": [vocab, hidden]}
    for number in range(fields["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def planned_gib(argv: list[str], ranks: int, tokens: int) -> float:
    """The memory plan's peak of these options."""
    from megatron_simct.config.flags import parse_config
    from megatron_simct.models.build import padded_vocab_size
    from megatron_simct.models.families import read_architecture
    from megatron_simct.models.lora import adapter_parameters
    from megatron_simct.preflight.memory import GIB, RESERVE, Sizes, student_plan

    config = parse_config(argv)
    parallel = config.parallel
    architecture = read_architecture(config.model.folder, flag="--hf-checkpoint")
    rows = padded_vocab_size(
        architecture.vocab_size,
        divisible_by=config.model.make_vocab_size_divisible_by,
        tp_size=parallel.tensor_model_parallel_size,
    )
    plan = student_plan(
        Sizes(architecture=architecture, parallel=parallel, vocab_size=rows, bf16=False),
        optimizer="adam",
        micro_batch_size=(config.training.max_tokens_per_gpu or tokens)
        / tokens
        / parallel.context_parallel_size,
        num_micro_batches=1,
        engine_batch_size=1,
        prompt_len=8,
        response_len=tokens - 8,
        loss_memory=config.interface.loss_memory_mib << 20,
        trains_on_given=True,
        on_gpu=False,
        update=config.update,
        data_parallel_size=ranks // parallel.model_parallel_size,
        adapters=adapter_parameters(
            architecture, config.lora, tp_size=parallel.tensor_model_parallel_size, flag="--hf-checkpoint"
        )
        if config.lora.rank
        else None,
    )
    return plan.peak / (1 + RESERVE) / GIB


if __name__ == "__main__":
    main()

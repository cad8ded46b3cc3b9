"""Tokens a second of the rollout engine beside transformers' generate, on the same weights in one
process, in float32.

    python tools/benchmark/generation.py
    python tools/benchmark/generation.py --prompts 4 --samples-per-prompt 8 --temperature 1 --json

Without --hf-checkpoint the model has the shapes of SmolLM2-135M and random weights. No sequence stops before
--new-tokens. The two take turns. `seconds` is the least of --repeats calls, prompts included. transformers
gets each prompt --samples-per-prompt times. With --temperature 0, `same_tokens` is the share of equal tokens:
rounding may separate the two at a near tie, and from there on they stay apart.

    python tools/benchmark/generation.py --count

counts the launches of one decoded token instead, on tiny random models: calls of torch's operations other
than views, and kernels of compiled regions, for each layer and for the rest of the model (from the
difference between two models). It also counts how often the host reads from the device or sends to it,
without the prompts. The step has the same shape as on a GPU. All-reduces of tensor parallelism are not
counted. It needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_simct.config.options import ParallelConfig
from megatron_simct.models.build import build_model
from megatron_simct.models.families import read_architecture
from megatron_simct.models.hf_load import load_hf_weights
from megatron_simct.models.regions import EAGER, Regions, compiled
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.records import Prompt
from megatron_simct.rollout import megatron_engine
from megatron_simct.rollout.engine import Sampling
from megatron_simct.rollout.graphs import Stepping
from megatron_simct.rollout.megatron_engine import MegatronEngine
from tools.benchmark.counting import Kernels, Launches, Waits

SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "initializer_range": 0.04,
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf-checkpoint", metavar="DIR", help="Hugging Face folder with weights")
    parser.add_argument("--prompts", type=int, default=8, help="number of different prompts (default: 8)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens of each prompt (default: 64)")
    parser.add_argument("--samples-per-prompt", type=int, default=1, help="responses a prompt (default: 1)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of each response (default: 64)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="temperature of sampling (default: 0, greedy)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="probability of the tokens to sample from (default: 1)"
    )
    parser.add_argument(
        "--top-k", type=int, default=-1, help="number of tokens to sample from (default: -1, all)"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each (default: 3)")
    parser.add_argument(
        "--count", action="store_true", help="count the operations of a token instead of measuring seconds"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.count:
        os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # loads from a cache are not counted
        counts = [count(name, with_compiler=value) for name in SHAPES for value in (False, True)]
        print(json.dumps(counts) if options.json else "\n".join(map(counted_line, counts)))
        return 0
    try:
        import transformers
    except ImportError:
        print(
            "generation: error: needs the package transformers: pip install transformers==5.24.0",
            file=sys.stderr,
        )
        return 1
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.hf_checkpoint or scratch
        if options.hf_checkpoint is None:
            config = transformers.LlamaConfig(
                **SMOLLM2_135M, bos_token_id=None, eos_token_id=None, pad_token_id=None
            )
            torch.manual_seed(0)
            transformers.LlamaForCausalLM(config).save_pretrained(scratch)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        report = measure(options, folder, theirs)
    print(json.dumps(report) if options.json else table(report))
    return 0


def measure(options: argparse.Namespace, folder: str, theirs: Any) -> dict:
    """Seconds and tokens a second of both, and the share of equal tokens."""
    architecture = read_architecture(folder, flag="--hf-checkpoint")
    vocab_size, total = architecture.vocab_size, options.prompts * options.samples_per_prompt
    ids = torch.randint(0, vocab_size, (options.prompts, options.prompt_tokens))
    repeated = ids.repeat_interleave(options.samples_per_prompt, dim=0)
    prompts = [
        Prompt(sample_id=i, student_ids=row.numpy().astype(np.int32), teacher_ids=np.zeros(0, np.int32))
        for i, row in enumerate(repeated)
    ]
    parallel = ParallelConfig()
    with process_groups(parallel, seed=1) as groups:
        model = build_model(
            architecture,
            parallel,
            groups,
            vocab_size=vocab_size,
            divisible_by=1,
            bf16=False,
            flag="--hf-checkpoint",
            initialize=False,
        )
        load_hf_weights(model, architecture, folder, groups, flag="--hf-checkpoint")
        theirs.to(groups.device)
        engine = MegatronEngine(model, groups, vocab_size=vocab_size, stop_ids=(), batch_size=total)
        sampling = Sampling(
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            max_response_len=options.new_tokens,
            seed=1,
        )
        choice: dict[str, Any] = {"do_sample": False}
        if options.temperature > 0:
            choice = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
            choice["top_k"] = options.top_k if options.top_k > 0 else 0
        lengths = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}

        def ours() -> torch.Tensor:
            return torch.tensor(np.array([r.student_ids for r in engine.generate(prompts, sampling)]))

        @torch.no_grad()
        def generate() -> torch.Tensor:
            inputs = repeated.to(groups.device)
            mask = torch.ones_like(inputs)
            output = theirs.generate(
                inputs, attention_mask=mask, eos_token_id=None, pad_token_id=0, **lengths, **choice
            )
            return output[:, options.prompt_tokens :].cpu()

        seconds, answers = race({"engine": ours, "transformers": generate}, options.repeats)
    tokens = total * options.new_tokens
    return {
        "model": options.hf_checkpoint or "shapes of SmolLM2-135M, random weights",
        **{
            name: getattr(options, name)
            for name in ("prompts", "samples_per_prompt", "prompt_tokens", "new_tokens")
        },
        **{name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "threads")},
        "seconds": seconds,
        "tokens_per_second": {name: tokens / value for name, value in seconds.items()},
        "ratio": seconds["transformers"] / seconds["engine"],
        "same_tokens": float((answers["engine"] == answers["transformers"]).float().mean())
        if options.temperature == 0
        else None,
    }


# Counting

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e4, "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "rope_theta": 1e4, "head_dim": 16, "tie_word_embeddings": False},
    "gemma2": {
        "model_type": "gemma2",
        "rope_theta": 1e4,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 64,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}


def count(name: str, *, with_compiler: bool) -> dict[str, Any]:
    """Launches of one more token in greedy and in free sampling, for each layer and for the rest."""
    kernels = Kernels()
    regions = regions_of(kernels) if with_compiler else EAGER
    megatron_engine.compiled = lambda: regions  # type: ignore[assignment]
    few, many = (count_model(name, layers, kernels) for layers in (4, 8))
    a_layer = (many["launches"] - few["launches"]) / 4
    return {
        "model": name,
        "compiled": with_compiler,
        "a_layer": a_layer,
        "outside_of_layers": many["launches"] - 8 * a_layer,
        "waits_a_token": many["waits"],
    }


def count_model(name: str, layers: int, kernels: Kernels) -> dict[str, float]:
    """A token's launches and waits in a model with this number of layers, from calls with
    different numbers of tokens.
    """
    config = {**TINY, **SHAPES[name], "num_hidden_layers": layers}
    parallel, stepping = ParallelConfig(), Stepping(rows=8, keys=256, late=1, compiled=True, graphs=True)
    with tempfile.TemporaryDirectory() as folder, process_groups(parallel, seed=1) as groups:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        architecture = read_architecture(folder, flag="--hf-checkpoint")
        vocab_size = architecture.vocab_size
        model = build_model(
            architecture,
            parallel,
            groups,
            vocab_size=vocab_size,
            divisible_by=1,
            bf16=False,
            flag="--hf-checkpoint",
        )
        engine = MegatronEngine(
            model, groups, vocab_size=vocab_size, stop_ids=(), batch_size=8, stepping=stepping
        )
        empty = np.zeros(0, np.int32)
        prompts = [
            Prompt(sample_id=i, student_ids=np.arange(5 + 3 * i, dtype=np.int32), teacher_ids=empty)
            for i in range(3)
        ]
        totals = []
        for tokens in (8, 8, 24):  # the first call compiles
            sampling = Sampling(temperature=1.0, max_response_len=tokens, seed=1)
            with Launches() as launches, Waits() as waits:
                engine.generate(prompts, sampling)
            totals.append((sum(launches.names.values()) + kernels.take()[0], waits.count))
    (_, _), (few, few_waits), (many, many_waits) = totals
    return {"launches": (many - few) / 16, "waits": (many_waits - few_waits) / 16}


def regions_of(kernels: Kernels) -> Regions:
    """The compiled regions, whose kernels are counted."""
    torch.compiler.reset()
    compiled.cache_clear()
    made = compiled()
    return Regions(
        **{field.name: kernels.counted(field.name, getattr(made, field.name)) for field in fields(made)}
    )


def counted_line(counts: dict[str, Any]) -> str:
    how = "compiled regions" if counts["compiled"] else "torch's operations"
    return (
        f"{counts['model']:7} {how:18} {counts['a_layer']:5.1f} a layer + {counts['outside_of_layers']:.1f}, "
        f"{counts['waits_a_token']:.1f} host waits a token"
    )


def race(
    runners: dict[str, Callable[[], torch.Tensor]], repeats: int
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The least seconds and the answer of each runner, in turns, after one call that is not counted."""
    answers = {name: run() for name, run in runners.items()}
    seconds = dict.fromkeys(runners, float("inf"))
    for _ in range(repeats):
        for name, run in runners.items():
            begin = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return seconds, answers


def table(report: dict) -> str:
    lines = [
        ", ".join(f"{name} {value}" for name, value in report.items() if not isinstance(value, dict | float))
    ]
    for name, value in report["seconds"].items():
        lines.append(f"{name:13} {value:8.2f} s {report['tokens_per_second'][name]:9.1f} tokens a second")
    lines.append(f"engine / transformers: {report['ratio']:.2f}")
    if report["same_tokens"] is not None:
        lines.append(f"same tokens: {report['same_tokens']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

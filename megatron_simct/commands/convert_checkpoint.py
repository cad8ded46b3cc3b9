"""Converts a Hugging Face folder to a Megatron checkpoint for --pretrained-checkpoint, and back.

    python tools/convert_checkpoint.py hf-to-megatron --hf-checkpoint DIR --save DIR [--verify]
    torchrun --nproc-per-node 4 tools/convert_checkpoint.py megatron-to-hf --load DIR --hf-checkpoint DIR
    --save DIR \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
    python tools/convert_checkpoint.py verify DIR

A checkpoint does not depend on the layout of the job that wrote it. The layout given here divides the model
over the ranks of the conversion. megatron-to-hf takes configuration and tokenizer from --hf-checkpoint.
`verify` reads every file of every checkpoint in DIR, and prints which of them are intact.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_simct.config.command_line import Parser, command, loading

with loading("convert_checkpoint"):
    import torch
    import torch.distributed as dist

    from megatron_simct.models.build import HiddenStateModel, InterleavedModel, build_model, chunks_of

from megatron_simct.config.options import ParallelConfig
from megatron_simct.files import sampled_fingerprint
from megatron_simct.losses.vocab_parallel import soft_cap
from megatron_simct.models.families import Architecture, read_architecture
from megatron_simct.models.formats import folder_format
from megatron_simct.models.hf_export import save_hf_weights
from megatron_simct.models.hf_hashes import check_hashes
from megatron_simct.models.hf_load import load_hf_weights
from megatron_simct.models.lora import add_adapters, merge_adapters, save_peft
from megatron_simct.models.tensor_files import find_weights, is_for_bf16, weight_files
from megatron_simct.parallel.disk import sole_owner
from megatron_simct.parallel.initialize import Groups, process_groups
from megatron_simct.update.checkpoint import (
    SavedLora,
    load_weights,
    newest_checkpoint,
    numbered,
    save_weights,
    saved_lora,
    stored_dtype,
)
from megatron_simct.update.integrity import verify as checked_files

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_VERIFY_IDS = 48
_VERIFY_TOLERANCE = 1e-4


@command("convert_checkpoint")
def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    if options.command == "verify":
        with process_groups(ParallelConfig(), seed=1):
            verify_files(options.directory)
        return
    parallel = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        num_virtual_stages_per_pipeline_rank=options.num_virtual_stages_per_pipeline_rank,
        expert_model_parallel_size=options.expert_model_parallel_size,
        expert_tensor_parallel_size=options.expert_tensor_parallel_size,
    )
    if options.make_vocab_size_divisible_by < 1:
        raise ValueError(
            f"--make-vocab-size-divisible-by {options.make_vocab_size_divisible_by}: must be at least 1"
        )
    if options.verify:
        stored = folder_format(options.hf_checkpoint, flag="--hf-checkpoint")
        if stored is not None and options.command == "hf-to-megatron":
            raise ValueError(
                f"--verify: {options.hf_checkpoint} is quantised ({stored.label}), and transformers rounds "
                "quantised weights differently; leave it out"
            )
        if options.command == "megatron-to-hf" and options.peft:
            raise ValueError(
                "--verify: compares whole models, but --peft writes only adapters; leave one of them out"
            )
    text_ids = None if options.verify_text is None else _encode(options)
    with process_groups(parallel, seed=1) as groups:
        if options.command == "hf-to-megatron":
            with sole_owner({"--save": options.save}, beside=True):
                if Path(options.save).exists():
                    raise ValueError(f"--save {options.save}: exists already; nothing is overwritten")
                dist.barrier()  # before any rank makes it
                to_megatron(options, parallel, groups)
            checkpoint, folder = options.save, options.hf_checkpoint
        else:
            to_hugging_face(options, parallel, groups)
            checkpoint, folder = options.load, options.save
        if options.verify:
            verify(folder, checkpoint, text_ids, options, parallel, groups)


def to_megatron(options: argparse.Namespace, parallel: ParallelConfig, groups: Groups) -> None:
    """Read this rank's slices of the folder and write them as a checkpoint of iteration 0."""
    folder, flag = options.hf_checkpoint, "--hf-checkpoint"
    architecture = read_architecture(folder, flag=flag)
    if find_weights(folder, flag=flag) is None:
        raise ValueError(f"{flag} {folder}: has no weights to convert")
    if options.dtype is None:
        bf16 = is_for_bf16(folder, flag=flag)
    elif options.dtype == "float16":
        raise ValueError("--dtype float16: a Megatron checkpoint is float32 or bfloat16")
    else:
        bf16 = options.dtype == "bfloat16"
    if options.verify_checkpoint:
        check_hashes(folder, listed=options.hf_sha256, prefix="")
    model = _build(architecture, parallel, groups, options, bf16=bf16)
    with _progress(model, groups, "reading") as progress:
        load_hf_weights(
            model,
            architecture,
            folder,
            groups,
            flag=flag,
            progress=progress,
        )
    save_weights(model, options.save, 0)
    _say(groups, f" {options.save}: written in {'bfloat16' if bf16 else 'float32'}")


def to_hugging_face(options: argparse.Namespace, parallel: ParallelConfig, groups: Groups) -> None:
    """Load this rank's shards of the checkpoint and write them as a folder; adapters merged, or alone."""
    architecture = read_architecture(options.hf_checkpoint, flag="--hf-checkpoint")
    stored = stored_dtype(options.load, flag="--load")
    _, path = newest_checkpoint(options.load, flag="--load")
    adapters = saved_lora(path)
    if options.peft and adapters is None:
        raise ValueError(f"--peft: {options.load} contains weights, not adapters; leave --peft out")
    if options.peft and architecture.is_nested:
        raise ValueError(
            "--peft: not supported for a model that also reads images, because its modules have other names; "
            "leave it out to merge"
        )
    model = _load(architecture, adapters, parallel, groups, options, bf16=stored == torch.bfloat16)
    if options.peft and adapters is not None:
        save_peft(model, groups, adapters.lora, base=options.hf_checkpoint, save=options.save)
        _say(groups, f" {options.save}: adapters of rank {adapters.lora.rank}")
        return
    merge_adapters(model)
    dtype = _DTYPES[options.dtype] if options.dtype else stored
    with _progress(model, groups, "writing") as progress:
        save_hf_weights(
            model,
            architecture,
            groups,
            template=options.hf_checkpoint,
            save=options.save,
            dtype=dtype,
            progress=progress,
        )
    _say(groups, f" {options.save}: written in {str(dtype).removeprefix('torch.')}")


def _load(
    architecture: Architecture,
    adapters: SavedLora | None,
    parallel: ParallelConfig,
    groups: Groups,
    options: argparse.Namespace,
    *,
    bf16: bool,
) -> HiddenStateModel | InterleavedModel:
    """The model of --load; its adapters beside the weights of --hf-checkpoint, if it holds adapters.

    ValueError where that is not the folder of their run.
    """
    model = _build(architecture, parallel, groups, options, bf16=bf16, local_layers=adapters is not None)
    folder, flag = options.hf_checkpoint, "--hf-checkpoint"
    if adapters is not None:
        has_weights = find_weights(folder, flag=flag) is not None
        if not has_weights or adapters.base != sampled_fingerprint(weight_files(folder, flag=flag)):
            raise ValueError(
                f"{flag} {folder}: is not the folder on whose weights the adapters of --load {options.load} "
                "were trained"
            )
        load_hf_weights(model, architecture, folder, groups, flag=flag)
        add_adapters(
            model, architecture, adapters.lora, tp_size=groups.tp_size, seed=0, flag=f"{flag} {folder}"
        )
    load_weights(model, options.load, flag="--load", verified=options.verify_checkpoint)
    return model


def verify_files(directory: str) -> None:
    """Prints one line for each checkpoint. Raises ValueError if one is damaged, or there is no checkpoint."""
    found = numbered(directory)
    if not found:
        raise ValueError(f"verify {directory}: no checkpoint there (iter_0000001 and so on)")
    damaged, newest = [], None
    for iteration, path in found.items():
        verdict = checked_files(path)
        if verdict is None:
            line = "not checked: written by an earlier version, which stored no hashes"
        elif verdict.damage is None:
            line, newest = f"intact: {verdict}", iteration
        else:
            line = f"damaged: {verdict.damage}"
            damaged.append(f"{path.name}/{verdict.damage}")
        if dist.get_rank() == 0:
            print(f" {path}: {line}", flush=True)
    if damaged:
        whole = (
            "none is known to be intact"
            if newest is None
            else f"the newest intact one is that of iteration {newest}"
        )
        raise ValueError(
            f"verify {directory}: {len(damaged)} of {len(found)} damaged: {'; '.join(damaged)}; {whole}"
        )


def verify(
    folder: str,
    checkpoint: str,
    tokens: torch.Tensor | None,
    options: argparse.Namespace,
    parallel: ParallelConfig,
    groups: Groups,
) -> None:
    """Compare the checkpoint's logits with transformers' on ids [1, s], both in float32. ValueError where
    they differ.

    tokens: None for random ones.
    """
    architecture = read_architecture(folder, flag="--hf-checkpoint")
    if tokens is None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, architecture.vocab_size, (1, _VERIFY_IDS), generator=generator)
    adapters = None
    if options.command == "megatron-to-hf":
        adapters = saved_lora(newest_checkpoint(checkpoint, flag="--load")[1])
    if adapters is not None:
        model = _load(architecture, adapters, parallel, groups, options, bf16=False)
        merge_adapters(model)
    else:
        model = _build(architecture, parallel, groups, options, bf16=False)
        load_weights(model, checkpoint, flag="--verify", verified=options.verify_checkpoint)
    expected = torch.empty(*tokens.shape, architecture.vocab_size)
    if groups.is_first_rank:
        expected.copy_(_transformers_logits(folder, tokens))
    expected = expected.to(groups.device)
    dist.broadcast(expected, src=0)
    if not expected.isfinite().all():
        raise ValueError(
            f"--verify: transformers' logits of {folder} are not finite, so they cannot be compared"
        )
    worst = torch.tensor(
        [_difference(model, tokens.to(groups.device), expected, groups)], device=groups.device
    )
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    relative = float(worst / expected.abs().max())
    if not relative <= _VERIFY_TOLERANCE:
        raise ValueError(
            f"--verify: logits of {checkpoint} and of transformers on {folder} differ by {relative:.1e} of "
            f"the largest (allowed: {_VERIFY_TOLERANCE:.0e})"
        )
    _say(
        groups, f" verified: logits at {tokens.shape[1]} positions agree with transformers to {relative:.1e}"
    )


def _difference(
    model: HiddenStateModel | InterleavedModel, tokens: torch.Tensor, expected: torch.Tensor, groups: Groups
) -> float:
    """Largest difference of a logit of this rank; 0 on stages that have none."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    chunks = chunks_of(model.eval())
    start, end = model.vocab_shard
    end = min(end, expected.shape[-1])

    @torch.no_grad()
    def compare(hidden: torch.Tensor, non_loss_data: bool = True) -> float:
        logits = soft_cap(hidden @ model.output_weight.T, model.logit_softcap)
        logits = logits.transpose(0, 1)[..., : max(0, end - start)]
        difference = (logits.float() - expected[..., start : max(start, end)]).abs()
        return (
            float(difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) if difference.numel() else 0.0
        )

    @torch.no_grad()
    def step(
        data: Iterator[torch.Tensor], chunk: HiddenStateModel
    ) -> tuple[torch.Tensor, Callable[..., float]]:
        batch = next(data)
        return chunk(
            batch, torch.arange(batch.shape[1], device=batch.device).expand_as(batch), None
        ), partial(compare)

    micro_batches = [tokens] * groups.pp.size()  # an interleaved schedule wants as many as there are stages
    answers = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(micro_batches),
        seq_length=tokens.shape[1],
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return max(answers, default=0.0) if groups.is_last_stage else 0.0


def _transformers_logits(folder: str, tokens: torch.Tensor) -> torch.Tensor:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ValueError(
            "--verify needs the package transformers: pip install transformers==5.24.0"
        ) from None
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(tokens).logits


def _encode(options: argparse.Namespace) -> torch.Tensor:
    """[1, s]: the ids of --verify-text as a prompt.

    Raises ValueError if there are none, or an id is outside the model's vocabulary.
    """
    from megatron_simct.alignment import load_tokenizer
    from megatron_simct.data.rendering import render_prompt

    flag = f"--verify-text {options.verify_text!r}"
    if not options.verify:
        raise ValueError(f"{flag}: needs --verify")
    if not options.verify_text:
        raise ValueError(f"{flag}: is empty; leave it out to compare on random ids")
    try:
        ids = render_prompt(options.verify_text, load_tokenizer(options.hf_checkpoint))
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    vocab_size = read_architecture(options.hf_checkpoint, flag="--hf-checkpoint").vocab_size
    if ids.max() >= vocab_size:
        raise ValueError(
            f"{flag}: the tokenizer gives the id {ids.max()}, the model of --hf-checkpoint has {vocab_size}"
        )
    return torch.from_numpy(ids).long().unsqueeze(0)


def _build(
    architecture: Architecture,
    parallel: ParallelConfig,
    groups: Groups,
    options: argparse.Namespace,
    *,
    bf16: bool,
    local_layers: bool = False,
) -> HiddenStateModel | InterleavedModel:
    """This rank's part, to be filled."""
    return build_model(
        architecture,
        parallel,
        groups,
        vocab_size=architecture.vocab_size,
        divisible_by=options.make_vocab_size_divisible_by,
        bf16=bf16,
        flag=f"--hf-checkpoint {options.hf_checkpoint}",
        initialize=False,
        local_layers=local_layers,
    )


@contextlib.contextmanager
def _progress(
    model: HiddenStateModel | InterleavedModel, groups: Groups, what: str
) -> Iterator[Callable[[int], object]]:
    """A bar of the first rank's bytes."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (f"{what:8}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not (groups.is_first_rank and sys.stdout.isatty())) as bar:
        task = bar.add_task(what, total=sum(parameter.nbytes for parameter in model.parameters()))
        yield lambda count: bar.advance(task, count)


def _say(groups: Groups, text: str) -> None:
    if groups.is_first_rank:
        print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="convert_checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    directions = {
        "hf-to-megatron": "convert a Hugging Face folder to a checkpoint of iteration 0",
        "megatron-to-hf": "convert a checkpoint to a Hugging Face folder",
    }
    integrity = commands.add_parser(
        "verify", help="check the files of every checkpoint in a directory against their hashes"
    )
    integrity.add_argument("directory", metavar="DIR", help="directory of checkpoints, as in --load")
    for name, what in directions.items():
        one = commands.add_parser(name, help=what, description=what)
        if name == "megatron-to-hf":
            one.add_argument(
                "--load", required=True, metavar="DIR", help="directory of checkpoints; the newest is read"
            )
            one.add_argument(
                "--peft",
                action="store_true",
                help="for a run with --lora-rank: write its adapters in the format of peft (default: merge "
                "them into the weights of --hf-checkpoint)",
            )
        one.add_argument("--hf-checkpoint", required=True, metavar="DIR", help="Hugging Face folder")
        one.add_argument("--save", required=True, metavar="DIR", help="directory to write; it must not exist")
        if name == "hf-to-megatron":
            one.add_argument(
                "--hf-sha256",
                metavar="FILE",
                help="hashes of the files in the folder, in the format of sha256sum",
            )
        one.add_argument(
            "--no-verify-checkpoint",
            dest="verify_checkpoint",
            action="store_false",
            help="do not check the hashes of the files that are read",
        )
        one.add_argument(
            "--dtype",
            choices=_DTYPES,
            help="data type of the written weights (default: that of the weights read)",
        )
        one.add_argument("--verify", action="store_true", help="compare logits with those of transformers")
        one.add_argument(
            "--verify-text",
            metavar="TEXT",
            help="with --verify: text on which the logits are compared (default: random ids)",
        )
        numbers = {
            "--tensor-model-parallel-size": (1, "ranks that share each layer"),
            "--pipeline-model-parallel-size": (1, "stages of consecutive layers"),
            "--num-virtual-stages-per-pipeline-rank": (1, "pieces of the model on each pipeline rank"),
            "--expert-model-parallel-size": (1, "ranks that share the experts of a layer"),
            "--make-vocab-size-divisible-by": (128, "as in training"),
        }
        for flag, (default, help) in numbers.items():
            one.add_argument(
                flag, type=int, default=default, metavar="N", help=f"{help} (default: {default})"
            )
        one.add_argument(
            "--expert-tensor-parallel-size",
            type=int,
            metavar="N",
            help="ranks that share each expert (default: --tensor-model-parallel-size)",
        )
    return parser

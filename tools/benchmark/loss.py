"""Time and memory of the loss (interface paper, forward and backward) beside plain torch and its
own matrix products.

    python tools/benchmark/loss.py --labels 512 --vocab 151936 --teacher-vocab 128256 --shared 109566
    python tools/benchmark/loss.py --labels 4096 --hidden 896 --variants fused,products --dtype bf16
    python tools/benchmark/loss.py --tensor-model-parallel-size 2 --variants logits,fused --json
    python tools/benchmark/loss.py --labels 128,512,4096 --vocab 32000,152064,256000 --variants fused,products
    python tools/benchmark/loss.py --labels 512 --vocab 152064 --variants fused,bytes

variants
    dense      plain torch from given logits: log_softmax, gather, softmax over U, autograd (one process only)
    logits     cross_tokenizer_loss from the same logits
    fused      cross_tokenizer_loss from the inputs of the output layers
    products   the bare matrix products that `fused` needs at least, each computed at once: student logits,
               teacher logits of the shared tokens, the logits' gradient times the weight and times the hidden
               states
    bytes      the interface bytes from the inputs of the output layers, with the teacher's sums, as `fused`
               includes the teacher's statistics; the plans that both make on the host beforehand (alignment,
               byte events) are left out
    bytes-longest-match   the same with --simct-byte-bounds longest-match
    gold       the loss of TRL's GOLD trainer (1.16, hybrid) from the same logits as `dense`, if trl is
               installed; one process only, and another definition of the same task

seconds     the least of --repeats calls; variants take turns in one process, so their ratios hold on a busy
            machine
extra MiB   highest resident memory during the first call, less the memory that was resident before it
            (inputs), a process for each variant; `less gradients` leaves out the gradients that the call
            returns
sent        bytes of the tensors that one call passes to collectives of torch.distributed, for each label;
            wrappers count them: `statistics` are reductions of vectors (the loss), `states` those of the
            hidden states' gradient [n, H], which any column-parallel layer makes, `rows` is sent from rank to
            rank

Labels: 9 of 10 segments are one shared token on both sides, the tenth is a unit of two tokens on both. For
`bytes` the tokens are made up: all single bytes, words of 2 to 8 letters with the frequencies of English
letters, and their prefixes. Several sizes, separated by commas, are measured one after another; --json then
prints one object on each line.

    python tools/benchmark/loss.py --count

counts what a GPU would be asked for instead, on tiny random models on a CPU: launches of a tile of columns,
forward and backward, bytes that all operations but the matrix products read and write for each row and
column, what the rest of a call launches, and how often the host waits. Once in torch's operations and once
with the bodies of tiles compiled, which needs a C++ compiler; in both cases over whole tiles, as on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VARIANTS = ("dense", "logits", "fused", "products", "bytes", "bytes-longest-match", "gold")
ONE_PROCESS = ("dense", "gold")
LETTERS, FREQUENCIES = (
    b" etaoinshrdlcumwfgypbvkjxqz",
    (18, 10, 7, 7, 6, 6, 6, 5, 5, 5, 3, 3, 2, 2) + (1,) * 13,
)
MIB = 1 << 20


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--labels", default="512", help="student labels; several separated by commas (default: 512)"
    )
    parser.add_argument(
        "--vocab", default="32000", help="student's vocabulary; several separated by commas (default: 32000)"
    )
    parser.add_argument("--teacher-vocab", type=int, help="default: --vocab")
    parser.add_argument("--shared", type=int, help="shared tokens; default: 0.7 of the smaller vocabulary")
    parser.add_argument("--hidden", type=int, default=896, help="hidden size of the student (default: 896)")
    parser.add_argument("--teacher-hidden", type=int, help="default: --hidden")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="data type of hidden states, weights and logits",
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of torch, over all ranks (default: 2)"
    )
    parser.add_argument(
        "--tensor-model-parallel-size", default="1", help="gloo ranks, 1, 2 or 1,2 (default: 1)"
    )
    parser.add_argument(
        "--variants", default="dense,logits,fused,products", help="variants to measure, separated by commas"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed calls a variant (default: 3)")
    parser.add_argument(
        "--count", action="store_true", help="count launches, bytes and waits instead of measuring seconds"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.teacher_hidden = args.teacher_hidden or args.hidden
    for name in ("labels", "vocab", "tensor_model_parallel_size"):
        try:
            setattr(args, name, [int(value) for value in getattr(args, name).split(",")])
        except ValueError:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: numbers, by commas")
    if not set(args.tensor_model_parallel_size) <= {1, 2}:
        parser.error("--tensor-model-parallel-size: choose from 1, 2")
    chosen = args.variants.split(",")
    if not set(chosen) <= set(VARIANTS):
        parser.error(f"--variants {args.variants}: choose from {', '.join(VARIANTS)}")
    if "gold" in chosen and _gold() is None:
        chosen.remove("gold")
        print(
            "gold: left out, the package trl does not import with the loss of its GOLD trainer",
            file=sys.stderr,
        )
    args.variants = ",".join(chosen)
    for one in sizes(args):
        if min(one.vocab, one.teacher_vocab) % one.tensor_model_parallel_size:
            parser.error("both vocabularies must be a multiple of --tensor-model-parallel-size")
        if one.shared > min(one.vocab, one.teacher_vocab):
            parser.error(f"--shared {one.shared}: more than the smaller vocabulary")
    return args


def sizes(args: argparse.Namespace) -> list[argparse.Namespace]:
    """One set of options for each combination of the sizes that commas separate."""
    found = []
    for tp, labels, vocab in itertools.product(args.tensor_model_parallel_size, args.labels, args.vocab):
        one = copy.copy(args)
        one.tensor_model_parallel_size, one.labels, one.vocab = tp, labels, vocab
        one.teacher_vocab = args.teacher_vocab or vocab
        one.shared = args.shared or int(0.7 * min(vocab, one.teacher_vocab))
        if tp > 1:
            one.variants = ",".join(name for name in args.variants.split(",") if name not in ONE_PROCESS)
        found.append(one)
    return found


# The parent: one set of ranks for the times, and one set a variant for the memory


def run_workers(args: argparse.Namespace, mode: str, variants: str) -> dict[str, Any]:
    """The output of rank 0. If memory is measured, freed memory is returned to the system at once."""
    size = args.tensor_model_parallel_size
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for rank in range(size):
            environment = os.environ | {
                "BENCHMARK_RANK": str(rank),
                "BENCHMARK_STORE": f"{folder}/store",
                "OMP_NUM_THREADS": str(max(1, args.threads // size)),
            }
            if mode == "memory":
                environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
            command = [sys.executable, __file__, "--worker", mode, "--variants", variants]
            for name in (
                "labels",
                "vocab",
                "teacher_vocab",
                "shared",
                "hidden",
                "teacher_hidden",
                "dtype",
                "repeats",
            ):
                command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
            command += ["--tensor-model-parallel-size", str(size)]
            workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        outputs = [worker.communicate()[0] for worker in workers]
    failed = [rank for rank, worker in enumerate(workers) if worker.returncode]
    if failed:
        raise SystemExit(
            f"{mode} of {variants}: rank {failed[0]} ended with code {workers[failed[0]].returncode}"
        )
    return json.loads(outputs[0])


def main() -> None:
    args = parse()
    if args.worker:
        print(json.dumps(work(sizes(args)[0])))
        return
    if args.count:
        os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # loads from a cache are not counted
        from tools.benchmark.loss_counts import counts

        for row in counts():
            print(json.dumps(row) if args.json else "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        return
    for one in sizes(args):
        for name in sorted(set(args.variants.split(",")) - set(one.variants.split(","))):
            print(f"{name}: left out, it runs in one process only", file=sys.stderr)
        report = measure(one)
        print(json.dumps(report) if args.json else table(report), flush=True)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    results = run_workers(args, "time", args.variants)
    for variant in args.variants.split(","):
        results[variant] |= run_workers(args, "memory", variant)[variant]
    names = ("labels", "vocab", "teacher_vocab", "shared", "hidden", "teacher_hidden", "dtype", "threads")
    report = {name: getattr(args, name) for name in (*names, "tensor_model_parallel_size")}
    report["student_logits_mib"] = args.labels * args.vocab * (4 if args.dtype == "fp32" else 2) / MIB
    report["variants"] = results
    for over, under in (
        ("fused", "products"),
        ("bytes", "fused"),
        ("bytes", "bytes-longest-match"),
        ("dense", "logits"),
        ("gold", "logits"),
    ):
        if over in results and under in results:
            report[f"{over}_over_{under}_seconds"] = results[over]["seconds"] / results[under]["seconds"]
    if "fused" in results:
        extra = results["fused"]["extra_less_gradients_mib"]
        report["fused_over_student_logits_memory"] = extra / report["student_logits_mib"]
    return report


def table(report: dict[str, Any]) -> str:
    scalars = {name: value for name, value in report.items() if name != "variants"}
    lines = [
        ", ".join(
            f"{name} {value:.3g}" if "_over_" in name else f"{name} {value}"
            for name, value in scalars.items()
        )
    ]
    lines.append(
        f"{'variant':10} {'seconds':>9} {'extra MiB':>10} {'less gradients':>15} "
        f"{'sent, B/label: statistics':>26} {'states':>8} {'rows':>10}"
    )
    for name, row in report["variants"].items():
        sent = row["sent_bytes_per_label"]
        lines.append(
            f"{name:10} {row['seconds']:9.3f} {row['extra_mib']:10.1f} "
            f"{row['extra_less_gradients_mib']:15.1f} {sent['statistics']:26.1f} {sent['states']:8.1f} "
            f"{sent['rows']:10.1f}"
        )
    return "\n".join(lines)


# A worker: one rank


def work(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    size, rank = args.tensor_model_parallel_size, int(os.environ["BENCHMARK_RANK"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    group = None
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{os.environ['BENCHMARK_STORE']}", rank=rank, world_size=size
        )
        group = dist.group.WORLD
    variants = args.variants.split(",")
    calls = {name: build(args, name, rank, group) for name in variants}
    results: dict[str, Any] = {name: {} for name in variants}
    if args.worker == "memory":
        (name,) = variants
        call, gradients = calls[name]
        before = reset_peak()
        call()
        extra = peak() - before
        results[name] = {"extra_mib": extra / MIB, "extra_less_gradients_mib": (extra - gradients) / MIB}
        return results
    for name, (call, _) in calls.items():
        with count_bytes() as counted:
            call()
        results[name]["sent_bytes_per_label"] = {kind: size / args.labels for kind, size in counted.items()}
        results[name]["seconds"] = float("inf")
    for _ in range(args.repeats):
        for name, (call, _) in calls.items():
            if group is not None:
                dist.barrier()
            start = time.perf_counter()
            call()
            results[name]["seconds"] = min(results[name]["seconds"], time.perf_counter() - start)
    return results


class count_bytes:
    """Collects the bytes of the tensors that this rank passes to collectives, by their content."""

    def __enter__(self) -> dict[str, int]:
        import torch.distributed as dist

        self._originals: dict[str, Any] = {}
        counted = {"statistics": 0, "states": 0, "rows": 0}

        def counting(name: str, given: int, original: Callable) -> Callable:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                tensor = args[given]
                reduced = name in ("all_reduce", "reduce_scatter_tensor")
                kind = "rows" if not reduced else "states" if tensor.ndim > 1 else "statistics"
                counted[kind] += tensor.numel() * tensor.element_size()
                return original(*args, **kwargs)

            return wrapper

        # The argument that is sent.
        names = {"all_reduce": 0, "broadcast": 0, "all_to_all_single": 1, "all_gather_into_tensor": 1}
        for name, given in (
            names | {"all_gather": 1, "reduce_scatter_tensor": 1, "send": 0, "isend": 0}
        ).items():
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, counting(name, given, self._originals[name]))
        self._dist = dist
        return counted

    def __exit__(self, *error: object) -> None:
        for name, original in self._originals.items():
            setattr(self._dist, name, original)


def reset_peak() -> int:
    """Resident bytes. The kernel's record of the peak starts again from this value."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    return status("VmHWM")


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def build(args: argparse.Namespace, variant: str, rank: int, group: Any) -> tuple[Callable[[], None], int]:
    """A call of forward and backward, and the bytes of the gradients that it leaves on this rank."""
    import torch

    from megatron_simct.losses import (
        Head,
        Logits,
        Response,
        SharedVocabulary,
        cross_tokenizer_loss,
        place_shared_head,
    )

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    n, size = args.labels, args.tensor_model_parallel_size
    wide_s, wide_t = args.vocab // size, args.teacher_vocab // size
    generator = torch.Generator().manual_seed(0)
    shared_s = torch.randperm(args.vocab, generator=generator)[: args.shared].sort().values
    shared_t = torch.randperm(args.teacher_vocab, generator=generator)[: args.shared]
    pick = torch.randint(args.shared, (n,), generator=generator)
    labels_s, labels_t = shared_s[pick], shared_t[pick]
    segments: list[tuple[int, int, int, int]] = []
    at = 0
    while at < n:
        width = 2 if len(segments) % 10 == 9 and at + 2 <= n else 1
        segments.append((at, at + width, at, at + width))
        at += width
    sample: dict[str, Any] = {
        "segments": torch.tensor(segments),
        "student_labels": labels_s,
        "teacher_labels": labels_t,
        "shared_student_ids": shared_s,
        "shared_teacher_ids": shared_t,
    }

    pair = SharedVocabulary(student_ids=shared_s, teacher_ids=shared_t)
    response = Response(segments=sample["segments"], student_labels=labels_s, teacher_labels=labels_t)

    def normal(*shape: int, scale: float = 1.0, seed: int = 1) -> torch.Tensor:
        return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)

    if variant in ("dense", "logits", "gold"):
        student = normal(n, wide_s, seed=2 + rank, scale=2.0).requires_grad_()
        teacher = normal(n, wide_t, seed=12 + rank, scale=2.0)
        gold = gold_loss(student, teacher, sample) if variant == "gold" else None

        def from_logits() -> None:
            student.grad = None
            if gold is not None:
                loss = gold()
            elif variant == "dense":
                loss = dense_paper(student, teacher, sample)
            else:
                loss = cross_tokenizer_loss(
                    Logits(student), Logits(teacher), pair, response, group=group
                ).loss
            loss.backward()

        return from_logits, student.numel() * student.element_size()

    h_s, h_t = args.hidden, args.teacher_hidden
    hidden, teacher_hidden = normal(n, h_s, seed=3).requires_grad_(), normal(n, h_t, seed=4)
    weight = normal(wide_s, h_s, seed=5 + rank, scale=2 * h_s**-0.5).requires_grad_()
    teacher_weight = normal(wide_t, h_t, seed=15 + rank, scale=2 * h_t**-0.5)
    head = place_shared_head(Head(teacher_hidden, teacher_weight), pair, student_width=wide_s, group=group)
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in (hidden, weight))

    def fused() -> None:
        hidden.grad = weight.grad = None
        cross_tokenizer_loss(Head(hidden, weight), head, pair, response, group=group).loss.backward()

    if variant in ("bytes", "bytes-longest-match"):
        from_states = byte_loss(
            variant == "bytes", args, sample, hidden, weight, teacher_hidden, teacher_weight, rank, group
        )

        def compared_bytes() -> None:
            hidden.grad = weight.grad = None
            from_states().backward()

        return compared_bytes, gradients

    def products() -> None:
        assert head.placed is not None, "place_shared_head places it"
        with torch.no_grad():
            logits = hidden @ weight.T
            teacher_hidden @ teacher_weight.T
            teacher_hidden[: len(segments)] @ head.placed.weight.T
            logits @ weight
            logits.T @ hidden

    return (fused if variant == "fused" else products), gradients


def dense_paper(student: Any, teacher: Any, sample: dict[str, Any]) -> Any:
    """Eq. 6-9 in plain torch, all rows at once."""
    import torch

    log_p, log_q = student.float().log_softmax(1), teacher.float().log_softmax(1)
    ts, te, ss, se = sample["segments"].unbind(1)
    length = se - ss
    is_unit = length > 1
    own_p = log_p.gather(1, sample["student_labels"][:, None]).squeeze(1)
    own_q = log_q.gather(1, sample["teacher_labels"][:, None]).squeeze(1)
    unit_p = torch.where(is_unit, (own_p[ss] + own_p[se - 1]) / 2, -1e30)
    unit_q = torch.where(is_unit, (own_q[ts] + own_q[te - 1]) / 2, -1e30)
    p = torch.cat([log_p[ss][:, sample["shared_student_ids"]], unit_p[:, None]], 1).log_softmax(1)
    q = torch.cat([log_q[ts][:, sample["shared_teacher_ids"]], unit_q[:, None]], 1).log_softmax(1)
    return torch.where(p.exp() > 0, p.exp() * (p - q), 0).sum() / len(own_p)


def byte_loss(
    any_tokenizer: bool,
    args: argparse.Namespace,
    sample: dict[str, Any],
    hidden: Any,
    weight: Any,
    teacher_hidden: Any,
    teacher_weight: Any,
    rank: int,
    group: Any,
) -> Callable[[], Any]:
    """A call of `bytes` on the labels of the sample. Tables, events and their packing are made once, here."""
    import numpy as np
    import torch

    from megatron_simct.alignment import TokenTable
    from megatron_simct.alignment.byte_bounds import Side, plan_byte_bounds
    from megatron_simct.alignment.byte_events import plan_byte_events
    from megatron_simct.alignment.placement import VocabPlacement
    from megatron_simct.config.options import InterfaceConfig
    from megatron_simct.losses import ByteOrder, interface_loss
    from megatron_simct.losses.kinds.bytes import teacher_byte_statistics
    from megatron_simct.packing import pack_byte_events, pack_byte_sides
    from megatron_simct.records import LabelBatch

    shared = [sample[f"shared_{side}_ids"] for side in ("student", "teacher")]
    words = made_up_words(args.vocab + args.teacher_vocab - args.shared)
    common, rest = words[: args.shared], iter(words[args.shared :])
    tables = []
    for ids, size in zip(shared, (args.vocab, args.teacher_vocab), strict=True):
        pieces = dict(zip(ids.tolist(), common, strict=True))
        tables.append(TokenTable.from_bytes([pieces.get(i) or next(rest) for i in range(size)]))
    labels = [sample["student_labels"], sample["teacher_labels"]]
    spelled = b"".join(tables[0].bytes_of(int(i)) for i in labels[0])
    student_ids, teacher_ids = (side.numpy().astype(np.int32) for side in labels)
    text = np.frombuffer(spelled, dtype=np.uint8)
    if any_tokenizer:
        sides = [
            Side(table=table, ids=ids) for table, ids in zip(tables, (student_ids, teacher_ids), strict=True)
        ]
        (events,) = plan_byte_bounds(text, stop=False, student=sides[0], teachers=sides[1:])
    else:
        events = plan_byte_events(
            text,
            stop=False,
            student=tables[0],
            student_ids=student_ids,
            teacher=tables[1],
            teacher_ids=teacher_ids,
        )
    starts = [rank * len(weight), rank * len(teacher_weight)]
    orders = [
        ByteOrder.of(table, shard_start=start, shard_end=start + len(head), device=head.device)
        for table, start, head in zip(tables, starts, (weight, teacher_weight), strict=True)
    ]
    teacher_side = pack_byte_sides([events.teacher], [len(labels[1])])
    none = torch.zeros(0, dtype=torch.int64)
    placement = VocabPlacement(
        student_vocab_size=args.vocab,
        teacher_vocab_size=args.teacher_vocab,
        shard_start=starts[0],
        shard_end=starts[0] + len(weight),
        columns=none.numpy(),
        row_offsets=np.zeros(1, dtype=np.int64),
        teacher_rows=none.numpy(),
    )

    def loss() -> Any:
        masses, own, lse = teacher_byte_statistics(
            teacher_hidden,
            teacher_weight,
            labels[1],
            teacher_side,
            order=orders[1],
            shard_start=starts[1],
            group=group,
        )
        batch = LabelBatch(
            student_labels=labels[0],
            segments=none.reshape(0, 4),
            kinds=none,
            replaced_columns=none,
            teacher_first_columns=none,
            weights=torch.ones(0),
            teacher_own_logit=own,
            teacher_lse=lse,
            teacher_hidden=None,
            teacher_hidden_index=none,
            byte_batch=pack_byte_events([events], [len(labels[0])], [masses]),
        )
        config = InterfaceConfig(interface="bytes")
        options = {"shared_head": None, "placement": placement, "config": config, "group": group}
        return interface_loss(hidden, weight, batch, byte_order=orders[0], **options).sum

    return loss


def made_up_words(count: int) -> list[bytes]:
    """`count` different byte strings: all single bytes, words, and some of their prefixes, shuffled."""
    rng = random.Random(0)
    words = {bytes([b]) for b in range(256)}
    while len(words) < count:
        word = bytes(rng.choices(LETTERS, FREQUENCIES, k=rng.randint(2, 8)))
        words.add(word)
        words.add(word[: rng.randint(2, len(word))])
    chosen = sorted(words)
    rng.shuffle(chosen)
    return chosen[:count]


def _gold() -> Any:
    """The class of TRL's loss; None if it cannot be imported."""
    try:
        from trl.experimental.gold.gold_trainer import ULDLoss
    except Exception:  # trl raises RuntimeError if one of its own imports is missing
        return None
    return ULDLoss


def gold_loss(student: Any, teacher: Any, sample: dict[str, Any]) -> Callable[[], Any]:
    """TRL's loss with its trainer's defaults, and with the hybrid that compares tokens of equal spelling."""
    import torch

    n = len(student)
    names: list[dict[str, int]] = [{}, {}]
    for side, (own, width) in enumerate((("student", student.shape[1]), ("teacher", teacher.shape[1]))):
        shared = {int(i): f"shared {k}" for k, i in enumerate(sample[f"shared_{own}_ids"])}
        names[side] = {shared.get(i, f"{own} {i}"): i for i in range(width)}
    tokenizers = [SimpleNamespace(get_vocab=lambda found=found: found) for found in names]
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=True,
        uld_token_merge_strategy="observed",
        uld_use_hybrid_loss=True,
        uld_hybrid_matched_weight=None,
        uld_hybrid_unmatched_weight=None,
        beta=0.0,
    )
    loss = _gold()(config, *tokenizers, device=student.device)
    # Every label is a separate token. Those of a unit end at other bytes, so that the unit is one group.
    ends = {side: torch.arange(1, n + 1) * 4 for side in ("student", "teacher")}
    for ss, se in sample["segments"][:, 2:].tolist():
        if se - ss > 1:
            ends["student"][ss : se - 1] += 1
    offsets = [torch.stack([side - 4, side], 1)[None] for side in (ends["student"], ends["teacher"])]
    labels = [sample[f"{side}_labels"][None] for side in ("student", "teacher")]

    def call() -> Any:
        return loss(student[None], teacher[None], *labels, *labels, *offsets)

    return call


if __name__ == "__main__":
    main()

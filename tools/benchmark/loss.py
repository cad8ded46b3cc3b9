"""Time and memory of the loss (interface paper, forward and backward) beside plain torch and its own matrix products.

    python tools/benchmark/loss.py --labels 512 --vocab 151936 --teacher-vocab 128256 --shared 109566
    python tools/benchmark/loss.py --labels 4096 --hidden 896 --variants fused,products --dtype bf16
    python tools/benchmark/loss.py --tensor-model-parallel-size 2 --variants logits,fused --json

variants
    dense      plain torch from logits that exist: log_softmax, gather, softmax over U, autograd (one process only)
    logits     cross_tokenizer_loss from the same logits
    fused      fused_cross_tokenizer_loss from what enters the output layers
    products   the bare matrix products that `fused` cannot do without, each done at once: student logits, teacher
               logits of the shared tokens, the logits' gradient times the weight and times the hidden states

seconds     the least of --repeats calls; variants take turns in one process, so their ratios hold on a busy machine
extra MiB   highest resident memory during the first call, less what was resident before it (inputs), a process a
            variant; `less gradients` leaves out the gradients that the call returns
statistics  bytes that all-reduces of one call carry, a label, counted by wrapping torch.distributed

Labels: 9 of 10 segments are one shared token on both sides, the tenth is a unit of two tokens on both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

VARIANTS = ("dense", "logits", "fused", "products")
MIB = 1 << 20


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=512, help="student labels (default: 512)")
    parser.add_argument("--vocab", type=int, default=32000, help="student's vocabulary (default: 32000)")
    parser.add_argument("--teacher-vocab", type=int, help="default: --vocab")
    parser.add_argument("--shared", type=int, help="shared tokens; default: 0.7 of the smaller vocabulary")
    parser.add_argument("--hidden", type=int, default=896, help="hidden size of the student (default: 896)")
    parser.add_argument("--teacher-hidden", type=int, help="default: --hidden")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of hidden states, weights, logits")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch, over all ranks (default: 2)")
    parser.add_argument("--tensor-model-parallel-size", type=int, choices=(1, 2), default=1, help="gloo ranks")
    parser.add_argument("--variants", default="dense,logits,fused,products", help="some of them, by commas")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls a variant (default: 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.teacher_vocab = args.teacher_vocab or args.vocab
    args.teacher_hidden = args.teacher_hidden or args.hidden
    args.shared = args.shared or int(0.7 * min(args.vocab, args.teacher_vocab))
    chosen = args.variants.split(",")
    if not set(chosen) <= set(VARIANTS):
        parser.error(f"--variants {args.variants}: choose from {', '.join(VARIANTS)}")
    if args.tensor_model_parallel_size > 1 and "dense" in chosen:
        chosen.remove("dense")
        print("dense: left out, it runs in one process only", file=sys.stderr)
    if min(args.vocab, args.teacher_vocab) % args.tensor_model_parallel_size:
        parser.error("both vocabularies must be a multiple of --tensor-model-parallel-size")
    if args.shared > min(args.vocab, args.teacher_vocab):
        parser.error(f"--shared {args.shared}: more than the smaller vocabulary")
    args.variants = ",".join(chosen)
    return args


# The parent: one set of ranks for the times, one a variant for the memory


def run_workers(args: argparse.Namespace, mode: str, variants: str) -> dict[str, Any]:
    """What rank 0 prints. Freed memory goes back to the system at once where it is measured."""
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
            for name in ("labels", "vocab", "teacher_vocab", "shared", "hidden", "teacher_hidden", "dtype", "repeats"):
                command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
            command += ["--tensor-model-parallel-size", str(size)]
            workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        outputs = [worker.communicate()[0] for worker in workers]
    failed = [rank for rank, worker in enumerate(workers) if worker.returncode]
    if failed:
        raise SystemExit(f"{mode} of {variants}: rank {failed[0]} ended with code {workers[failed[0]].returncode}")
    return json.loads(outputs[0])


def main() -> None:
    args = parse()
    if args.worker:
        print(json.dumps(work(args)))
        return
    results = run_workers(args, "time", args.variants)
    for variant in args.variants.split(","):
        results[variant] |= run_workers(args, "memory", variant)[variant]
    sizes = ("labels", "vocab", "teacher_vocab", "shared", "hidden", "teacher_hidden", "dtype", "threads")
    report = {name: getattr(args, name) for name in (*sizes, "tensor_model_parallel_size")}
    report["student_logits_mib"] = args.labels * args.vocab * (4 if args.dtype == "fp32" else 2) / MIB
    report["variants"] = results
    if args.json:
        print(json.dumps(report))
        return
    print(", ".join(f"{name} {value}" for name, value in report.items() if name != "variants"))
    print(f"{'variant':10} {'seconds':>9} {'extra MiB':>10} {'less gradients':>15} {'statistics B/label':>19}")
    for name, row in results.items():
        statistics = f"{row['statistics_bytes_per_label']:.1f}" if args.tensor_model_parallel_size > 1 else "-"
        print(
            f"{name:10} {row['seconds']:9.3f} {row['extra_mib']:10.1f} {row['extra_less_gradients_mib']:15.1f} "
            f"{statistics:>19}"
        )
    if "fused" in results and "products" in results:
        ratio = results["fused"]["seconds"] / results["products"]["seconds"]
        share = results["fused"]["extra_less_gradients_mib"] / report["student_logits_mib"]
        print(f"fused / products {ratio:.2f} in time; fused / student logits {share:.3f} in memory (one rank's share)")


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
        results[name]["statistics_bytes_per_label"] = sum(counted) / args.labels
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
    """Collects the bytes of each all-reduce's tensor on this rank, but for gradients of hidden states [n, H]."""

    def __enter__(self) -> list[int]:
        import torch.distributed as dist

        self._dist, self._original, counted = dist, dist.all_reduce, []

        def counting(tensor, *args, **kwargs):
            if tensor.ndim < 2:
                counted.append(tensor.numel() * tensor.element_size())
            return self._original(tensor, *args, **kwargs)

        dist.all_reduce = counting
        return counted

    def __exit__(self, *error: object) -> None:
        self._dist.all_reduce = self._original


def reset_peak() -> int:
    """Bytes that are resident; the kernel's record of the peak starts again from them."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    return status("VmHWM")


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def build(args: argparse.Namespace, variant: str, rank: int, group: Any) -> tuple[Callable[[], None], int]:
    """A call of forward and backward, and the bytes of the gradients it leaves on this rank."""
    import torch

    from megatron_simct.losses import cross_tokenizer_loss, fused_cross_tokenizer_loss, place_shared_head

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    n, size = args.labels, args.tensor_model_parallel_size
    wide_s, wide_t = args.vocab // size, args.teacher_vocab // size
    generator = torch.Generator().manual_seed(0)
    shared_s = torch.randperm(args.vocab, generator=generator)[: args.shared].sort().values
    shared_t = torch.randperm(args.teacher_vocab, generator=generator)[: args.shared]
    pick = torch.randint(args.shared, (n,), generator=generator)
    labels_s, labels_t = shared_s[pick], shared_t[pick]
    segments, at = [], 0
    while at < n:
        width = 2 if len(segments) % 10 == 9 and at + 2 <= n else 1
        segments.append((at, at + width, at, at + width))
        at += width
    sample = {
        "segments": torch.tensor(segments),
        "student_labels": labels_s,
        "teacher_labels": labels_t,
        "shared_student_ids": shared_s,
        "shared_teacher_ids": shared_t,
    }

    def normal(*shape: int, scale: float = 1.0, seed: int = 1) -> torch.Tensor:
        return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)

    if variant in ("dense", "logits"):
        student = normal(n, wide_s, seed=2 + rank, scale=2.0).requires_grad_()
        teacher = normal(n, wide_t, seed=12 + rank, scale=2.0)

        def from_logits() -> None:
            student.grad = None
            if variant == "dense":
                loss = dense_paper(student, teacher, sample)
            else:
                loss = cross_tokenizer_loss(student, teacher, group=group, **sample).loss
            loss.backward()

        return from_logits, student.numel() * student.element_size()

    h_s, h_t = args.hidden, args.teacher_hidden
    hidden, teacher_hidden = normal(n, h_s, seed=3).requires_grad_(), normal(n, h_t, seed=4)
    weight = normal(wide_s, h_s, seed=5 + rank, scale=2 * h_s**-0.5).requires_grad_()
    teacher_weight = normal(wide_t, h_t, seed=15 + rank, scale=2 * h_t**-0.5)
    head = place_shared_head(teacher_weight, shared_s, shared_t, student_width=wide_s, group=group)
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in (hidden, weight))

    def fused() -> None:
        hidden.grad = weight.grad = None
        fused_cross_tokenizer_loss(
            hidden, weight, teacher_hidden, teacher_weight, group=group, shared_head=head, **sample
        ).loss.backward()

    def products() -> None:
        with torch.no_grad():
            logits = hidden @ weight.T
            teacher_hidden @ teacher_weight.T
            teacher_hidden[: len(segments)] @ head.weight.T
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


if __name__ == "__main__":
    main()

"""A teacher in another job beside the same forward passes in this process: the cost of answers and rounding.

    python tools/benchmark/teacher.py --teacher-hf-checkpoint DIR --student-hf-checkpoint DIR --text-file FILE

Paragraphs of the text are the responses. The teacher's job is a separate process on this machine, reached by
--bind; both sides use --threads threads. For each --teacher-hidden-dtype, with hidden states of every
segment's first row (interface paper), and with sums of bytes (interface bytes):

wire           CPU seconds to encode and decode requests and answers, and to encrypt them at the speed that is
               measured below, over CPU seconds of the forward passes; this holds on a busy machine
seconds        the least of --repeats rounds; jobs and this process take turns; `ratio` is over the passes in
               this process
B/label        bytes of one student label on the wire, to the teacher and back; full logits would be 4 V
KL nats        from the teacher's distribution over its vocabulary before rounding to that after it, a row:
               mean and largest; for bytes, over the events of a byte position, rounded to float16
socket MB/s    one ZeroMQ socket alone, in messages of 1 MiB: plain, encrypted (CURVE), and two encrypted ones
               at once
overlap        seconds of a step over those of the slower part, which is either rollout and update, or the
               teacher. The student is a small model with random weights and the student's tokenizer. The
               teacher is a replica that sleeps for a step as long as the student's last rollout and update
               took (a model would compete for the same cores). This is the case that gains most, and in which
               1 is the hardest to reach. serial: nothing overlaps; on_policy: in waves of two prompts;
               one_step_off: in such waves, and one step ahead
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_simct.teacher.forward import HiddenDtype

DTYPES: tuple[HiddenDtype, ...] = ("fp32", "bf16", "int8")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher-hf-checkpoint", required=True, metavar="DIR")
    parser.add_argument(
        "--student-hf-checkpoint", required=True, metavar="DIR", help="only its tokenizer is read"
    )
    parser.add_argument("--text-file", required=True, metavar="FILE")
    parser.add_argument("--samples", type=int, default=16, help="responses (default: 16)")
    parser.add_argument(
        "--words", type=int, default=180, help="words of a prompt and its response together (default: 180)"
    )
    parser.add_argument(
        "--bind", default="tcp://127.0.0.1", help="ipc or tcp://HOST (default: tcp://127.0.0.1)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, each side (default: 1)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default: 3)")
    parser.add_argument(
        "--steps",
        type=int,
        default=8,
        help="training steps of the part overlap; 0: leave it out (default: 8)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args(argv)
    if 0 < args.steps < 4:
        parser.error(f"--steps {args.steps}: at least 4, as the first and the last do not count; or 0")
    return args


def main() -> None:
    args = parse()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    report = {
        "samples": args.samples,
        "threads": args.threads,
        "bind": args.bind,
        "socket_mb_per_s": sockets(),
    }
    report["overlap"] = overlaps(args) if args.steps else []
    report |= measure(args, report["socket_mb_per_s"]["curve"])
    if args.json:
        print(json.dumps(report))
        return
    for name in ("labels", "teacher_tokens", "teacher_vocabulary", "hidden_size", "socket_mb_per_s"):
        print(f"{name}: {report[name]}")
    print(
        f"{'interface':10} {'dtype':6} {'seconds':>8} {'ratio':>6} {'wire':>7} {'B/label to':>11} "
        f"{'back':>8} {'of logits':>10} KL nats"
    )
    for row in report["rows"]:
        kl = f"{row['kl_mean']:.2e} (largest {row['kl_max']:.2e})" if "kl_mean" in row else "-"
        print(
            f"{row['interface']:10} {row['dtype']:6} {row['seconds']:8.3f} {row['ratio']:6.3f} "
            f"{row['wire']:7.4f} {row['request_bytes_per_label']:11.0f} {row['answer_bytes_per_label']:8.0f} "
            f"{row['of_logits']:10.5f} {kl}"
        )
    for row in report["overlap"]:
        print(
            "overlap "
            + " ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{v:12}" for k, v in row.items())
        )


def measure(args: argparse.Namespace, curve_mb_per_s: float) -> dict[str, Any]:
    import torch

    from megatron_simct.alignment import build_alignment_map, load_tokenizer
    from megatron_simct.config.options import ModelConfig, ParallelConfig
    from megatron_simct.loading import build_byte_order, open_model
    from megatron_simct.parallel.initialize import process_groups
    from megatron_simct.records import TeacherNeeds
    from megatron_simct.teacher.forward import TeacherForward, by_length

    torch.set_num_threads(args.threads)
    student = load_tokenizer(args.student_hf_checkpoint)
    teacher = load_tokenizer(args.teacher_hf_checkpoint)
    alignment_map = build_alignment_map(student, teacher)
    texts = paragraphs(Path(args.text_file).read_text(encoding="utf-8"), args.samples, args.words)
    needs = {
        "paper": TeacherNeeds(hidden_rows="first"),
        "bytes": TeacherNeeds(hidden_rows="none", byte_events=True),
    }
    pairs = {name: align(texts, student, teacher, alignment_map, need) for name, need in needs.items()}
    labels = sum(pair.counts["student_labels"] for pair in pairs["paper"])
    rows: list[dict[str, Any]] = []
    with process_groups(ParallelConfig(), seed=0) as groups, tempfile.TemporaryDirectory() as folder:
        options = ModelConfig(hf_checkpoint=args.teacher_hf_checkpoint)
        model = open_model(
            options, ParallelConfig(), groups, teacher, prefix="teacher-", bf16=False, longest=4096
        )
        order = build_byte_order(model, groups, teacher)
        forward = TeacherForward(
            model, groups, vocab_size=teacher.table.num_ids, byte_order=order, packed=True
        )
        jobs = {dtype: start_job(args, Path(folder) / dtype, dtype) for dtype in DTYPES}
        try:
            clients = {dtype: open_client(args, Path(folder) / dtype, model) for dtype in DTYPES}
            for interface, of_interface in pairs.items():
                requests = requests_of(of_interface)
                calls: dict[str, Callable[[], object]] = {
                    dtype: partial(scored_by, client, requests)
                    for dtype, client in clients.items()
                    if interface == "paper" or dtype != "int8"
                }

                def here(requests: Sequence[Any] = requests) -> list[Any]:
                    return forward.run(by_length(requests, max_tokens=16384))

                calls["here"] = here
                before = {dtype: dict(client.counts) for dtype, client in clients.items()}
                seconds = best(calls, args.repeats)
                begin = time.process_time()
                answers = {answer.sample_id: answer for answer in here()}
                forward_cpu_s = time.process_time() - begin
                for dtype in (dtype for dtype in DTYPES if dtype in calls):
                    sent, received = (
                        (clients[dtype].counts[key] - before[dtype][key]) / (args.repeats + 1) / labels
                        for key in ("request_bytes", "answer_bytes")
                    )
                    rows.append(
                        {
                            "interface": interface,
                            "dtype": dtype,
                            "seconds": seconds[dtype],
                            "ratio": seconds[dtype] / seconds["here"],
                            "wire": wire_seconds(requests, answers, dtype, curve_mb_per_s) / forward_cpu_s,
                            "request_bytes_per_label": sent,
                            "answer_bytes_per_label": received,
                            "of_logits": received / (4 * teacher.table.num_ids),
                            **errors(interface, dtype, model, of_interface, answers, teacher.table.num_ids),
                        }
                    )
            for client in clients.values():
                client.close()
        finally:
            for job in jobs.values():
                job.send_signal(signal.SIGTERM)
            for job in jobs.values():
                job.wait(30)
    rows.sort(key=lambda row: (row["interface"] != "paper", DTYPES.index(row["dtype"])))
    return {
        "labels": labels,
        "teacher_tokens": sum(request.num_tokens for request in requests_of(pairs["paper"])),
        "teacher_vocabulary": teacher.table.num_ids,
        "hidden_size": model.config.hidden_size,
        "rows": rows,
    }


def paragraphs(text: str, count: int, size: int) -> list[tuple[str, str]]:
    """For each paragraph, a prompt of 120 characters and a response."""
    words = text.split(" ")
    chunks = [" ".join(words[i : i + size]) for i in range(0, len(words), size)][:count]
    if len(chunks) < count:
        raise SystemExit(f"--text-file: holds {len(chunks)} pieces of {size} words, --samples wants {count}")
    return [(chunk[:120], chunk[120:]) for chunk in chunks]


def align(
    texts: Sequence[tuple[str, str]], student: Any, teacher: Any, alignment_map: Any, needs: Any
) -> list[Any]:
    import numpy as np

    from megatron_simct.alignment.plan import plan_pair
    from megatron_simct.records import Prompt, Rollout

    pairs = []
    for sample_id, (prompt, response) in enumerate(texts):
        ids = student.encode(response.encode()).astype(np.int32)
        pairs.append(
            plan_pair(
                Prompt(
                    sample_id=sample_id,
                    student_ids=student.encode(prompt.encode()).astype(np.int32),
                    teacher_ids=teacher.encode(prompt.encode()).astype(np.int32),
                ),
                Rollout(
                    sample_id=sample_id,
                    weight_version=0,
                    student_ids=ids,
                    logprobs=np.zeros(len(ids), np.float32),
                    finish="length",
                ),
                student=student,
                teacher=teacher,
                alignment_map=alignment_map,
                needs=needs,
            )
        )
    return pairs


def requests_of(pairs: Sequence[Any]) -> list[Any]:
    from megatron_simct.teacher.forward import TeacherRequest

    return [TeacherRequest.of(pair) for pair in pairs]


def start_job(args: argparse.Namespace, run_dir: Path, dtype: str) -> subprocess.Popen:
    from megatron_simct.teacher.endpoints import endpoint_folder, read_endpoints

    command = [
        sys.executable,
        "-m",
        "megatron_simct.serve_teacher",
        "--run-dir",
        str(run_dir),
        "--bind",
        args.bind,
    ]
    command += ["--teacher-hf-checkpoint", args.teacher_hf_checkpoint, "--teacher-hidden-dtype", dtype]
    root = Path(__file__).resolve().parents[2]
    job = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.DEVNULL)
    while not read_endpoints(endpoint_folder(str(run_dir))):
        if job.poll() is not None:
            raise SystemExit(f"the teacher's job ended with code {job.returncode}")
        time.sleep(0.1)
    return job


def open_client(args: argparse.Namespace, run_dir: Path, model: Any) -> Any:
    from megatron_simct.teacher.client import Patience, TeacherClient
    from megatron_simct.teacher.endpoints import CLIENT_KEY, endpoint_folder
    from megatron_simct.teacher.lookout import Lookout

    folder = endpoint_folder(str(run_dir))
    client = TeacherClient(
        lookout=Lookout(folder),
        key_file=folder / CLIENT_KEY,
        fingerprints={"hidden_size": model.config.hidden_size},
        patience=Patience(timeout_s=120),
        window_tokens=1 << 20,
        where=str(run_dir),
    )
    client.start()
    client.meet()
    return client


def scored_by(client: Any, requests: Sequence[Any]) -> list[Any]:
    from megatron_simct.teacher.payload import read_scored

    for request in requests:
        client.submit(request)
    return [read_scored(client.next()[1]) for _ in requests]


def wire_seconds(
    requests: Sequence[Any], answers: dict[int, Any], dtype: HiddenDtype, curve_mb_per_s: float
) -> float:
    """CPU seconds of both ends, without the model."""
    from megatron_simct.teacher.payload import read_score, read_scored, score_message, scored_message
    from megatron_simct.teacher.wire import decode, encode, num_bytes

    size = 0
    begin = time.process_time()
    for request in requests:
        there = encode(score_message(0, request))
        read_score(decode(there))
        back = encode(scored_message(0, answers[request.sample_id], dtype))
        read_scored(decode(back))
        size += num_bytes(there) + num_bytes(back)
    return time.process_time() - begin + size / 1e6 / curve_mb_per_s


def best(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The least seconds of each. They take turns, so that load on the machine affects all of them."""
    seconds = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return seconds


def errors(
    interface: str,
    dtype: HiddenDtype,
    model: Any,
    pairs: Sequence[Any],
    answers: dict[int, Any],
    vocab_size: int,
) -> dict[str, float]:
    """KL between the distributions that the student computes from the answer and from an exact
    one: mean and largest.
    """
    import torch

    from megatron_simct.losses.vocab_parallel import soft_cap
    from megatron_simct.teacher.forward import rounded

    if dtype == "fp32":
        return {}
    values = []
    for pair in pairs:
        answer = answers[pair.sample_id]
        if interface == "paper":
            weight = model.output_weight[:vocab_size]
            exact, coarse = (
                torch.log_softmax(soft_cap(h @ weight.T, model.logit_softcap).double(), dim=1)
                for h in (answer.hidden, rounded(answer.hidden, dtype))
            )
            values.append((exact.exp() * (exact - coarse)).sum(1))
        else:
            position = torch.from_numpy(pair.byte_events.slot_position).long()
            events = torch.from_numpy(pair.byte_events.slot_event) != 258
            exact, coarse = (
                log_shares(x.double()[events], position[events], pair.byte_events.num_positions)
                for x in (answer.byte_logprobs, answer.byte_logprobs.half())
            )
            terms = torch.where(exact.isinf(), 0.0, exact.exp() * (exact - coarse))
            values.append(
                torch.zeros(pair.byte_events.num_positions).double().index_add(0, position[events], terms)
            )
    kl = torch.cat(values)
    return {"kl_mean": float(kl.mean()), "kl_max": float(kl.max())}


def log_shares(log_masses: Any, position: Any, num_positions: int) -> Any:
    """Log shares, normalized over the events of each position."""
    import torch

    totals = torch.zeros(num_positions, dtype=log_masses.dtype).index_add(0, position, log_masses.exp())
    return log_masses - totals.log()[position]


# The parts of a step at the same time

SCHEDULES = {
    "serial": (),
    "on_policy": ("--rollout-wave-size", "2"),
    "one_step_off": ("--rollout-wave-size", "2", "--schedule", "one_step_off"),
}
PROMPTS = 8


def overlaps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a step, of its rollout and update, and of the teacher: means over all steps except
    the first and last.
    """
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_small_student(folder / "student", args)
        texts = paragraphs(Path(args.text_file).read_text(encoding="utf-8"), PROMPTS, 30)
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p + r}) + "\n" for p, r in texts))
        for schedule in SCHEDULES:
            row = in_a_process(train_beside, args, folder, schedule)
            slower = max(row["rollout_and_update"], row["teacher"])
            rows.append({"schedule": schedule, **row, "ratio": row["step"] / slower})
    return rows


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a separate process: each training run begins with a fresh Megatron."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def write_small_student(folder: Path, args: argparse.Namespace) -> None:
    from megatron_simct.alignment import load_tokenizer

    fields = {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": load_tokenizer(args.student_hf_checkpoint).table.num_ids,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "initializer_range": 0.02,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))


def train_beside(args: argparse.Namespace, folder: Path, schedule: str) -> dict[str, float]:
    """A run of the student beside a teacher that sleeps, each in a separate process."""
    import torch

    from megatron_simct.config.flags import parse_config
    from megatron_simct.job import build_job
    from megatron_simct.parallel.initialize import process_groups
    from megatron_simct.teacher.endpoints import endpoint_folder, read_endpoints
    from megatron_simct.train import train

    torch.set_num_threads(args.threads)
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    context = multiprocessing.get_context("fork")
    pace, busy, stop = context.Value("d", 0.1), context.Value("d", 0.0), context.Event()
    teacher = context.Process(target=sleeping_teacher, args=(run_dir, pace, busy, stop))
    teacher.start()
    while not read_endpoints(endpoint_folder(str(run_dir))):
        assert teacher.is_alive(), "the teacher has ended"
        time.sleep(0.05)
    config = parse_config(
        [
            *("--hf-checkpoint", str(folder / "student"), "--tokenizer-model", args.student_hf_checkpoint),
            *("--teacher-hf-checkpoint", args.teacher_hf_checkpoint, "--teacher-endpoint", str(run_dir)),
            *(
                "--simct-interface",
                "bytes",
                "--prompt-data",
                str(folder / "prompts.jsonl"),
                "--run-dir",
                str(run_dir),
            ),
            *(
                "--rollout-batch-size",
                str(PROMPTS),
                "--micro-batch-size",
                "4",
                "--rollout-max-response-len",
                "32",
            ),
            *("--train-iters", str(args.steps), "--log-interval", str(args.steps), *SCHEDULES[schedule]),
        ]
    )
    try:
        with process_groups(config.parallel, seed=0) as groups:
            job = build_job(config, groups)
            record, at_step = job.monitor.step, []

            def step(*of_step: Any, **more: Any) -> None:
                seconds = of_step[4]
                pace.value = (seconds.get("rollout", 0.0) + seconds["update"]) / PROMPTS
                at_step.append(busy.value)
                record(*of_step, **more)

            job.monitor.step = step  # type: ignore[method-assign]
            train(job)
    finally:
        stop.set()
        teacher.join(30)
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][1:-1]

    def mean(*keys: str) -> float:
        return sum(step[key] for step in steps for key in keys) / len(steps)

    return {
        "step": mean("seconds"),
        "rollout_and_update": mean("seconds_rollout", "seconds_update"),
        "teacher": (at_step[-2] - at_step[0]) / len(steps),
        "alignment_left": mean("seconds_alignment"),
    }


def sleeping_teacher(run_dir: Path, pace: Any, busy: Any, stop: Any) -> None:
    """A replica without a model. It sleeps `pace` seconds for each sample, `busy` seconds
    in all, until `stop`.
    """
    import torch

    from megatron_simct.records import ScoredPair
    from megatron_simct.teacher.endpoints import endpoint_folder
    from megatron_simct.teacher.payload import scored_message
    from megatron_simct.teacher.service import ReplicaServer

    server = ReplicaServer(
        endpoint_folder(str(run_dir)),
        name="sleeping",
        address="ipc",
        number=0,
        keys=None,
        fingerprints={},
        vocab_size=1 << 30,
        max_tokens=1 << 20,
        life="one",
    )
    server.start()
    while not stop.is_set():
        for work in server.take(1, 0.05):
            begin = time.perf_counter()
            time.sleep(pace.value)
            zeros = torch.zeros(len(work.request.label_ids))
            assert work.request.byte_side is not None, "the student asks for `bytes`"
            answer = ScoredPair(
                sample_id=work.request.sample_id,
                own_logit=zeros,
                lse=zeros,
                hidden=None,
                byte_logprobs=torch.zeros(len(work.request.byte_side.last_row)),
            )
            server.answer(work, scored_message(work.number, answer, "bf16"))
            busy.value += time.perf_counter() - begin
    server.drain()
    server.close()


# One socket


def sockets(count: int = 200) -> dict[str, float]:
    """Messages of 1 MiB from another process; two_curve: from two processes, to two
    sockets of two threads.
    """
    return {
        name: round(socket_speed(curve, number, count), 1)
        for name, curve, number in (("plain", False, 1), ("curve", True, 1), ("two_curve", True, 2))
    }


def socket_speed(curve: bool, number: int, count: int) -> float:
    import zmq

    server, client = zmq.curve_keypair(), zmq.curve_keypair()
    context = zmq.Context(io_threads=number)
    receivers, senders = [], []
    for _ in range(number):
        receiver = context.socket(zmq.PULL)
        if curve:
            receiver.curve_server, receiver.curve_publickey, receiver.curve_secretkey = True, *server
        receivers.append(receiver)
        arguments = (receiver.bind_to_random_port("tcp://127.0.0.1"), curve, server[0], client, count + 1)
        senders.append(multiprocessing.get_context("fork").Process(target=send, args=arguments))
    for sender in senders:
        sender.start()
    for receiver in receivers:
        receiver.recv()
    begin = time.perf_counter()
    for _ in range(count):
        for receiver in receivers:
            receiver.recv()
    seconds = time.perf_counter() - begin
    for sender in senders:
        sender.join()
    context.destroy(0)
    return number * count * (1 << 20) / 1e6 / seconds


def send(port: int, curve: bool, server_public: bytes, client: tuple[bytes, bytes], count: int) -> None:
    import zmq

    context = zmq.Context()
    sender = context.socket(zmq.PUSH)
    if curve:
        sender.curve_serverkey, (sender.curve_publickey, sender.curve_secretkey) = server_public, client
    sender.connect(f"tcp://127.0.0.1:{port}")
    message = os.urandom(1 << 20)
    for _ in range(count):
        sender.send(message)
    sender.close(120_000)
    context.term()


if __name__ == "__main__":
    main()

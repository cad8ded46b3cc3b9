"""The teacher's job: answers students' requests until SIGTERM. Start it with torchrun, or directly as one
process.

    torchrun --nproc-per-node 8 -m megatron_simct.serve_teacher --tensor-model-parallel-size 8 \
        --teacher-hf-checkpoint TEACHER_DIR --run-dir runs/first
    torchrun ... -m megatron_simct.train ... --teacher-endpoint runs/first

With --engine-endpoint the model runs in a vLLM server, and this job holds its LM head only
(teacher/engine_front.py):

    python -m megatron_simct.serve_teacher --engine-endpoint http://HOST:8000 \
        --teacher-hf-checkpoint TEACHER_DIR --run-dir runs/first

The job has its own torchrun world and layout. Each data-parallel replica runs a server; more replicas may be
started later with the same --run-dir, and each may be restarted. On SIGTERM a replica finishes the requests
that its model has, hands back the others, and ends with exit code 0; on a second SIGTERM, or one while it
loads, it ends at once.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Sequence
from functools import partial

from megatron_simct.config.command_line import INTERRUPTED, command, loading

with loading("megatron_simct.serve_teacher"):
    from megatron_simct.loading import build_byte_order, describe_teacher, open_model, open_tokenizer

from megatron_simct.alignment import Tokenizer, report_notes
from megatron_simct.alignment.map_files import load_map
from megatron_simct.config.environment import Environment
from megatron_simct.config.flags import SERVE_TEACHER, parse_config
from megatron_simct.config.options import TeacherConfig
from megatron_simct.engine_client import EngineClient, Served
from megatron_simct.models.families import Architecture, read_architecture
from megatron_simct.models.head import Head
from megatron_simct.models.hf_hashes import check_hashes
from megatron_simct.models.layout import token_multiple
from megatron_simct.models.tensor_files import find_weights
from megatron_simct.parallel.initialize import Groups, process_groups
from megatron_simct.stopping import EndSignals
from megatron_simct.teacher.endpoints import check_bind, endpoint_folder, make_keys, this_host
from megatron_simct.teacher.engine_front import (
    Probe,
    Refused,
    Score,
    by_head,
    nothing,
    open_head,
    read_probe_text,
    serve_engine,
    wait_for_engine,
)
from megatron_simct.teacher.engine_logprobs import LogprobProbe, refusal, rows_of
from megatron_simct.teacher.engine_logprobs import score as score_of_logprobs
from megatron_simct.teacher.engine_pool import Ask, EnginePool, hidden_states
from megatron_simct.teacher.fingerprints import fingerprints
from megatron_simct.teacher.forward import TeacherForward
from megatron_simct.teacher.service import ReplicaServer, serve

PROGRAM = "megatron_simct.serve_teacher"


def serve_teacher(config: TeacherConfig, groups: Groups, signals: EndSignals) -> None:
    """Loads the model, starts the server, and answers requests. Raises ValueError, naming the flag, if the
    configuration is invalid."""
    config.check()
    serving = config.serving
    tokenizer = open_tokenizer(config.teacher, prefix="teacher-")
    if groups.is_first_rank:
        report_notes(tokenizer)
    map_fingerprint = None
    if serving.simct_alignment_map is not None:
        try:
            map_fingerprint = load_map(serving.simct_alignment_map, teacher=tokenizer.table).fingerprint
        except ValueError as error:
            raise ValueError(f"--simct-alignment-map: {error}") from None
    if groups.owns_teacher_socket:
        check_bind(serving.bind, number=groups.dp_rank)
    if config.engine.endpoint:
        _serve_engine(config, groups, signals, tokenizer, map_fingerprint)
    else:
        _serve_model(config, groups, signals, tokenizer, map_fingerprint)


def _serve_model(
    config: TeacherConfig,
    groups: Groups,
    signals: EndSignals,
    tokenizer: Tokenizer,
    map_fingerprint: str | None,
) -> None:
    """Answers requests with a model on this job's ranks."""
    options, serving, flag = config.teacher, config.serving, "--teacher-hf-checkpoint"
    architecture = read_architecture(options.folder, flag=flag)
    if options.pretrained_checkpoint is None and find_weights(options.folder, flag=flag) is None:
        raise ValueError(f"{flag} {options.hf_checkpoint}: has no weights, but a teacher needs them")
    model = open_model(
        options,
        config.parallel,
        groups,
        tokenizer,
        prefix="teacher-",
        bf16=serving.bf16,
        attention_backend=serving.attention_backend,
        longest=_longest(config),
        verified=serving.verify_checkpoint,
    )
    forward = TeacherForward(
        model,
        groups,
        vocab_size=tokenizer.table.num_ids,
        byte_order=build_byte_order(model, groups, tokenizer),
        hidden_dtype=serving.teacher_hidden_dtype,
        packed=True,
        multiple_of=token_multiple(
            config.parallel, groups.device, context_parallel_size=config.parallel.context_parallel_size
        ),
        context=groups.cp,
    )
    server = None
    signals.defer(groups.device)
    if groups.owns_teacher_socket:
        longest = min(serving.max_tokens_per_batch, architecture.index_length or serving.max_tokens_per_batch)
        server = _start_server(
            config, groups, signals, architecture, tokenizer, map_fingerprint, longest=longest
        )
    serve(
        server,
        forward,
        groups,
        max_tokens=serving.max_tokens_per_batch,
        hidden_dtype=serving.teacher_hidden_dtype,
        stop=lambda: signals.received,
    )
    if server is not None:
        _say_what_was_done(server, groups)


def _serve_engine(
    config: TeacherConfig,
    groups: Groups,
    signals: EndSignals,
    tokenizer: Tokenizer,
    map_fingerprint: str | None,
) -> None:
    """Answers requests with hidden states of engines and this job's LM head, or with
    log-probabilities of servers.
    """
    options, serving, engine, flag = config.teacher, config.serving, config.engine, "--teacher-hf-checkpoint"
    signals.defer(groups.device)
    where, text = f"{flag} {options.folder}", read_probe_text(engine.probe_text)
    hidden_size = 0
    ask: Ask
    score: Score
    refused: Refused
    if engine.answers == "hidden_states":
        if serving.verify_checkpoint:
            check_hashes(options.folder, listed=options.hf_sha256, prefix="teacher-")
        head, scorer, norm = open_head(config, tokenizer, groups.device)
        hidden_size = head.hidden_size
        probe: Probe | LogprobProbe = Probe(head, scorer, tokenizer, norm=norm, text=text, where=where)
        ask, score, refused = hidden_states, by_head(scorer), nothing
    else:
        probe = LogprobProbe(tokenizer, field=engine.answers, text=text, where=where)
        ask, score = partial(rows_of, field=engine.answers), score_of_logprobs
        refused = partial(refusal, field=engine.answers)
    clients = [
        EngineClient(url, hidden_size=hidden_size, dtype=engine.hidden_dtype, timeout_s=engine.timeout_s)
        for url in engine.endpoint
    ]
    first = wait_for_engine(clients, probe, minutes=engine.start_minutes, stop=lambda: signals.received)
    if first is None:
        return
    served = probe.served
    assert served is not None, "at least one engine has passed the checks"
    said = f" engine {first.address} serves {served.root} (vLLM {served.version}): "
    said += f"the probe text has {probe.mean_nats:.3f} nats a token"
    if engine.check_endpoint is not None and isinstance(probe, Probe):
        difference = probe.compare(first, EngineClient(engine.check_endpoint, timeout_s=engine.timeout_s))
        said += f", at most {difference:.2g} different from {engine.check_endpoint}"
    print(said, flush=True)
    longest = min(serving.max_tokens_per_batch, served.max_model_len or serving.max_tokens_per_batch)
    described = describe_teacher(options.folder, flag=flag)
    server = _start_server(
        config, groups, signals, described, tokenizer, map_fingerprint, served=served, longest=longest
    )
    serve_engine(
        server,
        EnginePool(clients, probe=probe, ask=ask),
        score,
        refused=refused,
        replicas=len(clients),
        max_tokens=serving.max_tokens_per_batch,
        hidden_dtype=serving.teacher_hidden_dtype,
        stop=lambda: signals.received,
    )
    _say_what_was_done(server, groups)


def _start_server(
    config: TeacherConfig,
    groups: Groups,
    signals: EndSignals,
    described: Architecture | Head,
    tokenizer: Tokenizer,
    map_fingerprint: str | None,
    *,
    served: Served | None = None,
    longest: int | None = None,
) -> ReplicaServer:
    """Registers this replica. longest: the most tokens of a request; default: --max-tokens-per-batch."""
    options, serving = config.teacher, config.serving
    assert serving.run_dir is not None, "check() refuses a job without --run-dir"
    folder = endpoint_folder(serving.run_dir)
    marks = fingerprints(
        options, described, tokenizer, longest=_longest(config), alignment_map=map_fingerprint
    )
    if served is not None:
        marks["engine"] = f"{served.root}, vLLM {served.version}"
    server = ReplicaServer(
        folder,
        name=f"{this_host()}-{os.getpid()}",
        address=serving.bind,
        number=groups.dp_rank,
        keys=make_keys(folder) if serving.bind.startswith("tcp://") else None,
        fingerprints=marks,
        vocab_size=tokenizer.table.num_ids,
        max_tokens=longest or serving.max_tokens_per_batch,
        life=uuid.uuid4().hex,
    )
    signals.last = server.withdraw
    server.start()
    print(f" teacher replica {groups.dp_rank} of {groups.dp_size} at {server.endpoint.address}", flush=True)
    return server


def _longest(config: TeacherConfig) -> int:
    return config.serving.rollout_max_prompt_len + config.serving.rollout_max_response_len


def _say_what_was_done(server: ReplicaServer, groups: Groups) -> None:
    numbers = server.status()
    kept = ("requests", "tokens", "handed_back", "malformed", "refused", "failed_handshakes")
    print(
        f" teacher replica {groups.dp_rank} stops: " + ", ".join(f"{numbers[k]} {k}" for k in kept),
        flush=True,
    )


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> None:
    """Ends on SIGTERM or Ctrl-C, which are not errors after the model is loaded."""
    config = parse_config(argv, SERVE_TEACHER)
    # With exit code 0 torchrun does not restart the processes.
    first = Environment.read().rank == 0
    interrupted = f"{PROGRAM}: interrupted\n" if first else ""
    stopped = " SIGTERM: the teacher exits immediately\n" if first else ""
    endings = {signal.SIGINT: (INTERRUPTED, interrupted), signal.SIGTERM: (0, stopped)}
    signals = EndSignals(endings, again_ends=True)
    with process_groups(config.parallel, seed=0, bf16=config.serving.bf16) as groups:
        serve_teacher(config, groups, signals)


if __name__ == "__main__":
    sys.exit(main())

"""The teacher's job: answers students' requests until SIGTERM. Start it with torchrun, or directly as one process.

    torchrun --nproc-per-node 8 -m megatron_simct.serve_teacher --tensor-model-parallel-size 8 \
        --teacher-hf-checkpoint TEACHER_DIR --run-dir runs/first
    torchrun ... -m megatron_simct.train ... --teacher-endpoint runs/first

It has a torchrun world and a layout of its own. Each data-parallel replica opens a door of its own; more replicas may
be started later, in the same --run-dir, and any of them may be restarted. On SIGTERM a replica finishes what its model
holds, hands back the rest, and ends with exit code 0; on one more it ends at once, as on the first while it loads.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Sequence

from megatron_simct.command_line import INTERRUPTED, command  # isort: skip  (before what takes seconds to load)
from megatron_simct.alignment.map_files import load_map
from megatron_simct.arguments import SERVE_TEACHER, parse_config
from megatron_simct.config import TeacherConfig
from megatron_simct.loading import build_byte_order, open_model, open_tokenizer
from megatron_simct.models.families import read_architecture
from megatron_simct.models.hf_load import find_weights
from megatron_simct.parallel.environment import Environment
from megatron_simct.parallel.initialize import Groups, process_groups
from megatron_simct.stopping import EndSignals
from megatron_simct.teacher.endpoints import check_bind, endpoint_folder, make_keys, this_host
from megatron_simct.teacher.fingerprints import fingerprints
from megatron_simct.teacher.forward import TeacherForward
from megatron_simct.teacher.service import Door, serve

PROGRAM = "megatron_simct.serve_teacher"


def serve_teacher(config: TeacherConfig, groups: Groups, signals: EndSignals) -> None:
    """Load the model, open the door, answer. ValueError, naming the flag, for whatever cannot work."""
    config.check()
    options, serving, flag = config.teacher, config.serving, "--teacher-hf-checkpoint"
    architecture = read_architecture(options.folder, flag=flag)
    if options.pretrained_checkpoint is None and find_weights(options.folder, flag=flag) is None:
        raise ValueError(f"{flag} {options.hf_checkpoint}: has no weights; a teacher needs some")
    tokenizer = open_tokenizer(options, prefix="teacher-")
    map_fingerprint = None
    if serving.simct_alignment_map is not None:
        try:
            map_fingerprint = load_map(serving.simct_alignment_map, teacher=tokenizer.table).fingerprint
        except ValueError as error:
            raise ValueError(f"--simct-alignment-map: {error}") from None
    if groups.meets_teacher:
        check_bind(serving.bind, number=groups.dp_rank)
    longest = serving.rollout_max_prompt_len + serving.rollout_max_response_len
    model = open_model(
        options, config.parallel, groups, tokenizer, prefix="teacher-", bf16=serving.bf16, longest=longest
    )
    forward = TeacherForward(
        model,
        groups,
        vocab_size=tokenizer.table.num_ids,
        byte_order=build_byte_order(model, groups, tokenizer),
        hidden_dtype=serving.teacher_hidden_dtype,
    )
    door = None
    signals.remember(groups.device)
    if groups.meets_teacher:
        assert serving.run_dir is not None, "check() refuses a job without --run-dir"
        folder = endpoint_folder(serving.run_dir)
        door = Door(
            folder,
            name=f"{this_host()}-{os.getpid()}",
            address=serving.bind,
            number=groups.dp_rank,
            keys=make_keys(folder) if serving.bind.startswith("tcp://") else None,
            fingerprints=fingerprints(options, architecture, tokenizer, longest=longest, alignment_map=map_fingerprint),
            vocab_size=tokenizer.table.num_ids,
            max_tokens=serving.max_tokens_per_batch,
            life=uuid.uuid4().hex,
        )
        signals.last = door.vanish
        door.start()
        print(f" teacher replica {groups.dp_rank} of {groups.dp_size} at {door.endpoint.address}", flush=True)
    serve(
        door,
        forward,
        groups,
        max_tokens=serving.max_tokens_per_batch,
        hidden_dtype=serving.teacher_hidden_dtype,
        stop=lambda: signals.told,
    )
    if door is not None:
        numbers = door.status()
        kept = ("requests", "tokens", "handed_back", "malformed", "refused", "strangers")
        print(f" teacher replica {groups.dp_rank} stops: " + ", ".join(f"{numbers[k]} {k}" for k in kept), flush=True)


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> None:
    """Ends by SIGTERM or Ctrl-C, which are no errors once the model is loaded."""
    config = parse_config(argv, SERVE_TEACHER)
    # With exit code 0 torchrun does not start again what was told to end.
    first = Environment.read().rank == 0
    interrupted = f"{PROGRAM}: interrupted\n" if first else ""
    stopped = " SIGTERM: the teacher ends at once\n" if first else ""
    endings = {signal.SIGINT: (INTERRUPTED, interrupted), signal.SIGTERM: (0, stopped)}
    signals = EndSignals(endings, again_ends=True)
    with process_groups(config.parallel, seed=0) as groups:
        serve_teacher(config, groups, signals)


if __name__ == "__main__":
    sys.exit(main())

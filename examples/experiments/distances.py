"""Distance of a student from its teacher on held-out solutions after their prompts, for each text.

    python examples/experiments/distances.py STUDENT_DIR TEACHER_DIR --held-out held_out.jsonl --output
        distances.json

transformers runs both folders; megatron_simct.losses compares them, as in training. The output has lists with
one number for each text: sums, and their divisors:
    nats                           the student's, of the solution              nats_count: bytes
    bytes_{reverse,forward}_kl     of the next byte, at every byte and the end   .._count: bytes
    strict_{reverse,forward}_kl    over the shared tokens, at 1:1 positions, the end too  .._count: positions
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_simct.files import write_whole

Lists = dict[str, list[float]]


def distances(student_folder: str, teacher_folder: str, rows: Sequence[dict[str, str]]) -> Lists:
    """The lists, in the order of `rows` with keys prompt and response."""
    import numpy as np
    import torch
    import transformers

    from megatron_simct.alignment import align, build_alignment_map, load_tokenizer
    from megatron_simct.config.options import InterfaceConfig
    from megatron_simct.data.rendering import render_prompt
    from megatron_simct.losses import Logits, Response, SharedVocabulary, cross_tokenizer_loss

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folders = {"student": student_folder, "teacher": teacher_folder}
    tokenizers = {side: load_tokenizer(folder) for side, folder in folders.items()}
    models = {
        side: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for side, folder in folders.items()
    }
    tables = {side: tokenizer.table for side, tokenizer in tokenizers.items()}
    shared = build_alignment_map(tokenizers["student"], tokenizers["teacher"])
    pair = SharedVocabulary(
        student_ids=torch.from_numpy(shared.student_ids.astype(np.int64)),
        teacher_ids=torch.from_numpy(shared.teacher_ids.astype(np.int64)),
        stop_student_id=shared.stop_student_id,
        stop_teacher_ids=shared.stop_teacher_ids,
        tables=(tables["student"], tables["teacher"]),
    )
    found: Lists = {}

    def add(name: str, total: float, count: float) -> None:
        found.setdefault(name, []).append(round(float(total), 6))
        found.setdefault(f"{name}_count", []).append(int(count))

    for row in rows:
        response, logits, labels = row["response"].encode(), {}, {}
        for side, tokenizer in tokenizers.items():
            prompt = render_prompt(row["prompt"], tokenizer)
            labels[side] = np.append(tokenizer.encode(response), np.int32(tokenizer.table.stop_ids[0]))
            ids = torch.from_numpy(np.concatenate([prompt, labels[side][:-1]]).astype(np.int64))[None]
            with torch.no_grad():
                rows_of_labels = models[side](ids, logits_to_keep=len(labels[side])).logits[0]
            logits[side] = rows_of_labels[:, : tokenizer.table.num_ids]
        ids = {side: torch.from_numpy(value.astype(np.int64)) for side, value in labels.items()}
        nats = torch.nn.functional.cross_entropy(logits["student"], ids["student"], reduction="none").double()
        add("nats", nats[:-1].sum(), len(response))
        alignment = align(tables["teacher"], labels["teacher"], tables["student"], labels["student"])
        ts, te, ss, se = alignment.segments.T
        one_to_one = (te - ts == 1) & (se - ss == 1)
        for interface in ("bytes", "strict"):
            for divergence in ("reverse_kl", "forward_kl"):
                with torch.no_grad():
                    output = cross_tokenizer_loss(
                        Logits(logits["student"]),
                        Logits(logits["teacher"]),
                        pair,
                        Response(
                            segments=torch.from_numpy(alignment.segments[one_to_one].astype(np.int64)),
                            student_labels=ids["student"],
                            teacher_labels=ids["teacher"],
                        ),
                        InterfaceConfig(interface=interface, divergence=divergence),
                    )
                count = len(response) if interface == "bytes" else int(one_to_one.sum())
                add(f"{interface}_{divergence}", output.sum, count)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("student", metavar="STUDENT_DIR")
    parser.add_argument("teacher", metavar="TEACHER_DIR")
    parser.add_argument(
        "--held-out", type=Path, required=True, metavar="FILE", help="JSONL file with prompt and response"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file to write")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.held_out.read_text(encoding="utf-8").split("\n") if line]
    found = distances(options.student, options.teacher, rows)
    write_whole(options.output, json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

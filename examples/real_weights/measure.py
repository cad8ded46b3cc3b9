"""Measurements of a Hugging Face folder by transformers: loss on held-out solutions after their
prompts, and continuations.

  python examples/real_weights/measure.py DIR --held-out held_out.jsonl --output measured.json [--continue 2]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.progress import track

from megatron_simct.files import write_whole


def measure(folder: str, rows: list[dict[str, str]], num_continued: int) -> dict[str, Any]:
    """nats_per_byte of the solutions; loss: nats a label, stop tokens included, as the
    trainer defines it; texts.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    nats = stop_nats = 0.0
    num_bytes = num_labels = 0
    for row in track(rows, f"{Path(folder).name:20}", disable=not sys.stdout.isatty()):
        prompt = tokenizer(row["prompt"]).input_ids
        labels = [*tokenizer(row["response"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + labels[:-1]]), logits_to_keep=len(labels)).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none").double()
        nats += float(losses[:-1].sum())
        stop_nats += float(losses[-1])
        num_bytes += len(row["response"].encode())
        num_labels += len(labels)
    texts = []
    for row in rows[:: max(1, len(rows) // max(1, num_continued))][:num_continued]:
        ids = tokenizer(row["prompt"], return_tensors="pt")
        answer = model.generate(**ids, max_new_tokens=48, do_sample=False)[0, ids.input_ids.shape[1] :]
        texts.append(
            {"prompt": row["prompt"], "continuation": tokenizer.decode(answer, skip_special_tokens=True)}
        )
    return {"nats_per_byte": nats / num_bytes, "loss": (nats + stop_nats) / num_labels, "texts": texts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR", help="Hugging Face folder")
    parser.add_argument(
        "--held-out", type=Path, required=True, metavar="FILE", help="JSONL file with prompt and response"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument(
        "--continue",
        type=int,
        default=0,
        metavar="N",
        dest="num_continued",
        help="number of prompts to continue",
    )
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.held_out.read_text(encoding="utf-8").split("\n") if line]
    result = measure(options.folder, rows, options.num_continued)
    write_whole(options.output, json.dumps(result, indent=1) + "\n")
    print(
        f" {options.folder}: {result['nats_per_byte']:.4f} nats a byte, loss {result['loss']:.4f}", flush=True
    )


if __name__ == "__main__":
    main()

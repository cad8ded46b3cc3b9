"""tools/evaluate.py beside lm-eval: the same responses get the same grades, and the same model gives
the same responses.

    python -m tests.end_to_end.lm_eval_harness --gsm8k test.jsonl --mbpp sanitized-mbpp.json --model DIR

1. Right, wrong and badly ended responses, made from the data sets' own solutions, go through lm-eval's tasks
   gsm8k, humaneval and mbpp (zero-shot, its prompts, filters and metrics) and through
   tools/evaluate.py --responses.
2. A model is converted from a Hugging Face folder to a checkpoint and back. On the export lm-eval's `hf`
   backend (transformers) and tools/evaluate.py (the engine, TP3) answer the first problems of GSM8K greedily,
   and both are graded.

Every grade of every problem must be equal. Otherwise the exit code is 1, and the first differences are
printed. lm-eval runs programs with a metric that is downloaded from a hub. Here a stand-in runs each
in a child process.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
METRICS = {
    "gsm8k": {"exact_match,strict-match": "strict_match", "exact_match,flexible-extract": "flexible_extract"},
    "humaneval": {"pass@1,create_test": "pass"},
    "mbpp": {"pass_at_1,none": "pass"},
}
"""lm-eval's name of each metric, and ours."""
PROGRAM_S = 20
TP = 3
"""SmolLM2-135M has 9 heads, and 3 of keys and values."""

Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gsm8k", type=Path, metavar="FILE", help="test.jsonl of GSM8K; without it GSM8K is left out"
    )
    parser.add_argument(
        "--mbpp", type=Path, metavar="FILE", help="sanitized-mbpp.json; without it MBPP is left out"
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="Hugging Face folder; without it part 2 is left out"
    )
    parser.add_argument("--rows", type=int, default=300, help="of GSM8K and of MBPP, for part 1")
    parser.add_argument("--questions", type=int, default=12, help="of GSM8K, for part 2")
    parser.add_argument("--max-response-len", type=int, default=48, help="tokens, for part 2")
    options = parser.parse_args()
    import evaluate

    evaluate.load = lambda name: SimpleNamespace(compute=_run_programs)
    with TemporaryDirectory() as folder:
        work = Path(folder)
        compare_grades("humaneval", _human_eval(), work)
        if options.gsm8k:
            rows = _json_lines(options.gsm8k)
            compare_grades("gsm8k", rows[: options.rows], work)
            if options.model:
                compare_model(options.model, rows[: options.questions], options.max_response_len, work)
        if options.mbpp:
            # lm-eval expects the unsanitized file: `text`, three tests, no imports.
            rows = [
                {**row, "text": row["prompt"]}
                for row in json.loads(options.mbpp.read_text())
                if len(row["test_list"]) == 3 and not row["test_imports"]
            ]
            compare_grades("mbpp", rows[: options.rows], work)


# 1. The same responses


def compare_grades(name: str, rows: Rows, work: Path) -> None:
    """Grade made-up responses to the rows with both."""
    chance = random.Random(name)
    responses = [_made_up(name, row, chance) for row in rows]
    theirs, _ = lm_eval_grades(name, rows, work, responses=responses)
    given = work / f"{name}_responses.jsonl"
    ids = [row["task_id"] if "task_id" in row else number for number, row in enumerate(rows)]
    _write_lines(
        given,
        [{"problem_id": str(i), "response": response} for i, response in zip(ids, responses, strict=True)],
    )
    ours = our_grades(name, rows, work / f"{name}_graded", "--responses", str(given))
    _report(f"{name}, made-up responses", theirs, ours)


def _made_up(name: str, row: dict[str, Any], chance: random.Random) -> str:
    """A response of one of several kinds, from the row's solution."""
    if name == "gsm8k":
        steps, answer = row["answer"].rsplit("#### ", 1)
        wrong = str(int(answer.replace(",", "")) + 1)
        return chance.choice(
            [
                f" {row['answer']}",
                f" {steps}#### {wrong}",
                f" {row['answer']}\n\nQuestion: How many are 2 and 2?\nAnswer: #### 4",
                f" The answer is ${answer}.",
                f" {steps}#### ${answer}",
                f" {steps}#### {answer}.00",
                f" It is {answer}, not {wrong}",
                f" {steps}#### {answer}</s> 7",
                " I do not know.",
                "",
            ]
        )
    code = row["canonical_solution"] if name == "humaneval" else row["code"]
    ends = ("\nprint('done')", "\ndef more(:") if name == "humaneval" else ("\n[DONE]\nbroken(", "[DONE]")
    nothing = "    pass" if name == "humaneval" else "def f(:"
    mutated = re.sub(r"return (.+)\s*\Z", r"return [\1]\n", code)
    return chance.choice([code, code + chance.choice(ends), mutated, code[: len(code) // 2], nothing])


# 2. The same model


def compare_model(model: Path, rows: Rows, length: int, work: Path) -> None:
    """Greedy responses of an export, by transformers under lm-eval and by the engine, and their grades."""
    checkpoint, export = work / "checkpoint", work / "export"
    convert = [sys.executable, "tools/convert_checkpoint.py"]
    _run(*convert, "hf-to-megatron", "--hf-checkpoint", model, "--save", checkpoint)
    _run(*convert, "megatron-to-hf", "--load", checkpoint, "--hf-checkpoint", model, "--save", export)
    theirs, texts = lm_eval_grades("gsm8k", rows, work, export=export, length=length)
    out = work / "generated"
    ours = our_grades("gsm8k", rows, out, "--hf-checkpoint", export, "--max-response-len", length, ranks=TP)
    found = [
        row["response"] for path in sorted((out / "responses").glob("*.jsonl")) for row in _json_lines(path)
    ]
    from megatron_simct.evaluation.benchmarks import cut

    same = [cut("gsm8k", text) for text in found] == texts
    print(
        f"gsm8k, {len(rows)} greedy responses of {model.name}: {'equal' if same else 'NOT EQUAL'}", flush=True
    )
    if not same:
        for ours_text, text in zip(found, texts, strict=True):
            if cut("gsm8k", ours_text) != text:
                raise SystemExit(f"first difference:\n  ours   {ours_text!r}\n  theirs {text!r}")
    _report(f"gsm8k, responses of {model.name}", theirs, ours)


# Both sides


def lm_eval_grades(
    name: str,
    rows: Rows,
    work: Path,
    *,
    responses: Sequence[str] = (),
    export: Path | None = None,
    length: int = 0,
) -> tuple[dict[str, list[bool]], list[str]]:
    """lm-eval's grades of given responses, or of an export's, by our metrics' names; and the responses."""
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.evaluator import simple_evaluate

    class Given(LM):
        """A model that answers with the given responses in the order of the rows, cut at the task's stop
        strings as every backend does.
        """

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [_cut(responses[request.doc_id], request.args[1]["until"]) for request in requests]

        def loglikelihood(self, requests: Any) -> Any:
            raise AssertionError("these tasks generate")

        loglikelihood_rolling = loglikelihood

    data = work / f"{name}_rows.jsonl"
    _write_lines(data, rows)
    theirs = Path(lm_eval.__file__).parent / "tasks" / name / f"{name}.yaml"
    task = {"include": str(theirs), "task": f"{name}_rows", "dataset_path": "json", "dataset_name": None}
    task |= {"num_fewshot": 0, "dataset_kwargs": {"data_files": {"train": str(data), "test": str(data)}}}
    spec = work / f"{name}.yaml"
    spec.write_text(json.dumps(task))
    model: dict[str, Any] = {"model": Given()}
    if export is not None:
        model = {
            "model": "hf",
            "model_args": {"pretrained": str(export), "dtype": "float32"},
            "device": "cpu",
        }
        model |= {"batch_size": 1, "gen_kwargs": {"max_gen_toks": length}}
    found = simple_evaluate(**model, tasks=[str(spec)], bootstrap_iters=0, confirm_run_unsafe_code=True)
    assert found is not None
    (task_name, samples), *others = found["samples"].items()
    assert not others
    grades: dict[str, list[bool]] = {}
    for key, ours in METRICS[name].items():
        metric, filtered = key.split(",")
        mine = sorted((s for s in samples if s["filter"] == filtered), key=lambda sample: sample["doc_id"])
        values = [sample[metric] for sample in mine]
        grades[ours] = [bool(value["pass@1"] if isinstance(value, dict) else value) for value in values]
        assert len(values) == len(rows) and abs(found["results"][task_name][key] - _mean(grades[ours])) < 1e-9
    return grades, [sample["resps"][0][0] for sample in mine]


def our_grades(name: str, rows: Rows, folder: Path, *flags: Any, ranks: int = 1) -> dict[str, list[bool]]:
    """The grades of tools/evaluate.py."""
    data = folder.with_suffix(".jsonl")
    _write_lines(data, rows)
    start = (
        [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    )
    if ranks > 1:
        start += ["--nproc-per-node", str(ranks)]
        flags += ("--tensor-model-parallel-size", ranks)
    command = [*start, "tools/evaluate.py", "--benchmark", name, "--data", data, "--output-dir", folder]
    _run(*command, "--cpu-seconds", PROGRAM_S, *flags)
    rights = [
        row["right"] for path in sorted((folder / "grades").glob("*.jsonl")) for row in _json_lines(path)
    ]
    results = json.loads((folder / "results.json").read_text())
    grades = {ours: [right[ours] for right in rights] for ours in METRICS[name].values()}
    for metric, right in grades.items():
        assert abs(results["metrics"][metric]["pass@1"]["mean"] - _mean(right)) < 1e-9
    return grades


def _report(what: str, theirs: dict[str, list[bool]], ours: dict[str, list[bool]]) -> None:
    for metric, right in ours.items():
        differ = [i for i, (a, b) in enumerate(zip(theirs[metric], right, strict=True)) if a != b]
        print(f"{what}, {metric}: lm-eval {_mean(theirs[metric]):.4f}, ours {_mean(right):.4f}", flush=True)
        if differ:
            raise SystemExit(f"{len(differ)} of {len(right)} grades differ; rows {differ[:10]}")


def _run_programs(
    references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)
) -> Any:
    """The result of the metric `code_eval` for one prediction each: the share of programs
    that end without error.
    """
    passed = []
    for reference, (prediction,) in zip(references, predictions, strict=True):
        program = [sys.executable, "-I", "-c", f"{prediction}\n{reference}"]
        try:
            passed.append(
                subprocess.run(program, capture_output=True, timeout=PROGRAM_S, cwd="/").returncode == 0
            )
        except subprocess.TimeoutExpired:
            passed.append(False)
    return {"pass@1": _mean(passed)}, {}


def _cut(text: str, stops: Sequence[str]) -> str:
    return min((text.split(stop)[0] for stop in stops), key=len)


def _human_eval() -> Rows:
    from megatron_simct.evaluation.benchmarks import read_problems

    return [problem.fields for problem in read_problems("humaneval", None)]


def _json_lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write_lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _run(*command: Any) -> None:
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(str(word) for word in command)}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
        )


if __name__ == "__main__":
    main()

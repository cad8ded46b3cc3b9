"""Users' mistakes with all commands: one helpful line, no traceback, an exit code, and no half-written file.

`MISTAKES` is the list. Each is the command's main() in a forked process, started in a folder that has all
necessary files, with a right command line except for the given flags. Afterwards the folder is unchanged.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.distributed import run_ranks
from tests.end_to_end.test_plot_run import write_run
from tests.preflight import build_pair, run_values
from tests.tiny import command_line
from tests.unit.test_select_responses import GOOD, leave
from tests.weights import random_weights

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "train": "megatron_simct.train",
    "serve_teacher": "megatron_simct.serve_teacher",
    "launch": "megatron_simct.launch.__main__",
    "align": "megatron_simct.commands.build_alignment_map",
    "inspect": "megatron_simct.commands.inspect_alignment",
    "check_pair": "megatron_simct.commands.check_pair",
    "convert": "megatron_simct.commands.convert_checkpoint",
    "prepare": "megatron_simct.commands.prepare_prompts",
    "select": "megatron_simct.commands.select_responses",
    "evaluate": "megatron_simct.commands.evaluate",
    "plot": "megatron_simct.commands.plot_run",
    "quickstart": "examples.quickstart.run",
    "study": "examples.experiments.run",
}
TOKENIZERS = "--teacher-tokenizer tiny/teacher.tiktoken --student-tokenizer tiny/student.model"
RIGHT = {
    "train": "",  # tests.tiny.command_line
    "serve_teacher": "--teacher-hf-checkpoint tiny/teacher --teacher-tokenizer-model tiny/teacher.tiktoken "
    "--run-dir out",
    "launch": "run.yaml --dry-run",
    "align": f"{TOKENIZERS} --output out/map",
    "inspect": f"{TOKENIZERS} --text hello --format html --output out/page.html",
    "check_pair": "run.yaml",
    "convert": "megatron-to-hf --load weights/student --hf-checkpoint tiny/student "
    "--make-vocab-size-divisible-by 8 --save out/folder",
    "prepare": "--mixture mixture.yaml --output-dir out/prompts",
    "select": "--responses evaluated/run --data evaluated/problems.jsonl --output out/warm_up.jsonl",
    "evaluate": "--benchmark exact_match --data evaluated/problems.jsonl --responses responses.jsonl "
    "--output-dir out",
    "plot": "run --output out/report.html",
    "quickstart": "--smoke --run-dir out/quickstart",
    "study": "--run-dir out/study",
}
ASKED = (
    "--benchmark exact_match --data evaluated/problems.jsonl --output-dir out --hf-checkpoint tiny/student"
)


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One way to start a command that cannot work."""

    what: str
    command: str
    flags: str
    """Flags after the right ones; with a leading `=`, instead of them."""
    line: str
    """A regular expression for the beginning of the line after `PROGRAM: error: `."""
    code: int
    """Exit code: 2 for a wrong command line, 1 for anything else."""
    disk: str = ""
    """The state of the disk of out/: `full` or `read-only`. `cut off`: there is no network."""


MISTAKES = [
    Mistake(
        command="train",
        what="folder does not exist",
        flags="--hf-checkpoint no/folder",
        line="--hf-checkpoint no/folder: .*No such file",
        code=1,
    ),
    Mistake(
        command="train",
        what="config.json has a string for a number",
        flags="--hf-checkpoint sizes",
        line="--hf-checkpoint sizes: .*: hidden_size = '64'; expected a",
        code=1,
    ),
    Mistake(
        command="train",
        what="folder of an adapter",
        flags="--hf-checkpoint adapter",
        line="--hf-checkpoint adapter: holds adapter_config.json, so it",
        code=1,
    ),
    Mistake(
        command="train",
        what="file instead of a folder",
        flags="--hf-checkpoint text.txt",
        line="--hf-checkpoint text.txt: .*Not a directory",
        code=1,
    ),
    Mistake(
        command="train",
        what="prompt file does not exist",
        flags="--prompt-data no.jsonl",
        line="--prompt-data no.jsonl: No such file",
        code=1,
    ),
    Mistake(
        command="train",
        what="folder instead of a prompt file",
        flags="--prompt-data tiny",
        line="--prompt-data tiny: Is a directory",
        code=1,
    ),
    Mistake(
        command="train",
        what="binary prompt file",
        flags="--prompt-data binary",
        line="--prompt-data binary: not UTF-8",
        code=1,
    ),
    Mistake(
        command="train",
        what="prompt file without read permission",
        flags="--prompt-data locked.jsonl",
        line="--prompt-data locked.jsonl: Permission denied",
        code=1,
    ),
    Mistake(
        command="train",
        what="rows without the expected key",
        flags="--input-key question",
        line="--prompt-data .*line 1.*question",
        code=1,
    ),
    Mistake(
        command="train",
        what="string for a number",
        flags="--train-iters many",
        line="argument --train-iters: invalid int value: 'many'",
        code=2,
    ),
    Mistake(
        command="train",
        what="misspelt flag",
        flags="--hf-chekpoint x",
        line="unknown flag --hf-chekpoint; did you mean --hf-checkpoint?",
        code=2,
    ),
    Mistake(
        command="train",
        what="abbreviated flag",
        flags="--train-iter 3",
        line="unknown flag --train-iter; did you mean --train-iters?",
        code=2,
    ),
    Mistake(
        command="train",
        what="flag without a value",
        flags="--save",
        line="argument --save: expected one argument",
        code=2,
    ),
    Mistake(
        command="train", what="extra argument", flags="--bf16 true", line="unexpected argument 'true'", code=2
    ),
    Mistake(
        command="train",
        what="unknown choice",
        flags="--simct-interface papr",
        line="argument --simct-interface: invalid choice: 'papr'",
        code=2,
    ),
    Mistake(
        command="train",
        what="configuration file does not exist",
        flags="--config-file no.yaml",
        line="--config-file no.yaml: No such file",
        code=2,
    ),
    Mistake(
        command="train",
        what="unknown key",
        flags="--config-file typo.yaml",
        line="--config-file typo.yaml: unknown key 'train_iter'",
        code=2,
    ),
    Mistake(
        command="train",
        what="too few processes",
        flags="--tensor-model-parallel-size 2",
        line=r"world size \(1\).*start 2 processes",
        code=1,
    ),
    Mistake(command="train", what="bf16 without a GPU", flags="--bf16", line="--bf16 needs a GPU", code=1),
    Mistake(
        command="train",
        what="TransformerEngine's attention",
        flags="--attention-backend unfused",
        line="--attention-backend unfused: that is TransformerEngine's .*use auto, flash or local",
        code=1,
    ),
    Mistake(
        command="train",
        what="flash attention without a GPU",
        flags="--attention-backend flash",
        line="--attention-backend flash: there is no GPU; use auto",
        code=1,
    ),
    Mistake(
        command="train",
        what="folder without a checkpoint",
        flags="--load tiny",
        line="--load tiny: no checkpoint there",
        code=1,
    ),
    Mistake(
        command="train",
        what="damaged safetensors",
        flags="--hf-checkpoint bad_weights",
        line="--hf-checkpoint bad_weights",
        code=1,
    ),
    Mistake(
        command="train",
        what="read-only disk",
        flags="--run-dir out/run",
        line="--run-dir out/run: Read-only.*choose a path",
        code=1,
        disk="read-only",
    ),
    Mistake(
        command="train",
        what="tokenizer does not exist",
        flags="--tokenizer-model no.model",
        line=".*no.model.* does not exist",
        code=1,
    ),
    Mistake(
        command="train",
        what="file instead of a run directory",
        flags="--run-dir text.txt",
        line="--run-dir text.txt.*File exists",
        code=1,
    ),
    Mistake(
        command="serve_teacher", what="bf16 without a GPU", flags="--bf16", line="--bf16 needs a GPU", code=1
    ),
    Mistake(
        command="serve_teacher",
        what="TransformerEngine's attention",
        flags="--attention-backend fused",
        line="--attention-backend fused: that is TransformerEngine's",
        code=1,
    ),
    Mistake(
        command="serve_teacher",
        what="folder without weights",
        flags="",
        line="--teacher-hf-checkpoint tiny/teacher: has no weights",
        code=1,
    ),
    Mistake(
        command="serve_teacher",
        what="misspelt flag",
        flags="--run-dri x",
        line="unknown flag --run-dri; did you mean --run-dir?",
        code=2,
    ),
    Mistake(
        command="serve_teacher",
        what="folder does not exist",
        flags="--teacher-hf-checkpoint no",
        line="--teacher-hf-checkpoint no: .*No such file",
        code=1,
    ),
    Mistake(
        command="launch",
        what="run file does not exist",
        flags="= no.yaml",
        line="no.yaml: No such file",
        code=1,
    ),
    Mistake(
        command="launch",
        what="folder instead of a run file",
        flags="= tiny",
        line="tiny: Is a directory",
        code=1,
    ),
    Mistake(
        command="launch",
        what="misspelt section",
        flags="= misspelt.yaml",
        line="misspelt.yaml: unknown section 'studnet'; did you mean student",
        code=1,
    ),
    Mistake(
        command="launch",
        what="unknown key",
        flags="student.train_iter=3",
        line=".*unknown key 'train_iter'; did you mean train_iters",
        code=1,
    ),
    Mistake(
        command="launch",
        what="override without a value",
        flags="student.train_iters",
        line=".*student.train_iters",
        code=1,
    ),
    Mistake(
        command="launch",
        what="Slurm command for a local run",
        flags="= status local.yaml",
        line="local.yaml: cluster.kind is local",
        code=1,
    ),
    Mistake(
        command="launch",
        what="misspelt flag",
        flags="--dry-rum",
        line="unknown flag --dry-rum; did you mean --dry-run?",
        code=2,
    ),
    Mistake(
        command="launch",
        what="pre-flight fails",
        flags="= run.yaml student.prompt_data=no.jsonl",
        line="run.yaml: the pre-flight failed",
        code=1,
    ),
    Mistake(
        command="align",
        what="missing required flag",
        flags=f"= {TOKENIZERS}",
        line="the following arguments are required: --output",
        code=2,
    ),
    Mistake(
        command="align",
        what="misspelt required flag",
        flags=f"= {TOKENIZERS} --ouput x",
        line="unknown flag --ouput; did you mean --output?",
        code=2,
    ),
    Mistake(
        command="align",
        what="folder with other files",
        flags="--output tiny",
        line="--output tiny: exists and is not an alignment map",
        code=1,
    ),
    Mistake(
        command="align",
        what="tokenizer does not exist",
        flags="--teacher-tokenizer no/tok",
        line=".*no/tok.* does not exist",
        code=1,
    ),
    Mistake(
        command="align",
        what="full disk",
        flags="",
        line="--output out/map: .*No space left",
        code=1,
        disk="full",
    ),
    Mistake(
        command="align",
        what="text file does not exist",
        flags="--corpus no.txt",
        line="--corpus no.txt: No such file",
        code=1,
    ),
    Mistake(
        command="align",
        what="rows without the expected key",
        flags="--corpus prompts.jsonl",
        line="--corpus prompts.jsonl, line 1: not a JSON object with 'text'",
        code=1,
    ),
    Mistake(
        command="align",
        what="binary text file",
        flags="--corpus binary",
        line="--corpus binary: not UTF-8 at byte 0",
        code=1,
    ),
    Mistake(
        command="align",
        what="text file without read permission",
        flags="--corpus locked.jsonl",
        line="--corpus locked.jsonl: Permission denied; change",
        code=1,
    ),
    Mistake(
        command="align",
        what="read-only disk",
        flags="",
        line="--output out/map: .*Read-only file system; choose a path",
        code=1,
        disk="read-only",
    ),
    Mistake(
        command="inspect",
        what="two exclusive flags",
        flags="--text-file text.txt",
        line="argument --text-file: not allowed with argument --text",
        code=2,
    ),
    Mistake(
        command="inspect",
        what="unknown format",
        flags="--format pdf",
        line="argument --format: invalid choice: 'pdf'",
        code=2,
    ),
    Mistake(
        command="inspect",
        what="text file does not exist",
        flags=f"= {TOKENIZERS} --text-file no.txt",
        line="--text-file no.txt: No such file",
        code=1,
    ),
    Mistake(
        command="inspect",
        what="folder instead of an output file",
        flags="--output foreign",
        line="--output foreign: Is a directory",
        code=1,
    ),
    Mistake(
        command="inspect",
        what="no network",
        flags="--teacher-tokenizer tiktoken:o200k_base",
        line=".*without a network, give the ranks as a",
        code=1,
        disk="cut off",
    ),
    Mistake(
        command="inspect",
        what="output file is the input file",
        flags=f"= {TOKENIZERS} --text-file text.txt --output text.txt",
        line="--output text.txt: is also the file of --text",
        code=1,
    ),
    Mistake(
        command="inspect",
        what="full disk",
        flags="",
        line="--output out/page.html: No space left",
        code=1,
        disk="full",
    ),
    Mistake(
        command="inspect",
        what="folder does not exist",
        flags="--output text.txt/x/page.html",
        line="--output text.txt/x/page.html: .*Not a dir",
        code=1,
    ),
    Mistake(
        command="inspect",
        what="read-only disk",
        flags="",
        line="--output out/page.html: .*Read-only file system",
        code=1,
        disk="read-only",
    ),
    Mistake(
        command="check_pair",
        what="run file does not exist",
        flags="= no.yaml",
        line="no.yaml: No such file",
        code=1,
    ),
    Mistake(
        command="check_pair",
        what="string for a number",
        flags="--device-memory lots",
        line="argument --device-memory: invalid float value: 'lots'",
        code=2,
    ),
    Mistake(
        command="check_pair",
        what="misspelt flag",
        flags="--jsno",
        line="unknown flag --jsno; did you mean --json?",
        code=2,
    ),
    Mistake(
        command="convert",
        what="config.json has a string for a number",
        flags="--hf-checkpoint sizes",
        line="--hf-checkpoint sizes: .*: hidden_size = '64'; expected a",
        code=1,
    ),
    Mistake(
        command="convert",
        what="missing subcommand",
        flags="=",
        line="the following arguments are required: command",
        code=2,
    ),
    Mistake(
        command="convert",
        what="unknown subcommand",
        flags="= hf-to-megatrn",
        line="argument command: invalid choice: 'hf-to-megatrn'",
        code=2,
    ),
    Mistake(
        command="convert",
        what="folder without a checkpoint",
        flags="--load tiny",
        line="--load tiny: no checkpoint there",
        code=1,
    ),
    Mistake(
        command="convert",
        what="output folder exists",
        flags="--save tiny",
        line="--save tiny: .*exists already; nothing is overwritten",
        code=1,
    ),
    Mistake(
        command="convert",
        what="folder of another model",
        flags="--hf-checkpoint tiny/teacher",
        line="--load weights/student.*does not fit this model",
        code=1,
    ),
    Mistake(
        command="convert",
        what="folder without weights",
        flags="= hf-to-megatron --hf-checkpoint tiny/student --save out/c",
        line=".*has no weights",
        code=1,
    ),
    Mistake(
        command="convert",
        what="vocabulary padding 0",
        flags="--make-vocab-size-divisible-by 0",
        line="--make-vocab-size-divisible-by 0: must be at least 1",
        code=1,
    ),
    Mistake(
        command="convert",
        what="misspelt flag",
        flags="--verfy",
        line="unknown flag --verfy; did you mean --verify?",
        code=2,
    ),
    Mistake(
        command="convert",
        what="read-only disk",
        flags="",
        line="--save out/folder: .*Read-only file system",
        code=1,
        disk="read-only",
    ),
    Mistake(
        command="convert",
        what="full disk",
        flags="",
        line="--save out/folder: .*No space left",
        code=1,
        disk="full",
    ),
    Mistake(
        command="prepare",
        what="mixture does not exist",
        flags="--mixture no.yaml",
        line="--mixture no.yaml: No such file",
        code=1,
    ),
    Mistake(
        command="prepare",
        what="wrong data root",
        flags="--data-root tiny",
        line="--data-root: source words: tiny/prompts.jsonl: No such file",
        code=1,
    ),
    Mistake(
        command="prepare",
        what="all rows excluded",
        flags="--mixture excluded.yaml",
        line="--mixture: all 1 rows were dropped: 1 excluded",
        code=1,
    ),
    Mistake(
        command="prepare",
        what="excluded file without prompts",
        flags="--mixture unexcluded.yaml",
        line="--mixture: exclude prompts.jsonl: no row has the key quest",
        code=1,
    ),
    Mistake(
        command="prepare",
        what="string for a count",
        flags="--mixture count.yaml",
        line="--mixture count.yaml: source 1: count '3': expected int",
        code=1,
    ),
    Mistake(
        command="prepare",
        what="chat template without a model",
        flags="--apply-chat-template",
        line="--apply-chat-template: needs --hf-checkpoint or",
        code=1,
    ),
    Mistake(
        command="prepare",
        what="invalid regular expression",
        flags="--mixture pattern.yaml",
        line="--mixture pattern.yaml: source words: label_pattern",
        code=1,
    ),
    Mistake(
        command="prepare",
        what="read-only disk",
        flags="",
        line="--output-dir out/prompts: .*Read-only file system",
        code=1,
        disk="read-only",
    ),
    Mistake(
        command="select",
        what="results do not exist",
        flags="--responses no",
        line="--responses no: not a finished run of tools/evaluate.py",
        code=1,
    ),
    Mistake(
        command="select",
        what="other problems",
        flags="--data prompts.jsonl",
        line="--data prompts.jsonl: .*",
        code=1,
    ),
    Mistake(
        command="select",
        what="results of another command",
        flags="--responses results",
        line="--responses results: not a finished run of tools/evaluate",
        code=1,
    ),
    Mistake(
        command="select",
        what="output file is the input file",
        flags="--output evaluated/problems.jsonl",
        line="--output .*problems.jsonl: is also the file of --data",
        code=1,
    ),
    Mistake(
        command="select",
        what="unknown metric",
        flags="--metric rouge",
        line="--metric rouge: .*exact_match",
        code=1,
    ),
    Mistake(
        command="select",
        what="full disk",
        flags="",
        line="--output out/warm_up.jsonl: No space left",
        code=1,
        disk="full",
    ),
    Mistake(
        command="evaluate",
        what="unknown benchmark",
        flags="--benchmark gsm9k",
        line="argument --benchmark: invalid choice: 'gsm9k'",
        code=2,
    ),
    Mistake(
        command="evaluate",
        what="problem file does not exist",
        flags="--data no.jsonl",
        line="--data no.jsonl: .*No such file",
        code=1,
    ),
    Mistake(
        command="evaluate",
        what="rows without the expected key",
        flags="--data question.jsonl",
        line="--data question.jsonl, line 1 .*no prompt",
        code=1,
    ),
    Mistake(
        command="evaluate",
        what="response file does not exist",
        flags="--responses no.jsonl",
        line="--responses no.jsonl: No such file",
        code=1,
    ),
    Mistake(
        command="evaluate",
        what="more samples than responses",
        flags="--samples 3",
        line="--responses responses.jsonl: p0 has 1 responses, but --samples",
        code=1,
    ),
    Mistake(
        command="evaluate",
        what="--chat-responses without --responses",
        flags=f"= {ASKED} --chat-responses",
        line="--chat-responses: describes --responses",
        code=1,
    ),
    Mistake(
        command="evaluate",
        what="vocabulary padding 0",
        flags=f"= {ASKED} --make-vocab-size-divisible-by 0",
        line="--make-vocab-size-divisible-by 0: must be at",
        code=1,
    ),
    Mistake(
        command="evaluate",
        what="damaged archive",
        flags="--data damaged.jsonl.gz",
        line="--data damaged.jsonl.gz: Not a gzipped file",
        code=1,
    ),
    Mistake(
        command="evaluate",
        what="number for a prompt",
        flags="--data number.jsonl",
        line="--data number.jsonl, line 1 is not a row of exact_match",
        code=1,
    ),
    Mistake(
        command="evaluate",
        what="several greedy samples",
        flags=f"= {ASKED} --samples 2",
        line="--samples 2 would all be the same",
        code=1,
    ),
    Mistake(
        command="plot",
        what="folder without a run",
        flags="= tiny",
        line="RUN_DIR tiny: no metrics.jsonl there; give the --run-dir",
        code=1,
    ),
    Mistake(
        command="plot",
        what="foreign metrics file",
        flags="= foreign",
        line="foreign/metrics.jsonl: line 1",
        code=1,
    ),
    Mistake(
        command="plot",
        what="full disk",
        flags="",
        line="--output out/report.html: No space left",
        code=1,
        disk="full",
    ),
    Mistake(
        command="plot",
        what="output file is a file of the run",
        flags="--output run/metrics.jsonl",
        line="--output run/metrics.jsonl: is a file of the run",
        code=1,
    ),
    Mistake(
        command="plot",
        what="unknown picture format",
        flags="--png out/a.txt",
        line="--png out/a.txt: unknown picture format",
        code=1,
    ),
    Mistake(
        command="plot",
        what="picture with the name of a page",
        flags="--png out/report.html",
        line="--png out/report.html: unknown picture format",
        code=1,
    ),
    Mistake(
        command="plot",
        what="configuration is not YAML",
        flags="= bad_config",
        line="bad_config/config.yaml: not a file that a run has written",
        code=1,
    ),
    Mistake(
        command="plot",
        what="foreign samples file",
        flags="= bad_samples",
        line="bad_samples/samples.jsonl: has rows that are not responses",
        code=1,
    ),
    Mistake(
        command="plot",
        what="binary metrics file",
        flags="= bad_metrics",
        line="bad_metrics/metrics.jsonl: not UTF-8 at byte 0",
        code=1,
    ),
    Mistake(
        command="plot",
        what="full disk for the picture",
        flags="--output /dev/null --png out/a.png",
        line="--png out/a.png: No space left",
        code=1,
        disk="full",
    ),
    Mistake(
        command="quickstart",
        what="misspelt flag",
        flags="--interfce bytes",
        line="unknown flag --interfce; did you mean --interface?",
        code=2,
    ),
    Mistake(
        command="quickstart",
        what="0 steps",
        flags="--train-iters 0",
        line="--train-iters 0: must be at least 1",
        code=2,
    ),
    Mistake(
        command="quickstart", what="learning rate 0", flags="--lr 0", line="--lr 0.0: must be above 0", code=2
    ),
    Mistake(
        command="quickstart",
        what="unknown interface",
        flags="--interface papper",
        line="argument --interface: invalid choice: 'papper'",
        code=2,
    ),
    Mistake(
        command="quickstart",
        what="read-only disk",
        flags="",
        line="--run-dir .*out/quickstart: Read-only file system",
        code=1,
        disk="read-only",
    ),
    Mistake(
        command="study",
        what="unknown part",
        flags="--parts z",
        line="--parts z: expected some of a,b,c",
        code=2,
    ),
    Mistake(
        command="study",
        what="unknown run",
        flags="--only rouge",
        line="--only rouge: no run of parts",
        code=1,
    ),
]


@pytest.fixture(scope="module")
def desk(tiny, tmp_path_factory) -> Path:
    """The folder in which the commands are started."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "tiny").symlink_to(tiny)
    (folder / "pair").mkdir()
    build_pair(folder / "pair")
    run = run_values(folder / "pair")
    local = run | {"cluster": {"kind": "local"}}
    misspelt = {"studnet" if key == "student" else key: value for key, value in run.items()}
    for name, values in (("run", run), ("local", local), ("misspelt", misspelt)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    source = {"name": "words", "path": "prompts.jsonl"}
    mixtures = {"mixture": {}, "pattern": {"label_pattern": "("}, "count": {"count": "3"}}
    excluded = {
        "sources": [{"name": "words", "path": "prompts.jsonl"}],
        "exclude": [{"path": "prompts.jsonl"}],
    }
    (folder / "excluded.yaml").write_text(yaml.safe_dump(excluded))
    excluded["exclude"][0]["prompt_key"] = "question"
    (folder / "unexcluded.yaml").write_text(yaml.safe_dump(excluded))
    for name, more in mixtures.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"sources": [source | more]}))
    (folder / "broken.yaml").write_text("lr: 1\n  - [\n")
    (folder / "typo.yaml").write_text("train_iter: 3\n")
    (folder / "wrong_type.yaml").write_text("lr: fast\n")
    (folder / "text.txt").write_text("words\n")
    (folder / "binary").write_bytes(bytes(range(128, 256)))
    (folder / "damaged.json").write_text('{"model": ')
    prompts = '{"prompt": "How many?", "label": "2"}\n'
    (folder / "prompts.jsonl").write_text(prompts)
    (folder / "locked.jsonl").write_text(prompts)
    (folder / "locked.jsonl").chmod(0)
    (folder / "bad_weights").mkdir()
    (folder / "bad_weights" / "config.json").write_bytes((tiny / "student" / "config.json").read_bytes())
    (folder / "bad_weights" / "model.safetensors").write_bytes(b"PK\3\4 no tensors")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "sizes").mkdir()
    fields = json.loads((tiny / "student" / "config.json").read_text()) | {"hidden_size": "64"}
    (folder / "sizes" / "config.json").write_text(json.dumps(fields))
    (folder / "evaluated").mkdir()
    leave(folder / "evaluated", [[(GOOD, True, "stop")]])
    (folder / "question.jsonl").write_text('{"question": "How many?", "label": "2"}\n')
    (folder / "responses.jsonl").write_text(json.dumps({"problem_id": "p0", "response": GOOD}) + "\n")
    write_run(folder / "run", iterations=2)
    (folder / "foreign").mkdir()
    (folder / "foreign" / "metrics.jsonl").write_text("iteration,loss\n")
    for name, file in (
        ("bad_config", "config.yaml"),
        ("bad_samples", "samples.jsonl"),
        ("bad_metrics", "metrics.jsonl"),
    ):
        write_run(folder / name, iterations=2)
        (folder / name / file).write_text(
            '{"kind": "sample", "iteration": 1}\n' if "samples" in file else "- [\n"
        )
    (folder / "bad_metrics" / "metrics.jsonl").write_bytes(bytes(range(128, 256)))
    (folder / "damaged.jsonl.gz").write_bytes(b"no archive")
    (folder / "number.jsonl").write_text('{"prompt": 3, "label": "2"}\n')
    (folder / "results").mkdir()
    (folder / "results" / "results.json").write_text("[1]")
    (folder / "weights").mkdir()
    random_weights(tiny, folder / "weights")
    (folder / "out").mkdir()
    return folder


def argv_of(mistake: Mistake) -> list[str]:
    flags = shlex.split(mistake.flags.removeprefix("="))
    if mistake.flags.startswith("="):
        return flags
    right = command_line(Path("tiny")) if mistake.command == "train" else shlex.split(RIGHT[mistake.command])
    return [*right, *flags]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.command}: {mistake.what}")
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, desk) -> None:
    ((code, err, before, after),) = run_ranks(1, _make, mistake, desk)
    if code == "skip":
        pytest.skip(err)
    assert "Traceback" not in err, err
    *above, line = err.splitlines()
    assert not above or mistake.what == "pre-flight fails", err
    program, _, text = line.partition(": error: ")
    assert program.split()[0] in line and re.match(mistake.line, text), line
    assert code == mistake.code, line
    assert after == before


def test_a_full_disk_at_a_save_is_one_line_and_no_checkpoint(desk) -> None:
    """The unfinished files have a temporary name. The next start removes them."""
    save = Mistake(
        command="train",
        what="full disk",
        flags="--save out/saved",
        line="--save out/saved",
        code=1,
        disk="full",
    )
    ((code, err, before, after),) = run_ranks(1, _make, save, desk)
    if code == "skip":
        pytest.skip(err)
    assert code == save.code and re.fullmatch(r"megatron_simct.train: error: --save out/saved.*\n", err), err
    new = set(after) - set(before)
    assert all("/out/saved/iter_0000002.tmp/" in name for name in new), new


def test_there_are_enough() -> None:
    assert (
        len({(mistake.command, mistake.flags, mistake.disk) for mistake in MISTAKES}) == len(MISTAKES) >= 40
    )
    assert {mistake.command for mistake in MISTAKES} == set(COMMANDS) == set(RIGHT)


def test_debug_shows_the_traceback(tmp_path) -> None:
    for flags, shown in ((), False), (("--debug",), True):
        command = [sys.executable, str(ROOT / "tools" / "plot_run.py"), str(tmp_path), *flags]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 1 and ("Traceback" in ended.stderr) == shown
        assert "no metrics.jsonl there" in ended.stderr


@pytest.mark.parametrize(
    "begun", ["", "written to|iteration +2"], ids=["while libraries load", "in training"]
)
def test_ctrl_c_is_one_line(begun, tiny, tmp_path) -> None:
    flags = ("--train-iters", "1000", "--run-dir", str(tmp_path / "run"))
    command = [sys.executable, "-m", "megatron_simct.train", *command_line(tiny, *flags)]
    # A job in a shell's background ignores SIGINT, and so would its children.
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=listening, **pipes)
    try:
        if begun:
            assert any(re.search(begun, line) for line in process.stdout)
        else:
            maps = Path(f"/proc/{process.pid}/maps")
            while "libtorch" not in maps.read_text():
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode in (130, -signal.SIGINT)  # a shell returns 130 for both
    assert err.splitlines()[-1].endswith("train: interrupted"), err
    assert "Traceback" not in err


def _make(
    rank: int, world_size: int, mistake: Mistake, desk: Path
) -> tuple[int | str, str, list[str], list[str]]:
    """Exit code, stderr, and the files before and after."""
    main = importlib.import_module(COMMANDS[mistake.command]).main
    os.chdir(desk)
    _obey_permissions()
    if mistake.disk and (reason := _mount(desk / "out", mistake.disk)):
        return "skip", reason, [], []
    before, out, err = _files(desk), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv_of(mistake))
        except SystemExit as exit_:
            code = exit_.code
    return code, err.getvalue(), before, _files(desk)


def _files(folder: Path) -> list[str]:
    return sorted(f"{path} {path.stat().st_size}" for path in folder.rglob("*") if path.is_file())


def _obey_permissions() -> None:
    """Root can read and write everything, until it gives up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110
    assert libc.capset(header, sets) == 0


def _mount(folder: Path, disk: str) -> str | None:
    """Mount a disk for this process alone, full or read-only, or disconnect the network. Returns the reason
    if that is not allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_network, new_mounts, read_only, private = 0x40000000, 0x20000, 1, 0x44000
    if disk == "cut off":
        os.environ["TIKTOKEN_CACHE_DIR"] = str(folder / "no_cache")
        return (
            f"no network of one's own: {os.strerror(ctypes.get_errno())}"
            if libc.unshare(new_network)
            else None
        )
    if libc.unshare(new_mounts) or libc.mount(None, b"/", None, private, None):
        return f"no disk of one's own: {os.strerror(ctypes.get_errno())}; needs root"
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", read_only * (disk == "read-only"), b"size=16k"):
        return f"no tmpfs: {os.strerror(ctypes.get_errno())}"
    if disk == "full":
        with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    return None

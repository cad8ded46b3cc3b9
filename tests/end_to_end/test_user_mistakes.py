"""What users do wrong, over all commands: one helpful line, no traceback, an exit code, and nothing
half-written.

`MISTAKES` is the list. Each is the command's main() in a forked process, started in a folder that has what is
needed, with a right command line but for the flags that are given. Afterwards the folder is as it was before.
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
    """Behind the right ones, or with a leading `=` instead of them."""
    line: str
    """A regular expression that the line behind `PROGRAM: error: ` begins with."""
    code: int = 1
    disk: str = ""
    """What out/ is on: `full` or `read-only`; `cut off`: there is no network."""


def mistakes(command: str, *rows: tuple[str, str, str] | tuple[str, str, str, str]) -> list[Mistake]:
    """Rows of what, flags, line, and disk."""
    usage = (
        r"unknown flag|unexpected|--parts z|--train-iters 0|--lr 0|the following|argument |expected|unrecog"
    )
    usage += "|--config-f"
    return [
        Mistake(
            command=command,
            what=what,
            flags=flags,
            line=line,
            disk=disk[0] if disk else "",
            code=2 if re.match(usage, line) else 1,
        )
        for what, flags, line, *disk in rows
    ]


MISTAKES = [
    *mistakes(
        "train",
        (
            "a folder that is not there",
            "--hf-checkpoint no/folder",
            "--hf-checkpoint no/folder: .*No such file",
        ),
        (
            "a text for a size",
            "--hf-checkpoint sizes",
            "--hf-checkpoint sizes: .*: hidden_size = '64'; expected a",
        ),
        (
            "an adapter for a model",
            "--hf-checkpoint adapter",
            "--hf-checkpoint adapter: holds adapter_config.json, so it",
        ),
        (
            "a file in place of a folder",
            "--hf-checkpoint text.txt",
            "--hf-checkpoint text.txt: .*Not a directory",
        ),
        ("prompts that are not there", "--prompt-data no.jsonl", "--prompt-data no.jsonl: No such file"),
        ("a folder in place of prompts", "--prompt-data tiny", "--prompt-data tiny: Is a directory"),
        ("a binary file in place of prompts", "--prompt-data binary", "--prompt-data binary: not UTF-8"),
        (
            "prompts that may not be read",
            "--prompt-data locked.jsonl",
            "--prompt-data locked.jsonl: Permission denied",
        ),
        ("another column", "--input-key question", "--prompt-data .*line 1.*question"),
        ("a text for a number", "--train-iters many", "argument --train-iters: invalid int value: 'many'"),
        ("a misspelt flag", "--hf-chekpoint x", "unknown flag --hf-chekpoint; did you mean --hf-checkpoint?"),
        ("a shortened flag", "--train-iter 3", "unknown flag --train-iter; did you mean --train-iters?"),
        ("a flag without its value", "--save", "argument --save: expected one argument"),
        ("a word too many", "--bf16 true", "unexpected argument 'true'"),
        ("an unknown choice", "--simct-interface papr", "argument --simct-interface: invalid choice: 'papr'"),
        ("no such configuration", "--config-file no.yaml", "--config-file no.yaml: No such file"),
        (
            "a key that does not exist",
            "--config-file typo.yaml",
            "--config-file typo.yaml: unknown key 'train_iter'",
        ),
        ("two processes too few", "--tensor-model-parallel-size 2", r"world size \(1\).*start 2 processes"),
        ("half precision without a GPU", "--bf16", "--bf16 needs a GPU"),
        ("a checkpoint of another kind", "--load tiny", "--load tiny: no checkpoint there"),
        ("weights that are no safetensors", "--hf-checkpoint bad_weights", "--hf-checkpoint bad_weights"),
        (
            "a disk that may not be written",
            "--run-dir out/run",
            "--run-dir out/run: Read-only.*name",
            "read-only",
        ),
        ("no such tokenizer", "--tokenizer-model no.model", ".*no.model.* does not exist"),
        ("a file where the run is to be", "--run-dir text.txt", "--run-dir text.txt.*File exists"),
    ),
    *mistakes(
        "serve_teacher",
        ("half precision without a GPU", "--bf16", "--bf16 needs a GPU"),
        ("a folder without weights", "", "--teacher-hf-checkpoint tiny/teacher: has no weights"),
        ("a misspelt flag", "--run-dri x", "unknown flag --run-dri; did you mean --run-dir?"),
        (
            "a folder that is not there",
            "--teacher-hf-checkpoint no",
            "--teacher-hf-checkpoint no: .*No such file",
        ),
    ),
    *mistakes(
        "launch",
        ("no run file", "= no.yaml", "no.yaml: No such file"),
        ("a folder for a run file", "= tiny", "tiny: Is a directory"),
        (
            "a misspelt section",
            "= misspelt.yaml",
            "misspelt.yaml: unknown section 'studnet'; did you mean student",
        ),
        (
            "a key that does not exist",
            "student.train_iter=3",
            ".*unknown key 'train_iter'; did you mean train_iters",
        ),
        ("an override without a value", "student.train_iters", ".*student.train_iters"),
        ("Slurm's command for a local run", "= status local.yaml", "local.yaml: cluster.kind is local"),
        ("a misspelt flag", "--dry-rum", "unknown flag --dry-rum; did you mean --dry-run?"),
        (
            "a pre-flight that fails",
            "= run.yaml student.prompt_data=no.jsonl",
            "run.yaml: the pre-flight failed",
        ),
    ),
    *mistakes(
        "align",
        ("a required flag left out", f"= {TOKENIZERS}", "the following arguments are required: --output"),
        ("that flag misspelt", f"= {TOKENIZERS} --ouput x", "unknown flag --ouput; did you mean --output?"),
        ("a folder with other things", "--output tiny", "--output tiny: exists and is not an alignment map"),
        ("no such tokenizer", "--teacher-tokenizer no/tok", ".*no/tok.* does not exist"),
        ("a full disk", "", "--output out/map: .*No space left", "full"),
        ("a text that is not there", "--corpus no.txt", "--corpus no.txt: No such file"),
        (
            "another column",
            "--corpus prompts.jsonl",
            "--corpus prompts.jsonl, line 1: no JSON object with 'text'",
        ),
        ("a file that is no text", "--corpus binary", "--corpus binary: not UTF-8 at byte 0"),
        (
            "a text that may not be read",
            "--corpus locked.jsonl",
            "--corpus locked.jsonl: Permission denied; change",
        ),
        (
            "a disk that may not be written",
            "",
            "--output out/map: .*Read-only file system; name",
            "read-only",
        ),
    ),
    *mistakes(
        "inspect",
        (
            "both sources of the text",
            "--text-file text.txt",
            "argument --text-file: not allowed with argument --text",
        ),
        ("a format that does not exist", "--format pdf", "argument --format: invalid choice: 'pdf'"),
        (
            "a text that is not there",
            f"= {TOKENIZERS} --text-file no.txt",
            "--text-file no.txt: No such file",
        ),
        ("a folder in place of the page", "--output foreign", "--output foreign: Is a directory"),
        (
            "no network",
            "--teacher-tokenizer tiktoken:o200k_base",
            ".*without a network give them as a file",
            "cut off",
        ),
        (
            "the text's own file",
            f"= {TOKENIZERS} --text-file text.txt --output text.txt",
            "--output text.txt: is the --text",
        ),
        ("a full disk", "", "--output out/page.html: No space left", "full"),
        (
            "a folder that is not there",
            "--output text.txt/x/page.html",
            "--output text.txt/x/page.html: .*Not a dir",
        ),
        (
            "a disk that may not be written",
            "",
            "--output out/page.html: .*Read-only file system",
            "read-only",
        ),
    ),
    *mistakes(
        "check_pair",
        ("no run file", "= no.yaml", "no.yaml: No such file"),
        (
            "a text for a number",
            "--device-memory lots",
            "argument --device-memory: invalid float value: 'lots'",
        ),
        ("a misspelt flag", "--jsno", "unknown flag --jsno; did you mean --json?"),
    ),
    *mistakes(
        "convert",
        (
            "a text for a size",
            "--hf-checkpoint sizes",
            "--hf-checkpoint sizes: .*: hidden_size = '64'; expected a",
        ),
        ("no direction", "=", "the following arguments are required: command"),
        ("no such direction", "= hf-to-megatrn", "argument command: invalid choice: 'hf-to-megatrn'"),
        ("no checkpoint", "--load tiny", "--load tiny: no checkpoint there"),
        ("a folder that exists", "--save tiny", "--save tiny: .*exists already; nothing is overwritten"),
        (
            "another model's folder",
            "--hf-checkpoint tiny/teacher",
            "--load weights/student.*does not fit this model",
        ),
        (
            "no weights to convert",
            "= hf-to-megatron --hf-checkpoint tiny/student --save out/c",
            ".*has no weights",
        ),
        (
            "no vocabulary",
            "--make-vocab-size-divisible-by 0",
            "--make-vocab-size-divisible-by 0: must be at least 1",
        ),
        ("a misspelt flag", "--verfy", "unknown flag --verfy; did you mean --verify?"),
        ("a disk that may not be written", "", "--save out/folder: .*Read-only file system", "read-only"),
        ("a full disk", "", "--save out/folder: .*No space left", "full"),
    ),
    *mistakes(
        "prepare",
        ("no mixture", "--mixture no.yaml", "--mixture no.yaml: No such file"),
        (
            "data in another place",
            "--data-root tiny",
            "--data-root: source words: tiny/prompts.jsonl: No such file",
        ),
        (
            "all of it in a test set",
            "--mixture excluded.yaml",
            "--mixture: nothing is left of 1 rows: 1 excluded",
        ),
        (
            "a test set without prompts",
            "--mixture unexcluded.yaml",
            "--mixture: exclude prompts.jsonl: no row has a quest",
        ),
        (
            "a text for a count",
            "--mixture count.yaml",
            "--mixture count.yaml: source 1: count '3': expected int",
        ),
        (
            "a template of no model",
            "--apply-chat-template",
            "--apply-chat-template: needs --hf-checkpoint or",
        ),
        (
            "a pattern that is none",
            "--mixture pattern.yaml",
            "--mixture pattern.yaml: source words: label_pattern",
        ),
        (
            "a disk that may not be written",
            "",
            "--output-dir out/prompts: .*Read-only file system",
            "read-only",
        ),
    ),
    *mistakes(
        "select",
        ("no run", "--responses no", "--responses no: no finished run of tools/evaluate.py"),
        ("other problems", "--data prompts.jsonl", "--data prompts.jsonl: .*"),
        (
            "a folder with other results",
            "--responses results",
            "--responses results: no finished run of tools/evaluate",
        ),
        (
            "the problems' own file",
            "--output evaluated/problems.jsonl",
            "--output .*problems.jsonl: is the file of --data",
        ),
        ("a metric that it has not", "--metric rouge", "--metric rouge: .*exact_match"),
        ("a full disk", "", "--output out/warm_up.jsonl: No space left", "full"),
    ),
    *mistakes(
        "evaluate",
        ("an unknown benchmark", "--benchmark gsm9k", "argument --benchmark: invalid choice: 'gsm9k'"),
        ("no problems", "--data no.jsonl", "--data no.jsonl: .*No such file"),
        ("another column", "--data question.jsonl", "--data question.jsonl, line 1 .*no prompt"),
        ("no responses", "--responses no.jsonl", "--responses no.jsonl: No such file"),
        (
            "more samples than responses",
            "--samples 3",
            "--responses responses.jsonl: 1 responses to p0, and --samples",
        ),
        (
            "chat responses of a model",
            f"= {ASKED} --chat-responses",
            "--chat-responses: says what --responses are",
        ),
        (
            "no vocabulary",
            f"= {ASKED} --make-vocab-size-divisible-by 0",
            "--make-vocab-size-divisible-by 0: must be at",
        ),
        ("an archive that is none", "--data damaged.jsonl.gz", "--data damaged.jsonl.gz: Not a gzipped file"),
        (
            "a number for an answer",
            "--data number.jsonl",
            "--data number.jsonl, line 1 is not one of exact_match",
        ),
        ("samples that are all the same", f"= {ASKED} --samples 2", "--samples 2 of one greedy response"),
    ),
    *mistakes(
        "plot",
        ("a folder without a run", "= tiny", "RUN_DIR tiny: no metrics.jsonl there; give the --run-dir"),
        ("a file that no run wrote", "= foreign", "foreign/metrics.jsonl: line 1"),
        ("a full disk", "", "--output out/report.html: No space left", "full"),
        (
            "a page over the run's own file",
            "--output run/metrics.jsonl",
            "--output run/metrics.jsonl: the run wrote it",
        ),
        ("a picture of no kind", "--png out/a.txt", "--png out/a.txt: no kind of picture"),
        (
            "a picture in place of the page",
            "--png out/report.html",
            "--png out/report.html: no kind of picture",
        ),
        (
            "a configuration that is no YAML",
            "= bad_config",
            "bad_config/config.yaml: it is not what a run writes",
        ),
        (
            "samples of something else",
            "= bad_samples",
            "bad_samples/samples.jsonl: has rows that are no responses",
        ),
        ("a binary file for the metrics", "= bad_metrics", "bad_metrics/metrics.jsonl: not UTF-8 at byte 0"),
        (
            "a full disk for the picture",
            "--output /dev/null --png out/a.png",
            "--png out/a.png: No space left",
            "full",
        ),
    ),
    *mistakes(
        "quickstart",
        ("a misspelt flag", "--interfce bytes", "unknown flag --interfce; did you mean --interface?"),
        ("no steps", "--train-iters 0", "--train-iters 0: must be at least 1"),
        ("a rate of 0", "--lr 0", "--lr 0.0: must be above 0"),
        (
            "an interface that does not exist",
            "--interface papper",
            "argument --interface: invalid choice: 'papper'",
        ),
        (
            "a disk that may not be written",
            "",
            "--run-dir .*out/quickstart: Read-only file system",
            "read-only",
        ),
    ),
    *mistakes(
        "study",
        ("a part that does not exist", "--parts z", "--parts z: expected some of a,b,c"),
        ("no such run", "--only rouge", "--only rouge: no run of parts"),
    ),
]


@pytest.fixture(scope="module")
def desk(tiny, tmp_path_factory) -> Path:
    """The folder that the commands are started in."""
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
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, desk):
    ((code, err, before, after),) = run_ranks(1, _make, mistake, desk)
    if code == "skip":
        pytest.skip(err)
    assert "Traceback" not in err, err
    *above, line = err.splitlines()
    assert not above or mistake.what == "a pre-flight that fails", err
    program, _, text = line.partition(": error: ")
    assert program.split()[0] in line and re.match(mistake.line, text), line
    assert code == mistake.code, line
    assert after == before


def test_a_full_disk_at_a_save_is_one_line_and_no_checkpoint(desk):
    """What is there has a temporary name, which the next start clears away."""
    save = Mistake(
        command="train", what="a full disk", flags="--save out/saved", line="--save out/saved", disk="full"
    )
    ((code, err, before, after),) = run_ranks(1, _make, save, desk)
    if code == "skip":
        pytest.skip(err)
    assert code == 1 and re.fullmatch(r"megatron_simct.train: error: --save out/saved.*\n", err), err
    new = set(after) - set(before)
    assert all("/out/saved/iter_0000002.tmp/" in name for name in new), new


def test_there_are_enough():
    assert (
        len({(mistake.command, mistake.flags, mistake.disk) for mistake in MISTAKES}) == len(MISTAKES) >= 40
    )
    assert {mistake.command for mistake in MISTAKES} == set(COMMANDS) == set(RIGHT)


def test_debug_shows_the_traceback(tmp_path):
    for flags, shown in ((), False), (("--debug",), True):
        command = [sys.executable, str(ROOT / "tools" / "plot_run.py"), str(tmp_path), *flags]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 1 and ("Traceback" in ended.stderr) == shown
        assert "no metrics.jsonl there" in ended.stderr


@pytest.mark.parametrize(
    "begun", ["", "written to|iteration +2"], ids=["while libraries load", "in training"]
)
def test_ctrl_c_is_one_line(begun, tiny, tmp_path):
    flags = ("--train-iters", "1000", "--run-dir", str(tmp_path / "run"))
    command = [sys.executable, "-m", "megatron_simct.train", *command_line(tiny, *flags)]
    # A job that a shell has put into the background ignores SIGINT, and so would all that it starts.
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
    assert process.returncode in (130, -signal.SIGINT)  # a shell says 130 of both
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
    """Root reads and writes everything, until it gives up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110
    assert libc.capset(header, sets) == 0


def _mount(folder: Path, disk: str) -> str | None:
    """A disk of this process alone, without room or read-only, or no network; why not, where that is not
    allowed.
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

"""No file that a command opens can make it run code: each of them is replaced by a pickle that would.

The test does not list the files that a command opens: a hook in the interpreter records every open of a
successful run. Files that libraries open by themselves are those that the command line names.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_simct import serve_teacher, train
from megatron_simct.commands import build_alignment_map, convert_checkpoint, evaluate
from megatron_simct.launch import __main__ as launch
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.teacher.endpoints import read_endpoints, read_keys
from megatron_simct.update import checkpoint, torch_dist
from megatron_simct.update.torch_dist import read_metadata
from tests.distributed import run_ranks
from tests.tiny import build_files, command_line
from tests.weights import random_weights

with megatron_imports():
    from megatron.core.dist_checkpointing.mapping import ShardedObject


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._mark),)


def saved(value: object, *, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def payloads(path: Path, mark: Path) -> list[bytes]:
    """Contents that could make a reader of such a file run code."""
    evil = Evil(mark)
    if path.suffix in (".yaml", ".yml"):
        return [f"!!python/object/apply:os.mkdir ['{mark}']\n".encode()]
    if path.suffix in (".pt", ".distcp", ".safetensors"):
        return [saved(evil), saved({"x": evil}, zipped=False), pickle.dumps(evil)]
    if path.suffix in (".npy", ".npz"):
        array = io.BytesIO()
        np.save(array, np.array([evil], dtype=object), allow_pickle=True)
        return [array.getvalue(), pickle.dumps(evil)]
    return [pickle.dumps(evil)]


def test_the_payloads_would_run(tmp_path) -> None:
    readers: dict[str, Callable[[bytes], object]] = {
        "a.json": pickle.loads,
        "a.pt": lambda data: torch.load(io.BytesIO(data), weights_only=False),
        "a.npy": lambda data: np.load(io.BytesIO(data), allow_pickle=True),
        "a.yaml": lambda data: yaml.unsafe_load(data),
    }
    for name, read in readers.items():
        for data in payloads(Path(name), tmp_path / "mark"):
            with contextlib.suppress(Exception):  # of the payloads that follow it
                read(data)
            (tmp_path / "mark").rmdir()  # it is there


# The commands


Main = Callable[[Sequence[str]], int | None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command on the files of a folder, and some of the files that it must open."""

    main: Main
    argv: Callable[[Path], list[str]]
    opens: tuple[str, ...]


def _serve(argv: Sequence[str]) -> int | None:
    """A teacher that stops when its endpoint is open."""
    serve_teacher.serve = lambda *args, **kwargs: None
    return serve_teacher.main(argv)


def _resume(inputs: Path) -> list[str]:
    return command_line(
        inputs / "files",
        *(
            "--config-file",
            str(inputs / "options.yaml"),
            "--load",
            str(inputs / "save"),
            "--no-verify-checkpoint",
        ),
        *("--simct-alignment-map", str(inputs / "map"), "--run-dir", str(inputs / "run")),
        *("--teacher-pretrained-checkpoint", str(inputs / "weights" / "teacher")),
        *("--eval-prompt-data", str(inputs / "files" / "held_out.jsonl"), *SMALL),
    )


def _start(inputs: Path) -> list[str]:
    return command_line(
        inputs / "files",
        *("--hf-checkpoint", str(inputs / "hf"), "--hf-sha256", str(inputs / "list"), *SMALL),
        *(
            "--load-debug-rollout-data",
            str(inputs / "rollouts"),
            "--load-debug-scored-data",
            str(inputs / "scored"),
        ),
        *("--teacher-pretrained-checkpoint", str(inputs / "weights" / "teacher"), "--train-iters", "1"),
    )


def _teach(inputs: Path) -> list[str]:
    return [
        *("--teacher-hf-checkpoint", str(inputs / "files" / "teacher"), "--bind", "tcp://127.0.0.1"),
        *("--teacher-tokenizer-model", str(inputs / "files" / "teacher.tiktoken")),
        *("--teacher-make-vocab-size-divisible-by", "4", "--run-dir", str(inputs / "served")),
        *("--teacher-pretrained-checkpoint", str(inputs / "weights" / "teacher"), "--no-verify-checkpoint"),
        *("--simct-alignment-map", str(inputs / "map")),
    ]


def _evaluate(inputs: Path) -> list[str]:
    return [
        *("--benchmark", "exact_match", "--data", str(inputs / "files" / "held_out.jsonl"), "--limit", "2"),
        *("--hf-checkpoint", str(inputs / "files" / "student"), "--output-dir", str(inputs / "evaluated")),
        *(
            "--tokenizer-model",
            str(inputs / "files" / "student.model"),
            "--make-vocab-size-divisible-by",
            "8",
        ),
        *("--pretrained-checkpoint", str(inputs / "save"), "--no-verify-checkpoint"),
        *("--max-response-len", "3", "--part-size", "1", "--workers", "1"),
    ]


def _back(inputs: Path) -> list[str]:
    return [
        *(
            "megatron-to-hf",
            "--load",
            str(inputs / "save"),
            "--hf-checkpoint",
            str(inputs / "files" / "student"),
        ),
        *("--save", str(inputs / "out"), "--make-vocab-size-divisible-by", "8", "--no-verify-checkpoint"),
    ]


def _there(inputs: Path) -> list[str]:
    return ["hf-to-megatron", "--hf-checkpoint", str(inputs / "hf"), "--save", str(inputs / "out")]


SMALL = ("--rollout-batch-size", "2", "--rollout-max-response-len", "3")
WEIGHTS = ("__0_0.distcp", "__0_1.distcp", ".metadata", "metadata.json")
SHARDS = (*WEIGHTS, "common.pt")
CASES = {
    "train, which resumes": Case(
        main=train.main,
        argv=_resume,
        opens=(
            *SHARDS,
            "options.yaml",
            "config.json",
            "train.jsonl",
            "held_out.jsonl",
            "metrics.jsonl",
            "run.json",
        ),
    ),
    "train, from downloaded weights": Case(
        main=train.main,
        argv=_start,
        opens=("model-00001-of-00001.safetensors", "list", "rollout_0.0.json", "teacher.json"),
    ),
    "serve_teacher": Case(main=_serve, argv=_teach, opens=(*WEIGHTS, "server_key.json", "gone.json")),
    "evaluate": Case(main=evaluate.main, argv=_evaluate, opens=(*WEIGHTS, "run.json", "000000.jsonl")),
    "convert": Case(main=convert_checkpoint.main, argv=_there, opens=("model-00001-of-00001.safetensors",)),
    "convert back": Case(main=convert_checkpoint.main, argv=_back, opens=WEIGHTS),
    "convert's verify": Case(
        main=convert_checkpoint.main,
        argv=lambda inputs: ["verify", str(inputs / "save")],
        opens=(*SHARDS, "run.json"),
    ),
    "launch": Case(
        main=launch.main, argv=lambda inputs: [str(inputs / "run.yaml"), "--dry-run"], opens=("run.yaml",)
    ),
    "launch status": Case(
        main=launch.main, argv=lambda inputs: ["status", str(inputs / "slurm.yaml")], opens=("job.json",)
    ),
}


def _run(
    rank: int, world_size: int, main: Main, argv: list[str], folder: Path | None
) -> tuple[object, str, set[Path]]:
    """Exit code, standard error, and the files of the folder that were opened for reading."""
    opened: set[Path] = set()

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if (
            event == "open"
            and isinstance(args[0], str | os.PathLike)
            and args[2] & os.O_ACCMODE != os.O_WRONLY
        ):
            opened.add(Path(os.path.abspath(args[0])))

    if folder is not None:
        sys.addaudithook(hear)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code: object = main(argv)
        except SystemExit as end:
            code = end.code
    return code, errors.getvalue(), {path for path in opened if folder in path.parents} if folder else set()


def succeed(main: Main, *argv: str) -> None:
    ((code, err, _),) = run_ranks(1, _run, main, list(argv), None)
    assert not code, err


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """All input files of the commands, made by the commands."""
    folder = tmp_path_factory.mktemp("inputs") / "inputs"
    files = folder / "files"
    files.mkdir(parents=True)
    build_files(files)
    random_weights(files, folder / "weights")
    kept = (
        "--save-debug-rollout-data",
        str(folder / "rollouts"),
        "--save-debug-scored-data",
        str(folder / "scored"),
    )
    run = ("--save", str(folder / "save"), "--run-dir", str(folder / "run"), "--train-iters", "1")
    teacher = ("--teacher-pretrained-checkpoint", str(folder / "weights" / "teacher"))
    succeed(train.main, *command_line(files, *SMALL, *run, *kept, *teacher))
    succeed(convert_checkpoint.main, *_back(folder))
    (folder / "out").rename(folder / "hf")
    names = sorted((folder / "hf").iterdir())
    (folder / "list").write_text(
        "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in names)
    )
    tokenizers = ("--teacher-tokenizer", str(files / "teacher.tiktoken"), "--student-tokenizer")
    succeed(
        build_alignment_map.main, *tokenizers, str(files / "student.model"), "--output", str(folder / "map")
    )
    (folder / "options.yaml").write_text("train_iters: 2\n")
    succeed(_serve, *_teach(folder))
    gone = '{"replica": "gone", "address": "tcp://127.0.0.1:1", "life": "x", "host": "nowhere", "pid": 1}'
    (folder / "served" / "teacher" / "gone.json").write_text(gone)
    succeed(evaluate.main, *_evaluate(folder))
    for kind in ("responses", "grades"):
        (folder / "evaluated" / kind / "000001.jsonl").unlink()
    student = {"hf_checkpoint": str(folder / "hf"), "tokenizer_model": str(files / "student.model")}
    student |= {
        "prompt_data": str(files / "train.jsonl"),
        "simct_interface": "sft",
        "rollout_max_response_len": 3,
    }
    values = {"run_dir": str(folder / "launched"), "student": student}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    (folder / "slurm.yaml").write_text(
        yaml.safe_dump(values | {"cluster": {"kind": "slurm", "student": {"nodes": 1}}})
    )
    (folder / "launched").mkdir()
    (folder / "launched" / "job.json").write_text('{"job_id": "1"}')
    return folder


@pytest.fixture
def copied(inputs, tmp_path) -> Iterator[Path]:
    """The inputs. They are restored at the end."""
    shutil.copytree(inputs, tmp_path / "pristine")
    yield inputs
    shutil.rmtree(inputs)
    shutil.copytree(tmp_path / "pristine", inputs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_file_that_a_command_opens_runs_code(copied, tmp_path, case) -> None:
    folder, pristine, mark = copied, tmp_path / "pristine", tmp_path / "mark"

    def restore() -> None:
        shutil.rmtree(folder)
        shutil.copytree(pristine, folder)

    argv = case.argv(folder)
    ((_, err, opened),) = run_ranks(1, _run, case.main, argv, folder)
    restore()
    named = {Path(value) for value in argv if value.startswith(str(folder))}
    files = sorted(path for path in opened | named if path.is_file())
    assert set(case.opens) <= {path.name for path in files}, (files, err)
    ends = []
    for path in files:
        for data in payloads(path, mark):
            path.write_bytes(data)
            # if it fails, one line says so
            ((code, err, _),) = run_ranks(1, _run, case.main, argv, None)
            assert not mark.exists(), path
            ends.append(code)
            restore()
    assert {1, 2} & set(ends), "some of them cannot be done without"


def test_what_both_jobs_exchange_in_files_runs_no_code(tmp_path) -> None:
    for name in ("server_key.json", "client_key.json", "replica.json"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
        path.chmod(0o600)
        with contextlib.suppress(ValueError):
            read_keys(path)
    assert read_endpoints(tmp_path) == {} and not (tmp_path / "mark").exists()


# Contents of a checkpoint's files


def _edit(inputs: Path, change: Callable[[Any], None]) -> Path:
    """A checkpoint folder with another `.metadata`."""
    folder = inputs / "save" / "iter_0000001"
    metadata = read_metadata(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def _resumed(inputs: Path) -> str:
    ((code, err, _),) = run_ranks(1, _run, train.main, _resume(inputs), None)
    assert code == 1 and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("place", ["planner_data", "all_local_plans", "storage_meta", "state_dict_metadata"])
def test_the_metadata_is_checked_in_every_part(copied, tmp_path, place) -> None:
    evil = Evil(tmp_path / "mark")
    _edit(copied, lambda metadata: setattr(metadata, place, {"x": evil}))
    err = _resumed(copied)
    assert "iter_0000001: .metadata is damaged or none (it names posix.mkdir, which has no place there" in err
    assert not (tmp_path / "mark").exists()


def test_a_name_behind_an_allowed_one_is_none(tmp_path) -> None:
    """In protocol 4 a name may have dots: `torch` `Size.__class__`, and from there any object."""
    for module, name in (
        ("torch", "Size.__reduce__"),
        ("torch", "os.system"),
        ("torch", "load"),
        ("os", "system"),
    ):
        text = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
        (tmp_path / ".metadata").write_bytes(b"\x80\x04" + text + b"\x93.")
        with pytest.raises(ValueError, match=r"\.metadata .*has no place there"):
            read_metadata(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_shards_are_read_as_numbers_only(copied, tmp_path, zipped) -> None:
    data = saved(Evil(tmp_path / "mark"), zipped=zipped)

    def redirect(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path, info.offset, info.length = "evil.pt", 0, len(data)

    (_edit(copied, redirect) / "evil.pt").write_bytes(data)
    assert "holds a pickle of more than numbers, which is not read" in _resumed(copied)
    assert not (tmp_path / "mark").exists()


def _resume_with_objects(argv: Sequence[str]) -> int | None:
    """train, with the random state requested as the object that earlier versions wrote."""
    checkpoint._has_rng_tensors = lambda path: False
    return train.main(argv)


def _save_with_objects(argv: Sequence[str]) -> int | None:
    state = checkpoint.Checkpoints._state

    def old_state(self: Any, iteration: int, *, is_loading: bool, rng: str | None = None) -> dict[str, Any]:
        evil = Evil(Path(os.environ["MARK"]))
        return state(self, iteration, is_loading=is_loading, rng=None) | {
            "rng_state": ShardedObject("rng_state", {"torch": evil}, (1,), (0,), replica_id=0)
        }

    checkpoint.Checkpoints._state = old_state
    return train.main(argv)


def test_the_random_state_of_earlier_versions_is_no_pickle(copied, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    shutil.rmtree(copied / "save")
    succeed(_save_with_objects, *command_line(copied / "files", *SMALL, "--save", str(copied / "save")))
    ((code, err, _),) = run_ranks(1, _run, _resume_with_objects, _resume(copied), None)
    assert code == 1 and "holds a pickle of more than numbers, which is not read" in err
    assert not (tmp_path / "mark").exists()


def test_state_that_transformer_engine_would_unpickle_is_refused() -> None:
    name = "decoder.layers.self_attention.linear_qkv._extra_state"
    for empty in (None, torch.empty(0, dtype=torch.uint8)):
        torch_dist._refuse_pickled_state({"model": {name: empty}})
    for filled in (torch.ones(9, dtype=torch.uint8), io.BytesIO(b"x")):
        with pytest.raises(ValueError, match="_extra_state holds a pickle"):
            torch_dist._refuse_pickled_state({"model": {name: filled}})


def test_what_a_user_has_set_for_torch_is_left_as_it_was(monkeypatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    evil = saved({"x": Evil(Path("/nowhere/at/all"))})
    with torch_dist._weights_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(evil), weights_only=False)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ

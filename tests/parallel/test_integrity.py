"""A checkpoint is used only if it is unchanged since it was written. Otherwise one line names the
file and the remedy.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_simct.commands import convert_checkpoint
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.update import checkpoint
from megatron_simct.update.checkpoint import RUN_FILE, TRACKER
from megatron_simct.update.integrity import read_run_file, sealed
from megatron_simct.update.torch_dist import read_metadata
from tests.distributed import run_ranks
from tests.end_to_end.bit_flips import flip, flips_in_one_process, flips_through_train
from tests.runs import assert_same_run, run
from tests.tiny import command_line

with megatron_imports():
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


def argv(files: Path, folder: Path, iterations: int, *flags: str) -> list[str]:
    return command_line(
        files,
        *("--lr-decay-style", "constant", "--train-iters", str(iterations), "--save-interval", "1"),
        *(
            "--run-dir",
            str(folder / "run"),
            "--save",
            str(folder / "save"),
            "--load",
            str(folder / "save"),
            *flags,
        ),
    )


def printed(arguments: list[str], *, world_size: int = 1) -> str:
    results = run_ranks(world_size, run, arguments)
    assert all(code == 0 for code, _, _ in results), results
    return results[0][1]


def refused(arguments: list[str], *, world_size: int = 1) -> str:
    """The one error line, which is the same on each rank."""
    results = run_ranks(world_size, run, arguments)
    lines = {re.sub(r" on rank \d", "", err) for _, _, err in results}
    assert all(code == 1 for code, _, _ in results) and len(lines) == 1, results
    (line,) = lines
    assert line.count("\n") == 1, line
    return line


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory) -> Path:
    """Three steps, each with a checkpoint."""
    folder = tmp_path_factory.mktemp("original")
    printed(argv(tiny, folder, 3))
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy to damage."""
    shutil.copytree(original, tmp_path / "copy")
    return tmp_path / "copy"


def newest(folder: Path) -> Path:
    return folder / "save" / "iter_0000003"


# Bits


def test_no_flipped_bit_passes(folder) -> None:
    assert flips_in_one_process(newest(folder), 60, seed=3).startswith("0 of 60 bit flips pass")


def test_no_flipped_bit_is_trained_on(tiny, folder) -> None:
    for iteration in (1, 2):  # a tracker that names another complete checkpoint is followed
        shutil.rmtree(folder / "save" / f"iter_000000{iteration}")
    assert flips_through_train(folder / "save", argv(tiny, folder, 4), 4, seed=2).startswith("0 of 4")


@pytest.mark.parametrize("harm", ["cut", "grown", "gone", "empty"])
def test_a_file_of_another_length_is_named(tiny, folder, harm) -> None:
    path = newest(folder) / "__0_1.distcp"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-1], "grown": data + b"\0", "gone": b"", "empty": b""}[harm])
    if harm == "gone":
        path.unlink()
    line = refused(argv(tiny, folder, 4))
    assert f"{newest(folder)}: damaged: __0_1.distcp (" in line


# What to do then


def test_the_newest_whole_one_is_named_and_taken_when_told_so(tiny, folder, original) -> None:
    for iteration in (2, 3):
        flip(folder / "save" / f"iter_000000{iteration}" / ".metadata", 999)
    line = refused(argv(tiny, folder, 3, "--tensor-model-parallel-size", "2"), world_size=2)
    assert (
        "iter_0000003: damaged: .metadata (its SHA-256 is another one); the newest whole one is that of"
        in line
    )
    assert "iteration 1: add --ckpt-step 1" in line
    assert "after iteration 1" in printed(argv(tiny, folder, 3, "--ckpt-step", "1"))
    assert_same_run(folder, original)


def test_the_step_that_is_asked_for_must_be_there(tiny, folder) -> None:
    assert "--ckpt-step 7: no such checkpoint" in (line := refused(argv(tiny, folder, 4, "--ckpt-step", "7")))
    assert "there are: 1, 2, 3" in line
    assert "--ckpt-step needs --load" in refused(command_line(tiny, "--ckpt-step", "1"))


def test_a_newer_one_that_the_tracker_does_not_name_is_pointed_out(tiny, folder) -> None:
    (folder / "save" / TRACKER).write_text("1")
    text = printed(argv(tiny, folder, 2))
    assert f"after iteration 1, the one in {TRACKER}; there are newer ones: 2, 3" in text


def test_a_step_that_is_older_than_the_newest_is_saved_again(tiny, folder) -> None:
    flip(newest(folder) / "common.pt", 99)
    printed(argv(tiny, folder, 2, "--ckpt-step", "2"))
    assert (folder / "save" / TRACKER).read_text() == "2"


def test_weights_to_start_from_are_verified_and_the_line_that_mends_them_works(tiny, folder) -> None:
    flip(newest(folder) / "__0_0.distcp", 77777)
    start = command_line(tiny, "--pretrained-checkpoint", str(folder / "save"), "--train-iters", "1")
    line = refused(start)
    assert line.split(": ")[2].startswith("--pretrained-checkpoint") and "__0_0.distcp" in line
    subprocess.run(["bash", "-c", line.strip().split(": ")[-1]], check=True)
    assert f"--pretrained-checkpoint {folder / 'save' / 'iter_0000002'}: 5 files" in printed(start)


def test_where_none_is_whole_the_line_says_how_to_go_on_nevertheless(tiny, folder) -> None:
    for iteration in (1, 2, 3):
        path = folder / "save" / f"iter_000000{iteration}"
        largest = max(read_metadata(path).storage_data.values(), key=lambda info: info.length)
        flip(path / largest.relative_path, 8 * (largest.offset + largest.length // 2))  # amid numbers
    line = refused(argv(tiny, folder, 4))
    assert "no older one is known to be whole; --no-verify-checkpoint loads it nevertheless" in line
    text = printed(argv(tiny, folder, 4, "--no-verify-checkpoint"))
    assert "after iteration 3" in text and "verified" not in text


def test_the_seconds_of_verifying_and_of_reading_are_said(tiny, folder) -> None:
    text = printed(argv(tiny, folder, 3))
    assert re.search(r" --load \S+/iter_0000003: 5 files, 0\.\d MiB, verified in \d+\.\d\d s\n", text), text
    assert re.search(r" --load \S+/iter_0000003: read in \d+\.\d\d s\n", text)


def test_a_file_of_ones_own_beside_them_does_no_harm(tiny, folder) -> None:
    (newest(folder) / "notes.txt").write_text("the good one")
    assert "after iteration 3" in printed(argv(tiny, folder, 3))


# Earlier versions


def as_before(folder: Path) -> None:
    """Remove from run.json what earlier versions, without hashes, did not write."""
    content, _ = read_run_file(folder)
    del content["files"], content["sha256"]
    (folder / RUN_FILE).write_text(json.dumps(content, indent=2) + "\n")


def _old_state(self, iteration, *, is_loading, rng="tensors") -> dict[str, Any]:
    state = STATE(self, iteration, is_loading=is_loading, rng=None)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    random = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    state["rng_state"] = ShardedObject("rng_state", random, (world_size,), (rank,), replica_id=0)
    return state


STATE = checkpoint.Checkpoints._state


def _run_as_before(rank, world_size, arguments) -> tuple[int, str, str]:
    checkpoint.Checkpoints._state = _old_state
    return run(rank, world_size, arguments)


def test_a_checkpoint_without_hashes_is_loaded_with_one_line(tiny, original, tmp_path) -> None:
    ((code, _, err),) = run_ranks(1, _run_as_before, argv(tiny, tmp_path, 2))
    assert code == 0, err
    as_before(tmp_path / "save" / "iter_0000002")
    text = printed(argv(tiny, tmp_path, 3))
    assert text.count("has no hashes") == 1 and "after iteration 2" in text
    assert_same_run(tmp_path, original)


def test_what_is_sealed_is_not_taken_for_an_earlier_version(tiny, folder) -> None:
    """One bit cannot remove one half of the seal without a trace in the other."""
    path = newest(folder) / RUN_FILE
    good = path.read_bytes()
    for field in (b'"files"', b'"sha256": "' + json.loads(good)["sha256"].encode()):
        path.write_bytes(good.replace(field, field.replace(b"s", b"t", 1)))
        assert "damaged: run.json (" in refused(argv(tiny, folder, 4))


def test_the_seal_is_of_the_text_and_not_of_what_it_says(tmp_path) -> None:
    (tmp_path / RUN_FILE).write_bytes(sealed({"name": "\u00e9"}, {}))
    assert read_run_file(tmp_path) == ({**json.loads((tmp_path / RUN_FILE).read_bytes())}, {})
    text = (tmp_path / RUN_FILE).read_text()
    (tmp_path / RUN_FILE).write_text(text.replace("\\u00e9", "\\u00E9"))
    with pytest.raises(ValueError, match=RUN_FILE):
        read_run_file(tmp_path)


# The tool


def _verify(rank: int, world_size: int, directory: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = convert_checkpoint.main(["verify", directory])
    return code, out.getvalue(), err.getvalue()


def test_the_tool_says_of_each_checkpoint_whether_it_is_whole(folder) -> None:
    as_before(folder / "save" / "iter_0000001")
    ((code, out, _),) = run_ranks(1, _verify, str(folder / "save"))
    assert code == 0 and re.sub(r"\d+\.\d+", "x", out).splitlines() == [
        f" {folder}/save/iter_0000001: not checked: written by an earlier version, which stored no hashes",
        f" {folder}/save/iter_0000002: intact: 5 files, x MiB, verified in x s",
        f" {folder}/save/iter_0000003: intact: 5 files, x MiB, verified in x s",
    ]
    flip(newest(folder) / "metadata.json", 3)
    for code, _, err in run_ranks(2, _verify, str(folder / "save")):
        assert code == 1 and "1 of 3 damaged: iter_0000003/metadata.json (" in err
        assert err.endswith("the newest intact one is that of iteration 2\n")
    for code, _, err in run_ranks(1, _verify, str(folder)):
        assert code == 1 and "no checkpoint there" in err


# Downloaded weights


@pytest.fixture
def hf_folder(tmp_path) -> Path:
    """A student with weights, as downloaded."""
    pytest.importorskip("transformers")
    from tests.huggingface import save_model

    save_model(tmp_path / "hf", "llama", shard_size="30KB", vocab_size=360)
    return tmp_path / "hf"


def sums(folder: Path, pattern: str) -> str:
    files = sorted(folder.glob(pattern))
    assert files
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)


def test_downloaded_weights_are_compared_with_a_list(tiny, hf_folder, tmp_path) -> None:
    listed = tmp_path / "list"
    listed.write_text(sums(hf_folder, "*"))
    start = command_line(tiny, "--hf-checkpoint", str(hf_folder), "--train-iters", "1")
    assert "verified by" in printed([*start, "--hf-sha256", str(listed)])
    files = sorted(hf_folder.glob("*.safetensors"))
    assert len(files) > 2
    flip(files[1], 8 * files[1].stat().st_size - 1)
    line = refused([*start, "--hf-sha256", str(listed)], world_size=2)
    assert f"--hf-checkpoint {hf_folder}: {files[1].name} is not the file that {listed} names" in line
    printed(start)  # no file says what the hash must be
    listed.write_text("".join(row for row in listed.read_text().splitlines(True) if files[2].name not in row))
    assert f"has no line for {files[2].name}" in refused([*start, "--hf-sha256", str(listed)])
    listed.write_text("0123  model.safetensors\n")
    assert "line 1 is not a line of sha256sum" in refused([*start, "--hf-sha256", str(listed)])
    assert "No such file" in refused([*start, "--hf-sha256", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("kind", ["SHA256SUMS", "hub folder", "hub cache"])
def test_downloaded_weights_are_compared_with_what_the_folder_says_of_them(tiny, hf_folder, kind) -> None:
    files = sorted(hf_folder.glob("*.safetensors"))
    if kind == "SHA256SUMS":
        subprocess.run(["bash", "-c", "sha256sum *.safetensors > SHA256SUMS"], check=True, cwd=hf_folder)
    for path in files:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if kind == "hub folder":
            kept = hf_folder / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(f"{'c' * 40}\n{digest}\n1700000000.0\n")
        elif kind == "hub cache":
            (hf_folder.parent / "blobs").mkdir(exist_ok=True)
            path.rename(hf_folder.parent / "blobs" / digest)
            path.symlink_to(Path("..") / "blobs" / digest)
    start = command_line(tiny, "--hf-checkpoint", str(hf_folder), "--train-iters", "1")
    assert f" --hf-checkpoint {hf_folder}: {len(files)} files verified by " in printed(start)
    flip(files[0].resolve(), 8 * files[0].stat().st_size - 9)
    assert files[0].name in refused(start)
    assert "verified" not in printed([*start, "--no-verify-checkpoint"])

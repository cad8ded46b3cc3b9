"""Flips single bits of a checkpoint's files at random: the verification must find each, and no
run may train on one.

    python -m tests.end_to_end.bit_flips 1000 [--through-train 20] [--seed S]
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from megatron_simct.update.checkpoint import TRACKER
from megatron_simct.update.integrity import verify
from tests.distributed import run_ranks
from tests.runs import run
from tests.tiny import build_files, command_line


def flip(path: Path, bit: int) -> None:
    """Flip one bit; a second flip restores it."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def chosen(folder: Path, count: int, dice: random.Random) -> list[tuple[Path, int]]:
    """Each file in turn, so that all are used, and a random bit of it."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    picked = [files[number % len(files)] for number in range(count)]
    return [(path, dice.randrange(8 * path.stat().st_size)) for path in picked]


def unnoticed(
    rank: int, world_size: int, folder: Path, flips: list[tuple[Path, int]]
) -> list[tuple[str, int]]:
    """The flips that `verify` does not find, or reports for another file."""
    sound = verify(folder)
    assert sound is not None and sound.damage is None
    missed = []
    for path, bit in flips:
        flip(path, bit)
        verdict = verify(folder)
        flip(path, bit)
        if verdict is None or verdict.damage is None or not verdict.damage.startswith(path.name):
            missed.append((path.name, bit))
    return missed


def flips_in_one_process(folder: Path, count: int, *, seed: int) -> str:
    """A summary of the flips in a checkpoint. Raises AssertionError if one is not found."""
    flips = chosen(folder, count, random.Random(seed))
    ((missed),) = run_ranks(1, unnoticed, folder, flips, timeout_s=3600)
    assert not missed, missed
    return f"{len(missed)} of {count} bit flips pass the verification, in {len({p for p, _ in flips})} files"


def flips_through_train(save: Path, argv: list[str], count: int, *, seed: int) -> str:
    """The same, with a command that resumes. The tracker is among the files."""
    folder = save / f"iter_{int((save / TRACKER).read_text()):07d}"
    flips = [
        *chosen(folder, max(0, count - 2), random.Random(seed)),
        (save / TRACKER, 1),
        (save / TRACKER, 5),
    ][:count]
    for path, bit in flips:
        flip(path, bit)
        ((code, out, err),) = run_ranks(1, run, argv)
        flip(path, bit)
        assert code == 1 and err.count("\n") == 1 and "--load" in err, (path.name, bit, out, err)
        assert path.name in err or path.name == TRACKER, err
    return f"0 of {count} bit flips pass through train"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("flips", type=int, metavar="N")
    parser.add_argument("--through-train", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        files, save = Path(name) / "files", Path(name) / "save"
        files.mkdir()
        build_files(files)
        argv = command_line(files, "--save", str(save), "--load", str(save))
        ((code, _, err),) = run_ranks(1, run, argv)
        assert code == 0, err
        print(flips_in_one_process(save / "iter_0000002", options.flips, seed=options.seed), flush=True)
        print(flips_through_train(save, argv, options.through_train, seed=options.seed), flush=True)


if __name__ == "__main__":
    main()

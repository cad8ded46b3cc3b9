"""Run every command of the quick start and of a first hour as a newcomer does; compare the output of each.

It needs only Python: the first command makes the environment. It runs in the current folder, a checkout.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.printed import commands_of, same, same_but_for_numbers

QUICK_START = Path("docs/quickstart.md")


def run(command: str) -> str:
    done = subprocess.run(
        ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3600
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nfirst_hour: {command}: exit code {done.returncode}")
    return done.stdout


def main() -> None:
    steps = [("./examples/quickstart/run.sh", QUICK_START.read_text().split("```")[1])]
    steps += [
        ("source .venv/bin/activate\n" + command, text)
        for command, text in commands_of(Path("docs/first_hour.md"))
    ]
    exact = 0
    for command, expected in steps:
        begin = time.monotonic()
        printed = run(command)
        if "Held-out accuracy" in expected:  # its last table; the lines before it are those of the three runs
            printed = printed[printed.index("   Held-out accuracy") :]
        if not same_but_for_numbers(expected, printed):
            sys.exit(f"first_hour: {command}\nthe page prints\n{expected}\nfound was\n{printed}")
        exact += same(expected, printed)
        found = (
            "as the page prints it" if same(expected, printed) else "as the page prints it but for numbers"
        )
        print(
            f"first_hour: {time.monotonic() - begin:5.0f} s  {found}: {command.splitlines()[-1].strip()}",
            flush=True,
        )
    print(
        f"first_hour: verified: {len(steps)} commands in an empty environment, {exact} of them to the digit"
    )


if __name__ == "__main__":
    main()

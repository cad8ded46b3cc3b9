"""What an import loads, and which parts of the package know which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ALLOWED = {
    # What every other part may read.
    "records": "",
    "files": "",
    "json_fields": "",
    "stopping": "",
    "megatron_flags": "",
    "command_line": "parallel",
    "config": "alignment evaluation",  # whether a folder holds a tokenizer; names of benchmarks
    "arguments": "command_line config megatron_flags",
    "writers": "config files",
    "parallel": "config records",
    # The hops.
    "alignment": "config files json_fields records",
    "data": "alignment records",
    "evaluation": "",
    "losses": "alignment config parallel records",
    "models": "config json_fields parallel",
    "rollout": "alignment data files losses models parallel records",
    "teacher": "alignment config loading losses models parallel records update",
    "update": "alignment config files losses models parallel records",
    # What knows several of them.
    "loading": "alignment config data evaluation losses models parallel update",
    "monitoring": "alignment parallel records update writers",
    "samples": "alignment records update writers",
    "preflight": "alignment arguments config data launch loading losses models parallel records update writers",
    "launch": "arguments command_line config preflight teacher",
    # The jobs.
    "job": "alignment arguments config data evaluation loading losses models monitoring parallel records rollout "
    "samples stopping teacher update writers",
    "serve_teacher": "alignment arguments command_line config loading models parallel stopping teacher",
    "train": "arguments command_line config files job losses models monitoring parallel records teacher update",
}
"""Which folders and files of megatron_simct/ each import, in functions too. No hop knows job.py or train.py."""


def loaded_by(module: str) -> set[str]:
    """The modules that a fresh interpreter has after the import, less those it has without."""
    code = f"import sys; before = set(sys.modules); import {module}; print(*sys.modules.keys() - before)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, timeout=120)
    return set(result.stdout.split())


def imported(path: Path) -> set[str]:
    """Full names of what a file imports, at its top or in a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(
    "module, forbidden",
    [
        ("megatron_simct.config", "torch numpy yaml"),
        ("megatron_simct.arguments", "torch numpy"),
        ("megatron_simct.records", "torch"),
        ("megatron_simct.alignment", "torch megatron tokenizers sentencepiece tiktoken"),
        ("megatron_simct.losses", "megatron transformers"),
        ("megatron_simct.launch.__main__", "torch megatron tokenizers"),
        ("megatron_simct.teacher.wire", "torch megatron zmq"),
        ("megatron_simct.train", "transformers tensorboard wandb matplotlib"),
    ],
)
def test_an_import_loads_nothing_heavy_that_it_does_not_need(module, forbidden):
    roots = {name.split(".")[0] for name in loaded_by(module)}
    assert roots & set(forbidden.split()) == set()


def test_the_package_itself_imports_nothing():
    assert loaded_by("megatron_simct") == {"megatron_simct"}


def test_parts_of_the_package_know_those_of_the_table_and_no_others():
    package = ROOT / "megatron_simct"
    found: dict[str, set[str]] = {
        path.stem: set() for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    del found["__init__"]
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for name in imported(path):
            root, *rest = name.split(".")
            assert root not in ("tools", "examples", "tests", "megatron_simct_tools"), f"{path} imports {name}"
            if root == "megatron_simct" and rest and rest[0] not in (own, "__version__"):
                found[own].add(rest[0])
    assert found == {own: set(names.split()) for own, names in ALLOWED.items()}

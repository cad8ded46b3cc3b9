"""Modules that an import loads, and the table of which part of the package imports which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ALLOWED = {
    # Every other part may import these.
    "records": "",
    "files": "",
    "prompt_files": "json_fields",
    "ownership": "files",
    "json_fields": "",
    "engine_client": "",
    "stopping": "",
    "config": "json_fields",
    "parallel": "config ownership stopping",
    # The hops.
    "alignment": "config files json_fields records",
    "data": "alignment prompt_files records",
    "evaluation": "config prompt_files",
    "packing": "records",
    "losses": "alignment config packing records",
    "models": "config files json_fields parallel",
    "rollout": "alignment data engine_client files losses models packing parallel prompt_files records",
    "teacher": "alignment config engine_client files loading losses models ownership packing parallel "
    "records update",
    "update": "alignment config files losses models parallel records",
    # Parts that know several of them.
    "loading": "alignment config data evaluation losses models parallel records update",
    "reporting": "alignment config files parallel records update",
    "preflight": "alignment config data engine_client loading losses models packing parallel records "
    "reporting teacher update",
    "launch": "config files preflight",
    "rewarding": "alignment evaluation records rollout update",
    # The jobs, and the commands beside them.
    "commands": "alignment config data evaluation files loading losses models parallel preflight "
    "prompt_files records rollout update",
    "job_parts": "alignment config data engine_client evaluation files loading losses models packing "
    "parallel records reporting rewarding rollout teacher update",
    "job": "alignment config data evaluation job_parts loading losses parallel records reporting rewarding "
    "rollout stopping teacher update",
    "serve_teacher": "alignment config engine_client loading models parallel stopping teacher",
    "train": "config files job losses models parallel records reporting rollout teacher update",
}
"""Which folders and files of megatron_simct/ each import, in functions too.

No hop knows job.py or train.py.
"""


def loaded_by(module: str) -> set[str]:
    """The modules that the import adds to those of a fresh interpreter."""
    code = f"import sys; before = set(sys.modules); import {module}; print(*sys.modules.keys() - before)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, timeout=120)
    return set(result.stdout.split())


def imported(path: Path) -> set[str]:
    """Full names of a file's imports, at its top or in a function."""
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
        ("megatron_simct.config.options", "torch numpy yaml"),
        ("megatron_simct.config.flags", "torch numpy"),
        ("megatron_simct.records", "torch"),
        ("megatron_simct.alignment", "torch megatron tokenizers sentencepiece tiktoken"),
        ("megatron_simct.losses", "megatron transformers"),
        ("megatron_simct.launch.__main__", "torch megatron tokenizers"),
        ("megatron_simct.teacher.wire", "torch megatron zmq"),
        ("megatron_simct.train", "transformers tensorboard wandb matplotlib"),
    ],
)
def test_an_import_loads_nothing_heavy_that_it_does_not_need(module, forbidden) -> None:
    roots = {name.split(".")[0] for name in loaded_by(module)}
    assert roots & set(forbidden.split()) == set()


@pytest.mark.parametrize("module", ["megatron_simct.config.command_line", "megatron_simct.train"])
def test_an_import_leaves_the_interpreter_as_it_was(module) -> None:
    code = f"import sys; before = sys.excepthook; import {module}; print(sys.excepthook is before)"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout == "True\n"


def test_the_package_itself_imports_nothing() -> None:
    assert loaded_by("megatron_simct") == {"megatron_simct"}


def test_no_file_changes_where_modules_are_found() -> None:
    """A checkout and an installed package have the same names (CONTRIBUTING.md)."""
    sources = [
        path for room in ("megatron_simct", "tools", "examples") for path in (ROOT / room).rglob("*.py")
    ]
    assert len(sources) > 200
    assert [str(path) for path in sources if "sys.path" in path.read_text(encoding="utf-8")] == []


def test_parts_of_the_package_know_those_of_the_table_and_no_others() -> None:
    package = ROOT / "megatron_simct"
    found: dict[str, set[str]] = {
        path.stem: set()
        for path in package.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    del found["__init__"]
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for name in imported(path):
            root, *rest = name.split(".")
            assert root not in ("tools", "examples", "tests"), f"{path} imports {name}"
            if root == "megatron_simct" and rest and rest[0] not in (own, "__version__"):
                found[own].add(rest[0])
    assert found == {own: set(names.split()) for own, names in ALLOWED.items()}

"""The packages that a CPU install pulls, and the installed files."""

from __future__ import annotations

import re
from pathlib import Path

import tomllib
from setuptools import find_packages

import megatron_simct

ROOT = Path(__file__).resolve().parents[2]


def _names(lines: list[str]) -> list[str]:
    return [re.split(r"[\[<>=! ]", line)[0] for line in lines if line and not line.startswith(("#", "-r"))]


def test_cpu_requirements_pull_nothing_of_a_gpu() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = _names((ROOT / "requirements.txt").read_text().splitlines())
    assert {"torch", "megatron-core"} <= set(pinned)
    for name in (
        *pinned,
        *_names(project["dependencies"]),
        *_names(project["optional-dependencies"]["test"]),
    ):
        assert name not in ("transformer-engine", "apex")
    assert _names(project["optional-dependencies"]["gpu"]) == ["transformer-engine"]
    # Every dependency of the package is pinned, torch exactly, and so are the packages for the
    # quick start's pictures.
    report = _names(project["optional-dependencies"]["report"])
    assert set(_names(project["dependencies"])) | set(report) == set(pinned)
    assert all(
        "==" in line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] not in "#"
    )


def test_version_is_one() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]
    assert f"## {megatron_simct.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_image_has_the_versions_that_the_tests_ran_with() -> None:
    pinned = set(
        (ROOT / "requirements.txt").read_text().split() + (ROOT / "requirements-test.txt").read_text().split()
    )
    dockerfile = (ROOT / "Dockerfile").read_text()
    named = re.findall(r" ([a-z]+==\d[\d.]+)", dockerfile)
    assert {name.split("==")[0] for name in named} == {"hypothesis", "pytest", "transformers"} and set(
        named
    ) <= pinned
    (core,) = re.findall(r"ARG MEGATRON_CORE_VERSION=(\S+)", dockerfile)
    assert f"megatron-core=={core}" in pinned


def test_all_packages_their_files_and_their_commands_are_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = project["tool"]["setuptools"]["packages"]["find"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "megatron_simct").rglob("*.py")}
    assert {str(folder).replace("/", ".") for folder in folders} == set(find_packages(str(ROOT), **found))
    kept = {
        path
        for pattern in project["tool"]["setuptools"]["package-data"]["megatron_simct"]
        for path in (ROOT / "megatron_simct").glob(pattern)
    }
    others = {path for path in (ROOT / "megatron_simct").rglob("*") if path.is_file()}
    assert {path for path in others if path.suffix not in (".py", ".pyc")} == kept
    for name, target in project["project"]["scripts"].items():
        module, function = target.split(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        assert name.startswith("simct-") and f"def {function}(argv" in path.read_text()


def test_a_tool_of_the_checkout_is_the_installed_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    installed = {target.split(":")[0]: name for name, target in scripts.items() if ".commands." in target}
    tools = {path.stem: path.read_text() for path in (ROOT / "tools").glob("*.py")}
    del tools["reference"]  # writes a document of the checkout
    assert {f"megatron_simct.commands.{name}" for name in tools} == set(installed)
    for name, text in tools.items():
        module = f"megatron_simct.commands.{name}"
        assert f"from {module} import main\n" in text and f'"""{installed[module]} from a checkout' in text
        assert len(text.splitlines()) < 10


def test_the_lock_file_has_every_pinned_package_with_its_hashes() -> None:
    """Except torch: its builds differ by index."""
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text())
    locked = {entry.split(" ")[0]: entry for entry in entries if not entry.startswith("#")}
    pinned = {
        line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] not in ("#", "")
    }
    assert {line for line in pinned if line.split("==")[0] != "torch"} <= locked.keys()
    assert not [name for name in locked if name.split("==")[0].startswith(("torch", "nvidia"))]
    for name, entry in locked.items():
        assert re.fullmatch(r"[a-z0-9.-]+==[\w.]+", name) and re.search(
            r"--hash=sha256:[0-9a-f]{64}", entry
        ), name

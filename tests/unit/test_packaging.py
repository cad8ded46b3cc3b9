"""What a CPU install pulls, and what the README names."""

from __future__ import annotations

import re
from pathlib import Path

import tomllib

import megatron_simct
from megatron_simct.arguments import options
from megatron_simct.config import Config, TeacherConfig

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def _names(lines: list[str]) -> list[str]:
    return [re.split(r"[\[<>=! ]", line)[0] for line in lines if line and not line.startswith(("#", "-r"))]


def test_cpu_requirements_pull_nothing_of_a_gpu():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = _names((ROOT / "requirements.txt").read_text().splitlines())
    assert {"torch", "megatron-core"} <= set(pinned)
    for name in (*pinned, *_names(project["dependencies"]), *_names(project["optional-dependencies"]["test"])):
        assert name not in ("transformer-engine", "apex")
    assert _names(project["optional-dependencies"]["gpu"]) == ["transformer-engine"]
    # Every dependency of the package is pinned, torch exactly, and what draws the quick start's pictures.
    report = _names(project["optional-dependencies"]["report"])
    assert set(_names(project["dependencies"])) | set(report) == set(pinned)
    assert all("==" in line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] not in "#")


def test_version_is_one():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]
    assert f"## {megatron_simct.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_paths_in_the_readme_exist():
    paths = set(re.findall(r"(?:\./)?((?:megatron_simct|examples|tests|tools)/[\w./-]*\w)", README))
    assert len(paths) > 8
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_links_in_the_readme_lead_somewhere():
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.MULTILINE)
    anchors = {"#" + re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles}
    links = set(re.findall(r"\]\((?!https://)([^)]+)\)", README))
    assert len(links) > 10
    assert sorted(link for link in links if link.startswith("#") and link not in anchors) == []
    assert sorted(link for link in links if not link.startswith("#")) == [".github/flow.svg"]


def test_flags_in_the_readme_exist():
    known = {option.flag for config in (Config, TeacherConfig) for option in options(config)} | {
        "--help",
        "--print-config",
        "--config-file",
        "--debug",
        "--nproc-per-node",
        "--rdzv-backend",
    }
    known |= {"--model", "--tasks"}  # of lm-eval
    known |= {flag.replace("--", "--no-", 1) for flag in known}
    launcher = ROOT / "megatron_simct/launch/__main__.py"
    for script in (*ROOT.glob("examples/*/run.py"), launcher, *(ROOT / "tools").glob("*.py")):
        known |= set(re.findall(r'"(--[a-z0-9-]+)"', script.read_text()))
    known |= {f"--{side}-{name}" for side in ("teacher", "student") for name in ("tokenizer", "stop-token-ids")}
    flags = set(re.findall(r"(--[a-z][a-z0-9-]*[a-z0-9])(?![\w-])", README))
    assert len(flags) > 20
    assert sorted(flags - known) == []


def test_the_image_has_the_versions_that_the_tests_ran_with():
    pinned = set((ROOT / "requirements.txt").read_text().split() + (ROOT / "requirements-test.txt").read_text().split())
    dockerfile = (ROOT / "Dockerfile").read_text()
    named = re.findall(r" ([a-z]+==\d[\d.]+)", dockerfile)
    assert {name.split("==")[0] for name in named} == {"hypothesis", "pytest", "transformers"} and set(named) <= pinned
    (core,) = re.findall(r"ARG MEGATRON_CORE_VERSION=(\S+)", dockerfile)
    assert f"megatron-core=={core}" in pinned


def test_all_packages_their_files_and_their_commands_are_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    setuptools = project["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "megatron_simct").rglob("*.py")}
    assert {str(folder).replace("/", ".") for folder in folders} | {"megatron_simct_tools"} == set(
        setuptools["packages"]
    )
    kept = {
        path
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        for path in (ROOT / setuptools["package-dir"][package]).glob(pattern)
    }
    others = {path for folder in ("megatron_simct", "tools") for path in (ROOT / folder).rglob("*") if path.is_file()}
    assert {path for path in others if path.suffix not in (".py", ".sh", ".pyc")} == kept
    for name, target in project["project"]["scripts"].items():
        module, function = target.split(":")
        path = ROOT / (module.replace("megatron_simct_tools", "tools").replace(".", "/") + ".py")
        assert name.startswith("simct-") and f"def {function}(argv" in path.read_text()

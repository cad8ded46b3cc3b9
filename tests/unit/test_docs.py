"""README and docs/: the paths, flags and links in them exist, and the site loads nothing from other hosts."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_simct.config.flags import options, parse_config
from megatron_simct.config.megatron_flags import ALWAYS, MEGATRON_FLAGS
from megatron_simct.config.options import Config, TeacherConfig
from megatron_simct.config.run_file import read_run_file
from megatron_simct.launch import local, slurm
from tests.printed import commands_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_OTHER_PROGRAMS = {
    "--ignore-requires-python",  # pip
    "--nproc-per-node",  # torchrun
    "--rdzv-backend",
    "--standalone",
    "--model",  # lm-eval, vLLM
    "--port",  # vLLM
    "--runner",
    "--convert",
    "--pooler-config",
    "--enable-scale-out",
    "--generation-config",
    "--max-logprobs",
    "--data-parallel-size",
    "--tensor-parallel-size",
    "--host",
    "--tasks",
    "--strict",  # mkdocs
    "--no-deps",  # pip
}
FROM_ELSEWHERE = ("from_megatron.md", "migration.md")
"""Pages with tables whose first column has options of other programs."""
page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def test_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 20_000


@page
def test_paths_exist(path: Path) -> None:
    named = set(
        re.findall(r"(?:\./)?((?:megatron_simct|examples|tests|tools|docs)/[\w./-]*\w)", path.read_text())
    )
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_paths_of_the_walks_for_contributors_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`(?:\./)?((?:megatron_simct|examples|tests|tools|docs)/[\w./-]*\w)", text))
    assert len(named) > 30
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@page
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\((?!https://)([^)]+)\)", path.read_text()):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if path.parent.name == "docs" and file == "security.md":
            target = ROOT / "SECURITY.md"  # docs/security.md includes it
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def _anchors(path: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles}


@page
def test_flags_exist(path: Path) -> None:
    known = {option.flag for config in (Config, TeacherConfig) for option in options(config)}
    known |= {"--help", "--print-config", "--config-file", "--debug"} | ALWAYS.keys()
    known |= {flag.replace("--", "--no-", 1) for flag in known}
    launcher = ROOT / "megatron_simct/launch/__main__.py"
    scripts = ("examples/*/run.py", "megatron_simct/commands/*.py", "tools/benchmark/*.py")
    for script in (launcher, *(path for pattern in scripts for path in ROOT.glob(pattern))):
        known |= set(re.findall(r'"(--[a-z0-9-]+)"', script.read_text()))
    known |= {
        f"--{side}-{name}" for side in ("teacher", "student") for name in ("tokenizer", "stop-token-ids")
    }
    text = path.read_text()
    if path.name in FROM_ELSEWHERE:
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
        known |= MEGATRON_FLAGS.keys()
    flags = set(re.findall(r"(?<![\w<!-])(--[a-z][a-z0-9-]*[a-z0-9])(?![\w-])", text))
    assert sorted(flags - known - OF_OTHER_PROGRAMS) == []


def test_the_page_for_megatron_prints_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    ((command, printed),) = commands_of(ROOT / "docs" / "from_megatron.md")
    _, _, module, *flags = shlex.split(command)
    assert module == "megatron_simct.train"
    with pytest.raises(SystemExit):
        parse_config(flags)
    assert capsys.readouterr().err == printed


@page
def test_run_files_are_read(path: Path, tmp_path: Path) -> None:
    for number, text in enumerate(re.findall(r"```yaml\n(run_dir:.*?)```", path.read_text(), re.DOTALL)):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        run = read_run_file(str(file))
        assert slurm.job_script(run, directory="/") if run.cluster.kind == "slurm" else local.dry_run(run)


def test_pages_name_many_flags_and_paths() -> None:
    """The patterns of the tests above find something."""
    text = "".join(path.read_text() for path in PAGES)
    assert len(set(re.findall(r"--[a-z][a-z0-9-]*[a-z0-9]", text))) > 100
    assert len(set(re.findall(r"(?:megatron_simct|examples|tests|tools)/[\w./-]*\w", text))) > 30


def test_no_docstring_needs_the_name_above_it() -> None:
    """A text that begins with Of continues the name above it, and says nothing alone."""
    start = '"""' + "Of "
    sources = [
        path
        for room in ("megatron_simct", "tools", "examples", "tests")
        for path in (ROOT / room).rglob("*.py")
    ]
    assert [str(path) for path in sources if start in path.read_text()] == []


@pytest.mark.skipif(
    importlib.util.find_spec("material") is None,
    reason="mkdocs-material is not installed: pip install -r requirements-test.txt",
)
def test_the_site_builds_strictly_and_loads_nothing_of_other_hosts(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "-f",
        ".mkdocs.yml",
        "-d",
        str(tmp_path),
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    html = [path.read_text() for path in tmp_path.rglob("*.html")]
    assert len(html) > len(list((ROOT / "docs").glob("*.md"))) - 1
    for text in (*html, *(path.read_text() for path in tmp_path.rglob("*.css"))):
        loaded = re.findall(
            r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)", text
        )
        loaded += re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)", text)
        assert loaded == []

"""The report of a run: its numbers, files that are not a run's, and the page in a real browser
if one is installed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_simct.commands import plot_run as tool

PIECES = ["<script>", 'document.title = "broken"', "</script>", " 8", "\n"]


def write_run(folder: Path, *, iterations: int = 70) -> None:
    """Metrics that fall from 2 to 1, and two responses, one of them with markup in its text."""
    rows = [{"kind": "evaluation", "iteration": 0, "greedy_accuracy": 0.25, "sampled_accuracy": 0.125}]
    for i in range(1, iterations + 1):
        rows.append(
            {
                "kind": "step",
                "iteration": i,
                "loss": 2 - i / iterations,
                "seconds_update": 0.5,
                "stop_rate": 0.5,
            }
        )
    rows.append(
        {"kind": "evaluation", "iteration": iterations, "greedy_accuracy": 0.75, "sampled_accuracy": 0.5}
    )
    samples = [
        {
            "kind": "sample",
            "iteration": iteration,
            "sample_id": iteration,
            "finish": finish,
            "prompt": "What is <b>2</b>?",
            "units": [
                {"student": [piece], "teacher": [piece] * (k % 2), "loss": 0.5 * k}
                for k, piece in enumerate(PIECES)
            ],
        }
        for iteration, finish in ((1, "stop"), (iterations, "length"))
    ]
    folder.mkdir()
    for name, lines in (("metrics", rows), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(
        "simct_interface: paper\ntrain_iters: 70\nprompt_data: <i>here</i>.jsonl\n"
    )


def test_a_page_and_a_picture(tmp_path, capsys) -> None:
    write_run(tmp_path / "run")
    assert tool.main([str(tmp_path / "run"), "--png", str(tmp_path / "curves.png")]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    source = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert (
        "src=" not in source
        and "<script>document" not in source
        and "<b>2" not in source
        and "<i>here" not in source
    )
    assert source.count("<svg") == 4, "loss, accuracy, responses, time"
    assert (
        "<b>1.000</b><span>at first 1.986</span>" in source
        and "<b>0.750</b><span>at first 0.250</span>" in source
    )
    first = (tmp_path / "run" / "report.html").read_bytes()
    assert tool.main([str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").read_bytes() == first, "the same run, the same page"


def test_a_run_that_was_killed_while_it_wrote(tmp_path) -> None:
    write_run(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "iter')
    (tmp_path / "run" / "samples.jsonl").unlink()
    (tmp_path / "run" / "config.yaml").unlink()
    assert tool.main([str(tmp_path / "run"), "--output", str(tmp_path / "page.html")]) == 0
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "iteration 70" in source and "Responses of the student" not in source


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "no metrics.jsonl there; give the --run-dir of a run"),
        ("", "the run has not finished a step yet"),
        ("hello\n", "line 1 is not JSON"),
        ('{"loss": 1}\n', "line 1 has no iteration and kind"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path, capsys, text, words) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert tool.main([str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("plot_run: error: ") and words in err and err.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_the_page_in_a_browser(tmp_path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser_path is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    write_run(tmp_path / "run")
    assert tool.main([str(tmp_path / "run")]) == 0
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        colours = {}
        for scheme in ("light", "dark"):
            page = browser.new_context(color_scheme=scheme, offline=True).new_page()
            errors: list[str] = []
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.goto((tmp_path / "run" / "report.html").as_uri())
            assert page.title() == str(tmp_path / "run")
            shown = page.evaluate("[...document.querySelectorAll('.text')].map(t => t.textContent)")
            assert shown == ["".join(PIECES)] * 2
            title = (
                "getComputedStyle([...document.querySelectorAll('svg text')].find(t => t.textContent == "
                "'Loss')).fill"
            )
            colours[scheme] = (
                page.evaluate("getComputedStyle(document.body).backgroundColor"),
                page.evaluate(title),
            )
            assert not page.locator("#card").is_visible()
            page.locator(".u").nth(3).hover()
            assert page.locator("#card").inner_text().split("\n") == [
                "1.5000 nats",
                "student   8",
                "teacher   8",
            ]
            dark, light = (
                page.locator(".u").nth(k).evaluate("u => u.style.getPropertyValue('--share')") for k in (3, 0)
            )
            assert float(dark) > 0.5 and float(light) == 0
            assert page.locator(".u.off").count() == 2, "the first unit of both responses is not compared"
            assert not errors
        browser.close()
    assert colours["light"][0] != colours["dark"][0] and colours["light"][1] != colours["dark"][1]

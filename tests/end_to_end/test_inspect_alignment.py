"""The tool that shows an alignment: its three formats, and its page in a real browser if one is installed."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from megatron_simct.commands import inspect_alignment as tool
from tests.unit.test_map_files import tiktoken_file

TEXT = 'hello <b>"hel"</b> &amp;\nhello <script>document.title = "broken"</script>\n'


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    teacher = tiktoken_file(tmp_path, "teacher", [b"he", b"hel", b"lo", b" <", b" <b"], "<t>")
    student = tiktoken_file(tmp_path, "student", [b"he", b"ll", b"b>"], "<s>")
    return ["--teacher-tokenizer", teacher, "--student-tokenizer", student]


def test_json_has_segments_ids_and_what_was_dropped(arguments, capsys) -> None:
    assert tool.main([*arguments, "--text", "hello", "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["teacher_ids"], result["student_ids"]) == ([257, 258], [256, 257, 111])
    assert (result["segments"], result["dropped"]) == ([[0, 2, 0, 3]], {})
    assert result["counts"] == {"1:1": 0, "1:n": 0, "n:1": 0, "n:m": 1}
    (unit,) = result["units"]
    assert (unit["bytes"], unit["text"]) == ("68 65 6c 6c 6f", "hello")
    assert [token["text"] for token in unit["student"]] == ["he", "ll", "o"]


def test_bytes_that_are_no_text_are_shown_and_counted(arguments, tmp_path, capsys) -> None:
    (tmp_path / "bytes").write_bytes(b"he\xff\xfelo")
    assert tool.main([*arguments, "--text-file", str(tmp_path / "bytes"), "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["segments"], result["bytes_not_encoded"], result["rest"]) == (
        [[0, 1, 0, 1]],
        4,
        "\\xff\\xfelo",
    )


def test_a_text_on_the_command_line_may_be_any_bytes(arguments, capsys) -> None:
    assert tool.main([*arguments, "--text", os.fsdecode(b"he\xff"), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["rest"] == "\\xff"


def test_the_terminal_marks_what_is_not_one_to_one(arguments, capsys) -> None:
    assert tool.main([*arguments, "--text", "hello <he", "--format", "terminal"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("[hello]│[ <]│he│") and "\x1b" not in shown
    assert " 1:1  1 " in shown and " n:m  1 " in shown and " 1:n  1 " in shown


def test_errors_name_the_flag(arguments, capsys) -> None:
    assert tool.main([*arguments, "--text-file", "/none/such"]) == 1
    assert "/none/such" in capsys.readouterr().err
    assert tool.main([*arguments[:2], "--student-tokenizer", "nothing.json", "--text", "a"]) == 1
    assert "error: --student-tokenizer: " in capsys.readouterr().err


def test_the_page_in_a_browser(arguments, tmp_path) -> None:
    """Offline, in light and dark: pointing shows ids and bytes, a click dims a kind, and no byte of the
    text becomes markup.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser_path is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    page_file = tmp_path / "page.html"
    assert tool.main([*arguments, "--text", TEXT, "--format", "html", "--output", str(page_file)]) == 0
    source = page_file.read_text(encoding="utf-8")
    assert "http" not in source and "src=" not in source
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        colours = {}
        for scheme in ("light", "dark"):
            context = browser.new_context(color_scheme=scheme, offline=True)
            page = context.new_page()
            errors: list[str] = []
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.goto(page_file.as_uri())
            colours[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert page.title() == "Alignment"
            shown = page.evaluate("[...document.querySelectorAll('.u')].map(u => u.textContent).join('')")
            assert shown == TEXT.replace("\n", "\\n")
            assert page.locator("#text b, #text script").count() == 0

            card = page.locator("#card")
            assert not card.is_visible()
            page.locator(".u[data-kind='n:m']").first.hover()
            detail = card.inner_text()
            assert "68 65 6c 6c 6f" in detail and "257 “hel”" in detail and "256 “he”" in detail
            page.locator(".u[data-kind='1:n']").first.hover()
            assert "68 65 6c 6c 6f" not in card.inner_text()

            button = page.locator("button[data-kind='n:m']")
            dimmed = "[...document.querySelectorAll('.u.off')].map(u => u.dataset.kind)"
            assert page.evaluate(dimmed) == []
            button.click()
            count = page.locator(".u[data-kind='n:m']").count()
            assert count and page.evaluate(dimmed) == ["n:m"] * count
            assert float(page.locator(".u.off").first.evaluate("u => getComputedStyle(u).opacity")) < 0.5
            button.click()
            assert page.evaluate(dimmed) == []
            assert not errors
            context.close()
        browser.close()
    assert colours["light"] != colours["dark"]

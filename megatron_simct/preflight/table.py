"""Prints a report as tables."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_simct.preflight.memory import size_text
from megatron_simct.preflight.report import Report

_COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def console(*, stderr: bool = False) -> Console:
    """A console of the terminal's width; for a file, of 160 columns, so that most findings fit on a line."""
    probe = Console(stderr=stderr)
    return probe if probe.is_terminal else Console(stderr=stderr, width=160)


def show(report: Report, console: Console, *, only_problems: bool = False) -> None:
    """Prints findings, the memory of the jobs, and the first prompt for each model.

    only_problems: prints only warnings and failures.
    """
    findings = [finding for finding in report.findings if not only_problems or finding.level != "pass"]
    if findings:
        table = Table(box=None, pad_edge=False)
        for title in ("", "side", "check", "found"):
            table.add_column(title, overflow="fold", no_wrap=title in ("", "side"))
        for finding in findings:
            colour = _COLOURS[finding.level]
            named = finding.flag is None or finding.flag in finding.message
            message = finding.message if named else f"{finding.flag}: {finding.message}"
            row = (finding.side, finding.check, message)
            table.add_row(f"[{colour}]{finding.level}[/{colour}]", *map(escape, row))
        console.print(table)
    if only_problems:
        return
    for job, plan in report.plans.items():
        table = Table(box=None, pad_edge=False, title=f"memory of one rank, {job} job", title_justify="left")
        for title in ("when", "what"):
            table.add_column(title)
        table.add_column("", justify="right")
        for when, parts in {"always": plan.held, **plan.phases}.items():
            for what, size in parts.items():
                table.add_row(when, what, size_text(size))
        table.add_row("most", f"in {plan.peak_phase}, reserve included", size_text(plan.peak))
        console.print(table)
    if len(report.prompts) > 1 and len(set(report.prompts.values())) > 1:
        table = Table(
            box=None, pad_edge=False, title="the first prompt, as each model reads it", title_justify="left"
        )
        for name in report.prompts:
            table.add_column(name, overflow="fold")
        table.add_row(*(escape(text) for text in report.prompts.values()))
        console.print(table)
    levels = [finding.level for finding in report.findings]
    console.print(
        f"{levels.count('pass')} passed, {levels.count('warn')} warned, {levels.count('fail')} failed"
    )

"""Writes report.md from the files of results/: tables, figures, and the sentences that they support."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from examples.experiments import grid
from examples.experiments.figures import draw
from examples.experiments.plan import BOUNDS, SETTINGS, Run, Setting
from examples.experiments.scoring import (
    ACCURACIES,
    NUM_PAIRS,
    Metric,
    change,
    difference,
    metrics_of,
    over_starts,
    scores,
    verdict,
)
from megatron_simct.evaluation.statistics import Estimate
from megatron_simct.files import write_whole

HERE = Path(__file__).parent
FIGURES = HERE.parents[1] / "docs" / "figures"
"""Beside the pages, which also show them."""
BASELINES = ("strict", "paper")
"""Every other interface is compared with these: the one without units, and the one that SimCT proposes."""

HEADLINES = ("greedy", "bytes_reverse_kl")
"""For each setting, the metric that the summary shows."""

Results = dict[str, dict[int, dict[str, Any]]]
"""Results of one setting, by interface and seed."""


def write_report(runs: Sequence[Run]) -> Path:
    """Write report.md, and its figures into docs/figures. Returns the report's path."""
    found = {run.name: run.result for run in runs}
    missing = [run for run in runs if found[run.name] is None]
    first_parts = [run for run in runs if run.setting.part != "e"]
    by_setting: dict[str, Results] = {setting.name: {} for setting in (*SETTINGS, *BOUNDS)}
    for run in first_parts:
        if found[run.name] is not None:
            by_setting[run.setting.name].setdefault(run.interface, {})[run.seed] = found[run.name]
    parts = [
        _introduction(runs, missing),
        _summary({setting.name: by_setting[setting.name] for setting in SETTINGS}),
        *(_section(setting, by_setting[setting.name]) for setting in SETTINGS),
        _bounds(by_setting),
        grid.section(found),
        _limits(),
    ]
    path = HERE / "report.md"
    write_whole(path, "\n\n".join(parts) + "\n")
    return path


def _introduction(runs: Sequence[Run], missing: Sequence[Run]) -> str:
    lines = [
        "# Which interface is better",
        "",
        "Written by `./examples/experiments/run.sh` from the files of `results/`; do not edit. Each run "
        "distils on",
        "policy from the warm start that all runs of its setting share, with one learning rate for all "
        "interfaces;",
        "in part e, with each arm's best of three rates.",
        "",
        f"**{len(runs) - len(missing)} of {len(runs)} planned runs are done.**",
    ]
    if missing:
        lines += ["Missing, by setting, interface and seed:", ""]
        for setting in (*SETTINGS, *BOUNDS):
            seeds = {name: [] for name in setting.interfaces}
            for run in missing:
                if run.setting == setting:
                    seeds[run.interface].append(str(run.seed))
            items = [f"`{name}` {' '.join(numbers)}" for name, numbers in seeds.items() if numbers]
            if items:
                lines.append(f"* {setting.name}: {', '.join(items)}")
        number = sum(run.setting.part == "e" for run in missing)
        if number:
            lines.append(f"* part e: {number} runs; its section says of what")
    return "\n".join(lines)


def _summary(by_setting: dict[str, Results]) -> str:
    """Each interface in each setting, by one metric."""
    there = {name: results for name, results in by_setting.items() if results}
    if not there:
        return "No run is done."
    metrics = {
        name: next(
            m for m in metrics_of(next(iter(next(iter(results.values())).values()))) if m.name in HEADLINES
        )
        for name, results in there.items()
    }
    words = {"better": "better", "worse": "**worse**", "undecided": "either way"}
    rows = []
    for interface in dict.fromkeys(name for setting in SETTINGS for name in setting.interfaces):
        row = [f"`{interface}`"]
        for name, results in there.items():
            by_seed = results.get(interface, {})
            if by_seed:
                estimate = change(list(by_seed.values()), metrics[name].name)
                row.append(
                    f"{estimate.mean:+.3f} {words[verdict(estimate, metrics[name])]}, {_seeds(len(by_seed))}"
                )
            else:
                row.append("")
        rows.append(row)
    header = ["change by distillation", *(f"{name}: {metrics[name].title}" for name in there)]
    return f"## In one table\n\n{_table(header, rows)}\n\n`either way`: its interval has 0 in it."


def _seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"


def _section(setting: Setting, results: Results) -> str:
    lines = [f"## {setting.name}: {setting.title}", "", _configuration(setting)]
    if not results:
        return "\n".join([*lines, "", "No run of this setting is done."])
    metrics = metrics_of(next(iter(next(iter(results.values())).values())))
    lines += ["", _warm_starts(results, metrics)]
    draw(setting.name, results, metrics, FIGURES / f"{setting.name}.svg")
    lines += ["", f"![{setting.title}](../../docs/figures/{setting.name}.svg)", ""]
    lines += [_verdicts(results, metrics), "", _values(results, metrics), "", _comparisons(results, metrics)]
    return "\n".join([*lines, "", _rising(results), "", _conditions(results)])


def _configuration(setting: Setting) -> str:
    options = ", ".join(f"{name} {value}" for name, value in setting.options.items())
    interfaces = ", ".join(f"`{name}`" for name in setting.interfaces)
    return f"Part {setting.part}; {options}. Planned: {interfaces}; seeds 1 to {setting.seeds}."


def _warm_starts(results: Results, metrics: Sequence[Metric]) -> str:
    every = [result for by_seed in results.values() for result in by_seed.values()]
    starts = sorted({result["warm_start"] for result in every})
    one = f"All runs start from one student ({starts[0]})." if len(starts) == 1 else (
        f"The runs start from {len(starts)} different warm starts ({', '.join(starts)}): compare with care."
    )  # fmt: skip
    before = [
        f"{metric.title} {fmean(scores(result, metric.name, before=True).mean() for result in every):.4f}"
        for metric in metrics
    ]
    return f"{one} Before distillation: {', '.join(before)}."


# Sentences


def _verdicts(results: Results, metrics: Sequence[Metric]) -> str:
    """Which metrics changed, which interface leads, which one harms; each with what its interval shows."""
    lines = []
    for metric in metrics:
        of_change = {name: change(list(by_seed.values()), metric.name) for name, by_seed in results.items()}
        for word, text in (
            ("better", "improves under"),
            ("worse", "is harmed by"),
            ("undecided", "may go either way under"),
        ):
            names = [name for name, estimate in of_change.items() if verdict(estimate, metric) == word]
            if names:
                lines.append(
                    f"* {metric.title[0].upper()}{metric.title[1:]} {text} {_list(names, of_change)}."
                )
        if len(results) > 1:
            lines.append(f"* {_ahead(results, metric)}")
    return "\n".join(lines)


def _list(names: Sequence[str], estimates: dict[str, Estimate]) -> str:
    return ", ".join(f"`{name}` ({estimates[name].mean:+.3f})" for name in names)


def _ahead(results: Results, metric: Metric) -> str:
    """The interface with the best mean, and the interfaces that cannot be told from it."""
    sign = 1 if metric.higher_is_better else -1

    def mean(name: str) -> float:
        return fmean(scores(result, metric.name).mean() for result in results[name].values())

    best, *others = sorted(results, key=lambda name: -sign * mean(name))
    close = []
    for name in others:
        paired = results[best].keys() & results[name].keys()
        if not paired or verdict(difference(results[best], results[name], metric.name), metric) != "better":
            close.append(f"`{name}`")
    told = f"not told apart from it: {', '.join(close)}" if close else "ahead of every other one"
    return f"Best {metric.title}: `{best}`, {mean(best):.4f}; {told}."


# Tables


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(estimate: Estimate, digits: int) -> str:
    return f"{estimate.mean:+.{digits}f} ({estimate.low:+.{digits}f} to {estimate.high:+.{digits}f})"


def _digits(metrics: Sequence[Metric]) -> int:
    return 3 if metrics[0].higher_is_better else 4


def _values(results: Results, metrics: Sequence[Metric]) -> str:
    """Every seed, and the change by distillation."""
    digits = _digits(metrics)
    header = ["interface", "seeds"]
    for metric in metrics:
        header += [f"{metric.title}, by seed", "change (95 % interval)"]
    rows = []
    for name, by_seed in results.items():
        seeds = sorted(by_seed)
        row = [f"`{name}`", " ".join(map(str, seeds))]
        for metric in metrics:
            values = [f"{scores(by_seed[seed], metric.name).mean():.{digits}f}" for seed in seeds]
            row += [
                " ".join(values),
                _interval(change([by_seed[seed] for seed in seeds], metric.name), digits),
            ]
        rows.append(row)
    return _table(header, rows)


def _comparisons(results: Results, metrics: Sequence[Metric]) -> str:
    """Each interface minus the baselines, on the seeds that both have."""
    digits = _digits(metrics)
    baselines = [name for name in BASELINES if name in results]
    header = ["difference, paired"]
    header += [f"{metric.title} - `{name}`" for name in baselines for metric in metrics[:2]]
    rows = []
    for name, by_seed in results.items():
        cells = []
        for baseline in baselines:
            for metric in metrics[:2]:
                common = by_seed.keys() & results[baseline].keys()
                none = name == baseline or not common
                cells.append(
                    "" if none else _interval(difference(by_seed, results[baseline], metric.name), digits)
                )
        rows.append([f"`{name}`", *cells])
    return _table(header, rows)


def _conditions(results: Results) -> str:
    """Other measurements of the runs, as means over seeds."""

    def mean(
        by_seed: dict[int, dict[str, Any]], of: Callable[[dict[str, Any]], float | None], digits: int
    ) -> str:
        values = [value for value in map(of, by_seed.values()) if value is not None]
        return f"{fmean(values):.{digits}f}" if values else ""

    figures = {
        "coverage 1:1": "coverage_one_to_one",
        "coverage units": "coverage_unit",
        "mass outside U, first": "mass_outside_first",
        "last": "mass_outside_last",
        "loss, first": "loss_first",
        "loss, last": "loss_last",
    }
    columns = {"mean over seeds": [f"`{name}`" for name in results]}
    for title, key in figures.items():
        cells = [
            mean(by_seed, lambda result, key=key: result["figures"].get(key), 3)
            for by_seed in results.values()
        ]
        if any(cells):  # runs with real weights keep fewer figures
            columns[title] = cells
    columns["seconds"] = [mean(by_seed, lambda result: result["seconds"], 0) for by_seed in results.values()]
    columns["of the processor"] = [
        mean(by_seed, lambda result: result["cpu_seconds"], 0) for by_seed in results.values()
    ]
    return _table(list(columns), list(zip(*columns.values(), strict=True)))


def _rising(results: Results) -> str:
    """Interfaces whose own loss was larger at the end."""

    def mean(name: str, key: str) -> float:
        return fmean(result["figures"].get(key, 0.0) for result in results[name].values())

    ends = {name: (mean(name, "loss_first"), mean(name, "loss_last")) for name in results}
    rose = [f"`{name}` ({first:.3f} to {last:.3f})" for name, (first, last) in ends.items() if last > first]
    return (
        f"Own loss, of the first and of the last ten steps, rose under {', '.join(rose) or 'none of them'}."
    )


def _bounds(by_setting: dict[str, Results]) -> str:
    """`bytes` with --simct-byte-bounds any less longest-match, on the warm starts and seeds that both have."""
    lines = ["## `bytes`: `any` less `longest-match`, if digits disagree", ""]
    rows = []
    for title in dict.fromkeys(setting.title for setting in BOUNDS):
        paired: dict[str, list[tuple[int, dict[str, Any], dict[str, Any]]]] = {}
        for setting in BOUNDS:
            found = by_setting[setting.name]
            first, other = found.get("bytes", {}), found.get("bytes_any", {})
            both = [(seed, first[seed], other[seed]) for seed in sorted(first.keys() & other.keys())]
            if setting.title == title and both:
                paired[str(setting.options["warm_start_seed"])] = both
        for metric in ACCURACIES if paired else ():
            of_starts = []
            for start, both in paired.items():
                values = [
                    (scores(r, metric.name, before=True), scores(r, metric.name), scores(o, metric.name))
                    for _, r, o in both
                ]
                of_starts.append(np.mean([other - first for _, first, other in values], axis=0))
                means = [
                    f"{before.mean():.3f} -> {first.mean():.3f}, {other.mean():.3f}"
                    for before, first, other in values
                ]
                seeds = " ".join(str(seed) for seed, _, _ in both)
                rows.append([title, metric.title, start, seeds, "; ".join(means), ""])
            estimate = over_starts(np.array(of_starts), np.arange(len(of_starts[0])) % NUM_PAIRS)
            rows.append([title, metric.title, "all", "", "", _interval(estimate, 3)])
    if not rows:
        return "\n".join([*lines, "No run of this part is done."])
    header = [
        "pair",
        "metric",
        "warm start",
        "seeds",
        "before -> `longest-match`, `any`; by seed",
        "difference",
    ]
    return "\n".join(
        [
            *lines,
            "Part d; both start from the same models, with the same seeds, rate and steps as above. Intervals are",
            "over pairs of numbers and over warm starts, both drawn again; seeds are averaged.",
            "",
            _table(header, rows),
        ]
    )


def _limits() -> str:
    return """## What the intervals cannot tell

* They are percentiles of means over held-out problems drawn again with replacement, the seeds being averaged first,
  both interfaces on the same draws. The toy's 200 problems of parts a, b and d are 54 pairs of numbers in other words,
  so there pairs are drawn, each with all of its problems. They tell what other problems of the same kind would give. In
  parts a to c they do not tell what another teacher or warm start would: every setting has one. What another seed of the
  distillation would give shows in the seeds themselves, which scatter more than the intervals where a run can collapse.
* A row with one seed is one run: its interval says nothing of other seeds.
* In parts a to d, one learning rate serves all interfaces of a setting, chosen where `bytes` was known to learn; another
  interface may want another rate, or another number of steps. An interface that harms here harms with this budget. Where its own
  loss rose (below each table of differences), it did not even reach what it aims at: that rate is no test of it.
* Many interfaces and several metrics: of twenty intervals one misses by chance. Differences near 0 are no ranking.
* The toy answers turn on numbers. Where tokenizers disagree on digits, that is the hardest case for units and no
  typical text.
* Seconds are of a machine that did other work too; `of the processor` is the time that the run's one thread had.
* Mass outside U is the student's probability outside the compared tokens, mean of the first and of the last ten steps.
  `bytes` compares no tokens: it covers every byte, and has neither coverage nor U."""

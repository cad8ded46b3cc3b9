"""The report's section on part e, from whatever results exist, and what they cannot tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from examples.experiments.plan import (
    ARMS,
    BEST_SETTINGS,
    GRIDS,
    JUDGED,
    RATE_SETTINGS,
    RATES,
    SFT_STEPS,
    TOY,
    WARM_STARTS,
    Run,
    Setting,
    best_rate,
    grid_runs,
)
from examples.experiments.problems import clusters
from examples.experiments.scoring import ACCURACIES, Metric, over_starts, scores, verdict
from megatron_simct.evaluation.statistics import Estimate

Result = Mapping[str, Any]
COMPARED = ("kd", "bytes_any")
"""Arms that all others are compared with: the ceiling, and the interface of this project."""


def section(found: Mapping[str, Result | None]) -> str:
    """The results by name of the run; None where there is none."""
    runs = grid_runs()
    of_rates = [run for run in runs if run.setting in RATE_SETTINGS]
    of_best = [run for run in runs if run.setting in BEST_SETTINGS]
    done = {run.name for run in runs if found[run.name] is not None}
    lines = [
        "## Part e: every arm at its best of three learning rates",
        "",
        f"**{sum(run.name in done for run in of_rates)} of {len(of_rates)} runs that choose a rate and "
        f"{sum(run.name in done for run in of_best)} of {len(of_best)} runs at the best rate are done.**",
        "",
        _plan(),
    ]
    for grid, (title, _) in GRIDS.items():
        here = [run for run in runs if run.setting.options["grid"] == grid and run.name in done]
        lines += ["", f"### {grid}: {title}", ""]
        if not here:
            lines.append("No run of this pair is done: nothing is known.")
            continue
        lines.append(_rates([run for run in here if run.setting in RATE_SETTINGS], found))
        best = [run for run in here if run.setting in BEST_SETTINGS]
        lines += ["", _best(best, found) if best else "No run at a best rate is done."]
        lines += ["", _untold(here)]
    return "\n".join(lines)


def _plan() -> str:
    arms = ", ".join(f"`{arm}`" for arm in ARMS)
    rates = ", ".join(f"{rate:g}" for rate in sorted(RATES))
    return f"""Arms: {arms}.
`kd` has a teacher with the student's tokenizer, trained alike, as the ceiling; `sft` trains on the right answers of the
teacher, in {SFT_STEPS} steps instead of {TOY["train_iters"]} (the processor's time is in the table); `bytes_any` is `bytes`
with `--simct-byte-bounds any`. An arm that is `paper` at 1:1 positions and `bytes` inside units is not there: the package
has no such interface. First every arm runs once at each of {rates}. The rate whose greedy answers to
{JUDGED} validation problems are best is then used from {len(WARM_STARTS)} warm starts with two other seeds. All numbers below except the
choice are of {JUDGED} held-out problems. Training, validation and held-out problems have different pairs of numbers; each of
the validation and held-out pairs is there once. Training of teachers and warm-up stop on validation problems. Intervals
are over held-out problems, drawn by their first number, and over warm starts where there is more than one; seeds are
averaged. `better`, `worse`: the interval has no 0 in it."""


def held_out(result: Result, metric: str, *, before: bool = False) -> np.ndarray:
    """[JUDGED], scores of the held-out problems."""
    return scores(result, metric, before=before)[JUDGED:]


def _gain(result: Result, metric: str) -> np.ndarray:
    return held_out(result, metric) - held_out(result, metric, before=True)


def _estimate(by_start: Mapping[int, Sequence[np.ndarray]]) -> Estimate:
    """Values of several seeds, by warm start."""
    values = [np.mean(by_start[start], axis=0) for start in sorted(by_start)]
    return over_starts(np.array(values), clusters())


def _words(estimate: Estimate, metric: Metric) -> str:
    interval = f"{estimate.mean:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"
    return f"{interval} {verdict(estimate, metric)}"


def _rates(runs: Sequence[Run], found: Mapping[str, Result | None]) -> str:
    """Every run that chooses a rate."""
    rows = []
    for run in sorted(runs, key=lambda run: (ARMS.index(run.interface), run.configuration["lr"])):
        result = found[run.name]
        assert result is not None
        rate = run.configuration["lr"]
        validation = scores(result, "greedy")[:JUDGED].mean()
        before = scores(result, "greedy", before=True)[:JUDGED].mean()
        changes = [
            _words(_estimate({1: [_gain(result, metric.name)]}), metric) for metric in ACCURACIES
        ]  # fmt: skip
        chosen = "best" if best_rate(run.setting, run.interface) == rate else ""
        row = [f"`{run.interface}`", f"{rate:g}", f"{before:.3f} -> {validation:.3f}", chosen, *changes]
        rows.append([*row, f"{result['cpu_seconds']:.0f}"])
    header = ["arm", "rate", "validation, greedy", "chosen"]
    header += [f"change of held-out {metric.title}, one run" for metric in ACCURACIES]
    return _table([*header, "seconds of the processor"], rows)


def _best(runs: Sequence[Run], found: Mapping[str, Result | None]) -> str:
    """Every arm at its best rate, and its differences from the arms that all are compared with."""
    results: dict[str, dict[tuple[int, int], Result]] = {}
    for run in runs:
        result = found[run.name]
        assert result is not None
        start = run.setting.options["warm_start_seed"]
        results.setdefault(run.interface, {})[start, run.seed] = result
    rows = []
    for arm in (arm for arm in ARMS if arm in results):
        of_arm = results[arm]
        row = [f"`{arm}`", f"{next(iter(of_arm.values()))['configuration']['lr']:g}"]
        row.append(f"{len(of_arm)} from {len({start for start, _ in of_arm})}")
        for metric in ACCURACIES:
            gains = {key: _gain(result, metric.name) for key, result in of_arm.items()}
            row.append(_words(_estimate(_by_start(gains)), metric))
        for other in COMPARED:
            common = sorted(of_arm.keys() & results.get(other, {}).keys()) if other != arm else []
            differences = {
                key: held_out(of_arm[key], "greedy") - held_out(results[other][key], "greedy")
                for key in common
            }
            row.append(_words(_estimate(_by_start(differences)), ACCURACIES[0]) if common else "")
        rows.append(row)
    header = ["arm", "best rate", "runs, warm starts"]
    header += [f"change of held-out {metric.title}" for metric in ACCURACIES]
    return _table([*header, *(f"greedy less `{other}`, same starts and seeds" for other in COMPARED)], rows)


def _by_start(values: Mapping[tuple[int, int], np.ndarray]) -> dict[int, list[np.ndarray]]:
    by_start: dict[int, list[np.ndarray]] = {}
    for (start, _), value in sorted(values.items()):
        by_start.setdefault(start, []).append(value)
    return by_start


def _untold(done: Sequence[Run]) -> str:
    """What these results of one pair cannot tell."""
    names = {run.name for run in done}
    settings: list[Setting] = [run.setting for run in done]
    grid = settings[0].options["grid"]
    lines = ["What this cannot tell:", ""]
    tried = {run.interface for run in done}
    absent = [arm for arm in ARMS if arm not in tried]
    if absent:
        lines.append(f"* Nothing of {_list(absent)}: no run.")
    open_rate = [arm for arm in ARMS if arm in tried and best_rate(settings[0], arm) is None]
    if open_rate:
        lines.append(f"* The best rate of {_list(open_rate)}: not all three rates have run.")
    ends = [arm for arm in ARMS if best_rate(settings[0], arm) in (min(RATES), max(RATES))]
    if ends:
        lines.append(
            f"* Whether {_list(ends)} would do better at a rate outside those tried: the best is at an end."
        )
    starts = {run.setting.options["warm_start_seed"] for run in done}
    if len(starts) == 1:
        lines.append(
            "* What another warm start gives: there is one, so intervals are over problems only. Nor what another "
            "seed gives, where there is one run."
        )
    missing = [
        run for run in grid_runs() if run.setting.options["grid"] == grid and run.name not in names
    ]  # fmt: skip
    if missing:
        lines.append(
            f"* The order of arms with missing runs: {len(missing)} of this pair's runs are not done."
        )
    lines += [
        "* What a better teacher gives: this one stopped at .95 of the validation problems, or after its last step below that.",
        "* What `sft` gives without a check of the teacher's answers: it has only right ones, the others have no such help.",
        "* What other tasks and models give.",
    ]
    return "\n".join(lines)


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

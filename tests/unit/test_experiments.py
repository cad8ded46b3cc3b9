"""examples/experiments without training: which runs are planned, kept and repeated, and
the report of results.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.experiments import distances, grid, plan, problems, processes, real, report, run, scoring, toy
from examples.experiments.plan import BOUNDS, SETTINGS, VARIANTS, Run
from examples.quickstart import tokenizer_files
from examples.quickstart.task import write_task
from examples.real_weights import measure
from megatron_simct.alignment import load_tokenizer
from megatron_simct.config.flags import parse_config
from megatron_simct.losses.checks import check_config
from tests.huggingface import save_byte_fallback, save_byte_level, save_model

TOY, REAL = SETTINGS[0], SETTINGS[-1]
needs_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("mistral_common") is None,
    reason="mistral-common is not installed: pip install --no-deps -r examples/quickstart/requirements.txt",
)


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch) -> Path:
    """The empty folder of results, and the report's folder beside it."""
    folder = tmp_path / "results"
    monkeypatch.setattr(plan, "RESULTS", folder)
    monkeypatch.setattr(run, "RESULTS", folder)
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "FIGURES", tmp_path / "figures")
    return folder


def finished(interface: str, seed: int, *, greedy: str, before: str = "0011") -> Run:
    """A run of the toy with these outcomes, kept."""
    done = Run(setting=TOY, interface=interface, seed=seed)
    outcomes = {"greedy_before": before, "greedy": greedy, "sampled_before": "0022", "sampled": "0123"}
    outcomes = {name: digits * 10 for name, digits in outcomes.items()}
    figures = {"greedy_before": 0.5, "greedy": greedy.count("1") / 4}
    run.keep(
        done,
        {"figures": figures, "outcomes": outcomes, "warm_start": "w", "seconds": 9.0, "cpu_seconds": 8.0},
    )
    return done


def test_the_first_seed_of_everything_comes_first() -> None:
    runs = [r for r in plan.planned_runs() if r.setting.part != "e"]
    assert [r.seed for r in runs] == sorted(r.seed for r in runs)
    assert (
        len(runs)
        == 2 * 11 * 5 + 5 * 3 + 5 * 2 + 6 * 2 * 2
        == len({r.name for r in runs})
        == len({r.fingerprint for r in runs})
    )
    first = [(r.setting.name, r.interface) for r in runs if r.seed == 1]
    assert len(first) == 44 and {r.setting.part for r in runs} == {"a", "b", "c", "d"}
    for setting in (*SETTINGS, *BOUNDS):
        assert isinstance(setting.options["lr"], float), "one rate for all interfaces"


def test_a_run_is_done_while_its_configuration_is_the_same(results, monkeypatch) -> None:
    done = finished("bytes", 1, greedy="1111")
    options = run.parse(["--parts", "a", "--only", "teacher-groups-bytes"])
    assert done.result["configuration"] == done.configuration
    assert [r.seed for r in run.chosen(options)] == [2, 3, 4, 5]
    monkeypatch.setitem(TOY.options, "lr", 1.0)
    assert done.result is None and len(run.chosen(options)) == 5
    assert [path.name for path in results.iterdir()] == ["teacher-groups-bytes-1.json"]
    with pytest.raises(ValueError, match="--only nothing: no run of parts a has this in its name"):
        run.chosen(run.parse(["--parts", "a", "--only", "nothing"]))


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_failed_run_does_not_stop_the_others(tmp_path, monkeypatch, capsys, jobs) -> None:
    class Bench:
        def __init__(self, setting, workplace) -> None:
            pass

        def run(self, one) -> dict[str, Any]:
            if one.interface == "paper":
                raise RuntimeError("exit code 3 [/tmp]")
            return {"figures": {"greedy_before": 0.25, "greedy": 0.5}, "seconds": 1.0}

    monkeypatch.setattr(run, "Toy", Bench)
    flags = [
        "--parts",
        "a",
        "--only",
        "teacher-groups",
        "--run-dir",
        str(tmp_path / "runs"),
        "--jobs",
        str(jobs),
    ]
    options = run.parse(flags)
    missing = [one for one in run.chosen(options) if one.seed == 1]
    assert run.run_missing(missing, options) == 1
    assert [one.interface for one in missing if one.result is None] == ["paper"]
    out = capsys.readouterr().out
    assert "failed: exit code 3 [/tmp]" in out and "11/11" in out and "greedy 0.250 -> 0.500" in out


def test_a_command_is_measured_and_its_failure_is_told(tmp_path) -> None:
    workplace = processes.Workplace(tmp_path / "work")
    spin = "import time\nwhile time.process_time() < .3: pass"
    used = workplace.command([sys.executable, "-c", spin], log=tmp_path / "logs" / "log.txt")
    assert used["cpu_seconds"] >= 0.3 and used["seconds"] > 0
    with pytest.raises(RuntimeError, match=r"exit code 3; the end of .*log.txt:\nwhat was wrong"):
        workplace.command(
            [sys.executable, "-c", "print('what was wrong'); exit(3)"], log=tmp_path / "log.txt"
        )


def test_two_studies_do_not_share_a_folder(tmp_path) -> None:
    first = processes.Workplace(tmp_path)
    other = (
        "from pathlib import Path; from examples.experiments.processes import Workplace; "
        "Workplace(Path(r'{}'))"
    )
    with pytest.raises(
        RuntimeError, match="ValueError: --run-dir .*: a study, or a command that a killed one has left"
    ):
        first.command([sys.executable, "-c", other.format(tmp_path)], log=tmp_path / "log.txt")


@needs_tokenizers
@pytest.mark.parametrize("setting", [*SETTINGS[:-1], BOUNDS[0]], ids=lambda setting: setting.name)
def test_every_planned_run_is_a_command_that_the_trainer_accepts(tmp_path, monkeypatch, setting) -> None:
    commands = []

    def command(self, command, *, log) -> dict[str, float]:
        commands.append(parse_config(list(command[3:])))
        log.parent.mkdir()
        evaluation = {"kind": "evaluation", "greedy_accuracy": 0, "sampled_accuracy": 0}
        row = json.dumps(evaluation | {"greedy_right": [0], "sampled_right": [0]}) + "\n"
        (log.parent / "metrics.jsonl").write_text(row * 2)
        return {"seconds": 1.0, "cpu_seconds": 1.0}

    monkeypatch.setattr(toy.quickstart.Recipe, "warm_start", ())
    monkeypatch.setattr(processes.Workplace, "command", command)
    bench = toy.Toy(setting, processes.Workplace(tmp_path / "work"))
    for interface in setting.interfaces:
        bench.run(Run(setting=setting, interface=interface, seed=3))
    for interface, config in zip(setting.interfaces, commands, strict=True):
        config.check(data_parallel_size=1)
        check_config(config.interface)
        name, flags = VARIANTS.get(interface, (interface, {}))
        assert config.interface.interface == name and config.training.seed == 3
        assert config.interface.byte_bounds == flags.get("--simct-byte-bounds", "longest-match")
        assert (config.training.lr, config.training.train_iters) == (
            setting.options["lr"],
            TOY.options["train_iters"],
        )
        assert config.rollout.rollout_batch_size == config.training.micro_batch_size == 32
        assert config.evaluation.eval_interval is None, "before and after, nothing between"
    assert len({config.model.pretrained_checkpoint for config in commands}) == 1


def test_outcomes_are_what_the_evaluations_have_counted() -> None:
    steps = [{"kind": "step", "loss": float(i), "coverage_unit": 0.25} for i in range(20)]
    evaluations = [
        {
            "kind": "evaluation",
            "greedy_accuracy": a,
            "greedy_right": g,
            "sampled_accuracy": a,
            "sampled_right": s,
        }
        for a, g, s in ((0.5, [0, 1], [0, 4]), (1.0, [1, 1], [3, 4]))
    ]
    found = toy.summarize([evaluations[0], *steps, evaluations[1]])
    assert found["outcomes"] == {
        "greedy_before": "01",
        "sampled_before": "04",
        "greedy": "11",
        "sampled": "34",
    }
    figures = found["figures"]
    assert (figures["loss_first"], figures["loss_last"], figures["coverage_unit"]) == (4.5, 14.5, 0.25)
    assert figures["coverage_one_to_one"] is None, "bytes has none"


def test_differences_are_paired_by_seed_and_problem() -> None:
    def result(greedy: str) -> dict:
        return {"outcomes": {"greedy": greedy, "greedy_before": "0000"}, "configuration": {"eval_samples": 4}}

    ours, theirs = (
        {1: result("1110"), 2: result("1111"), 3: result("0000")},
        {1: result("1100"), 2: result("0111")},
    )
    estimate = scoring.difference(ours, theirs, "greedy")
    assert estimate.mean == pytest.approx((0 + 0 + 1 + 0 + 1 + 0 + 0 + 0) / 8)
    assert 0 <= estimate.low < estimate.mean < estimate.high <= 0.5
    assert scoring.change([result("1111")], "greedy").low == 1
    with pytest.raises(ValueError, match="no seed in common"):
        scoring.difference({1: ours[1]}, {2: theirs[2]}, "greedy")


def test_sums_of_texts_are_weighed_by_their_lengths() -> None:
    texts = {"nats": [1.0, 9.0], "nats_before": [2.0, 9.0], "nats_count": [10, 90]}
    values = scoring.scores({"texts": texts}, "nats")
    np.testing.assert_allclose(values.mean(), 0.1)
    assert scoring.change([{"texts": texts}], "nats").mean == pytest.approx(-0.01)


def test_an_interval_with_0_in_it_decides_nothing() -> None:
    higher, lower = scoring.ACCURACIES[0], scoring.DISTANCES[0]
    for bounds, of_higher, of_lower in (
        ((0.1, 0.2), "better", "worse"),
        ((-0.1, 0.2), "undecided", "undecided"),
    ):
        estimate = scoring.Estimate(mean=sum(bounds) / 2, low=bounds[0], high=bounds[1])
        assert (scoring.verdict(estimate, higher), scoring.verdict(estimate, lower)) == (of_higher, of_lower)


def test_the_report_says_what_is_done_and_what_the_results_bear(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for seed in (1, 2):
        finished("bytes", seed, greedy="1111")
        finished("paper", seed, greedy="0000")
    finished("strict", 1, greedy="0011")
    text = report.write_report(plan.planned_runs()).read_text()
    assert "**5 of 348 planned runs are done.**" in text
    assert re.search(r"^\* teacher-groups: .*`strict` 2 3 4 5, `bytes` 3 4 5", text, re.MULTILINE)
    assert "* Greedy accuracy improves under `bytes` (+0.500)." in text
    assert "* Greedy accuracy is harmed by `paper` (-0.500)." in text
    assert "* Best greedy accuracy: `bytes`, 1.0000; ahead of every other one." in text
    assert re.search(r"^\| `bytes` \| 1 2 \| 1.000 1.000 \| \+0.500 ", text, re.MULTILINE)
    assert "| mean over seeds | seconds | of the processor |" in text, "no column for what no run has"
    assert (
        "All runs start from one student (w)" in text and text.count("No run of this setting is done.") == 3
    )
    figure = tmp_path / "figures" / "teacher-groups.svg"
    first = figure.read_bytes()
    report.write_report(plan.planned_runs())
    assert figure.read_bytes() == first and len(first) < 60_000 and b"strict" in first


def test_no_interface_is_ahead_of_one_that_shares_no_seed_with_it() -> None:
    def result(greedy: str) -> dict:
        return {"outcomes": {"greedy": greedy}, "configuration": {"eval_samples": 4}}

    said = report._ahead({"bytes": {1: result("1111")}, "paper": {2: result("0000")}}, scoring.ACCURACIES[0])
    assert said == "Best greedy accuracy: `bytes`, 1.0000; not told apart from it: `paper`."


def test_the_reports_numbers_are_those_of_its_files() -> None:
    """Recomputed without the report's code: means of outcomes, and intervals over the 54 pairs of numbers."""
    folder = Path(report.__file__).parent
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    random, compared = np.random.default_rng(1), 0
    for setting in [setting for setting in SETTINGS if setting is not REAL]:
        start = next(i for i, line in enumerate(lines) if line.startswith(f"## {setting.name}:"))
        for name in setting.interfaces:
            gains = []
            for path in sorted((folder / "results").glob(f"{setting.name}-{name}-[0-9].json")):
                outcomes = json.loads(path.read_text())["outcomes"]
                after, before = (
                    [int(digit) for digit in outcomes[key]] for key in ("greedy", "greedy_before")
                )
                gains.append([a - b for a, b in zip(after, before, strict=True)])
            gain = np.mean(gains, axis=0)
            of_pairs = [(gain[k::54].sum(), len(gain[k::54])) for k in range(54)]
            drawn = np.array(of_pairs)[random.integers(0, 54, (4000, 54))].sum(axis=1)
            low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
            row = next(line for line in lines[start:] if line.startswith(f"| `{name}` | 1 2 3"))
            said = re.search(r"(\S+) \((\S+) to (\S+)\)", row)
            assert said is not None and float(said[1]) == pytest.approx(gain.mean(), abs=6e-4), row
            assert (float(said[2]), float(said[3])) == pytest.approx((low, high), abs=0.012), row
            compared += 1
    assert compared == 27


def test_the_reports_numbers_on_bounds_are_those_of_its_files() -> None:
    """Recomputed without the report's code: differences by warm start, intervals over both."""
    folder = Path(report.__file__).parent
    text = (folder / "report.md").read_text(encoding="utf-8")
    random = np.random.default_rng(1)
    for title in {setting.title for setting in BOUNDS}:
        of_starts = []
        for setting in BOUNDS:
            differences = []
            for path in (folder / "results").glob(f"{setting.name}-bytes_any-[0-9].json"):
                other = path.with_name(path.name.replace("bytes_any", "bytes"))
                if setting.title == title and other.exists():
                    any_, first = (json.loads(p.read_text())["outcomes"]["greedy"] for p in (path, other))
                    differences.append([int(a) - int(b) for a, b in zip(any_, first, strict=True)])
            if differences:
                of_starts.append(np.mean(differences, axis=0))
        said = re.search(rf"\| {title} \| greedy accuracy \| all \|.*\| (\S+) \((\S+) to (\S+)\)", text)
        assert (said is not None) == bool(of_starts)
        if said is None:
            continue
        means = []
        for _ in range(4000):
            starts = random.integers(0, len(of_starts), len(of_starts))
            gain = np.mean([of_starts[w] for w in starts], axis=0)
            values = np.concatenate([gain[k::54] for k in random.integers(0, 54, 54)])
            means.append(values.mean())
        low, high = np.percentile(means, [2.5, 97.5])
        assert float(said[1]) == pytest.approx(np.mean(of_starts), abs=6e-4)
        assert (float(said[2]), float(said[3])) == pytest.approx((low, high), abs=0.012)


def test_warm_starts_are_drawn_as_pairs_are() -> None:
    """Two starts that differ by .5 in everything: one of four draws has the one alone, one the other."""
    values = np.stack([np.zeros(200), np.full(200, 0.5)])
    estimate = scoring.over_starts(values, np.arange(200) % scoring.NUM_PAIRS)
    assert (estimate.low, estimate.mean, estimate.high) == (0, 0.25, 0.5)
    one = (np.arange(200) % 54 < 27).astype(float)
    alone, clusters = scoring.over_starts(one[None], np.arange(200) % 54), scoring.by_clusters(one, 54)
    assert (alone.low, alone.high) == pytest.approx((clusters.low, clusters.high), abs=0.01)


def test_a_pair_of_numbers_is_drawn_with_all_of_its_problems() -> None:
    """A model that knows half of the pairs, in all words: the interval of 54 pairs is wider than
    that of 200 problems.
    """
    values = (np.arange(200) % 54 < 27).astype(float)
    estimate = scoring.by_clusters(values, scoring.NUM_PAIRS)
    assert scoring.NUM_PAIRS == 54 and estimate.mean == values.mean()
    alone = scoring.bootstrap(values)
    assert estimate.high - estimate.low > 1.7 * (alone.high - alone.low)
    rows = [json.loads(line) for line in _held_out().splitlines()]
    pairs = [tuple(re.findall(r"[0-9]+", row["prompt"])) for row in rows]
    assert all(pairs[i] == pairs[i % 54] for i in range(200)) and len(set(pairs)) == 54


def _held_out() -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder))
        return (Path(folder) / "held_out.jsonl").read_text()


def test_results_in_the_repository_are_of_planned_runs(monkeypatch) -> None:
    monkeypatch.undo()
    for path in sorted(plan.RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        assert path.stem in {one.name for one in plan.planned_runs()}
        if "outcomes" in content:
            for name, outcome in content["outcomes"].items():
                samples = content["configuration"]["eval_samples"] if name.startswith("sampled") else 1
                share = sum(map(int, outcome)) / (samples * len(outcome))
                assert share == pytest.approx(content["figures"][name])


def judged(arm: str, setting: plan.Setting, seed: int, after: str, before: str = "0" * 400) -> Run:
    """A run of part e with these answers to validation and held-out problems, kept."""
    done = Run(setting=setting, interface=arm, seed=seed)
    outcomes = {"greedy_before": before, "greedy": after, "sampled_before": before, "sampled": after}
    other = {"figures": {}, "warm_start": "w", "seconds": 9.0, "cpu_seconds": 8.0}
    run.keep(done, {"outcomes": outcomes, **other})
    return done


def test_every_beginning_of_part_e_is_balanced() -> None:
    """Numbers of runs of two arms differ by one at most; rates come before seeds."""
    runs = plan.grid_runs()
    assert len(runs) == len({r.name for r in runs}) == 7 * 3 * (3 + 6)
    counts = {(grid, arm): 0 for grid in plan.GRIDS for arm in plan.ARMS}
    for one in runs:
        counts[one.setting.options["grid"], one.interface] += 1
        assert max(counts.values()) - min(counts.values()) <= 1
    assert [r.setting in plan.RATE_SETTINGS for r in runs] == [True] * 63 + [False] * 126


def test_the_best_rate_is_that_of_the_validation_problems(capsys) -> None:
    """Held-out problems, all right at the other rates, have no say."""
    best = Run(setting=plan.BEST_SETTINGS[0], interface="paper", seed=2)
    of_rates = [s for s in plan.RATE_SETTINGS if s.options["grid"] == best.setting.options["grid"]]
    for setting in of_rates:
        assert best.configuration.get("lr") is None and not best.ready and not run._can_start(best)
        right = {6e-5: 50, 2e-4: 60, 6e-4: 60}[setting.options["lr"]]
        held_out = "0" if setting.options["lr"] == 2e-4 else "1"
        judged("paper", setting, 1, ("1" * right).ljust(200, "0") + held_out * 200)
    assert "paper-2 waits" in capsys.readouterr().out
    assert best.ready and best.configuration["lr"] == 2e-4, "the lower one of two equals"
    assert Run(setting=best.setting, interface="sft", seed=2).configuration["train_iters"] == 300
    first = best.fingerprint
    judged("paper", of_rates[-1], 1, "1" * 200 + "0" * 200)
    assert best.configuration["lr"] == 6e-4 and best.fingerprint != first


def test_problems_of_part_e_are_distinct_and_none_is_trained_on(tmp_path) -> None:
    pairs = {}
    for path in problems.write_problems(tmp_path, "crossing"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        pairs[path.stem] = [tuple(map(int, re.findall("[0-9]+", row["prompt"]))) for row in rows]
        for row, (a, b) in zip(rows, pairs[path.stem], strict=True):
            assert f" {a + b} " in row["label"] == row["response"]
    assert len(set(pairs["judged"])) == len(pairs["judged"]) == 400
    assert pairs["judged"][:200] == pairs["validation"] and len(pairs["train"]) == 6000
    assert not set(pairs["train"]) & set(pairs["judged"]) and len(set(pairs["train"])) == 410
    assert [a for a, _ in pairs["judged"][200:]] == list(problems.clusters())


@needs_tokenizers
def test_all_words_of_the_third_pair_are_cut_across_tokens(tmp_path) -> None:
    """In each, a token of one tokenizer begins inside a token of the other and ends behind it."""
    names, things = problems.WORDS["crossing"]
    spans: list[dict[str, list[tuple[int, int]]]] = []
    for side in tokenizer_files.sides("digits-agree", "teacher-groups", tmp_path):
        tokenizer = load_tokenizer(side.tokenizer)
        pieces = tokenizer.table.pieces()
        spans.append({})
        for word in (*names, *things):
            ends = np.cumsum([len(pieces[i]) for i in tokenizer.encode(f" {word}".encode())]).tolist()
            spans[-1][word] = list(zip([0, *ends], ends, strict=False))
    for word in (*names, *things):
        ours, theirs = (of[word] for of in spans)
        assert any(a < c < b < d or c < a < d < b for a, b in ours for c, d in theirs), word


@needs_tokenizers
@pytest.mark.parametrize("setting", plan.RATE_SETTINGS[:3], ids=lambda setting: setting.name)
def test_every_arm_is_a_command_that_the_trainer_accepts(tmp_path, monkeypatch, setting) -> None:
    commands = []

    def command(self, command, *, log) -> dict[str, float]:
        commands.append(parse_config(list(command[3:])))
        log.parent.mkdir()
        evaluation = {"kind": "evaluation", "greedy_accuracy": 0, "sampled_accuracy": 0}
        row = json.dumps(evaluation | {"greedy_right": [0], "sampled_right": [0]}) + "\n"
        (log.parent / "metrics.jsonl").write_text(row * 2)
        return {"seconds": 1.0, "cpu_seconds": 1.0}

    def stage(self, root) -> None:
        stages.append(self.output.name)

    stages: list[str] = []
    monkeypatch.setattr(toy.quickstart.Stage, "run", stage)
    monkeypatch.setattr(processes.Workplace, "command", command)
    bench = toy.Toy(setting, processes.Workplace(tmp_path / "work"))
    assert {"teacher", "student", "same-tokenizer-teacher", "responses", "warm_up.jsonl"} <= set(stages)
    assert sorted(set(stages)) == sorted(stages), "no stage is run twice"
    for arm in setting.interfaces:
        bench.run(Run(setting=setting, interface=arm, seed=1))
    configs = dict(zip(setting.interfaces, commands, strict=True))
    for arm, config in configs.items():
        config.check(data_parallel_size=1)
        check_config(config.interface)
        assert config.interface.interface == VARIANTS.get(arm, (arm, {}))[0]
        assert config.training.train_iters == (300 if arm == "sft" else 100)
        assert config.training.lr == 2e-4 and Path(config.data.eval_prompt_data).name == "judged.jsonl"
    assert len({config.model.pretrained_checkpoint for config in commands}) == 1
    student = configs["kd"].model.tokenizer_model
    assert configs["kd"].teacher.tokenizer_model == student != configs["paper"].teacher.tokenizer_model


def recomputed(gains: dict[int, list[np.ndarray]], firsts: list[int]) -> tuple[float, float, float]:
    """Mean and interval without the report's code: warm starts, then first numbers, drawn one by one."""
    random, starts = np.random.default_rng(1), [np.mean(of_seeds, axis=0) for of_seeds in gains.values()]
    groups = [[i for i, first in enumerate(firsts) if first == number] for number in sorted(set(firsts))]
    means = []
    for _ in range(4000):
        drawn = [i for k in random.integers(0, len(groups), len(groups)) for i in groups[k]]
        chosen = random.integers(0, len(starts), len(starts))
        means.append(np.mean([starts[w][drawn] for w in chosen]))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(np.mean(starts)), float(low), float(high)


def check_part_e(text: str, folder: Path) -> int:
    """Recompute the intervals of greedy changes in part e of this report from its files; their number."""
    with tempfile.TemporaryDirectory() as made:
        rows = problems.write_problems(Path(made), "plain")[2].read_text().splitlines()[200:]
    firsts = [int(re.findall("[0-9]+", json.loads(row)["prompt"])[0]) for row in rows]
    gains: dict[tuple[str, str, str], dict[int, list[np.ndarray]]] = {}
    for path in sorted(folder.glob("e-*.json")):
        content = json.loads(path.read_text())
        of, kind = content["configuration"], "rate" if "-rate-" in path.stem else "best"
        after, before = ([int(d) for d in content["outcomes"][name]] for name in ("greedy", "greedy_before"))
        key = (of["grid"], f"| `{of['interface']}` | {of['lr']:g} |", kind)
        of_key = gains.setdefault(key, {}).setdefault(of["warm_start_seed"], [])
        of_key.append((np.array(after) - np.array(before))[200:])
    for (pair, start, kind), of_starts in gains.items():
        section = text.split(f"### {pair}:")[1].split("\n### ")[0].split("\n## ")[0]
        table = section.split("| arm | best rate |")[kind == "best"]
        row = next(row for row in table.splitlines() if row.startswith(start))
        said = re.search(r"(\S+) \((\S+) to (\S+)\) (\w+)", row)
        mean, low, high = recomputed(of_starts, firsts)
        assert said is not None and float(said[1]) == pytest.approx(mean, abs=6e-4), row
        assert (float(said[2]), float(said[3])) == pytest.approx((low, high), abs=0.012), row
        if abs(low) > 0.012 < abs(high):
            assert said[4] == ("better" if low > 0 else "worse" if high < 0 else "undecided"), row
    return len(gains)


def test_the_reports_numbers_on_part_e_are_those_of_its_files() -> None:
    folder = Path(report.__file__).parent
    text = (folder / "report.md").read_text(encoding="utf-8")
    files = sorted((folder / "results").glob("e-*.json"))
    rates = sum("-rate-" in path.stem for path in files)
    assert f"**{rates} of 63 runs that choose a rate and {len(files) - rates} of 126 runs" in text
    check_part_e(text, folder / "results")


def test_part_e_of_a_report_is_recomputed_and_says_what_it_cannot_tell(results) -> None:
    random = np.random.default_rng(7)

    def answers(share: float) -> str:
        return "".join(map(str, (random.random(400) < share).astype(int)))

    pair = "e-student-groups"
    for setting in plan.RATE_SETTINGS:
        for arm, share in {"bytes_any": 0.6, "paper": 0.3, "kd": 0.5}.items():
            if setting.options["grid"] == pair and (arm != "kd" or setting.options["lr"] == 2e-4):
                judged(arm, setting, 1, answers(share), answers(0.3))
    for setting in plan.BEST_SETTINGS:
        if setting.options["grid"] == pair and setting.options["warm_start_seed"] < 3:
            for seed in plan.CONFIRMED:
                judged("paper", setting, seed, answers(0.3), answers(0.3))
                judged("bytes_any", setting, seed, answers(0.6), answers(0.3))
    text = grid.section({one.name: one.result for one in plan.grid_runs()})
    assert "**7 of 63 runs that choose a rate and 8 of 126 runs at the best rate are done.**" in text
    assert check_part_e(text, results) == 9
    assert "* Nothing of `sft`, `strict`, `exact`, `alm`: no run." in text
    assert "* The best rate of `kd`: not all three rates have run." in text
    assert text.count("No run of this pair is done: nothing is known.") == 2
    assert re.search(r"^\| `paper` \| \S+ \| 4 from 2 \|.* worse \|$", text, re.MULTILINE)
    assert "48 of this pair's runs are not done" in text


def test_distances_of_texts_from_a_teacher(tmp_path) -> None:
    pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    for name, vocab_size, save_tokenizer in (
        ("student", 320, save_byte_level),
        ("teacher", 340, save_byte_fallback),
    ):
        (tmp_path / name).mkdir()
        save_model(tmp_path / name, "llama", vocab_size=vocab_size)
        save_tokenizer(tmp_path / name)
    student, teacher = str(tmp_path / "student"), str(tmp_path / "teacher")
    rows = [{"prompt": "the cat", "response": "sat on"}, {"prompt": "Tom", "response": "has 12"}]
    found = distances.distances(student, teacher, rows)
    names = {metric.name for metric in scoring.DISTANCES}
    assert found.keys() == names | {f"{name}_count" for name in names}
    assert found["nats_count"] == found["bytes_reverse_kl_count"] == [6, 6]
    measured = measure.measure(student, rows, 0)
    assert sum(found["nats"]) / 12 == pytest.approx(measured["nats_per_byte"], rel=1e-5)
    same = distances.distances(student, student, rows)
    assert same["nats"] == found["nats"]
    for name in names - {"nats"}:
        assert min(found[name]) > 0.1, name
        # `strict` compares the student's first stop token with both of the teacher's.
        assert max(map(abs, same[name])) < (1e-5 if name.startswith("bytes") else 0.1), name
    assert found["strict_reverse_kl"] != found["strict_forward_kl"]


def test_a_run_with_real_weights_is_the_examples_own_commands(tmp_path, monkeypatch) -> None:
    """Downloads, conversion and training are replaced; everything else runs."""
    folder = tmp_path / "work" / REAL.name
    started = []

    def command(self, command, *, log) -> dict[str, float]:
        started.append(list(command))
        if "distances.py" in command[1]:
            sums = {"nats": [1.0, 3.0], "nats_count": [10, 10]}
            (folder / "bytes-2" / "after.json").write_text(json.dumps(sums))
        elif "megatron_simct.train" in command:
            (folder / "bytes-2" / "distil").mkdir(parents=True)
            row = {"kind": "step", "iteration": 1, "loss": 0.5}
            (folder / "bytes-2" / "distil" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return {"seconds": 5.0, "cpu_seconds": 4.0}

    def stage(self, root) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        if self.output.name == "before.json":
            self.output.write_text(json.dumps({"nats": [2.0, 3.0], "nats_count": [10, 10]}))

    monkeypatch.setattr(real, "gguf_file", lambda model, cache: cache)
    monkeypatch.setattr(real, "write_texts", lambda path, gsm8k, num_held_out: write_texts(path))
    monkeypatch.setattr(real.Stage, "run", stage)
    monkeypatch.setattr(processes.Workplace, "command", command)
    bench = real.RealWeights(REAL, processes.Workplace(tmp_path / "work"))
    found = bench.run(Run(setting=REAL, interface="bytes", seed=2))
    assert found["figures"] == {"nats_before": 0.25, "nats": 0.2, "loss_first": 0.5, "loss_last": 0.5}
    assert found["texts"]["nats_before"] == [2.0, 3.0] and found["seconds"] == 5.0
    for name in ("smollm2", "gemma3"):
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text("{}")
    flags = started[0][started[0].index("megatron_simct.train") + 1 :]
    config = parse_config(flags)
    config.check(data_parallel_size=1)
    check_config(config.interface)
    assert (config.interface.interface, config.training.seed, config.training.lr) == (
        "bytes",
        2,
        REAL.options["lr"],
    )
    assert config.interface.divergence == REAL.options["divergence"]
    assert [len(started), "export" in " ".join(started[1])] == [3, True]
    assert not (folder / "bytes-2").exists(), "2 GB of checkpoints"


def write_texts(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("prompts", "held_out"):
        (folder / f"{name}.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 12)

"""samples.jsonl: the record of a few responses of a run, in any layout."""

from __future__ import annotations

import json

import pytest

from megatron_simct.alignment import load_tokenizer
from tests.distributed import run_ranks
from tests.runs import run
from tests.tiny import command_line

LAYOUTS = {
    "one": (1, ()),
    "pp2": (2, ("--pipeline-model-parallel-size", "2")),
    "tp2": (2, ("--tensor-model-parallel-size", "2")),
}


@pytest.mark.parametrize("interface", ["paper", "bytes", "strict"])
def test_units_spell_the_responses_and_their_losses_add_up(tiny, weights, tmp_path, interface) -> None:
    """One micro-batch of two samples, both kept: their losses are those of the step."""
    rows = {}
    for name, (world_size, flags) in LAYOUTS.items():
        folder = tmp_path / name
        argv = command_line(tiny, *weights, "--simct-interface", interface, "--run-dir", str(folder), *flags)
        argv += ["--rollout-batch-size", "2", "--train-iters", "3", "--sample-interval", "2"]
        argv += ["--save-debug-rollout-data", str(folder / "rollouts")] * (name == "one")
        argv += ["--load-debug-rollout-data", str(tmp_path / "one" / "rollouts")] * (name != "one")
        for code, _, err in run_ranks(world_size, run, argv):
            assert code == 0, err
        rows[name] = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    one = rows["one"]
    assert [(row["iteration"], row["sample_id"]) for row in one] == [
        (1, 0),
        (1, 1),
        (2, 2),
        (2, 3),
        (3, 4),
        (3, 5),
    ]
    steps = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    student = load_tokenizer(str(tiny / "student.model"))
    kept = [json.loads(path.read_text()) for path in sorted((tmp_path / "one" / "rollouts").iterdir())]
    ids = {rollout["sample_id"]: rollout["student_ids"] for batch in kept for rollout in batch}
    for step in steps:
        samples = [row for row in one if row["iteration"] == step["iteration"]]
        num_labels = sum(len(ids[row["sample_id"]]) for row in samples)
        total = sum(unit["loss"] for row in samples for unit in row["units"])
        assert total / num_labels == pytest.approx(step["loss"], rel=1e-5) and total > 0.1
    for row in one:
        spelled = [piece for unit in row["units"] for piece in unit["student"]]
        assert len(spelled) == len(ids[row["sample_id"]])
        text = student.decode(ids[row["sample_id"]][:1]).decode(errors="backslashreplace")
        assert spelled[0] in (text, text.encode("unicode_escape").decode()) or spelled[0].startswith("<")
        assert row["prompt"].startswith(("How", "Tom", "Nora", "Anna")), row["prompt"]
    assert any(unit["teacher"] for row in one for unit in row["units"])
    losses = {name: [unit.pop("loss") for row in rows[name] for unit in row["units"]] for name in LAYOUTS}
    for name in LAYOUTS:
        assert rows[name] == one
        assert losses[name] == pytest.approx(losses["one"], rel=1e-3, abs=1e-3)

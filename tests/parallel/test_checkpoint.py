"""Weights survive a change of layout bit by bit. If a checkpoint cannot be loaded, one line says why."""

from __future__ import annotations

import argparse
import io
import json
import os
import queue
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_simct.alignment import load_tokenizer
from megatron_simct.loading import load_model
from megatron_simct.models.build import HiddenStateModel, InterleavedModel
from megatron_simct.models.norm import RMSNorm
from megatron_simct.parallel.cpu import megatron_imports
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.update import checkpoint
from megatron_simct.update.checkpoint import TRACKER, load_weights, save_weights
from tests.distributed import run_ranks
from tests.tiny import config

with megatron_imports():
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.strategies import filesystem_async


def student_of(folder, groups, *flags) -> HiddenStateModel | InterleavedModel:
    """The student with random weights, or those of --pretrained-checkpoint."""
    resolved = config(folder, "--tensor-model-parallel-size", str(groups.tp_size), *flags)
    tokenizer = load_tokenizer(resolved.model.tokenizer_model)
    return load_model(resolved, resolved.model, groups, tokenizer, prefix="")


def in_job(function) -> Callable[..., Any]:
    """Run function(groups, *args) on every rank, with tensor parallelism over all of them."""

    def worker(rank, world_size, folder, *args) -> Any:
        resolved = config(folder, "--tensor-model-parallel-size", str(world_size))
        with process_groups(resolved.parallel, seed=3) as groups:
            return function(groups, folder, *args)

    return worker


def parameters_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def logits_of(model, groups) -> torch.Tensor:
    """[S, V] over the real vocabulary, gathered."""
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        hidden = model(ids, torch.arange(ids.shape[1])[None], None)[:, 0]
        shard = hidden @ model.output_weight.T
    shards = [torch.empty_like(shard) for _ in range(groups.tp_size)]
    torch.distributed.all_gather(shards, shard, group=groups.tp)
    return torch.cat(shards, dim=1)[:, :360]


@in_job
def _load_and_save(groups, folder, source, target, iteration) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Load from one directory, save in another; the weights and logits in between."""
    model = student_of(folder, groups, *(["--pretrained-checkpoint", str(source)] if source else []))
    save_weights(model, str(target), iteration)
    return parameters_of(model), logits_of(model, groups)


@in_job
def _load(groups, folder, source) -> tuple[int, dict[str, torch.Tensor], torch.Tensor]:
    model = student_of(folder, groups)
    iteration = load_weights(model, str(source), flag="--load-it")
    return iteration, parameters_of(model), logits_of(model, groups)


def test_weights_go_from_one_rank_to_two_and_back(tiny, tmp_path) -> None:
    ((weights, logits),) = run_ranks(1, _load_and_save, tiny, None, tmp_path / "one", 7)
    two = run_ranks(2, _load_and_save, tiny, tmp_path / "one", tmp_path / "two", 8)
    ((iteration, weights_back, logits_back),) = run_ranks(1, _load, tiny, tmp_path / "two")
    assert iteration == 8 and (tmp_path / "two" / TRACKER).read_text() == "8"
    assert logits.std() > 0.1
    for shard, logits_of_two in two:
        torch.testing.assert_close(logits_of_two, logits, rtol=1e-5, atol=1e-5)
        assert shard["decoder.layers.0.mlp.linear_fc2.weight"].shape == (32, 32), "each rank holds its half"
    assert weights_back.keys() == weights.keys()
    for name, value in weights.items():
        if name == "embedding.word_embeddings.weight":  # no token uses the padding past the vocabulary
            value, weights_back[name] = value[:360], weights_back[name][:360]
        assert torch.equal(weights_back[name], value), name
    assert torch.equal(logits_back, logits)


# What cannot be loaded


def _refusals(rank, world_size, folder, sources, tp) -> list[str]:
    """The error for each directory."""
    resolved = config(folder, "--tensor-model-parallel-size", str(tp))
    with process_groups(resolved.parallel, seed=3) as groups:
        model = student_of(folder, groups)
        messages = []
        for source in sources:
            with pytest.raises(ValueError) as error:
                load_weights(model, str(source), flag="--pretrained-checkpoint")
            messages.append(str(error.value))
        return messages


@in_job
def _save_relatives(groups, folder, target) -> None:
    """Checkpoints of models that differ a little from the student."""
    for name, changes in RELATIVES.items():
        architecture = target / f"{name} model"
        architecture.mkdir()
        fields = json.loads((folder / "student" / "config.json").read_text()) | changes
        (architecture / "config.json").write_text(json.dumps(fields))
        save_weights(student_of(folder, groups, "--hf-checkpoint", str(architecture)), str(target / name), 1)


RELATIVES = {
    "untied": {"tie_word_embeddings": False},
    "deeper": {"num_hidden_layers": 3},
    "wider": {"intermediate_size": 96},
}


@pytest.mark.parametrize("tp", [1, 2])
def test_what_is_no_checkpoint_of_this_model_is_refused_in_one_line(tiny, weights, tmp_path, tp) -> None:
    student_dir, teacher_dir = weights[1], weights[3]
    (tmp_path / "empty").mkdir()
    for name, content in (("garbage", "newest"), ("dangling", "12")):
        (tmp_path / name).mkdir()
        (tmp_path / name / TRACKER).write_text(content)
    sources = [
        tmp_path / "nowhere",
        tmp_path / "empty",
        tmp_path / "garbage",
        tmp_path / "dangling",
        teacher_dir,
    ]
    if tp == 1:
        run_ranks(1, _save_relatives, tiny, tmp_path)
        sources += [tmp_path / name for name in RELATIVES]
    for messages in run_ranks(tp, _refusals, tiny, sources, tp):
        for source, message in zip(sources, messages, strict=True):
            assert message.startswith(f"--pretrained-checkpoint {source}"), message
            assert "\n" not in message and len(message) < 600
        assert all("no checkpoint there" in message and TRACKER in message for message in messages[:3])
        assert "iter_0000012 does not exist" in messages[3]
        for message in messages[4:]:
            assert "does not fit this model" in message and ("layer" in message), message
    assert run_ranks(tp, _load, tiny, student_dir)[0][0] == 1, "the student's own fits"


# A run that is killed


@in_job
def _killed_before_the_tracker(groups, folder, target) -> tuple[torch.Tensor, torch.Tensor]:
    """A sound checkpoint 1; then a kill of checkpoint 2 between its last file and the tracker."""
    model = student_of(folder, groups)
    save_weights(model, str(target), 1)
    first = logits_of(model, groups)
    with torch.no_grad():
        model.output_weight.mul_(2.0)
    replace = os.replace

    def kill(source, target_path) -> None:
        if str(target_path).endswith(TRACKER):
            raise KeyboardInterrupt
        replace(source, target_path)

    checkpoint.os.replace = kill
    try:
        with pytest.raises(KeyboardInterrupt):
            save_weights(model, str(target), 2)
    finally:
        checkpoint.os.replace = replace
    return first, logits_of(model, groups)


@in_job
def _resume(
    groups, folder, target
) -> tuple[tuple[int, torch.Tensor], torch.Tensor, tuple[int, torch.Tensor]]:
    """The state that the next run loads, and the state after it has saved checkpoint 2 over the remains."""
    model = student_of(folder, groups)
    loaded = load_weights(model, str(target), flag="--load-it"), logits_of(model, groups)
    with torch.no_grad():
        model.output_weight.mul_(3.0)
    save_weights(model, str(target), 2)
    saved = logits_of(model, groups)
    other = student_of(folder, groups)
    return loaded, saved, (load_weights(other, str(target), flag="--load-it"), logits_of(other, groups))


def test_a_kill_before_the_tracker_leaves_the_previous_checkpoint_in_use(tiny, tmp_path) -> None:
    ((first, second),) = run_ranks(1, _killed_before_the_tracker, tiny, tmp_path)
    assert not torch.equal(first, second)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "iter_0000001",
        "iter_0000002",
    ]
    ((loaded, saved, reloaded),) = run_ranks(1, _resume, tiny, tmp_path)
    assert loaded[0] == 1 and torch.equal(loaded[1], first)
    assert reloaded[0] == 2 and torch.equal(reloaded[1], saved) and not torch.equal(saved, second)


# Checkpoints of Megatron-LM and Megatron-Bridge, as far as they can be imitated here


@in_job
def _save_as_others_do(groups, folder, target, tracker) -> torch.Tensor:
    """The form of their converters: TransformerEngine's extra state, pickled arguments,
    `release` or iteration 0.
    """
    model = student_of(folder, groups)
    path = target / (tracker if tracker == "release" else f"iter_{int(tracker):07d}")
    path.mkdir(parents=True)
    objects = {
        key: ShardedObject(key, io.BytesIO(), (2,) if "layers" in key else (1,), (0,), replica_id=0)
        for key in (
            "decoder.layers.self_attention.core_attention._extra_state",
            "decoder.final_layernorm._extra_state",
        )
    }
    objects["decoder.layers.self_attention.core_attention._extra_state/1"] = ShardedObject(
        "decoder.layers.self_attention.core_attention._extra_state", io.BytesIO(), (2,), (1,), replica_id=0
    )
    objects["rerun"] = ShardedObject("rerun_state_machine_state", io.BytesIO(), (1,), (0,), replica_id=0)
    common = {"args": argparse.Namespace(num_layers=2), "checkpoint_version": 3.0, "iteration": 0}
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save({"model": model.sharded_state_dict(), **objects, **common}, str(path))
    (target / TRACKER).write_text(tracker)
    return logits_of(model, groups)


@pytest.mark.parametrize("tracker", ["release", "0"])
def test_weights_of_megatron_s_converters_are_read(tiny, tmp_path, tracker) -> None:
    ((logits),) = run_ranks(1, _save_as_others_do, tiny, tmp_path / "theirs", tracker)
    ((iteration, _, loaded),) = run_ranks(1, _load, tiny, tmp_path / "theirs")
    assert iteration == 0 and torch.equal(loaded, logits)


@in_job
def _between_kinds_of_norms(groups, folder, source, target) -> torch.Tensor:
    """Load weights saved by norms without extra state into norms that have one, and save those."""
    RMSNorm.get_extra_state = lambda self: torch.empty(0, dtype=torch.uint8)
    RMSNorm.set_extra_state = lambda self, state: None
    model = student_of(folder, groups)
    assert any(key.endswith("_extra_state") for key in model.state_dict())
    load_weights(model, str(source), flag="--load-it")
    save_weights(model, str(target), 2)
    return logits_of(model, groups)


def test_checkpoints_with_and_without_extra_state_load_into_each_other(tiny, tmp_path) -> None:
    ((_, logits),) = run_ranks(1, _load_and_save, tiny, None, tmp_path / "without", 1)
    ((with_state),) = run_ranks(1, _between_kinds_of_norms, tiny, tmp_path / "without", tmp_path / "with")
    ((_, _, back),) = run_ranks(1, _load, tiny, tmp_path / "with")
    assert torch.equal(with_state, logits) and torch.equal(back, logits)

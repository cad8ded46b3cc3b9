"""The gated delta net: chunks against the recurrence, whole models against transformers' gradients, caches
and packed sequences longer than a chunk, checkpoints in another layout.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_simct.config.options import ParallelConfig
from megatron_simct.models import delta_net
from megatron_simct.models.build import HiddenStateModel, InterleavedModel, build_model
from megatron_simct.models.delta_net import CHUNK, delta_rule
from megatron_simct.models.families import Architecture, read_architecture
from megatron_simct.models.hf_load import load_hf_weights
from megatron_simct.models.hf_mapping import parameters_of
from megatron_simct.models.layout import Layout
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.records import Prompt, Rollout
from megatron_simct.rollout.engine import Sampling
from megatron_simct.rollout.megatron_engine import MegatronEngine
from megatron_simct.update.checkpoint import load_weights, save_weights
from tests.distributed import run_ranks
from tests.huggingface import save_model
from tests.oracles.delta_net import recurrence

pytest.importorskip("transformers")

FIELDS = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
LENGTH = 2 * CHUNK + 7
TOKENS = torch.randint(0, 90, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [1, CHUNK, CHUNK + 1, 150])
def test_chunks_compute_the_recurrence_and_its_gradient(length) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (2, length, 3)
    query, key = torch.nn.functional.normalize(
        torch.randn(2, *shape, 8, generator=generator, dtype=torch.float64), dim=-1
    )
    value = torch.randn(*shape, 5, generator=generator, dtype=torch.float64)
    decay = -torch.rand(*shape, generator=generator, dtype=torch.float64) * 3
    beta = torch.rand(*shape, generator=generator, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (query, key, value, decay, beta)]
    weights = torch.randn(*shape, 5, generator=generator, dtype=torch.float64)
    expected, expected_state = recurrence(*inputs)
    wanted = torch.autograd.grad((expected * weights).sum() + expected_state.sum(), inputs)
    found, state = delta_rule(*inputs)
    gradients = torch.autograd.grad((found * weights).sum() + state.sum(), inputs)
    for ours, theirs in zip((found, state, *gradients), (expected, expected_state, *wanted), strict=True):
        # Both in float64; only the order of sums differs.
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_strong_decay_overflows_nowhere() -> None:
    query = torch.ones(1, CHUNK, 1, 4) / 2
    decay = torch.full((1, CHUNK, 1), -300.0, requires_grad=True)
    out, state = delta_rule(query, query, query, decay, torch.ones(1, CHUNK, 1))
    (out.sum() + state.sum()).backward()
    assert out.isfinite().all() and state.isfinite().all() and decay.grad.isfinite().all()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("delta")
    return folder, save_model(folder, "qwen3_5_text", **FIELDS)


def build(
    folder: str, parallel: ParallelConfig, groups
) -> tuple[HiddenStateModel | InterleavedModel, Architecture]:
    architecture = read_architecture(folder, flag="")
    model = build_model(architecture, parallel, groups, vocab_size=90, divisible_by=8, bf16=False, flag="")
    load_hf_weights(model, architecture, folder, groups, flag="")
    return model, architecture


def _gradients(rank, world_size, folder, weights) -> dict[str, torch.Tensor]:
    parallel = ParallelConfig()
    with process_groups(parallel, seed=3) as groups:
        model, architecture = build(folder, parallel, groups)
        hidden = model(TOKENS, torch.arange(LENGTH).expand_as(TOKENS), None)
        logits = (hidden @ model.output_weight.T).transpose(0, 1)[..., : weights.shape[-1]]
        (logits * weights).sum().backward()
        for parameter in model.parameters():
            parameter.data = parameter.grad
        found: dict[str, torch.Tensor] = {"logits": logits.detach()}
        for rule, place, shard in parameters_of(model, architecture, tp_rank=0, tp_size=1):
            for piece in rule.pieces(shard, place):
                whole = found.setdefault(piece.name, torch.zeros(piece.shape))
                target = whole.narrow(piece.axis, piece.begin, piece.end - piece.begin)
                target.copy_(piece.view.reshape(target.shape))
        return found


def test_gradients_of_every_tensor_are_those_of_transformers(trained) -> None:
    folder, model = trained
    weights = torch.randn(2, LENGTH, 99, generator=torch.Generator().manual_seed(2))
    (found,) = run_ranks(1, _gradients, str(folder), weights)
    model.zero_grad()
    logits = model(TOKENS).logits
    (logits * weights).sum().backward()
    logits = logits.detach()
    torch.testing.assert_close(found.pop("logits"), logits, rtol=0, atol=1e-4 * float(logits.abs().max()))
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == theirs.keys()
    for name, gradient in theirs.items():
        largest = float(gradient.abs().max())
        assert largest > 1e-3, name
        assert float((found[name] - gradient).abs().max()) < 2e-4 * largest, name


def _sampled(rank, world_size, folder, prompts) -> list[Rollout]:
    parallel = ParallelConfig(tensor_model_parallel_size=world_size)
    with process_groups(parallel, seed=3) as groups:
        model, _ = build(folder, parallel, groups)
        engine = MegatronEngine(model, groups, vocab_size=90, stop_ids=[90], batch_size=3)
        return engine.generate(prompts, Sampling(temperature=1.0, top_p=1.0, max_response_len=9, seed=1))


@torch.no_grad()
def test_sampling_past_a_chunk_is_the_whole_forward_pass(trained) -> None:
    folder, model = trained
    sizes = (1, CHUNK - 4, CHUNK, CHUNK + 3, 2 * CHUNK - 2)
    prompts = [
        Prompt(
            sample_id=i,
            student_ids=TOKENS[i % 2, :n].numpy().astype(np.int32),
            teacher_ids=np.zeros(0, np.int32),
        )
        for i, n in enumerate(sizes)
    ]
    for rollouts in run_ranks(2, _sampled, str(folder), prompts):
        for prompt, rollout in zip(prompts, rollouts, strict=True):
            ids = torch.from_numpy(np.concatenate([prompt.student_ids, rollout.student_ids]).astype(np.int64))
            rows = model(ids[None]).logits[0, len(prompt.student_ids) - 1 : -1, :90].double().log_softmax(-1)
            expected = rows.gather(1, ids[len(prompt.student_ids) :, None])[:, 0]
            np.testing.assert_allclose(rollout.logprobs, expected.numpy(), rtol=1e-4, atol=1e-4)


def _packed(rank, world_size, folder) -> None:
    with process_groups(ParallelConfig(), seed=3) as groups:
        model, _ = build(folder, ParallelConfig(), groups)
        attention = model.decoder.layers[0].self_attention
        lengths = [5, CHUNK + 9, 1]
        hidden = torch.randn(sum(lengths), 1, 32, generator=torch.Generator().manual_seed(4))
        positions = torch.cat([torch.arange(length) for length in lengths])
        together, _ = attention(hidden, None, packed_seq_params=Layout(positions, lengths))
        apart = torch.cat([attention(part, None)[0] for part in hidden.split(lengths)])
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)
        assert float((together - attention(hidden, None)[0]).abs().max()) > 1e-3


def test_packed_sequences_do_not_see_each_other(trained) -> None:
    run_ranks(1, _packed, str(trained[0]))


def _save(rank, world_size, folder, save) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=world_size)
    with process_groups(parallel, seed=3) as groups:
        save_weights(build(folder, parallel, groups)[0], save, 1)


def _load(rank, world_size, folder, save) -> None:
    with process_groups(ParallelConfig(), seed=3) as groups:
        expected, architecture = build(folder, ParallelConfig(), groups)
        model = build_model(
            architecture, ParallelConfig(), groups, vocab_size=90, divisible_by=8, bf16=False, flag=""
        )
        load_weights(model, save, flag="--load")
        others = dict(expected.named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, others[name]), name


def test_a_checkpoint_of_one_layout_loads_in_another(trained, tmp_path) -> None:
    run_ranks(2, _save, str(trained[0]), str(tmp_path / "save"))
    run_ranks(1, _load, str(trained[0]), str(tmp_path / "save"))


def test_the_chunk_is_a_matter_of_speed(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.nn.functional.normalize(torch.randn(1, 40, 2, 8, generator=generator), dim=-1)
    rates = torch.rand(1, 40, 2, generator=generator)
    whole, state = delta_rule(query, query, query, -rates, rates)
    monkeypatch.setattr(delta_net, "CHUNK", 16)
    parts, again = delta_rule(query, query, query, -rates, rates)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(again, state)

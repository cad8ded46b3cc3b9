"""Sampling from vocabulary shards: the same tokens for any split, equal to a float64 oracle's,
with its frequencies.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_simct.rollout.sampling import nucleus_cutoff, sample_tokens
from tests.distributed import run_ranks
from tests.oracles import sampling as oracle

INF = float("inf")
VOCAB, PADDED = 21, 24  # on 4 ranks the last one has 3 real columns of 6
SETTINGS = [(0.0, 1.0), (1.0, 1.0), (0.6, 1.0), (3.0, 1.0), (1.0, 0.95), (0.7, 0.5), (2.0, 0.05)]
SETTINGS += [(1.0, 1.0, 1), (1.0, 1.0, 5), (3.0, 0.8, 9), (2.0, 1.0, 20), (2.0, 0.9, 1000)]
"""(temperature, top_p), or with top_k after them; a rank of four has 6 columns."""
BELOW_ONE = 1.0 - 2.0**-53
"""The largest number below 1."""


def random_logits(rows: int, *, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    """[rows, PADDED]; padded columns have the largest numbers, so that a read of one is detected."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, PADDED, generator=generator)
    logits[:, VOCAB:] = 1e5
    return logits


def random_uniforms(rows: int, *, seed: int = 1) -> torch.Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def choice(setting: tuple) -> dict:
    return dict(zip(("temperature", "top_p", "top_k"), setting, strict=False))


def _sample(
    rank, world_size, logits, uniforms, vocab_size, all_settings
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    width = logits.shape[1] // world_size
    return [
        sample_tokens(
            logits[:, rank * width : (rank + 1) * width],
            uniforms,
            shard_start=rank * width,
            vocab_size=vocab_size,
            **choice(setting),
            group=dist.group.WORLD if world_size > 1 else None,
        )
        for setting in all_settings
    ]


def sample(
    world_size, logits, uniforms, all_settings=SETTINGS, *, vocab_size=VOCAB
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, log-probs) for each of the settings. All ranks must agree on them."""
    if world_size == 1:
        return _sample(0, 1, logits, uniforms, vocab_size, all_settings)
    first, *others = run_ranks(world_size, _sample, logits, uniforms, vocab_size, all_settings)
    for other in others:
        for (ids, scores), (other_ids, other_scores) in zip(first, other, strict=True):
            assert torch.equal(ids, other_ids) and torch.equal(
                scores.nan_to_num(9.0), other_scores.nan_to_num(9.0)
            )
    return first


# Tokens


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_tokens_and_log_probs_are_the_oracle_s(world_size) -> None:
    logits, uniforms = random_logits(200), random_uniforms(200)
    for setting, (ids, scores) in zip(SETTINGS, sample(world_size, logits, uniforms), strict=True):
        assert ids.dtype == torch.int64 and scores.dtype == torch.float32
        compared = 0
        for row, uniform, token, score in zip(
            logits[:, :VOCAB].double().tolist(), uniforms.tolist(), ids.tolist(), scores.tolist(), strict=True
        ):
            assert 0 <= token < VOCAB
            assert score == pytest.approx(oracle.log_softmax(row)[token], abs=2e-6)
            if setting[0] == 0:
                expected, margin = oracle.greedy(row), 1.0
            else:
                probs = oracle.distribution(row, **choice(setting))
                assert probs[token] > 0
                expected, margin = oracle.choose(probs, uniform)
            if margin > 1e-5:  # otherwise single precision may decide
                assert token == expected
                compared += 1
        assert compared > 190


def test_every_split_gives_the_same_tokens() -> None:
    logits, uniforms = random_logits(2000, seed=2), random_uniforms(2000, seed=3)
    one, two, four = (sample(world_size, logits, uniforms) for world_size in (1, 2, 4))
    for (ids, scores), *others in zip(one, two, four, strict=True):
        for other_ids, other_scores in others:
            assert torch.equal(ids, other_ids)
            torch.testing.assert_close(scores, other_scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_greedy_takes_the_lowest_of_equal_ids(world_size) -> None:
    logits = torch.zeros(4, PADDED)
    logits[:, VOCAB:] = 9.0
    logits[1, [7, 13, 20]] = 1.0  # on several ranks
    logits[2, [17, 16]] = 1.0  # on one rank
    logits[3] = -INF
    logits[3, [19, 20]] = -1e4
    ((ids, scores),) = sample(world_size, logits, torch.zeros(4, dtype=torch.float64), [(0.0, 1.0)])
    assert ids.tolist() == [0, 7, 16, 19]
    assert scores.tolist() == pytest.approx(
        [-math.log(21), 1 - math.log(3 * math.e + 18), 1 - math.log(2 * math.e + 19), -math.log(2)], abs=1e-6
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_uniform_numbers_at_the_borders(world_size) -> None:
    """0 takes the first token that has mass, the largest number below 1 the last one; no token
    without mass is taken.
    """
    logits = random_logits(5, scale=1.0)
    logits[1, :14] = -INF  # nothing on the first ranks
    logits[2, 5:VOCAB] = -INF  # nothing on the last ranks
    logits[3, :VOCAB] = -INF
    logits[3, 11] = -3.0
    logits[4, :VOCAB] = torch.where(torch.arange(VOCAB) % 5 == 2, 0.0, -INF)  # 2, 7, 12, 17
    no_cut = [(1.0, 1.0), (0.5, 1.0)]
    for ids, _ in sample(world_size, logits, torch.zeros(5, dtype=torch.float64), no_cut):
        assert ids.tolist() == [0, 14, 0, 11, 2]
    for ids, _ in sample(world_size, logits, torch.full((5,), BELOW_ONE, dtype=torch.float64), no_cut):
        assert ids.tolist() == [20, 20, 4, 11, 17]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_uniform_numbers_at_the_borders_of_a_nucleus(world_size) -> None:
    """The nucleus {5, 9} lies within one shard or two; the tokens that are cut on either side
    of it have no mass.
    """
    logits = torch.zeros(1, PADDED)
    logits[0, [5, 9]] = 10.0
    for uniform, expected in ((0.0, 5), (0.49, 5), (0.51, 9), (BELOW_ONE, 9)):
        ((ids, _),) = sample(world_size, logits, torch.tensor([uniform], dtype=torch.float64), [(1.0, 0.9)])
        assert ids.tolist() == [expected]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_extreme_logits(world_size) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = 1e4 * torch.randn(60, PADDED, generator=generator)
    logits[20:40, :VOCAB] = torch.eye(VOCAB)[torch.arange(20)] * 1e4  # one-hot at id row - 20
    logits[40:, :VOCAB] = 1e4 + torch.randn(20, VOCAB, generator=generator)
    logits[:, VOCAB:] = INF
    uniforms = random_uniforms(60)
    for setting, (ids, scores) in zip(SETTINGS, sample(world_size, logits, uniforms), strict=True):
        assert ids[20:40].tolist() == list(range(20))
        assert scores[20:40].tolist() == [0.0] * 20
        for row, uniform, token, score in zip(
            logits[:, :VOCAB].double().tolist(), uniforms.tolist(), ids.tolist(), scores.tolist(), strict=True
        ):
            assert score == pytest.approx(oracle.log_softmax(row)[token], rel=1e-6, abs=1e-5)
            if setting[0] > 0:
                probs = oracle.distribution(row, **choice(setting))
                expected, margin = oracle.choose(probs, uniform)
                assert token == expected or margin < 1e-5


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_without_a_real_column(world_size) -> None:
    """A vocabulary of 5 in 24 columns: most ranks hold padding alone."""
    logits, uniforms = random_logits(300), random_uniforms(300)
    logits[:, 5:] = 1e5
    alone = sample(1, logits, uniforms, vocab_size=5)
    for (ids, scores), (expected, expected_scores) in zip(
        sample(world_size, logits, uniforms, vocab_size=5), alone, strict=True
    ):
        assert torch.equal(ids, expected) and int(ids.max()) < 5
        torch.testing.assert_close(scores, expected_scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_model_that_says_nan_gives_real_ids_with_nan_log_probs(world_size) -> None:
    """A broken model then stops at the check of the loss, not at an id that no table has."""
    logits = random_logits(3)
    logits[0] = math.nan
    logits[1, 20] = math.nan  # only the last rank has it
    logits[2, 3] = math.nan
    for ids, scores in sample(world_size, logits, random_uniforms(3)):
        assert 0 <= int(ids.min()) <= int(ids.max()) < VOCAB
        assert scores.isnan().all()


def test_bf16_logits_are_widened() -> None:
    logits, uniforms = random_logits(50).bfloat16(), random_uniforms(50)
    for (ids, scores), (expected, expected_scores) in zip(
        sample(1, logits, uniforms), sample(1, logits.float(), uniforms), strict=True
    ):
        assert torch.equal(ids, expected) and torch.equal(scores, expected_scores)


# Frequencies


@pytest.mark.parametrize("world_size", [1, 2])
def test_frequencies_are_the_distribution_s(world_size) -> None:
    """Chi-square over 20,000 draws of one row; the bound is some five standard deviations."""
    draws = 20_000
    logits = random_logits(1, scale=1.0, seed=7).expand(draws, -1)
    uniforms = random_uniforms(draws, seed=8)
    row = logits[0, :VOCAB].double().tolist()
    all_settings = [(1.0, 1.0), (0.6, 1.0), (2.0, 1.0), (1.0, 0.8), (0.7, 0.6), (1.0, 1.0, 6), (1.5, 0.7, 12)]
    seen = []
    for setting, (ids, _) in zip(
        all_settings, sample(world_size, logits, uniforms, all_settings), strict=True
    ):
        probs = oracle.distribution(row, **choice(setting))
        counts = torch.bincount(ids, minlength=VOCAB).tolist()
        support = [i for i, p in enumerate(probs) if p > 0]
        assert sum(counts[i] for i in support) == draws, "a token outside the nucleus"
        chi_square = sum((counts[i] - draws * probs[i]) ** 2 / (draws * probs[i]) for i in support)
        freedom = len(support) - 1
        assert freedom >= 3 and chi_square < freedom + 5 * math.sqrt(2 * freedom)
        seen.append(counts)
    assert len({tuple(counts) for counts in seen}) == len(all_settings), "the settings change nothing"


# The nucleus

# Small integers have exact sums, so the oracle and single precision must agree to the last token, ties
# included.
WEIGHTS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


def oracle_cutoff(weights: list[float], top_p: float) -> float:
    return min(weights[i] for i in oracle.nucleus(weights, top_p))


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(WEIGHTS, min_size=1, max_size=4),
    sixteenths=st.integers(1, 16),
    candidates=st.integers(1, 5),
)
def test_the_cutoff_is_the_oracle_s_however_few_are_offered(rows, sixteenths, candidates) -> None:
    top_p = sixteenths / 16
    width = max(len(row) for row in rows)
    weights = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.float32)
    cutoff = nucleus_cutoff(weights, top_p, group=None, candidates=candidates)
    assert cutoff.tolist() == [oracle_cutoff(row, top_p) for row in weights.tolist()]


def _cutoffs(rank, world_size, cases) -> list[list[float]]:
    results = []
    for weights, top_p, candidates in cases:
        width = weights.shape[1] // world_size
        shard = weights[:, rank * width : (rank + 1) * width]
        results.append(nucleus_cutoff(shard, top_p, group=dist.group.WORLD, candidates=candidates).tolist())
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_cutoff_on_shards(world_size) -> None:
    generator = torch.Generator().manual_seed(11)
    cases = []
    for i in range(120):
        weights = torch.randint(0, 10, (3, 24), generator=generator).float()
        weights[0, : 24 // world_size * (i % world_size)] = 0.0  # whole shards without mass
        weights[:, -1] += 1.0  # some mass
        cases.append((weights, (1 + i % 16) / 16, (1, 2, 64)[i % 3]))
    expected = [[oracle_cutoff(row, top_p) for row in weights.tolist()] for weights, top_p, _ in cases]
    for found in run_ranks(world_size, _cutoffs, cases):
        assert found == expected


def test_a_flat_row_needs_more_than_the_first_offer() -> None:
    """1,000 equal weights: 64 candidates have 6 % of the mass; all tie with the cutoff."""
    assert nucleus_cutoff(torch.ones(1, 1000), 0.5, group=None).tolist() == [1.0]
    steps = torch.arange(1000, dtype=torch.float32)[None]
    assert nucleus_cutoff(steps, 0.5, group=None).tolist() == [oracle_cutoff(steps[0].tolist(), 0.5)]

"""Generation with a KV cache and padded batches gives the same results as the same weights without either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_simct.alignment import load_tokenizer
from megatron_simct.loading import load_model
from megatron_simct.models import regions
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.records import Prompt, Rollout
from megatron_simct.rollout import megatron_engine
from megatron_simct.rollout.decoder import Decoder
from megatron_simct.rollout.engine import Sampling
from megatron_simct.rollout.graphs import Stepping
from megatron_simct.rollout.megatron_engine import MegatronEngine
from tests.distributed import run_ranks
from tests.huggingface import save_model
from tests.tiny import config

VOCAB = 360
NEVER = (VOCAB - 1,)
"""A stop id that the runs below do not generate."""
SOME = tuple(range(0, VOCAB, 12))
"""Stop ids that end sampled responses sooner or later."""
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_response_len=10, seed=1)
SAMPLED = Sampling(temperature=1.0, top_p=0.95, max_response_len=10, seed=1)


def make_prompts() -> list[Prompt]:
    """Prompts of several lengths, also of a single token."""
    rng = np.random.default_rng(0)
    empty = np.zeros(0, np.int32)
    return [
        Prompt(sample_id=10 + i, student_ids=rng.integers(3, 350, n).astype(np.int32), teacher_ids=empty)
        for i, n in enumerate([5, 12, 1, 8, 5, 17])
    ]


PROMPTS = make_prompts()


def in_job(function) -> Callable[..., Any]:
    """Run function(model, groups, *args) on every rank, with the student's checkpoint loaded."""

    def worker(rank, world_size, folder, weights, tp, *args) -> Any:
        resolved = config(folder, *weights, "--tensor-model-parallel-size", str(tp))
        with process_groups(resolved.parallel, seed=1) as groups:
            student = load_tokenizer(resolved.model.tokenizer_model)
            assert student.table.num_ids == VOCAB
            return function(load_model(resolved, resolved.model, groups, student, prefix=""), groups, *args)

    return worker


@in_job
def _generate(model, groups, calls) -> list[list[Rollout]]:
    """The rollouts of each call: (prompts, sampling, stop ids, batch size)."""
    results = []
    for prompts, sampling, stop_ids, batch_size in calls:
        reported = []
        engine = MegatronEngine(
            model,
            groups,
            vocab_size=VOCAB,
            stop_ids=stop_ids,
            batch_size=batch_size,
            progress=lambda finished, of, reported=reported: reported.append((finished, of)),
        )
        results.append(engine.generate(prompts, sampling))
        assert reported == sorted(reported) and (not prompts or reported[-1] == (len(prompts), len(prompts)))
    return results


@in_job
def _without_cache(model, groups, prompts, num_tokens) -> list[list[int]]:
    """Greedy continuations, by a whole forward pass for each token of each prompt."""
    answers = []
    with torch.no_grad():
        for prompt in prompts:
            tokens = prompt.student_ids.tolist()
            for _ in range(num_tokens):
                (logits,) = _last_logits(model, [tokens])
                tokens.append(int(logits.argmax()))
            answers.append(tokens[len(prompt.student_ids) :])
    return answers


def _last_logits(model, sequences) -> Iterator[torch.Tensor]:
    for tokens in sequences:
        ids = torch.tensor([tokens])
        hidden = model(ids, torch.arange(ids.shape[1])[None], None)
        yield (hidden[-1, 0] @ model.output_weight.T)[:VOCAB]


@in_job
def _log_probs(model, groups, sequences) -> list[torch.Tensor]:
    """log-softmax at every position: row p scores the token at p + 1."""
    results = []
    with torch.no_grad():
        for tokens in sequences:
            ids = torch.tensor([tokens])
            hidden = model(ids, torch.arange(ids.shape[1])[None], None)
            results.append(
                torch.log_softmax((hidden[:, 0] @ model.output_weight.T)[:, :VOCAB].double(), dim=1)
            )
    return results


@pytest.fixture(scope="module")
def generate(tiny, weights) -> Callable[..., list[list[Rollout]]]:
    """calls -> rollouts of the first rank; all ranks must return the same."""

    def generate(*calls, tp: int = 1) -> list[list[Rollout]]:
        first, *others = run_ranks(tp, _generate, tiny, weights, tp, calls)
        for other in others:
            for mine, theirs in zip(first, other, strict=True):
                assert_equal(mine, theirs, atol=0)
        return first

    return generate


def assert_equal(found, expected, *, atol) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.sample_id == b.sample_id
        assert a.student_ids.tolist() == b.student_ids.tolist()
        assert a.finish == b.finish
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def greedy(generate) -> list[Rollout]:
    """Ten greedy tokens of every prompt, each prompt alone, no stop."""
    (rollouts,) = generate((PROMPTS, GREEDY, NEVER, 1))
    return rollouts


def test_greedy_tokens_are_those_of_a_loop_without_a_cache(tiny, weights, generate) -> None:
    (expected,) = run_ranks(1, _without_cache, tiny, weights, 1, PROMPTS, GREEDY.max_response_len)
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)
    for tp in (1, 2):
        (rollouts,) = generate((PROMPTS, GREEDY, NEVER, 4), tp=tp)
        assert [r.student_ids.tolist() for r in rollouts] == expected
        assert all(r.finish == "length" and r.student_ids.dtype == np.int32 for r in rollouts)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_answers_as_one_prompt_at_a_time(generate, sampling) -> None:
    alone, *batches = generate(*((PROMPTS, sampling, NEVER, size) for size in (1, 2, 4, 100)))
    for rollouts in batches:
        assert_equal(rollouts, alone, atol=1e-4)
    assert [r.sample_id for r in alone] == [p.sample_id for p in PROMPTS]


def test_stopped_sequences_do_not_change_their_neighbours(generate, greedy) -> None:
    """Stop ids that end some sequences of a batch early; the others go on as if alone."""
    stops = (int(greedy[0].student_ids[2]), int(greedy[3].student_ids[5]))
    batch, alone = generate((PROMPTS, GREEDY, stops, 100), (PROMPTS, GREEDY, stops, 1))
    assert_equal(batch, alone, atol=1e-4)
    assert len({len(r.student_ids) for r in batch}) > 2


def test_any_stop_id_ends_a_response_and_is_part_of_it(generate, greedy) -> None:
    stops = (int(greedy[0].student_ids[2]), int(greedy[3].student_ids[5]), int(greedy[1].student_ids[-1]))
    (rollouts,) = generate((PROMPTS, GREEDY, stops, 4))
    finishes = set()
    for rollout, unstopped in zip(rollouts, greedy, strict=True):
        ids = unstopped.student_ids.tolist()
        end = next((i + 1 for i, token in enumerate(ids) if token in stops), None)
        assert rollout.student_ids.tolist() == ids[:end]
        assert rollout.finish == ("length" if end is None else "stop")
        assert len(rollout.logprobs) == len(rollout.student_ids)
        np.testing.assert_allclose(rollout.logprobs, unstopped.logprobs[:end], rtol=0, atol=1e-4)
        finishes.add((rollout.finish, len(rollout.student_ids)))
    assert ("stop", 3) in finishes and ("stop", 10) in finishes, "early, and at the last token that fits"


def test_a_response_of_one_token(generate, greedy) -> None:
    one = replace(GREEDY, max_response_len=1)
    stop = (int(greedy[1].student_ids[0]),)
    (rollouts,) = generate((PROMPTS, one, stop, 4))
    for rollout, longer in zip(rollouts, greedy, strict=True):
        assert rollout.student_ids.tolist() == longer.student_ids[:1].tolist()
        assert rollout.finish == ("stop" if rollout.student_ids[0] == stop[0] else "length")
    assert {r.finish for r in rollouts} == {"stop", "length"}


@in_job
def _counted(model, groups, prompts, sampling, batch_size) -> tuple[list[Rollout], list[Any], list[Any]]:
    """Rollouts; the size of each forward pass, (prompts, rows to fill) or the number of sequences of a
    decoding step; and the reported numbers of finished responses after each token.
    """
    passes, reported = [], []
    with pytest.MonkeyPatch.context() as patch:
        prefill, decode = Decoder.prefill, Decoder.decode

        def counted_prefill(self, tokens, received, lengths, rows) -> Any:
            passes.append((len(tokens), rows.shape[1]))
            return prefill(self, tokens, received, lengths, rows)

        def counted_decode(self, tokens, *rest) -> Any:
            passes.append(len(tokens))
            return decode(self, tokens, *rest)

        patch.setattr(Decoder, "prefill", counted_prefill)
        patch.setattr(Decoder, "decode", counted_decode)
        engine = MegatronEngine(
            model,
            groups,
            vocab_size=VOCAB,
            stop_ids=SOME,
            batch_size=batch_size,
            progress=lambda finished, of: reported.append(finished),
        )
        return engine.generate(prompts, sampling), passes, reported


def test_samples_of_a_prompt_share_its_forward_pass(tiny, weights, generate) -> None:
    """Two prompts with three and five samples, and one sample of a third; also in fewer rows than samples."""
    of_prompt = [0, 1, 0, 1, 1, 2, 1, 0, 1]
    prompts = [replace(PROMPTS[p], sample_id=50 + i) for i, p in enumerate(of_prompt)]
    alone = generate(*(([prompt], SAMPLED, SOME, 1) for prompt in prompts))
    for batch_size, expected in (
        (100, [(3, 9)]),
        (5, [(1, 5), (1, 3), (1, 1)]),
        (2, [(1, 2)] * 3 + [(1, 1)] * 3),
    ):
        ((rollouts, passes, reported),) = run_ranks(
            1, _counted, tiny, weights, 1, prompts, SAMPLED, batch_size
        )
        assert_equal(rollouts, [rollout for (rollout,) in alone], atol=1e-4)
        prefills = [entry for entry in passes if isinstance(entry, tuple)]
        assert sum(count for count, _ in prefills) == sum(count for count, _ in expected)
        assert sum(rows for _, rows in prefills) == len(prompts)
        assert max(rows for _, rows in prefills) <= batch_size
        assert reported == sorted(reported) and reported[-1] == len(prompts)
        assert reported[0] <= batch_size, "a sample that waits with others of its prompt is not finished"


def test_rows_of_finished_sequences_are_filled_or_closed_up(tiny, weights) -> None:
    """24 samples in 8 rows: no row decodes a finished sequence, and new ones start beside old ones."""
    prompts = [replace(prompt, sample_id=100 * i + j) for i, prompt in enumerate(PROMPTS) for j in range(4)]
    sampling = replace(SAMPLED, max_response_len=40)
    ((rollouts, passes, _),) = run_ranks(1, _counted, tiny, weights, 1, prompts, sampling, 8)
    lengths = [len(rollout.student_ids) for rollout in rollouts]
    assert len(set(lengths)) > 5 and {r.finish for r in rollouts} == {"stop", "length"}
    decoded = [entry for entry in passes if not isinstance(entry, tuple)]
    assert max(decoded) <= 8
    assert sum(decoded) == sum(lengths) - len(prompts), (
        "each token but a prompt's first is one row of one step"
    )
    between = passes[1 : -1 - passes[::-1].index(next(p for p in reversed(passes) if isinstance(p, tuple)))]
    assert any(not isinstance(entry, tuple) for entry in between)
    assert len(decoded) < sum(max(lengths[i : i + 8]) - 1 for i in range(0, 24, 8)), (
        "fewer steps than in fixed batches"
    )


@pytest.mark.parametrize("tp", [1, 2])
def test_log_probs_are_those_of_a_full_forward_pass(tiny, weights, generate, tp) -> None:
    """Log-probs are those of the untempered, untruncated distribution, although sampling used neither."""
    hot = replace(SAMPLED, temperature=1.7, top_p=0.8)
    (rollouts,) = generate((PROMPTS, hot, NEVER, 4), tp=tp)
    sequences = [
        [*prompt.student_ids.tolist(), *rollout.student_ids.tolist()]
        for prompt, rollout in zip(PROMPTS, rollouts, strict=True)
    ]
    (all_rows,) = run_ranks(1, _log_probs, tiny, weights, 1, sequences)
    for prompt, rollout, rows in zip(PROMPTS, rollouts, all_rows, strict=True):
        first = len(prompt.student_ids) - 1
        expected = [float(rows[first + i, token]) for i, token in enumerate(rollout.student_ids)]
        np.testing.assert_allclose(rollout.logprobs, expected, rtol=0, atol=1e-4)
        assert rollout.logprobs.dtype == np.float32


def test_draws_depend_on_seed_and_sample_alone(generate) -> None:
    other_seed = replace(SAMPLED, seed=2)
    renamed = [replace(prompt, sample_id=prompt.sample_id + 100) for prompt in PROMPTS]
    first, again, seeded, others, part = generate(
        (PROMPTS, SAMPLED, NEVER, 4),
        (PROMPTS, SAMPLED, NEVER, 4),
        (PROMPTS, other_seed, NEVER, 4),
        (renamed, SAMPLED, NEVER, 4),
        (PROMPTS[::-2], SAMPLED, NEVER, 4),
    )
    assert_equal(again, first, atol=0)
    assert_equal(part, first[::-2], atol=1e-4)
    for changed in (seeded, others):
        for a, b in zip(changed, first, strict=True):
            assert a.student_ids.tolist() != b.student_ids.tolist()


def test_sampling_options_reach_the_choice(generate, greedy) -> None:
    """A nucleus of one token, the top 1 and a temperature near 0 are greedy; hot sampling is not."""
    narrow, first, cold, hot = generate(
        (PROMPTS, replace(SAMPLED, top_p=1e-6), NEVER, 8),
        (PROMPTS, replace(SAMPLED, temperature=3.0, top_p=1.0, top_k=1), NEVER, 8),
        (PROMPTS, replace(SAMPLED, temperature=1e-4, top_p=1.0), NEVER, 8),
        (PROMPTS, replace(SAMPLED, temperature=3.0, top_p=1.0), NEVER, 8),
    )
    expected = [r.student_ids.tolist() for r in greedy]
    for rollouts in (narrow, first, cold):
        assert [r.student_ids.tolist() for r in rollouts] == expected
    assert all(r.student_ids.tolist() != ids for r, ids in zip(hot, expected, strict=True))


STEPPINGS = {
    "as on a GPU": Stepping(rows=8, keys=256, late=1, compiled=True, graphs=True),
    "other buckets, later": Stepping(rows=3, keys=7, late=2, compiled=False, graphs=False),
}


@in_job
def _stepped(model, groups, prompts, calls, backend) -> list[list[Rollout]]:
    """The rollouts of each call: (sampling, stop ids, stepping)."""
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_engine, "compiled", lambda: regions.compiled(backend))
        for sampling, stop_ids, stepping in calls:
            engine = MegatronEngine(
                model, groups, vocab_size=VOCAB, stop_ids=stop_ids, batch_size=4, stepping=stepping
            )
            results.append(engine.generate(prompts, sampling))
    return results


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 2)])
def test_tokens_do_not_depend_on_how_steps_are_shaped_and_when_they_are_read(tiny, weights, tp, pp) -> None:
    """Rows and positions rounded up, tokens read a step or two later, parts of a layer
    traced by the compiler.
    """
    prompts = [replace(prompt, sample_id=100 * i + j) for i, prompt in enumerate(PROMPTS) for j in range(2)]
    several = [(GREEDY, NEVER), (SAMPLED, SOME), (replace(SAMPLED, max_response_len=1), SOME)]
    calls = [(*call, stepping) for stepping in (None, *STEPPINGS.values()) for call in several]
    flags = (*weights, "--pipeline-model-parallel-size", str(pp))
    first, *others = run_ranks(tp * pp, _stepped, tiny, flags, tp, prompts, calls, "aot_eager")
    for start in range(len(several), len(calls), len(several)):
        for usual, found in zip(first, first[start : start + len(several)], strict=False):
            assert_equal(found, usual, atol=1e-5)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert_equal(mine, theirs, atol=0)
    assert {r.finish for r in first[1]} == {"stop", "length"}


def test_no_prompts_no_rollouts(generate) -> None:
    assert generate(([], GREEDY, NEVER, 4)) == [[]]


@in_job
def _states(model, groups) -> tuple[list[int], list[tuple[bool, bool]], bool]:
    """The state after generate: the version of its rollouts and the mode of the model,
    also after an error.
    """
    engine = MegatronEngine(model, groups, vocab_size=VOCAB, stop_ids=NEVER, batch_size=4)
    versions, modes = [], []
    for training in (True, False):
        model.train(training)
        versions.append(engine.generate(PROMPTS[:1], GREEDY)[0].weight_version)
        modes.append((model.training, model.decoder.layers[0].training))
        engine.publish(7)
    model.train()
    outside = replace(PROMPTS[0], student_ids=np.array([10**6], np.int32))
    with pytest.raises(IndexError):
        engine.generate([outside], GREEDY)
    modes.append((model.training, model.decoder.layers[0].training))
    return versions, modes, all(p.grad is None for p in model.parameters())


def test_what_generation_leaves_behind(tiny, weights) -> None:
    ((versions, modes, no_gradients),) = run_ranks(1, _states, tiny, weights, 1)
    assert versions == [0, 7]
    assert modes == [(True, True), (False, False), (True, True)]
    assert no_gradients


@in_job
def _narrow(model, groups) -> int:
    engine = MegatronEngine(model, groups, vocab_size=50, stop_ids=(1,), batch_size=8)
    sampling = replace(SAMPLED, temperature=5.0, top_p=1.0)
    return max(int(r.student_ids.max()) for r in engine.generate(PROMPTS, sampling))


def test_ids_past_the_real_vocabulary_are_never_chosen(tiny, weights) -> None:
    for highest in run_ranks(2, _narrow, tiny, weights, 2):
        assert 30 < highest < 50


@in_job
def _follow_weights(model, groups) -> tuple[list[Rollout], list[Rollout]]:
    """Greedy answers before and after the weights were changed in place, as an optimizer step does."""
    engine = MegatronEngine(model, groups, vocab_size=VOCAB, stop_ids=NEVER, batch_size=8)
    before = engine.generate(PROMPTS, GREEDY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return before, engine.generate(PROMPTS, GREEDY)


def test_new_weights_are_used_at_once(tiny, weights) -> None:
    ((before, after),) = run_ranks(1, _follow_weights, tiny, weights, 1)
    assert [r.student_ids.tolist() for r in before] != [r.student_ids.tolist() for r in after]


class _AnotherLinear(torch.nn.Module):
    """Hides the type of a module, as if it were not megatron-core's own."""

    def __init__(self, module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs) -> Any:
        return self.module(*args, **kwargs)


@in_job
def _by_modules(model, groups) -> list[list[Rollout]]:
    """Rollouts with the decoder's own arithmetic, and with the modules of the layers as they are."""
    answers = []
    engine = MegatronEngine(model, groups, vocab_size=VOCAB, stop_ids=NEVER, batch_size=4)
    for wrap in (False, True):
        if wrap:
            for layer in model.decoder.layers:
                for owner, names in (
                    (layer.self_attention, ("linear_qkv", "linear_proj")),
                    (layer.mlp, ("linear_fc1", "linear_fc2")),
                ):
                    for name in names:
                        setattr(owner, name, _AnotherLinear(getattr(owner, name)))
        answers.append(engine.generate(PROMPTS, SAMPLED))
    return answers


@pytest.mark.parametrize("tp", [1, 2])
def test_modules_of_another_kind_run_as_they_are(tiny, weights, tp) -> None:
    for own, modules in run_ranks(tp, _by_modules, tiny, weights, tp):
        assert_equal(modules, own, atol=1e-5)


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> tuple[str, ...]:
    """Flags of a student with experts."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("experts")
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
    save_model(folder, "qwen3_moe", vocab_size=VOCAB, head_dim=8, **shape)
    return "--hf-checkpoint", str(folder)


@in_job
def _generate_shares(model, groups, calls) -> list[list[Rollout]]:
    """The rollouts of each call: (prompts of each data-parallel rank, stop ids)."""
    results = []
    for shares, stop_ids in calls:
        engine = MegatronEngine(model, groups, vocab_size=VOCAB, stop_ids=stop_ids, batch_size=2)
        results.append(engine.generate(shares[groups.dp_rank], GREEDY))
    return results


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 2)])
def test_ranks_that_share_experts_answer_prompts_of_their_own(tiny, experts, tp, pp) -> None:
    """Different numbers of prompts, lengths and ends; one rank has no prompt."""
    (expected,) = run_ranks(1, _without_cache, tiny, experts, 1, PROMPTS, GREEDY.max_response_len)
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)
    stop = expected[0][1]
    ends = [next((i + 1 for i, token in enumerate(answer) if token == stop), None) for answer in expected]
    assert None in ends and ends[0] == 2
    calls = [
        ([PROMPTS[:1], PROMPTS[1:]], NEVER),
        ([PROMPTS, []], NEVER),
        ([PROMPTS[:1], PROMPTS[1:]], (stop,)),
    ]
    flags = (*experts, "--expert-model-parallel-size", "2", "--pipeline-model-parallel-size", str(pp))
    ranks = run_ranks(2 * tp * pp, _generate_shares, tiny, flags, tp, calls)
    for call, ((shares, stop_ids), found) in enumerate(zip(calls, zip(*ranks, strict=True), strict=True)):
        for rank, rollouts in enumerate(found):
            assert [r.sample_id for r in rollouts] == [p.sample_id for p in shares[rank // tp % 2]], call
            for rollout in rollouts:
                index = rollout.sample_id - PROMPTS[0].sample_id
                end = None if stop_ids == NEVER else ends[index]
                assert rollout.student_ids.tolist() == expected[index][:end], call

"""Every token-level interface against whole matrices in float64, to 1e-12: texts over random vocabularies."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_simct.alignment import TokenTable, VocabPlacement
from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses import (
    Head,
    Logits,
    Response,
    SharedVocabulary,
    check_labels,
    cross_tokenizer_loss,
    interface_loss,
    teacher_needs,
)
from megatron_simct.losses.kinds.table import interface_of
from megatron_simct.losses.kinds.teacher_topk import response_entries
from megatron_simct.packing import by_number, pack_micro_batches
from megatron_simct.records import AlignedPair, Prompt, Rollout, ScoredPair
from megatron_simct.teacher.forward import LabelScorer, TeacherRequest
from megatron_simct.teacher.payload import misfit, read_score, read_scored, score_message, scored_message
from megatron_simct.teacher.wire import decode, encode
from tests.distributed import run_ranks
from tests.oracles import reference
from tests.oracles.children import child_loss
from tests.oracles.loss_cases import LossCase, evaluate

DIVERGENCES = ("reverse_kl", "forward_kl", "js")
SCORED = [
    {"interface": interface, "divergence": divergence, "temperature": temperature}
    for interface in ("paper", "sum", "code", "code_gh", "strict", "strict_topk")
    for divergence in DIVERGENCES
    for temperature in (1.0, 0.7, 2.5)
]
OPTIONS = [
    *SCORED,
    *({"interface": "exact", "divergence": divergence} for divergence in DIVERGENCES),
    *({"interface": "exact", "divergence": "js", "js_beta": beta} for beta in (0.1, 0.8)),
    {"interface": "paper", "min_teacher_mass": 0.6},
    {"interface": "paper", "divergence": "js", "js_beta": 0.9, "temperature": 1.3},
    {"interface": "strict_topk", "topk": 3, "divergence": "js"},
    {"interface": "uld", "uld_topk": 0},
    {"interface": "uld", "uld_topk": 4},
    {"interface": "alm"},
    {"interface": "alm", "alm_temperature": 2.0},
    {"interface": "sft"},
]
NUM_SAMPLES = 4


def loss_case(sample: reference.Sample) -> LossCase:
    """The sample with identity heads."""
    return LossCase(
        student_hidden=sample.student_logits,
        student_weight=torch.eye(len(sample.student_pieces), dtype=torch.float64),
        teacher_hidden=sample.teacher_logits,
        teacher_weight=torch.eye(len(sample.teacher_pieces), dtype=torch.float64),
        student_labels=sample.student_labels,
        teacher_labels=sample.teacher_labels,
        segments=sample.segments,
        kinds=sample.kinds,
        replaced=sample.replaced,
        shared=sample.shared,
        weights=sample.weights,
    )


def test_the_samples_have_what_is_to_be_tested() -> None:
    samples = [reference.random_sample(seed) for seed in range(NUM_SAMPLES)]
    assert {kind for sample in samples for kind in sample.kinds} == {0, 1, 2}
    assert any(i >= 0 for sample in samples for i in sample.replaced)
    lengths = {(te - ts, se - ss) for sample in samples for ts, te, ss, se in sample.segments}
    assert {(t > 1, s > 1) for t, s in lengths} == {
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    }


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options.values())))
def test_loss_and_gradient_equal_the_reference(options) -> None:
    names = {"divergence": "divergence_name", "js_beta": "beta"}
    given = {names.get(name, name): value for name, value in options.items() if name != "interface"}
    config = InterfaceConfig(**options)
    for seed in range(NUM_SAMPLES):
        sample = reference.random_sample(seed)
        logits = sample.student_logits.clone().requires_grad_()
        expected = reference.loss(sample, logits, options["interface"], **given)
        expected.backward()
        found = evaluate(loss_case(sample), config)
        scale = max(1.0, float(expected.detach().abs()))
        assert float(found.output.sum) == pytest.approx(float(expected.detach()), abs=1e-12 * scale)
        torch.testing.assert_close(found.hidden_gradient, logits.grad, rtol=1e-12, atol=1e-12 * scale)


EVENTS = [
    *(("partition", divergence, k) for divergence in DIVERGENCES for k in (2, 5, 40)),
    *(("bpm", divergence, k) for divergence in ("forward_kl", "js") for k in (3, 40)),
    ("topk_kl", "reverse_kl", 3),
    ("topk_kl", "reverse_kl", 40),
    ("bpm", "forward_kl", 5, 0.7),
    ("bpm", "js", 40, 1.0),
]
"""Interface, divergence, k, and the weight of the child term, if any."""


def config_of(interface: str, divergence: str, k: int, child_weight: float = 0.0) -> InterfaceConfig:
    return InterfaceConfig(
        interface=interface, divergence=divergence, teacher_topk=k, child_weight=child_weight
    )


def expected_loss(
    sample: reference.Sample,
    logits: torch.Tensor,
    interface: str,
    divergence: str,
    k: int,
    child_weight: float = 0.0,
) -> torch.Tensor:
    loss = reference.event_loss(sample, logits, interface, k=k, divergence_name=divergence)
    return loss + child_weight * child_loss(sample, logits, k=k) if child_weight else loss


def records_of(sample: reference.Sample) -> tuple[SharedVocabulary, Response]:
    """The pair and the response, made by the package from the pieces alone."""
    tables = [
        TokenTable.from_bytes(pieces, stop_ids=range(stops))
        for pieces, stops in ((sample.student_pieces, 1), (sample.teacher_pieces, 2))
    ]
    pair = SharedVocabulary.of(*tables)
    labels = {"student_labels": sample.student_labels, "teacher_labels": sample.teacher_labels}
    return pair, Response.of(pair, **labels)


def test_records_made_of_pieces_are_those_of_the_reference() -> None:
    for seed in range(NUM_SAMPLES):
        sample = reference.random_sample(seed)
        pair, response = records_of(sample)
        assert response.segments.tolist() == [list(segment) for segment in sample.segments]
        assert response.replaced_columns.tolist() == sample.replaced
        shared = {s: [t] for s, t in zip(pair.student_ids.tolist(), pair.teacher_ids.tolist(), strict=True)}
        assert shared | {pair.stop_student_id: list(pair.stop_teacher_ids)} == sample.shared


def padded_slice(logits: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """This rank's rows of an output layer that gives these logits for rows of the identity. Padding would
    have the largest logits.
    """
    width = -(-(logits.shape[1] + 1) // world_size)
    padded = torch.full((width * world_size, len(logits)), 50.0, dtype=torch.float64)
    padded[: logits.shape[1]] = logits.T
    return padded[rank * width : (rank + 1) * width].clone().requires_grad_()


def event_losses(rank: int, world_size: int, seeds: range) -> list[tuple[float, torch.Tensor]]:
    """From logits, or from this rank's slice of output layers whose hidden states are
    rows of the identity.
    """
    found = []
    for seed in seeds:
        sample = reference.random_sample(seed)
        pair, response = records_of(sample)
        weighted = Response(
            segments=response.segments,
            student_labels=response.student_labels,
            teacher_labels=response.teacher_labels,
            weights=torch.tensor(sample.weights),
        )
        for event in EVENTS:
            config = config_of(*event)
            if world_size == 1:
                student = sample.student_logits.clone().requires_grad_()
                sides, group = (Logits(student), Logits(sample.teacher_logits)), None
            else:
                group, both = dist.group.WORLD, (sample.student_logits, sample.teacher_logits)
                slices = [padded_slice(logits, rank, world_size) for logits in both]
                sides = tuple(
                    Head(torch.eye(len(logits), dtype=torch.float64), weight, vocab_size=logits.shape[1])
                    for logits, weight in zip(
                        (sample.student_logits, sample.teacher_logits), slices, strict=True
                    )
                )
                student = slices[0]
            loss = cross_tokenizer_loss(*sides, pair, weighted, config, normalizer=1, group=group).loss
            loss.backward()
            found.append((float(loss.detach()), student.grad if world_size == 1 else student.grad.T))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_events_of_the_teachers_likeliest_tokens_equal_the_reference(world_size) -> None:
    seeds = range(NUM_SAMPLES) if world_size == 1 else range(2)
    by_rank = [event_losses(0, 1, seeds)] if world_size == 1 else run_ranks(world_size, event_losses, seeds)
    cases = [(reference.random_sample(seed), *event) for seed in seeds for event in EVENTS]
    for (sample, *event), *found in zip(cases, *by_rank, strict=True):
        logits = sample.student_logits.clone().requires_grad_()
        expected = expected_loss(sample, logits, *event)
        expected.backward()
        for value, _ in found:
            assert value == pytest.approx(
                float(expected.detach()), abs=1e-12 * max(1.0, float(expected.detach()))
            )
        whole = torch.cat([gradient for _, gradient in found], dim=1)
        torch.testing.assert_close(whole[:, : logits.shape[1]], logits.grad, rtol=1e-11, atol=1e-12)
        assert not whole[:, logits.shape[1] :].any(), "padded columns were scored"


def samples_of_one_vocabulary(seed: int) -> list[reference.Sample]:
    """Three responses with the same tokens, and other logits."""
    first, samples = reference.random_sample(seed), []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        logits = (first.student_logits, first.teacher_logits)
        sides = [of + torch.randn(of.shape, generator=generator, dtype=of.dtype) for of in logits]
        samples.append(replace(first, student_logits=sides[0], teacher_logits=sides[1].float().double()))
    return samples


def records_of_a_run(sample: reference.Sample, sample_id: int, needs) -> tuple[Prompt, Rollout, AlignedPair]:
    """As `rollout` and `alignment` make them."""
    ids = [np.array(labels, np.int32) for labels in (sample.student_labels, sample.teacher_labels)]
    segments, kinds = np.array(sample.segments, np.int32), np.array(sample.kinds, np.int8)
    rows = (
        segments[kinds != 1, 0]
        if needs.hidden_rows == "one_to_one"
        else np.arange(len(ids[1]), dtype=np.int32)
    )
    prompt = Prompt(sample_id=sample_id, student_ids=ids[0][:1], teacher_ids=ids[1][:1])
    logprobs = np.zeros(len(ids[0]), np.float32)
    rollout = Rollout(
        sample_id=sample_id, weight_version=0, student_ids=ids[0], logprobs=logprobs, finish="stop"
    )
    none = np.full(len(kinds), -1, np.int32)
    aligned = AlignedPair(
        sample_id=sample_id,
        teacher_prompt_ids=ids[1][:1],
        teacher_ids=ids[1],
        segments=segments,
        kinds=kinds,
        replaced_columns=none,
        teacher_first_columns=none,
        weights=np.array(sample.weights, np.float32),
        teacher_rows=rows,
        needs=needs,
    )
    return prompt, rollout, aligned


def over_the_wire(sample: reference.Sample, pair: AlignedPair, rank: int, group) -> ScoredPair:
    """The answer of a teacher with these logits: request and answer go through the
    messages of the two jobs.
    """
    weight = padded_slice(sample.teacher_logits, rank, 1 if group is None else group.size()).detach()
    scorer = LabelScorer(
        weight=weight,
        shard_start=rank * len(weight),
        group=group,
        vocab_size=sample.teacher_logits.shape[1],
        logit_softcap=None,
        byte_order=None,
        hidden_dtype=None,
    )
    request = read_score(decode(encode(score_message(1, TeacherRequest.of(pair)))))
    (scored,) = scorer.score([request], torch.eye(len(sample.teacher_labels), dtype=torch.float64))
    message = decode(encode(scored_message(1, scored, "fp32")))
    assert misfit(message, request, hidden_size=1, vocab_size=scorer.vocab_size) is None
    return read_scored(message)


def losses_of_a_run(rank: int, world_size: int, seed: int) -> list[tuple[float, torch.Tensor]]:
    """For each of EVENTS, with one sequence a micro-batch and with three: the sum, and the
    output layer's gradient.
    """
    group = None if world_size == 1 else dist.group.WORLD
    samples, found = samples_of_one_vocabulary(seed), []
    num_labels = len(samples[0].student_labels)
    for event in EVENTS:
        config = config_of(*event)
        records = [records_of_a_run(sample, i, teacher_needs(config)) for i, sample in enumerate(samples)]
        scored = [
            over_the_wire(s, pair, rank, group) for s, (_, _, pair) in zip(samples, records, strict=True)
        ]
        vocabulary, _ = records_of(samples[0])
        build = interface_of(config).entries(config)
        slices = torch.cat(
            [padded_slice(s.student_logits, rank, world_size).detach() for s in samples], dim=1
        )
        placement = VocabPlacement(
            student_vocab_size=samples[0].student_logits.shape[1],
            teacher_vocab_size=samples[0].teacher_logits.shape[1],
            shard_start=rank * len(slices),
            shard_end=(rank + 1) * len(slices),
            columns=np.zeros(0, np.int64),
            row_offsets=np.zeros(1, np.int64),
            teacher_rows=np.zeros(0, np.int64),
        )
        for size in (1, 3):
            weight, total = slices.clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
            batches = pack_micro_batches(
                *zip(*records, strict=True),
                scored[::-1],
                cut=partial(by_number, size=size),
                check=lambda batch: None,
                entries=partial(response_entries, build, vocabulary.translation(config.interface)),
            )
            assert len(batches) == 3 // size
            for batch in batches:
                check_labels(batch.labels, placement=placement, config=config)
                rows = torch.cat(
                    [torch.arange(i * num_labels, (i + 1) * num_labels) for i in batch.sample_ids]
                )
                hidden = torch.eye(3 * num_labels, dtype=torch.float64)[rows]
                total = (
                    total
                    + interface_loss(
                        hidden,
                        weight,
                        batch.labels,
                        shared_head=None,
                        placement=placement,
                        config=config,
                        group=group,
                    ).sum
                )
            total.backward()
            found.append((float(total.detach()), weight.grad))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_events_that_came_over_the_wire_equal_the_reference(world_size) -> None:
    """The teacher's numbers are float32 there: each log-probability is off by some rounding errors."""
    by_rank = [losses_of_a_run(0, 1, 0)] if world_size == 1 else run_ranks(world_size, losses_of_a_run, 0)
    samples, found = samples_of_one_vocabulary(0), zip(*by_rank, strict=True)
    for event in EVENTS:
        logits = [sample.student_logits.clone().requires_grad_() for sample in samples]
        expected = sum(
            expected_loss(sample, given, *event) for sample, given in zip(samples, logits, strict=True)
        )
        expected.backward()
        gradient = torch.cat([given.grad.T for given in logits], dim=1)
        for _ in ("one sequence a micro-batch", "all in one"):
            of_ranks = next(found)
            assert len({value for value, _ in of_ranks}) == 1, "ranks differ"
            assert of_ranks[0][0] == pytest.approx(float(expected.detach()), rel=1e-5)
            whole = torch.cat([part for _, part in of_ranks])[: len(gradient)]
            torch.testing.assert_close(whole, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))

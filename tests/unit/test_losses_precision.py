"""Rounding: fp32 beside one rounding of its operands, bf16 beside plain torch in bf16, all
compared with float64.

The error of one number may be small by luck, so errors are root mean squares over several samples. `FAR`
models hardly overlap. `NEAR` ones differ by a few hundredths of a nat a row, so that the gradient consists
of small differences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from megatron_simct.alignment.placement import VocabPlacement
from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses import ByteOrder, interface_loss
from megatron_simct.losses.kinds.bytes import teacher_byte_statistics
from megatron_simct.packing import pack_byte_events, pack_byte_sides
from megatron_simct.records import LabelBatch
from tests import public_loss
from tests.oracles import bytes as byte_oracle
from tests.oracles.byte_cases import events_of, random_cases, table_of
from tests.oracles.dense import dense_sum
from tests.oracles.loss_cases import LossCase, evaluate, evaluate_oracle, random_case
from tests.unit.test_losses_public import arguments

FAR, NEAR = (4.0, None), (2.0, 0.3)
"""Scale of the logits, and of the difference between the teacher's and the student's; None:
they are unrelated.
"""
DIVERGENCES = ("reverse_kl", "forward_kl", "js")
MODES = [(interface, divergence) for interface in ("paper", "strict", "sum") for divergence in DIVERGENCES]
FLOAT32_STEP = 2.0**-23
"""Relative distance of neighboring float32 numbers, by which any float32 result may be off."""
ROUNDINGS = 8
"""Factor by which a result may exceed the error of rounded operands: a dozen operations round one after
another, and their errors add up as a random walk does.
"""
ROW_ERROR = FLOAT32_STEP / 2
"""Nats: a row's value is the difference of sums of about a nat, or log 2 for js, that are rounded as such."""
NO_WORSE = 1.05
"""Error of bf16 over that of dense bf16. Nearly all of it comes from the logits, which both round in
the same way. A weight gradient without main_grad is rounded twice, once for the shared columns and once
for the rows of units.
"""

Found = Sequence[torch.Tensor]
"""Loss (a sum), gradient of the hidden states, gradient of the weight."""


def case_of(
    seed: int, models: tuple[float, float | None], dtype: torch.dtype, vocab_size: int = 300
) -> LossCase:
    scale, distance = models
    case = random_case(seed, num_segments=15, vocab_size=vocab_size)
    generator = torch.Generator().manual_seed(seed)
    width = 32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden_s, hidden_t = normal(len(case.student_labels), width), normal(len(case.teacher_labels), width)
    weight_s = normal(vocab_size, width) * scale * width**-0.5
    weight_t = normal(len(case.teacher_weight), width) * scale * width**-0.5
    if distance is not None:
        for ts, te, ss, se in case.segments:
            hidden_t[ts:te] = hidden_s[[min(ss + k, se - 1) for k in range(te - ts)]]
        for student, teachers in case.shared.items():
            weight_t[teachers] = weight_s[student]
        weight_t += distance * normal(*weight_t.shape) * width**-0.5
    moved = replace(
        case,
        student_hidden=hidden_s,
        student_weight=weight_s,
        teacher_hidden=hidden_t,
        teacher_weight=weight_t,
    )
    return moved.to(dtype)


Rounding = Callable[[torch.Tensor], torch.Tensor]


def float32_rounding(seed: int) -> Rounding:
    """Moves every number by a step of float32 at most."""
    generator = torch.Generator().manual_seed(seed)

    def rounded(values: torch.Tensor) -> torch.Tensor:
        moved = 2 * torch.rand(values.shape, generator=generator, dtype=torch.float64) - 1
        return values * (1 + FLOAT32_STEP * moved)

    return rounded


def differentiated(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], case: LossCase) -> Found:
    hidden, weight = (
        case.student_hidden.clone().requires_grad_(),
        case.student_weight.clone().requires_grad_(),
    )
    value = loss(hidden, weight)
    value.backward()
    return value.detach(), hidden.grad, weight.grad


def dense(case: LossCase, interface: str, divergence: str, rounded: Rounding = torch.Tensor.clone) -> Found:
    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        teacher = case.teacher_hidden, case.teacher_weight
        options = {"interface": interface, "divergence": divergence, "rounded": rounded}
        return dense_sum(hidden, weight, *teacher, case, **options)

    return differentiated(loss, case)


def fused(case: LossCase, interface: str, divergence: str) -> Found:
    """With statistics of the teacher's labels."""
    options = arguments(case) | {"interface": interface, "divergence": divergence, "normalizer": 1}

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return public_loss.fused(hidden, weight, case.teacher_hidden, case.teacher_weight, **options).loss

    return differentiated(loss, case)


def from_labels(case: LossCase, interface: str, divergence: str) -> Found:
    result = evaluate(case, InterfaceConfig(interface=interface, divergence=divergence))
    return result.output.sum, result.hidden_gradient, result.weight_gradient[: len(case.student_weight)]


def relative_errors(found: Found, exact: Found) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def mean_errors(errors: list[list[float]]) -> list[float]:
    return torch.tensor(errors, dtype=torch.float64).square().mean(0).sqrt().tolist()


@pytest.mark.parametrize(("interface", "divergence"), MODES)
def test_dense_torch_in_float64_is_the_oracle(interface, divergence) -> None:
    """Therefore it may replace the oracle below."""
    case = random_case(3)
    expected, *gradients = evaluate_oracle(case, InterfaceConfig(interface=interface, divergence=divergence))
    for a, b in zip(dense(case, interface, divergence), (expected.sum.detach(), *gradients), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def check_float32(cases: list[LossCase], interface: str, divergence: str) -> None:
    """The effect in float64 of one rounding of the weights, hidden states and log-probabilities shows how far
    a good float32 result may be off. The distance of dense torch is luck, and differs between kinds of CPU.
    """
    errors: dict[str, list[list[float]]] = {"operands": [], "fused": [], "labels": []}
    exact = []
    for case in cases:
        wide = case.to(torch.float64)
        exact.append(dense(wide, interface, divergence))
        for draw in range(4):
            moved = dense(wide, interface, divergence, float32_rounding(draw))
            errors["operands"].append(relative_errors(moved, exact[-1]))
        for name, run in (("fused", fused), ("labels", from_labels)):
            errors[name].append(relative_errors(run(case, interface, divergence), exact[-1]))
    rows, total = len(cases[0].segments), float(sum(loss for loss, _, _ in exact)) / len(cases)
    limit = 1e-5 if total / rows > 0.1 else float("inf")
    least = max(FLOAT32_STEP / 2, ROW_ERROR * rows**0.5 / total)
    of_loss, *of_gradients = mean_errors(errors["operands"])
    for name in ("fused", "labels"):
        loss, *gradients = mean_errors(errors[name])
        assert loss <= min(limit, ROUNDINGS * max(of_loss, least)), (
            f"{name}: {loss}, of the operands {of_loss}"
        )
        for found, of_operands in zip(gradients, of_gradients, strict=True):
            bound = min(limit, ROUNDINGS * of_operands)
            assert found <= bound, f"{name}: gradient {found}, of the operands {of_operands}"


@pytest.mark.parametrize("models", [FAR, NEAR], ids=["far", "near"])
@pytest.mark.parametrize(("interface", "divergence"), MODES)
def test_float32_is_as_good_as_its_operands(interface, divergence, models) -> None:
    check_float32([case_of(seed, models, torch.float32) for seed in range(4)], interface, divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_is_as_good_as_its_operands_over_many_tiles(divergence) -> None:
    check_float32([case_of(0, FAR, torch.float32, vocab_size=12000)], "paper", divergence)


def main_grad_of(case: LossCase, interface: str, divergence: str) -> torch.Tensor:
    """The weight's gradient as Megatron's DDP stores it."""
    weight = case.student_weight.clone().requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight, dtype=torch.float32), False
    options = arguments(case) | {"interface": interface, "divergence": divergence, "normalizer": 1}
    output = public_loss.fused(
        case.student_hidden, weight, case.teacher_hidden, case.teacher_weight, **options
    )
    output.loss.backward()
    return weight.main_grad


@pytest.mark.parametrize("models", [FAR, NEAR], ids=["far", "near"])
@pytest.mark.parametrize(("interface", "divergence"), MODES)
def test_bfloat16_is_no_worse_than_dense_torch(interface, divergence, models) -> None:
    """Weights, hidden states and products of both models in bf16, statistics in float32."""
    errors: dict[str, list[list[float]]] = {"dense": [], "fused": [], "labels": [], "main_grad": []}
    for seed in range(3):
        case = case_of(seed, models, torch.bfloat16)
        exact = dense(case.to(torch.float64), interface, divergence)
        for name, run in (("dense", dense), ("fused", fused), ("labels", from_labels)):
            found = run(case, interface, divergence)
            assert found[0].dtype == torch.float32
            errors[name].append(relative_errors(found, exact))
        errors["main_grad"].append(relative_errors([main_grad_of(case, interface, divergence)], exact[2:]))
    of_dense = mean_errors(errors["dense"])
    for name in ("fused", "labels"):
        for found, theirs in zip(mean_errors(errors[name]), of_dense, strict=True):
            assert found <= NO_WORSE * theirs, f"{name}: {found}, dense torch {theirs}"
    assert mean_errors(errors["main_grad"])[0] <= NO_WORSE * of_dense[2]


@dataclass(frozen=True)
class ByteInput:
    """Samples of `bytes` whose logits come from output layers."""

    samples: list[tuple[byte_oracle.Side, byte_oracle.Side]]
    """Student and teacher; their logits are not read."""
    hidden: tuple[torch.Tensor, torch.Tensor]
    weight: tuple[torch.Tensor, torch.Tensor]

    def to(self, dtype: torch.dtype) -> ByteInput:
        moved = (tuple(tensor.to(dtype) for tensor in pair) for pair in (self.hidden, self.weight))
        return ByteInput(self.samples, *moved)


def byte_input(seed: int, scale: float, dtype: torch.dtype) -> ByteInput:
    samples = random_cases(seed, num_cases=2)
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = [], []
    for of_side in zip(*samples, strict=True):
        rows, width = sum(len(side.labels) for side in of_side), 16
        hidden.append(torch.randn(rows, width, generator=generator))
        weight.append(torch.randn(len(of_side[0].pieces), width, generator=generator) * scale * width**-0.5)
    return ByteInput(samples, tuple(hidden), tuple(weight)).to(dtype)


def byte_gradients(given: ByteInput, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Found:
    hidden, weight = given.hidden[0].clone().requires_grad_(), given.weight[0].clone().requires_grad_()
    value = loss(hidden, weight)
    value.backward()
    return value.detach(), hidden.grad, weight.grad


def dense_bytes(given: ByteInput, divergence: str, rounded: Rounding = torch.Tensor.clone) -> Found:
    """The oracle's steps in the type of the input, with softmax in float32 for bf16. `rounded` is applied to
    the inputs of the logits and to the log-probabilities.
    """

    def log_softmax(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = rounded(hidden) @ rounded(weight).T
        return rounded((logits.float() if logits.dtype == torch.bfloat16 else logits).log_softmax(1))

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = [log_softmax(hidden, weight), log_softmax(given.hidden[1], given.weight[1])]
        values = [0 * rows[0].sum()]
        for sample in given.samples:
            text, count = byte_oracle.positions(*sample)
            for i in range(count):
                points = [
                    byte_oracle.point(side, log_p, text, i) for side, log_p in zip(sample, rows, strict=True)
                ]
                values.append(byte_oracle.divergence(*byte_oracle.events(*points), divergence, 0.5))
            rows = [log_p[len(side.labels) :] for side, log_p in zip(sample, rows, strict=True)]
        return sum(values)

    return byte_gradients(given, loss)


def fused_bytes(given: ByteInput, divergence: str) -> Found:
    sides = list(zip(*given.samples, strict=True))
    events = [events_of(student, teacher) for student, teacher in given.samples]
    lengths = [[len(side.labels) for side in of_side] for of_side in sides]
    labels = [torch.tensor([label for side in of_side for label in side.labels]) for of_side in sides]
    orders = [
        ByteOrder.of(table_of(of_side[0]), shard_start=0, shard_end=len(weight), device=torch.device("cpu"))
        for of_side, weight in zip(sides, given.weight, strict=True)
    ]
    teacher, own, lse = teacher_byte_statistics(
        given.hidden[1],
        given.weight[1],
        labels[1],
        pack_byte_sides([e.teacher for e in events], lengths[1]),
        order=orders[1],
        shard_start=0,
        group=None,
    )
    none = torch.zeros(0, dtype=torch.int64)
    batch = LabelBatch(
        student_labels=labels[0],
        segments=none.reshape(0, 4),
        kinds=none,
        replaced_columns=none,
        teacher_first_columns=none,
        weights=torch.ones(len(none)),
        teacher_own_logit=own,
        teacher_lse=lse,
        teacher_hidden=None,
        teacher_hidden_index=none,
        byte_batch=pack_byte_events(events, lengths[0], [teacher]),
    )
    placement = VocabPlacement(
        student_vocab_size=len(given.weight[0]),
        teacher_vocab_size=len(given.weight[1]),
        shard_start=0,
        shard_end=len(given.weight[0]),
        columns=none.numpy(),
        row_offsets=np.zeros(1, dtype=np.int64),
        teacher_rows=none.numpy(),
    )
    config = InterfaceConfig(interface="bytes", divergence=divergence)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        options = {"shared_head": None, "placement": placement, "config": config, "byte_order": orders[0]}
        return interface_loss(hidden, weight, batch, **options).sum

    return byte_gradients(given, loss)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bytes_in_float32_are_as_good_as_their_operands(divergence) -> None:
    found, operands = [], []
    for seed in range(3):
        given = byte_input(seed, 2.0, torch.float32)
        exact = dense_bytes(given.to(torch.float64), divergence)
        assert float(exact[0]) > 0.1
        found.append(relative_errors(fused_bytes(given, divergence), exact))
        for draw in range(2):
            moved = dense_bytes(given.to(torch.float64), divergence, float32_rounding(draw))
            operands.append(relative_errors(moved, exact))
    loss, *gradients = mean_errors(found)
    of_loss, *of_gradients = mean_errors(operands)
    assert loss <= ROUNDINGS * max(of_loss, FLOAT32_STEP / 2), f"{loss}, of the operands {of_loss}"
    for error, of_operands in zip(gradients, of_gradients, strict=True):
        assert error <= ROUNDINGS * of_operands <= 1e-5, f"gradient {error}, of the operands {of_operands}"


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bytes_in_bfloat16_are_no_worse_than_dense_torch(divergence) -> None:
    errors: dict[str, list[list[float]]] = {"dense": [], "fused": []}
    for seed in range(3):
        given = byte_input(seed, 2.0, torch.bfloat16)
        exact = dense_bytes(given.to(torch.float64), divergence)
        for name, run in (("dense", dense_bytes), ("fused", fused_bytes)):
            errors[name].append(relative_errors(run(given, divergence), exact))
    for found, theirs in zip(mean_errors(errors["fused"]), mean_errors(errors["dense"]), strict=True):
        assert found <= NO_WORSE * theirs, f"{found}, dense torch {theirs}"

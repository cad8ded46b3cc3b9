"""A teacher whose weights are an exponential average of the student's: --teacher-ema.

    a_0 = the teacher's own weights at the start
    a_t = d a_(t-1) + (1 - d) s_t        after update t that leaves the student's weights s_t

The average is float32, whatever the models compute in. Teacher and student lie on the same ranks under one
layout, so each rank averages its own shard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_simct.models.build import HiddenStateModel, InterleavedModel
from megatron_simct.parallel.cpu import megatron_imports

with megatron_imports():
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

Model = HiddenStateModel | InterleavedModel


class Average:
    """The average, which is also the teacher's weights in the type that it computes in."""

    def __init__(self, teacher: Model, student: Model, *, decay: float, changed: Callable[[], None]) -> None:
        """changed: called whenever the teacher's weights have changed.

        Raises ValueError if the models differ in a shape.
        """
        of_teacher, of_student = dict(teacher.named_parameters()), dict(student.named_parameters())
        if {name: p.shape for name, p in of_teacher.items()} != {
            name: p.shape for name, p in of_student.items()
        }:
            raise ValueError("not of one shape")
        self._pairs = [(parameter, of_student[name]) for name, parameter in of_teacher.items()]
        self._teacher = teacher
        self._average = [t.data if t.dtype == torch.float32 else t.data.float() for t, _ in self._pairs]
        self._decay = decay
        self._changed = changed

    @torch.no_grad()
    def follow(self) -> None:
        """Update the average after a step of the student. Collective as `changed` is."""
        for average, (_, student) in zip(self._average, self._pairs, strict=True):
            average.lerp_(student.float(), 1 - self._decay)
        self._hand_over()

    def sharded_state_dict(self, prefix: str) -> dict[str, Any]:
        """The average for a checkpoint; its keys begin with the prefix."""
        with self._as_weights():
            state = self._teacher.sharded_state_dict()
            for leaf in nested_values(state):
                if isinstance(leaf, ShardedBase) and isinstance(leaf.data, torch.Tensor):
                    leaf.data = leaf.data.detach()
        add_prefix_for_sharding(state, prefix)
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Load the average from a checkpoint's state."""
        with self._as_weights():
            self._teacher.load_state_dict(state, strict=False)
        self._hand_over()

    @contextlib.contextmanager
    def _as_weights(self) -> Iterator[None]:
        """In this context the teacher's parameters are the float32 average."""
        kept = [teacher.data for teacher, _ in self._pairs]
        try:
            for average, (teacher, _) in zip(self._average, self._pairs, strict=True):
                teacher.data = average
            yield
        finally:
            for data, (teacher, _) in zip(kept, self._pairs, strict=True):
                teacher.data = data

    @torch.no_grad()
    def _hand_over(self) -> None:
        for average, (teacher, _) in zip(self._average, self._pairs, strict=True):
            if teacher.data is not average:
                teacher.copy_(average)
        self._changed()

"""Every interface by its name."""

from __future__ import annotations

from megatron_simct.config.options import InterfaceConfig
from megatron_simct.losses.kinds import (
    alm,
    bpm,
    exact,
    reward,
    scalar,
    sft,
    shared_tokens,
    teacher_topk,
    top_k,
)
from megatron_simct.losses.rows import Interface
from megatron_simct.records import TeacherNeeds

BYTES = Interface(
    needs=lambda config: TeacherNeeds(hidden_rows="none", byte_events=True),
    reads=frozenset({"divergence", "js_beta", "byte_bounds"}),
    rows=lambda config: None,
    value=None,
)
"""The whole of bytes.py, which has no token rows."""

INTERFACES = {
    "paper": shared_tokens.PAPER,
    "code": shared_tokens.CODE,
    "exact": exact.EXACT,
    "strict": shared_tokens.STRICT,
    "strict_topk": top_k.STRICT_TOPK,
    "uld": top_k.ULD,
    "alm": alm.ALM,
    "scalar": scalar.SCALAR,
    "partition": teacher_topk.PARTITION,
    "topk_kl": teacher_topk.TOPK_KL,
    "bpm": bpm.BPM,
    "bytes": BYTES,
    "kd": shared_tokens.KD,
    "sft": sft.SFT,
    "reward": reward.REWARD,
}


def interface_of(config: InterfaceConfig) -> Interface:
    """Raises ValueError for an unknown name."""
    found = INTERFACES.get(config.method().interface)
    if found is None:
        raise ValueError(
            f"unknown interface {config.interface!r}: --simct-interface is one of {', '.join(INTERFACES)}"
        )
    return found

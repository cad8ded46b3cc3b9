"""Number of floating-point operations of a rank in a forward pass, counted on the built model."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_simct.models.build import HiddenStateModel, InterleavedModel, chunks_of

_PEAKS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "GH200": 989e12, "A100": 312e12, "A800": 312e12}
"""Dense bf16 operations a second, by a part of the device's name, as its vendor states them."""


class Operations:
    """Two for each weight of a matrix and token, four for each pair of positions and
    entry of a query head.
    """

    def __init__(self, model: HiddenStateModel | InterleavedModel) -> None:
        config = model.config
        self._per_token = 0.0
        self._attention: list[tuple[int, int | None]] = []
        for chunk in chunks_of(model):
            for name, parameter in chunk.named_parameters():
                if parameter.dim() < 2 or "word_embeddings" in name or "output_layer" in name:
                    continue
                share = 1.0
                if ".experts." in name:  # tokens come from all ranks that share the experts
                    ranks = config.expert_model_parallel_size * config.expert_tensor_parallel_size
                    share = (
                        config.moe_router_topk
                        * ranks
                        / config.tensor_model_parallel_size
                        / config.num_moe_experts
                    )
                self._per_token += 2 * share * parameter.numel()
            for layer in chunk.decoder.layers:
                attention = layer.self_attention
                of_state = getattr(attention, "state_operations", None)
                if of_state is not None:
                    self._per_token += of_state
                    continue
                width = attention.num_attention_heads_per_partition * attention.hidden_size_per_attention_head
                self._attention.append((width, getattr(attention.core_attention, "_window", None)))
        last = chunks_of(model)[-1]
        self._per_label = 2.0 * last.output_weight.numel() if last.post_process else 0.0

    def forward(self, lengths: Sequence[int], num_labels: int) -> float:
        """Operations of a forward pass over sequences of these lengths, with the LM head at
        num_labels positions.
        """
        count = self._per_token * sum(lengths) + self._per_label * num_labels
        for width, window in self._attention:
            count += 4 * width * sum(_pairs(length, window) for length in lengths)
        return count


def _pairs(length: int, window: int | None) -> int:
    """Number of pairs of a query and a key that it sees in a sequence."""
    seen = length if window is None else min(window, length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def peak_operations(device_name: str) -> float | None:
    """Operations a second of the device; None if it is not known."""
    return next((peak for name, peak in _PEAKS.items() if name in device_name), None)

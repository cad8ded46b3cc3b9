"""A forward pass with a cache and without autograd over the parameters of a HiddenStateModel.

Megatron's modules hold the parameters and their split; this module and the caches of `models` do the
arithmetic of their layers in few operations. A part that is not one of Megatron's plain modules (experts,
TransformerEngine's layers, fewer key heads than ranks) runs as it is.

Sequences begin at position 0, so there is no padding on the left, and a token's results depend on its own
sequence alone.

Shape letters: B sequences, S padded prompt, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear

from megatron_simct.models.build import HiddenStateModel
from megatron_simct.models.layers import Angles, Cache, Step
from megatron_simct.models.norm import RMSNorm, row_parallel, scale_after
from megatron_simct.models.regions import EAGER, Regions, Scale, added
from megatron_simct.models.rotary import Rope
from megatron_simct.parallel.cpu import megatron_imports

with megatron_imports():
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.transformer_layer import TransformerLayer


class Decoder:
    """One pipeline stage and the caches of its layers, for a fixed number of sequences (rows)."""

    def __init__(self, stage: HiddenStateModel, *, rows: int, length: int, regions: Regions = EAGER) -> None:
        """length: positions of the longest sequence.

        Reads the parameters at every call: nothing is copied.
        """
        self._stage, self._regions = stage, regions
        self._layers: list[TransformerLayer] = list(stage.decoder.layers)
        self.is_first = stage.pre_process
        self.is_last = stage.post_process
        """Whether it is the whole model's first or last stage."""
        angles = self._angles(length)
        # layer_number counts from 1, over the whole model; `architecture.layers` from 0.
        self.kinds = [stage.architecture.layers[layer.layer_number - 1] for layer in self._layers]
        self._caches: list[Cache] = []
        for layer, record in zip(self._layers, self.kinds, strict=True):
            rope_angles = None if record.rope is None else angles[record.rope]
            self._caches.append(
                record.attention.cache(layer.self_attention, rope_angles, rows=rows, length=length)
            )

    def _angles(self, length: int) -> dict[Rope, Angles]:
        """Cosines and sines of each kind of layer."""
        dtype, ropes = self._stage.config.params_dtype, self._stage.architecture.ropes
        # [length, 1, 1, d] for each kind of rotary embedding -> [length, d].
        angles = self._stage.rotary_pos_emb(length)[:, :, 0, 0] if ropes else ()
        return {rope: Angles.of(one, rope, dtype) for rope, one in zip(ropes, angles, strict=True)}

    def prefill(
        self, tokens: torch.Tensor, received: torch.Tensor | None, lengths: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """Whole prompts, tokens int64 [B, S], padded on the right to S; lengths int64 [B].

        rows int64 [2, R]: the cache rows to fill, and which of the B prompts each of them holds. received:
        hidden states [B, S, H] of the stage before. Returns what the next stage reads, or of the last one
        the input of the LM head at the prompts' last tokens, [B, H].
        """
        hidden = self._embed(tokens) if received is None else received
        hidden, states = self._through(
            hidden, EAGER, lambda cache, states: cache.prefill(states, lengths, rows)
        )
        if not self.is_last:
            return hidden
        # The last token of prompt b is at column lengths[b] - 1; what stands behind it is padding.
        return self._output(states[torch.arange(len(lengths)), lengths - 1])

    def decode(
        self, tokens: torch.Tensor, received: torch.Tensor | None, where: torch.Tensor, num_keys: int
    ) -> torch.Tensor:
        """One more token of the first B rows: tokens int64 [B] at the positions `where` int64 [B].

        num_keys: cached positions to read, at least up to the last of these positions. received: hidden
        states [B, H] of the stage before. Returns hidden states [B, H], of the last stage those that enter
        the LM head.
        """
        hidden = self._embed(tokens) if received is None else received
        step = Step(where, num_keys, dtype=hidden.dtype, regions=self._regions)
        hidden, states = self._through(
            hidden, self._regions, lambda cache, states: cache.decode(states, step)
        )
        return self._output(states) if self.is_last else hidden

    def _through(
        self, hidden: torch.Tensor, regions: Regions, attend: Callable[[Cache, torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual after all layers of the stage, and the same after the final norm,
        if the stage has it.
        """
        # Norms 2 i and 2 i + 1 come before the attention and the MLP of layer i. A sum and the norm that
        # follows it are one operation, so the last MLP is followed by the stage's final norm, or by none.
        norms = [norm for layer in self._layers for norm in (layer.input_layernorm, layer.pre_mlp_layernorm)]
        norms.append(self._stage.decoder.final_layernorm if self.is_last else None)
        states = hidden if norms[0] is None else norms[0](hidden)
        for index, (layer, cache) in enumerate(zip(self._layers, self._caches, strict=True)):
            factor = self.kinds[index].residual_scale
            output, after = attend(cache, states), scale_after(layer.self_attention.linear_proj)
            hidden, states = self._add(hidden, output, after, norms[2 * index + 1], factor, regions)
            output, after = self._mlp(layer, states, regions)
            hidden, states = self._add(hidden, output, after, norms[2 * index + 2], factor, regions)
        return hidden, states

    def _add(
        self,
        hidden: torch.Tensor,
        output: torch.Tensor,
        after: Scale | None,
        before: torch.nn.Module | None,
        factor: float,
        regions: Regions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `add_normed`; a norm that is not our RMSNorm runs as it is."""
        if isinstance(before, RMSNorm):
            return regions.add_normed(hidden, output, after, before.scale, factor)
        hidden = added(hidden, output, after, factor)
        return hidden, hidden if before is None else before(hidden)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` to row `target`."""
        for cache in self._caches:
            cache.move(source, target, length)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded = self._stage.embedding.word_embeddings(tokens)
        scale = self._stage.embedding_scale
        return embedded if scale == 1.0 else embedded * scale

    def _output(self, states: torch.Tensor) -> torch.Tensor:
        """The input of the LM head, from the output of the last norm."""
        scale = self._stage.architecture.logit_scale
        return states if scale == 1.0 else states * scale

    def _mlp(
        self, layer: TransformerLayer, states: torch.Tensor, regions: Regions
    ) -> tuple[torch.Tensor, Scale | None]:
        """The MLP's output, and the norm that follows it outside of the MLP, if any."""
        mlp = layer.mlp
        if type(mlp) is not MLP or type(mlp.linear_fc1) is not ColumnParallelLinear:
            # Megatron's modules read [S, B, H]: all tokens as one sequence.
            output, _ = mlp(states.reshape(-1, 1, states.shape[-1]))
            return output.view_as(states), None
        halves = linear(states, mlp.linear_fc1.weight)
        output = row_parallel(mlp.linear_fc2, regions.gated(halves, mlp.config.activation_func))
        return output, scale_after(mlp.linear_fc2)

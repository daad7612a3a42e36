"""What all layers of a decoder need to know of one batch: positions, and who sees whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
from paddle import Tensor

from utils.kernels import masks
from utils.kernels.attention import Attend, Attention
from utils.kernels.rotary import RotaryTable, Rotation, pairing
from utils.model.architecture import Architecture, Rotary

if TYPE_CHECKING:
    from utils.families.text import AttentionInputs
    from utils.model.decoder import Decoder


@dataclass(frozen=True)
class Context:
    """What the layers of one batch need besides hidden states.

    It follows from the batch and the architecture alone, so whoever has only some of the layers works out the same
    from a copy of the batch.

    Attributes:
        ids: [batch, length] int64.
        positions: [parts, batch or 1, length] int64; None if nothing reads them.
        attends: attention with its mask and dropout, of layers that see all and perhaps of local ones.
        rotations: what rotates queries and keys by their positions, likewise; nothing without rotary positions.
        dropout: share of the outputs of attention and MLP that is dropped (0 outside training).
        tensor_part, key_value_group: see `Decoder`.
    """

    ids: Tensor
    positions: Tensor | None
    attends: tuple[Attend, ...]
    rotations: tuple[Rotation, ...]
    dropout: float
    tensor_part: tuple[int, int]
    key_value_group: Any


class RotaryPositions:
    """Rotary positions of a model: from the positions of a batch to what rotates its queries and keys."""

    def __init__(self, rotary: Rotary) -> None:
        self.rotary = rotary
        inverse = np.concatenate([rotary.inverse, rotary.inverse], axis=-1)  # [parts, head_dim]
        self.matrix, stretch = None, rotary.stretch_power
        self._stretch_power = None if stretch is None else np.concatenate([stretch, stretch])
        if rotary.order is not None:
            place = np.argsort(rotary.order)  # of each published dimension in this order
            self.matrix, inverse = pairing(rotary.order), inverse[:, place]
            if self._stretch_power is not None:
                self._stretch_power = self._stretch_power[place]
        self._inverse = inverse
        self.table = RotaryTable(inverse[0], rotary.magnitude) if len(inverse) == 1 else None

    def at(self, positions: Tensor, count: int, stretch: Tensor | None = None, *, logn: bool = False) -> Rotation:
        """
        Args:
            positions: [parts, batch, length] int64.
            count: the positions are below it. Without meaning in a static program, which has no table of all
                positions and works out their angles.
            stretch: [batch] float32, see `utils.families.text.Text`; None stretches nothing.
            logn: whether queries behind the trained length are scaled, see `Rotary.logn_length`.
        """
        stretch = None if self._stretch_power is None else stretch

        def waves(dtype: Any) -> tuple[Tensor, Tensor]:
            if self.table is not None and stretch is None and paddle.in_dynamic_mode():
                return self.table.at(positions[0], count, dtype)
            angles, factor = self._angles(positions, stretch).unsqueeze(2), self.rotary.magnitude
            both = angles.cos(), angles.sin()
            cos, sin = ((wave if factor == 1.0 else wave * factor).astype(dtype) for wave in both)
            return cos, sin

        return Rotation(waves, self.matrix, self._query_factor(positions) if logn else None)

    def _angles(self, positions: Tensor, stretch: Tensor | None) -> Tensor:
        """Radians [batch, length, head_dim], float32."""
        found: list[Tensor] = []
        for part, inverse in enumerate(self._inverse):
            speed = paddle.to_tensor(inverse)
            if stretch is not None:
                speed = speed * stretch.reshape([-1, 1, 1]) ** paddle.to_tensor(self._stretch_power)
            found.append(positions[part].astype("float32").unsqueeze(-1) * speed)
        return sum(found[1:], start=found[0])

    def _query_factor(self, positions: Tensor) -> Tensor | None:
        """[batch, length, 1, 1] float32."""
        if self.rotary.logn_length is None:
            return None
        trained = paddle.full([1], self.rotary.logn_length, dtype="float32")
        ratio = paddle.log(positions[0].astype("float32") + 1.0) / paddle.log(trained)
        return paddle.clip(ratio, min=1.0).unsqueeze([2, 3])


def own_slopes(architecture: Architecture, tensor_part: tuple[int, int]) -> Tensor | None:
    """[heads of this process] float32 of linear position biases (ALiBi), or None."""
    rank, degree = tensor_part
    slopes = architecture.slopes
    return None if slopes is None else paddle.to_tensor(np.split(slopes, degree)[rank])


def of_batch(decoder: Decoder, batch: Mapping[str, Tensor], cached: int) -> Context:
    """Of a training batch; no weights are read. Training knows neither dynamic NTK nor log-n scaling.

    Args:
        batch: tensors of the collator: `input_ids` [batch, length] and, when packed, `position_ids` [batch, length]
            and `segment_ends` [batch, 1, length, 1] int32 (for each key position the first query position that may
            no longer see it).
        cached: number of prefix positions, which all see.
    """
    facts, ids, ends = decoder.architecture, batch["input_ids"], batch.get("segment_ends")
    rows, length = ids.shape
    dropout = decoder.settings.dropouts.get("attention", 0.0) if decoder.training else 0.0
    plain = replace(_attention(decoder), dropout=dropout)
    if facts.prefix_reading is not None:
        places, seen = facts.prefix_reading(ids.numpy(), None if ends is None else ends.numpy()[:, 0, :, 0])
        before = np.ones([*seen.shape[:3], cached], dtype=bool)
        visible = paddle.to_tensor(np.concatenate([before, seen], axis=-1))
        return _context(decoder, ids, paddle.to_tensor(places), (replace(plain, visible=visible),), length)
    positions = batch.get("position_ids")
    positions = paddle.arange(length, dtype="int64").unsqueeze(0) if positions is None else positions
    windows = [facts.window] if facts.local is None else [facts.window, facts.local.window]
    attends = [_causal(plain, positions, ends, cached, window) for window in windows]
    return _context(decoder, ids, positions.expand([rows, length]).unsqueeze(0), attends, length)


def _causal(plain: Attention, positions: Tensor, ends: Tensor | None, cached: int, window: int | None) -> Attention:
    """The attention of training rows that are read from left to right.

    Args:
        plain: without what is visible.
        positions: [batch or 1, length] int64.
        ends: `segment_ends` of packed rows, or None.
    """
    length = positions.shape[1]
    if window is not None and length > window:
        visible = masks.window_mask(length, cached, window, prefix=cached)
        visible = visible if ends is None else visible & masks.packed(ends, cached)
    elif ends is not None and not cached:
        found = replace(plain, segment_ends=ends)
        if not found.flash:
            _ = found.segments  # read here, before any layer runs: it waits for the device
        return found
    elif not cached and plain.flash:
        return plain  # flash attention is causal by itself
    else:
        visible = masks.causal(length, cached) if ends is None else masks.packed(ends, cached)
    if plain.slopes is None:
        return replace(plain, visible=visible)
    before = paddle.arange(cached).unsqueeze(0).expand([positions.shape[0], cached])
    return replace(plain, visible=visible, key_positions=paddle.concat([before, positions + cached], axis=1))


def of_attention_inputs(decoder: Decoder, ids: Tensor, attention_inputs: AttentionInputs) -> Context:
    """Of new tokens [batch, length] in generation.

    Args:
        attention_inputs: where they stand, and what they see of all keys.
    """
    local = decoder.architecture.local
    attend = replace(_attention(decoder), visible=attention_inputs.visible, key_positions=attention_inputs.keys)
    attends = [attend]
    if local is not None:
        near = masks.near(attention_inputs.positions[0], attention_inputs.keys, local.window)
        attends.append(replace(attend, visible=paddle.logical_and(attention_inputs.visible, near)))
    return _context(
        decoder,
        ids,
        attention_inputs.positions,
        attends,
        attention_inputs.visible.shape[-1],
        attention_inputs.stretch,
        logn=True,
    )


def _attention(decoder: Decoder) -> Attention:
    """Attention of which it is not said yet what is visible."""
    facts = decoder.architecture
    return Attention(
        slopes=own_slopes(facts, decoder.tensor_part),
        flash=decoder.flash,
        wide=facts.wide_scores,
        group=facts.shape.heads // facts.shape.kv_heads,
        rank=decoder.tensor_part[0],
    )


def _context(
    decoder: Decoder,
    ids: Tensor,
    positions: Tensor,
    attends: Sequence[Attend],
    count: int,
    stretch: Tensor | None = None,
    *,
    logn: bool = False,
) -> Context:
    """
    Args:
        positions: [parts, batch, length] int64.
        count: see `RotaryPositions.at`.
    """
    rotations = [rotary.at(positions, count, stretch, logn=logn) for rotary in decoder.rotaries]
    dropout = decoder.settings.dropouts.get("hidden", 0.0) if decoder.training else 0.0
    group = decoder.key_value_group
    return Context(ids, positions, tuple(attends), tuple(rotations), dropout, decoder.tensor_part, group)

"""Families whose forward pass is our own, over the layers of PaddleNLP's model: masks, positions, cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from utils.families.base import FamilySpec, Layers
from utils.families.text import Places


def activation_name(config: Mapping[str, Any], default: str) -> str:
    """The activation by its published name. In PaddleNLP's configurations "gelu" is the tanh form."""
    published = config.get("activation") or config.get("activation_function")
    if published:
        return str(published)
    name = config.get("hidden_activation") or config.get("hidden_act") or default
    return "gelu_new" if name == "gelu" else str(name)


class DecoderFamily(FamilySpec):
    """A family whose `model_class` stands in `utils.families.models` and has

        decode(ids, positions, attend, cache) -> (hidden states, cache)
        attention_dropout: float

    The cache is a (key, value) per layer, each [batch, length, heads, head_dim].
    """

    def slopes(self, model: Any) -> Any:
        """[heads] float32 of linear position biases (ALiBi), or None."""
        return None

    def forward_hidden(self, model: Any, batch: Mapping[str, Any], cache: Any = None) -> Any:
        import paddle

        from utils.kernels import masks
        from utils.kernels.attention import packed_attention

        ids, ends = batch["input_ids"], batch.get("segment_ends")
        length, cached = ids.shape[1], cache[0][0].shape[1] if cache is not None else 0
        positions = batch.get("position_ids")
        if positions is None:
            positions = paddle.arange(length).unsqueeze(0)
        slopes, dropout = self.slopes(model), model.attention_dropout if model.training else 0.0
        attend: Callable[..., Any]
        if ends is not None and cache is None:
            attend = partial(packed_attention, segment_ends=ends, slopes=slopes, dropout=dropout)
        else:
            visible = masks.causal(length, cached) if ends is None else masks.packed(ends, cached)
            before = paddle.arange(cached).unsqueeze(0).expand([positions.shape[0], cached])
            key_positions = paddle.concat([before, positions + cached], axis=1)
            attend = masks.attention(visible, key_positions, slopes, dropout)
        return model.decode(ids, positions, attend, cache)[0]

    def decode(self, model: Any, input_ids: Any, places: Places, cache: Layers | None) -> tuple[Any, Layers]:
        from utils.kernels import masks

        attend = masks.attention(places.visible, places.keys, self.slopes(model), 0.0)
        return model.decode(input_ids, self.positions(places), attend, cache)

    def positions(self, places: Places) -> Any:
        """The tensor of positions that the model takes, [batch, length] int64."""
        return places.positions[0]

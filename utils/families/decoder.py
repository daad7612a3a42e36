"""Families whose forward pass is our own, over the layers of PaddleNLP's model: masks, positions, cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from utils.families.base import Context, FamilySpec, LayerForward
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

        attention_dropout: float
            share of the attention weights that training drops.
        embed(ids, positions) -> hidden [batch, length, hidden]
            all that comes before the first layer; calls the layer that `embedding` names.
        layer(attend, positions) -> LayerForward
            made once per batch, so what all layers share (rotary angles) is worked out here once. It counts
            heads by the width of projected tensors, and finds what one layer alone has (its number) on it.
        finish(hidden) -> hidden
            the final norm, and what else comes before the head.

    Positions are those of `positions`; in training [batch or 1, length] int64 unless `context` is overridden.
    """

    def slopes(self, model: Any) -> Any:
        """[heads of this process] float32 of linear position biases (ALiBi), or None."""
        return None

    def context(self, model: Any, batch: Mapping[str, Any], cached: int) -> Context:
        import paddle

        from utils.kernels import masks
        from utils.kernels.attention import packed_attention, segments_of

        ids, ends = batch["input_ids"], batch.get("segment_ends")
        positions = batch.get("position_ids")
        if positions is None:
            positions = paddle.arange(ids.shape[1]).unsqueeze(0)
        slopes, dropout = self.slopes(model), model.attention_dropout if model.training else 0.0
        attend: Callable[..., Any]
        if ends is not None and not cached:
            attend = partial(packed_attention, segments=segments_of(ends), slopes=slopes, dropout=dropout)
        else:
            before = paddle.arange(cached).unsqueeze(0).expand([positions.shape[0], cached])
            key_positions = paddle.concat([before, positions + cached], axis=1)
            attend = masks.attention(masks.causal_or_packed(ids, ends, cached), key_positions, slopes, dropout)
        return Context(ids, positions, attend)

    def inference_context(self, model: Any, input_ids: Any, places: Places) -> Context:
        from utils.kernels import masks

        attend = masks.attention(places.visible, places.keys, self.slopes(model), 0.0)
        return Context(input_ids, self.positions(places), attend)

    def embed(self, model: Any, context: Context) -> Any:
        return model.embed(context.ids, context.positions)

    def layer(self, model: Any, context: Context) -> LayerForward:
        return model.layer(context.attend, context.positions)

    def finish(self, model: Any, hidden: Any) -> Any:
        return model.finish(hidden)

    def positions(self, places: Places) -> Any:
        """The positions that the model takes, [batch, length] int64."""
        return places.positions[0]

"""What the forward passes of decoders share: the stack, and the layer that OPT and GPT have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.distributed.fleet.utils import recompute

from utils.families.base import LayerForward
from utils.kernels.masks import Attend


def run_layers(
    layers: Iterable[Any],
    hidden: Tensor,
    cache: Sequence[tuple[Tensor, Tensor]] | None,
    forward: LayerForward,
    *,
    recomputed: bool = False,
) -> Tensor:
    """Hidden states after some layers in turn, [batch, length, hidden].

    Args:
        layers: all of a model's, or those of one process.
        cache: (key, value) of each of `layers`, or None.
        recomputed: activations inside a layer are computed again for its gradient instead of kept.
    """
    for number, layer in enumerate(layers):
        past = cache[number] if cache is not None else (None, None)
        if recomputed and not hidden.stop_gradient:
            # tensors are arguments, not parts of the closure: gradients reach only those
            hidden = recompute(partial(_without_cache, forward, layer), hidden, *past)
        else:
            hidden = forward(layer, hidden, *past)[0]
    return hidden


def _without_cache(
    forward: LayerForward, layer: Any, hidden: Tensor, past_key: Tensor | None, past_value: Tensor | None
) -> Tensor:
    return forward(layer, hidden, past_key, past_value)[0]


def by_head(x: Tensor, head_dim: int) -> Tensor:
    """[batch, length, heads * head_dim] -> [batch, length, heads, head_dim]; batch and length may be left open.

    The width decides how many heads there are: a process may hold some of the configuration's only.
    """
    return x.reshape([0, 0, x.shape[-1] // head_dim, head_dim])


def extended(past: Tensor | None, new: Tensor) -> Tensor:
    """Cached keys or values and new ones, [batch, cached + length, heads, head_dim]."""
    return new if past is None else paddle.concat([past, new], axis=1)


def transformer_layer(
    layer: Any,
    hidden: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    *,
    attend: Attend,
    head_dim: int,
    norm_first: bool,
    activate: Callable[[Tensor], Tensor],
    dropout: float,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of OPT or GPT; see `LayerForward`.

    Args:
        layer: has self_attn with q_proj, k_proj, v_proj, out_proj, and norm1, norm2, linear1, linear2.
        norm_first: norms stand before attention and MLP, else after the sums.
        dropout: of both sublayers' outputs (0 outside training).
        scale: further factor on the attention scores.
    """
    attention = layer.self_attn
    normed = layer.norm1(hidden) if norm_first else hidden
    query, key, value = (
        by_head(project(normed), head_dim) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    key, value = extended(past_key, key), extended(past_value, value)
    attended = attention.out_proj(attend(query if scale == 1.0 else query * scale, key, value))
    hidden = hidden + (F.dropout(attended, dropout) if dropout else attended)
    hidden = hidden if norm_first else layer.norm1(hidden)
    normed = layer.norm2(hidden) if norm_first else hidden
    changed = layer.linear2(activate(layer.linear1(normed)))
    hidden = hidden + (F.dropout(changed, dropout) if dropout else changed)
    return hidden if norm_first else layer.norm2(hidden), key, value

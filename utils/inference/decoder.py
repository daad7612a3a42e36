"""One decoder for every family, put together from its `Architecture`: the inference model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from utils.checkpoints.tensors import cast
from utils.families.architecture import Architecture, LayerNames, Rotary
from utils.kernels import inference as kernels

Read = Callable[[str], np.ndarray]  # float32 values of a parameter, by name


class Decoder(nn.Layer):
    """A model of one family: token ids and the cache in, logits and new keys and values out.

    Query, key and value are one matrix, and so are gate and up of a gated MLP; the factor on attention
    scores is in the query's, and the dimensions of heads stand in `Rotary.order`.
    """

    def __init__(self, architecture: Architecture, parameters: Mapping[str, Any], read: Read, dtype: str) -> None:
        """
        Args:
            parameters: names of the model's parameters (values are not used).
            read: gives their values in the Paddle layout; each is asked for once, in layer order.
            dtype: of weights and hidden states.
        """
        super().__init__()
        self.architecture, self.dtype = architecture, dtype
        self._read, self._known = read, parameters
        shape = architecture.shape
        self._column = self._keep("mean", np.full((shape.hidden, 1), 1.0 / shape.hidden), "float32")
        self._embedding = self._keep("embedding", read(f"{architecture.embedding}.weight"))
        self._embedding_norm = self._norm("embedding_norm", architecture.embedding_norm)
        self._embedding_projection = self._linear("embedding_projection", architecture.embedding_projection)
        self._tables = [
            (self._keep(f"table_{number}", read(f"{table.name}.weight")), table)
            for number, table in enumerate(architecture.tables)
        ]
        self._layers = [self._layer(number, architecture.layer(number)) for number in range(shape.layers)]
        self._final_norm = self._norm("final_norm", architecture.final_norm)
        self._output_projection = self._linear("output_projection", architecture.output_projection)
        self._head = self._embedding
        if architecture.head is not None:
            values = read(architecture.head)
            self._head = self._keep("head", values if architecture.head_is_table else values.T)
        self._activation = kernels.activation(architecture.activation)
        self._slopes = None
        if architecture.slopes is not None:
            self._slopes = self._keep("slopes", architecture.slopes, "float32")
        if architecture.rotary is not None:
            self._keep_rotary(architecture.rotary)
        del self._read, self._known
        self.eval()

    # --- weights ------------------------------------------------------------------------------------

    def _keep(self, name: str, values: np.ndarray, dtype: str | None = None) -> Tensor:
        """Values as a tensor that is saved with the model."""
        kind = dtype or self.dtype
        tensor = paddle.to_tensor(np.ascontiguousarray(cast(values.astype(np.float32, copy=False), kind)))
        if kind == "bfloat16":
            tensor = tensor.view("bfloat16")
        self.register_buffer(name, tensor)
        return tensor

    def _linear(self, name: str, source: str | None) -> kernels.Linear | None:
        if source is None:
            return None
        bias = self._keep(f"{name}_bias", self._read(f"{source}.bias")) if f"{source}.bias" in self._known else None
        return kernels.Linear(self._keep(name, self._read(f"{source}.weight")), bias)

    def _norm(self, name: str, source: str | None) -> kernels.Norm | None:
        if source is None:
            return None
        weight = self._keep(name, self._read(f"{source}.weight"))
        if self.architecture.norm == "rms":
            return kernels.RMSNorm(weight, self._column, self.architecture.epsilon)
        bias = self._keep(f"{name}_bias", self._read(f"{source}.bias"))
        return kernels.LayerNorm(weight, bias, self.architecture.epsilon)

    def _layer(self, number: int, names: LayerNames) -> dict[str, Any]:
        place = f"layer_{number}"
        found: dict[str, Any] = {
            "attention_norm": self._norm(f"{place}_attention_norm", names.attention_norm),
            "attention_in": self._joined(f"{place}_attention_in", names.query_key_value, self._by_part(names)),
            "attention_out": self._linear(f"{place}_attention_out", names.attention_out),
            "mlp_norm": self._norm(f"{place}_mlp_norm", names.mlp_norm),
            "mlp_in": self._joined(f"{place}_mlp_in", names.mlp_in, lambda values: values),
            "mlp_out": self._linear(f"{place}_mlp_out", names.mlp_out),
        }
        return found

    def _joined(
        self, name: str, sources: tuple[str, ...], arrange: Callable[[np.ndarray], np.ndarray]
    ) -> kernels.Linear:
        """Several Linears side by side as one. Some may lack a bias: theirs is 0."""
        weights = [self._read(f"{source}.weight") for source in sources]
        kept = self._keep(name, arrange(weights[0] if len(weights) == 1 else np.concatenate(weights, axis=1)))
        if not any(f"{source}.bias" in self._known for source in sources):
            return kernels.Linear(kept)
        biases = [
            self._read(f"{source}.bias") if f"{source}.bias" in self._known else np.zeros(weight.shape[1], np.float32)
            for source, weight in zip(sources, weights, strict=True)
        ]
        return kernels.Linear(kept, self._keep(f"{name}_bias", arrange(np.concatenate(biases)[None])[0]))

    def _by_part(self, names: LayerNames) -> Callable[[np.ndarray], np.ndarray]:
        """Arranges the columns of query, key and value: by part, in `Rotary.order`, the scale in the query."""
        shape, rotary = self.architecture.shape, self.architecture.rotary
        heads, kv_heads, width = shape.heads, shape.kv_heads, shape.head_dim
        scale = np.float32(width**-0.5 if names.score_scale is None else names.score_scale)

        def arrange(values: np.ndarray) -> np.ndarray:
            rows = values.shape[0]
            if names.by_head:
                values = values.reshape(rows, heads, 3, width).transpose(0, 2, 1, 3)
            columns = values.reshape(rows, heads + 2 * kv_heads, width).copy()
            if rotary is not None and rotary.order is not None:
                columns[:, : heads + kv_heads] = columns[:, : heads + kv_heads][..., rotary.order]
            columns[:, :heads] *= scale
            return columns.reshape(rows, -1)

        return arrange

    def _keep_rotary(self, rotary: Rotary) -> None:
        width = self.architecture.shape.head_dim
        half = width // 2
        swap = np.zeros((width, width), dtype=np.float32)
        swap[np.arange(half) + half, np.arange(half)] = -1.0
        swap[np.arange(half), np.arange(half) + half] = 1.0
        self._swap = self._keep("swap", swap)
        self._inverse = self._keep("inverse", rotary.inverse, "float32")
        if rotary.stretch_power is not None:
            self._stretch_power = self._keep("stretch_power", rotary.stretch_power, "float32")

    # --- the forward pass ---------------------------------------------------------------------------

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        keys: Tensor,
        visible: Tensor,
        stretch: Tensor,
        chosen: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One step over new tokens.

        Args:
            ids: int64 [batch, length].
            positions, keys, visible, stretch: see `utils.families.text.Places`.
            chosen: int64 [n], the tokens whose logits are wanted, counted through the batch row by row.
            past: the cached keys and values of every layer in turn, each [batch, kv_heads, cached,
                head_dim]; nothing without a cache.

        Returns:
            Logits [n, vocabulary] and the new keys and values in the order of `past`, [2 * layers,
            batch, kv_heads, length, head_dim].
        """
        architecture, shape = self.architecture, self.architecture.shape
        hidden = nn.functional.embedding(ids, self._embedding)
        if self._embedding_norm is not None:
            hidden = self._embedding_norm(hidden)
        if self._embedding_projection is not None:
            hidden = self._embedding_projection(hidden)
        for table, facts in self._tables:
            hidden = hidden + nn.functional.embedding(positions[facts.part] + facts.offset, table)
        group = shape.heads // shape.kv_heads
        mask = kernels.mask_of(visible, keys, self._slopes, shape.kv_heads, group)
        turns = self._turns(positions, stretch) if architecture.rotary is not None else None
        kept: list[Tensor] = []
        for number, layer in enumerate(self._layers):
            before = past[2 * number : 2 * number + 2] if past else None
            normed = layer["attention_norm"](hidden) if architecture.norm_first else hidden
            attended, key, value = self._attention(layer, normed, turns, before, mask)
            kept += [key, value]
            hidden = self._base(hidden, normed) + attended
            if not architecture.norm_first:
                hidden = layer["attention_norm"](hidden)
            normed = layer["mlp_norm"](hidden) if architecture.norm_first else hidden
            hidden = self._base(hidden, normed) + self._mlp(layer, normed)
            if not architecture.norm_first:
                hidden = layer["mlp_norm"](hidden)
        states = paddle.index_select(hidden.reshape([-1, shape.hidden]), chosen)
        if self._final_norm is not None:
            states = self._final_norm(states)
        if self._output_projection is not None:
            states = self._output_projection(states)
        return kernels.logits(states, self._head), paddle.stack(kept)

    def _base(self, hidden: Tensor, normed: Tensor) -> Tensor:
        """What the output of attention or MLP is added to."""
        if self.architecture.residual == "hidden":
            return hidden
        factor = self.architecture.residual_factor
        return normed if factor == 1.0 else normed * factor

    def _turns(self, positions: Tensor, stretch: Tensor) -> kernels.Turns:
        """Angles of queries and keys of every new token."""
        shape, rotary = self.architecture.shape, self.architecture.rotary
        assert rotary is not None
        places = positions.astype("float32").unsqueeze(-1)  # [parts, batch, length, 1]
        inverse = self._inverse.reshape([-1, 1, 1, shape.head_dim // 2])
        if rotary.stretch_power is not None:
            inverse = inverse * (stretch.reshape([1, -1, 1, 1]) ** self._stretch_power)
        angles = (places * inverse).sum(0)
        angles = paddle.concat([angles, angles], axis=-1).unsqueeze(1)  # [batch, 1, length, head_dim]
        cos, sin = angles.cos(), angles.sin()
        if rotary.magnitude != 1.0:
            cos, sin = cos * rotary.magnitude, sin * rotary.magnitude
        spread = []
        for wave in (cos, sin):
            of_queries = wave
            if rotary.logn_length is not None:
                length = paddle.full([1], rotary.logn_length, dtype="float32")
                of_queries = wave * paddle.clip(paddle.log(places[0] + 1.0) / paddle.log(length), min=1.0).unsqueeze(1)
            both = [paddle.tile(of_queries, [1, shape.heads, 1, 1]), paddle.tile(wave, [1, shape.kv_heads, 1, 1])]
            spread.append(paddle.concat(both, axis=1).astype(self.dtype))
        return kernels.Turns(spread[0], spread[1], self._swap)

    def _attention(
        self, layer: dict[str, Any], x: Tensor, turns: kernels.Turns | None, past: Any, mask: kernels.Mask
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output [batch, length, hidden], new keys and values [batch, kv_heads, length, head_dim]."""
        shape = self.architecture.shape
        heads, kv_heads, width = shape.heads, shape.kv_heads, shape.head_dim
        parts = layer["attention_in"](x).reshape([0, 0, heads + 2 * kv_heads, width]).transpose([0, 2, 1, 3])
        turned, value = paddle.split(parts, [heads + kv_heads, kv_heads], axis=1)
        if turns is not None:
            turned = turns(turned)
        query, key = paddle.split(turned, [heads, kv_heads], axis=1)
        attended = kernels.attend(query.reshape([0, kv_heads, -1, width]), key, value, past, mask)
        attended = attended.reshape([0, heads, -1, width]).transpose([0, 2, 1, 3]).reshape([0, 0, heads * width])
        return layer["attention_out"](attended), key, value

    def _mlp(self, layer: dict[str, Any], x: Tensor) -> Tensor:
        inner = layer["mlp_in"](x)
        if not self.architecture.gated:
            return layer["mlp_out"](self._activation(inner))
        gate, up = paddle.split(inner, 2, axis=-1)
        return layer["mlp_out"](self._activation(gate) * up)

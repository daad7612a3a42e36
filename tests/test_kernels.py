"""Kernels against the library's own operators: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from utils.kernels import inference
from utils.kernels.attention import every_head
from utils.kernels.linear import fixed_linear
from utils.kernels.norm import rms_norm
from utils.kernels.precision import autocast
from utils.kernels.rotary import apply_rotary_pos_emb


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_each_process_takes_the_keys_of_its_queries(degree: int) -> None:
    """8 queries share 2 keys: shared by two processes, and whole in each of four."""
    key = paddle.arange(2, dtype="float32").reshape([1, 1, 2, 1])
    heads, found = 8 // degree, []
    for rank in range(degree):
        own = paddle.split(key, degree, axis=2)[rank] if degree <= 2 else key
        found.append(every_head(own, heads, 4, rank))
    assert paddle.concat(found, axis=2).flatten().tolist() == [0.0] * 4 + [1.0] * 4


def gradients(function: Callable[..., Any], *inputs: Any) -> list[np.ndarray]:
    """Outputs of `function`, then the gradients of a fixed weighting of them for each input."""
    tensors = [paddle.to_tensor(value, stop_gradient=False) for value in inputs]
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((output * paddle.cos(paddle.arange(output.size, dtype="float32").reshape(output.shape))).sum()
               for output in outputs)  # fmt: skip
    loss.backward()
    return [output.numpy() for output in outputs] + [tensor.grad.numpy() for tensor in tensors]


def test_rms_norm_matches_its_definition() -> None:
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(2, 7, 24)).astype("float32"), random.normal(size=24).astype("float32")

    def definition(x: Any, weight: Any) -> Any:
        return x / paddle.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight

    for ours, theirs in zip(
        gradients(lambda a, b: rms_norm(a, b, 1e-5), x, weight), gradients(definition, x, weight), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    with paddle.no_grad():
        plain = rms_norm(paddle.to_tensor(x), paddle.to_tensor(weight), 1e-5).numpy()
    np.testing.assert_allclose(plain, definition(paddle.to_tensor(x), paddle.to_tensor(weight)).numpy(), atol=1e-5)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("single_token", [True, False])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_of_a_sum_match_their_definitions(kind: str, single_token: bool, has_bias: bool) -> None:
    random = np.random.default_rng(1)
    x, hidden = (random.normal(size=(7, size)).astype("float32") for size in (16, 24))
    matrix, own = (random.normal(size=size).astype("float32") for size in ((16, 24), 24))
    weight, bias = (random.normal(size=24).astype("float32") for _ in range(2))
    scale, shift = (paddle.to_tensor(values) for values in (weight, bias))
    product = fixed_linear(paddle.to_tensor(matrix), paddle.to_tensor(own) if has_bias else None)
    norm = inference.RMSNorm(scale, 1e-5) if kind == "rms" else inference.LayerNorm(scale, shift, 1e-5)
    with paddle.no_grad():
        residual = inference.Residual(product, paddle.to_tensor(x))
        normal, total = norm.of_sum(paddle.to_tensor(hidden), residual, single_token=single_token)
    wanted = x.astype("float64") @ matrix + hidden + (own if has_bias else 0)
    np.testing.assert_allclose(total.numpy(), wanted, atol=1e-5)
    if kind == "layer":
        wanted = wanted - wanted.mean(-1, keepdims=True)
    wanted = wanted / np.sqrt((wanted**2).mean(-1, keepdims=True) + 1e-5) * weight + (bias if kind == "layer" else 0)
    np.testing.assert_allclose(normal.numpy(), wanted, atol=1e-5)


def test_rms_norm_of_large_values_in_mixed_precision() -> None:
    """Hidden states of hundreds are usual; their squares are no float16."""
    x = (600 * np.random.default_rng(3).normal(size=(5, 16))).astype("float32")
    weight = np.ones(16, dtype="float32")
    wanted = gradients(lambda a, b: rms_norm(a, b, 1e-5), x, weight)
    with autocast("float16"):
        found = gradients(lambda a, b: rms_norm(a, b, 1e-5), x, weight)
    assert np.abs(wanted[0]).max() > 1
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_rms_norm_without_a_trained_weight() -> None:
    x = paddle.to_tensor(np.random.default_rng(2).normal(size=(3, 8)).astype("float32"), stop_gradient=False)
    weight = paddle.ones([8])
    rms_norm(x, weight, 1e-6).sum().backward()
    assert weight.grad is None
    # the norm does not change along x itself; eight float32 products of about 1 are summed
    np.testing.assert_allclose((x.grad * x).sum(-1).numpy(), np.zeros(3), atol=5e-5)


@pytest.mark.parametrize("positions", [None, [[0, 1, 2, 0, 1], [5, 3, 3, 0, 9]]])
def test_rotary_matches_complex_multiplication(positions: list[list[int]] | None) -> None:
    random = np.random.default_rng(1)
    query = random.normal(size=(2, 5, 4, 8)).astype("float32")
    key = random.normal(size=(2, 5, 2, 8)).astype("float32")
    angles = np.arange(12)[:, None] * (0.5 ** np.arange(4))[None]
    table = np.concatenate([angles, angles], axis=-1)[None, :, None].astype("float32")
    cos, sin = paddle.to_tensor(np.cos(table)), paddle.to_tensor(np.sin(table))
    ids = None if positions is None else paddle.to_tensor(positions, dtype="int64")

    def rotated(x: np.ndarray) -> np.ndarray:
        places = np.array(positions if positions is not None else [range(5)] * 2)
        turn = np.exp(1j * angles[places])[:, :, None]
        value = (x[..., :4] + 1j * x[..., 4:]) * turn
        return np.concatenate([value.real, value.imag], axis=-1)

    def ours(q: Any, k: Any) -> Any:
        places = paddle.arange(5).expand([2, 5]) if ids is None else ids
        return apply_rotary_pos_emb(q, k, *(F.embedding(places, wave[0, :, 0]).unsqueeze(2) for wave in (cos, sin)))

    found = gradients(ours, query, key)
    np.testing.assert_allclose(found[0], rotated(query), atol=1e-5)
    np.testing.assert_allclose(found[1], rotated(key), atol=1e-5)

    def plain(q: Any, k: Any) -> Any:  # the same through autograd
        places = paddle.to_tensor([list(range(5))] * 2) if ids is None else ids
        c, s = cos[0, :, 0][places].unsqueeze(2), sin[0, :, 0][places].unsqueeze(2)
        return tuple(x * c + paddle.concat([-x[..., 4:], x[..., :4]], -1) * s for x in (q, k))

    for one, other in zip(found, gradients(plain, query, key), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)

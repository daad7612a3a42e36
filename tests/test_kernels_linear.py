"""Matrices of a model, with and without LoRA, in float32 and in half precision by rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from paddle.distributed.fleet.utils import recompute

from utils.kernels import precision
from utils.kernels.linear import Embedding, LoraLinear, linear

HALVES = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # of a value, the largest error of rounding


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype("float32")


def leaf(array: np.ndarray) -> Any:
    return paddle.to_tensor(array, stop_gradient=False)


def filled(layer: Any) -> Any:
    for number, parameter in enumerate(layer.parameters()):
        parameter.set_value(paddle.to_tensor(values(*parameter.shape, seed=number)).astype(parameter.dtype))
    return layer


def lora(dtype: str = "float32", own: str | None = None, **options: Any) -> Any:
    return filled(LoraLinear(linear(24, 16, dtype=dtype), 3, 0.5, dtype=own, **options))


def gradients(layer: Any, x: np.ndarray) -> dict[str, np.ndarray]:
    """The output of a layer, and the gradients of its input and of what it trains."""
    given = leaf(x)
    found = layer(given)
    (found * paddle.cos(paddle.arange(found.size, dtype="float32").reshape(found.shape))).sum().backward()
    trained = {name: one.grad for name, one in layer.named_parameters() if not one.stop_gradient}
    return {name: one.astype("float32").numpy() for name, one in {"y": found, "x": given.grad, **trained}.items()}


@pytest.mark.parametrize("options", [{}, {"dropout": 1e-12}], ids=["fused", "apart"])
@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24)])
def test_lora_is_what_it_says(shape: tuple[int, ...], options: dict[str, float]) -> None:
    """W + scale * A B, by Paddle's own gradients; W and the bias have none."""
    layer, x = lora(**options), values(*shape)
    found = gradients(layer, x)
    assert layer.weight.grad is None and layer.bias.grad is None
    given, a, b = leaf(x), leaf(layer.lora_A.numpy()), leaf(layer.lora_B.numpy())
    wanted = given @ (layer.weight + 0.5 * a @ b) + layer.bias
    (wanted * paddle.cos(paddle.arange(wanted.size, dtype="float32").reshape(wanted.shape))).sum().backward()
    for name, whole in (("y", wanted), ("x", given.grad), ("lora_A", a.grad), ("lora_B", b.grad)):
        np.testing.assert_allclose(found[name], whole.numpy(), rtol=1e-4, atol=2e-5, err_msg=name)
    layer.eval()
    np.testing.assert_allclose(layer(paddle.to_tensor(x)).numpy(), wanted.numpy(), rtol=1e-4, atol=2e-5)


def test_dropout_is_of_what_a_takes_and_in_training_only() -> None:
    layer = lora(dropout=0.5)
    layer.weight.set_value(paddle.zeros([24, 16]))
    layer.bias.set_value(paddle.zeros([16]))
    layer.lora_A.set_value(paddle.eye(24, 3))
    layer.lora_B.set_value(2.0 * paddle.eye(3, 16))
    rows = layer(paddle.ones([400, 24])).numpy()[:, :3]  # scale 0.5
    assert set(np.unique(rows)) == {0.0, 2.0} and 0.4 < (rows == 0).mean() < 0.6
    layer.eval()
    assert layer(paddle.ones([1, 24])).numpy()[0, :3].tolist() == [1.0] * 3


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_products_in_half_precision_are_those_of_rounded_operands(way: str, dtype: str) -> None:
    """Values and gradients can be stored in the half type, and are those of float32 within its error."""
    layer, x = filled(linear(24, 16, dtype=dtype if way == "weights" else "float32")), values(2, 5, 24, seed=9)
    exact = filled(linear(24, 16))
    for mine, other in zip(exact.parameters(), layer.parameters(), strict=True):
        mine.set_value(other.astype("float32"))
    wanted = gradients(exact, x)
    with precision.autocast(dtype if way == "autocast" else "float32"):
        found = gradients(layer, x)
    for name in ("x", "weight"):
        stored = paddle.to_tensor(found[name]).astype(dtype).astype("float32").numpy()
        np.testing.assert_array_equal(found[name], stored, err_msg=name)
    for name, whole in wanted.items():
        np.testing.assert_allclose(found[name], whole, atol=20 * HALVES[dtype] * np.abs(whole).max(), err_msg=name)
        assert name == "bias" or np.abs(found[name] - whole).max() > 0, name
    assert {one.grad.dtype for one in layer.parameters()} == {one.dtype for one in layer.parameters()}


@pytest.mark.parametrize("options", [{}, {"dropout": 1e-12}], ids=["fused", "apart"])
@pytest.mark.parametrize("own", ["float32", "bfloat16"])
def test_lora_over_a_matrix_in_half_precision(own: str, options: dict[str, float]) -> None:
    layer, x = lora("bfloat16", own, **options), values(5, 24)
    found = gradients(layer, x)
    assert {layer.lora_A.grad.dtype, layer.lora_B.grad.dtype} == {getattr(paddle, own)}
    exact = lora(**options)
    for mine, other in zip(exact.parameters(), layer.parameters(), strict=True):
        mine.set_value(other.astype("float32"))
    for name, whole in gradients(exact, x).items():
        error = np.abs(found[name] - whole).max()
        assert 0 < error < 20 * HALVES["bfloat16"] * np.abs(whole).max(), name


def test_what_is_recomputed_is_computed_in_the_same_precision() -> None:
    """Recomputation runs in the backward pass, outside of the block."""
    layer, x = filled(linear(24, 16)), values(2, 5, 24)

    def run(again: bool) -> list[np.ndarray]:
        given = leaf(x)
        layer.clear_gradients()
        with precision.autocast("bfloat16"):
            one = precision.under_autocast(layer.forward)
            y = paddle.tanh(recompute(one, given) if again else layer(given))
        y.square().sum().backward()
        return [y.numpy(), given.grad.numpy(), layer.weight.grad.numpy()]

    for mine, other in zip(run(True), run(False), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_block_ends_where_it_ends() -> None:
    """Also by an error; and within it there are blocks in the operands' own type."""
    x, y = (paddle.to_tensor(values(4, 4, seed=seed)) for seed in (1, 2))
    exact = paddle.matmul(x, y).numpy()

    def is_exact() -> bool:
        return bool((precision.matmul(x, y).numpy() == exact).all())

    with pytest.raises(KeyError), precision.autocast("float16"):
        assert not is_exact()
        with precision.in_own_type():
            assert is_exact()
        assert not is_exact()
        raise KeyError
    assert is_exact()


def test_rows_of_a_table_in_half_precision_come_as_hidden_states() -> None:
    before = paddle.get_default_dtype()
    paddle.set_default_dtype("bfloat16")
    try:
        table = Embedding(6, 4)
    finally:
        paddle.set_default_dtype(before)
    found = table(paddle.to_tensor([[5, 0]]))
    assert found.dtype == paddle.float32 and table.weight.dtype == paddle.bfloat16
    np.testing.assert_array_equal(found.numpy()[0], table.weight.astype("float32").numpy()[[5, 0]])
    found.sum().backward()
    assert table.weight.grad.dtype == paddle.bfloat16

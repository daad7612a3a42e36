"""The trainable decoder's corners: rotary pairs of any order, parameters of new models, masks of local layers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest
from family_cases import FIXTURES, NAMES, case

from utils.checkpoints.load import build, load_model, new_model
from utils.kernels import masks
from utils.kernels.rotary import apply_rotary_pos_emb
from utils.model.architecture import Initial, Rotary
from utils.model.inputs import RotaryPositions
from utils.model.settings import Settings

PARAMETERS = json.loads((FIXTURES / "parameters.json").read_text("utf-8"))


# --- parameters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameters_have_the_names_shapes_and_order_that_they_ever_had(name: str) -> None:
    """Optimizer states of interrupted runs, and what ranks share, count on it."""
    found = [[name, list(parameter.shape)] for name, parameter in case(name).model.named_parameters()]
    assert found == PARAMETERS[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_to_be_loaded_takes_no_memory(name: str) -> None:
    model = build(case(name).checkpoint, "float32")
    assert not any(parameter._is_initialized() for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_new_weights_are_drawn_as_the_architecture_says(name: str) -> None:
    """Wide enough that spreads can be told apart."""
    checkpoint = case(name).checkpoint
    paddle.seed(5)
    model = new_model(checkpoint.family, checkpoint.config, "float32")
    facts = model.architecture
    layer, found = facts.layer(1), dict(model.named_parameters())
    wanted = {
        f"{facts.embedding}.weight": facts.initial.tables,
        f"{layer.query_key_value[0]}.weight": facts.initial.linears,
        f"{layer.mlp_in[0]}.weight": facts.initial.linears,
        f"{layer.attention_out}.weight": facts.initial.outputs,
        f"{layer.mlp_out}.weight": facts.initial.outputs,
    }
    if facts.head is not None:
        wanted[facts.head] = facts.initial.head
    for parameter, spread in wanted.items():
        values = found[parameter].numpy()
        bound = (6 / sum(values.shape)) ** 0.5
        assert values.std() == pytest.approx(bound / 3**0.5 if spread is None else spread, rel=0.15), parameter
        assert (np.abs(values).max() <= bound) == (spread is None or spread < bound / 5), parameter
    vectors = {name: parameter.numpy() for name, parameter in found.items() if len(parameter.shape) == 1}
    assert all(np.ptp(values) == 0 for values in vectors.values())
    assert {float(values[0]) for name, values in vectors.items() if name.endswith(".bias")} <= {0.0}
    assert {float(values[0]) for name, values in vectors.items() if not name.endswith(".bias")} == {
        1.0 - facts.norm_offset
    }


def test_outputs_are_smaller_the_more_layers_add_up() -> None:
    assert Initial.spread(0.02, layers=8) == Initial(0.02, 0.005, 0.02, 0.02)
    assert Initial.spread(0.02, head=False) == Initial(0.02, 0.02, 0.02, None)


# --- positions ----------------------------------------------------------------------------------------


def queries_and_keys(head_dim: int, seed: int = 1) -> tuple[Any, Any]:
    """Of 2 texts of 6 tokens with 4 and 2 heads."""
    random = np.random.default_rng(seed)
    return tuple(paddle.to_tensor(random.normal(size=(2, 6, n, head_dim)).astype("float32")) for n in (4, 2))


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("in_order", [False, True])
def test_dimensions_may_pair_in_any_order(parts: int, in_order: bool) -> None:
    """As if they were brought into the order in which halves pair, rotated, and brought back."""
    random = np.random.default_rng(parts)
    inverse = random.uniform(0.01, 1, (parts, 8)).astype(np.float32)
    order = np.arange(16) if in_order else random.permutation(16)
    positions = random.integers(0, 50, (parts, 2, 6))
    query, key = queries_and_keys(16)
    rotation = RotaryPositions(Rotary(inverse, order, magnitude=1.5)).at(paddle.to_tensor(positions), 50)
    found = rotation(query, key)
    angles = np.einsum("pbl,pd->bld", positions, inverse.astype(np.float64))
    angles = np.concatenate([angles, angles], axis=-1)[:, :, None]
    for ours, x in zip(found, (query, key), strict=True):
        halves = x.numpy()[..., order]
        rotated = np.concatenate([-halves[..., 8:], halves[..., :8]], axis=-1)
        wanted = 1.5 * (halves * np.cos(angles) + rotated * np.sin(angles))
        np.testing.assert_allclose(ours.numpy()[..., order], wanted, atol=2e-5)


def test_pairs_of_halves_are_the_same_with_and_without_an_order() -> None:
    """Values and gradients, in the two ways that turn them."""
    inverse, positions = np.array([[1.0, 0.25, 0.5, 0.125]], np.float32), paddle.arange(12).reshape([1, 2, 6])
    found = []
    for order in (None, np.arange(8)):
        query, key = queries_and_keys(8)
        query.stop_gradient = key.stop_gradient = False
        rotated = RotaryPositions(Rotary(inverse, order)).at(positions, 12)(query, key)
        (rotated[0].square().sum() + (rotated[1] ** 3).sum()).backward()
        found.append([x.numpy() for x in (*rotated, query.grad, key.grad)])
    for plain, ordered in zip(*found, strict=True):
        np.testing.assert_allclose(plain, ordered, rtol=1e-6, atol=1e-6)


def test_texts_may_turn_faster_and_queries_grow() -> None:
    """Each text has its own factor; log-n scales queries behind the trained length, and generation alone does so."""
    inverse = np.array([[1.0, 0.5, 0.25, 0.0]], np.float32)
    power = np.array([0.0, -1.0, -2.0, 0.0], np.float32)
    rotary = Rotary(inverse, stretch_power=power, logn_length=4)
    positions, stretch = paddle.arange(6).expand([1, 2, 6]), paddle.to_tensor([1.0, 3.0])
    query, key = queries_and_keys(8)
    rotary_positions = RotaryPositions(rotary)
    plain = rotary_positions.at(positions, 6)(query, key)
    found = rotary_positions.at(positions, 6, stretch, logn=True)(query, key)
    np.testing.assert_allclose(found[1][0].numpy(), plain[1][0].numpy(), atol=1e-6)
    slower = RotaryPositions(Rotary(inverse * np.float32(3) ** power)).at(positions, 6)(query, key)
    np.testing.assert_allclose(found[1][1].numpy(), slower[1][1].numpy(), atol=1e-6)
    factors = np.maximum(np.log(np.arange(6) + 1) / np.log(4), 1.0)[:, None, None]
    np.testing.assert_allclose(found[0][1].numpy(), slower[0][1].numpy() * factors, atol=1e-5)


def test_a_table_has_the_angles_that_are_worked_out() -> None:
    """The table of a model, and what a program or several parts compute at once."""
    inverse = np.array([[1.0, 0.3, 0.01, 0.001]], np.float32)
    positions = paddle.to_tensor([[[0, 5, 900, 3, 2, 1], [7, 7, 8, 1000, 0, 4]]])
    one, two = RotaryPositions(Rotary(inverse)), RotaryPositions(Rotary(np.concatenate([inverse, 0 * inverse])))
    assert one.table is not None and two.table is None
    query, key = queries_and_keys(8)
    found = one.at(positions, 1001)(query, key), two.at(paddle.concat([positions, positions]), 1001)(query, key)
    for ours, wanted in zip(*found, strict=True):
        np.testing.assert_allclose(ours.numpy(), wanted.numpy(), atol=1e-4)
    cos, sin = one.table.at(positions[0], 1001, paddle.float32)
    assert np.array_equal(apply_rotary_pos_emb(query, key, cos, sin)[0].numpy(), found[0][0].numpy())


# --- who sees whom ------------------------------------------------------------------------------------


def test_a_window_is_seen_in_training_and_generation_alike() -> None:
    """A prefix of two, then five tokens of which each sees three."""
    trained = masks.window_mask(5, cached=2, window=3, prefix=2)[0, 0]
    keys = paddle.to_tensor([[-2, -1, 0, 1, 2, 3, 4]])
    near = masks.near(paddle.arange(5).unsqueeze(0), keys, 3)[0, 0]
    seen = keys <= paddle.arange(5).unsqueeze(1)
    assert bool((trained == paddle.logical_and(near, seen)).all())


def test_settings_choose_what_is_dropped() -> None:
    """Nothing that they do not name, whatever config.json says."""
    checkpoint = case("opt_tiny").checkpoint
    asks = replace(checkpoint, config={**checkpoint.config, "dropout": 0.9})
    batch, found = {"input_ids": paddle.to_tensor([[5, 6, 7]])}, []
    for settings in (Settings(), None):
        model = load_model(asks, "float32", settings=settings)
        kept = model.hidden(batch)
        model.train()
        found.append(bool((model.hidden(batch) == kept).all()))
    assert found == [True, False]

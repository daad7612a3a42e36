"""The parameters of a model and their published tensors follow from its architecture: as they were once listed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from family_cases import FIXTURES

from utils.families import family_of
from utils.model.weights import Stored, Weight

# by the name of a configuration: a fixture, what is changed of its config.json, and the list
LISTED: dict[str, Any] = json.loads((FIXTURES / "weights.json").read_text(encoding="utf-8"))


def line(weight: Weight) -> str:
    words = [weight.published, weight.parameter]
    words += [name for name, found in (("transpose", weight.transpose), ("conv1d", weight.conv1d)) if found]
    words += [f"part={weight.part[0]}/{weight.part[1]}"] if weight.part else []
    return " ".join([*words, f"split={weight.split}"] if weight.split else words)


@pytest.mark.parametrize("name", LISTED)
def test_the_weights_are_those_that_were_listed(name: str) -> None:
    known = LISTED[name]
    config = json.loads((FIXTURES / known["fixture"] / "config.json").read_text(encoding="utf-8"))
    family = family_of(config)
    assert family is not None
    found = [line(weight) for weight in family.weights(family.read_config({**config, **known["changed"]}))]
    wanted = known["weights"]
    if name == "llama_plain":  # each head has keys of its own: shares of columns are shares of heads
        wanted = [text.replace("key_value", "column") for text in wanted]
    assert sorted(found) == sorted(wanted)  # the order is that of the model's parameters, see test_families.py


def test_the_longest_beginning_of_a_name_is_renamed() -> None:
    stored = Stored({"model": "m", "model.layers": "blocks", "mlp.up": "mlp.both", "mlp.gate": "mlp.both"})
    assert [stored.name(name) for name in ("model.layers.3", "model.layer.3", "head.weight")] == [
        "blocks.3",
        "m.layer.3",
        "head.weight",
    ]
    assert stored.part("mlp.gate") == (1, 2) and stored.part("mlp.down") is None

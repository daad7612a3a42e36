"""Gemma 3: which layers are local, and what it refuses; the mathematics are tested in test_families.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from family_cases import case

from utils.errors import UserError
from utils.families import FAMILIES, family_of

FAMILY = FAMILIES["gemma3"]
PUBLISHED: dict[str, Any] = {  # of Gemma 3 1B, which leaves out what is as by default
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}


def test_the_published_configuration_is_read() -> None:
    assert family_of(PUBLISHED) is FAMILY
    known = FAMILY.read_config(PUBLISHED)
    shape, local = FAMILY.shape(known), FAMILY.architecture(known).local
    assert (shape.head_dim, shape.kv_heads, shape.tied) == (256, 1, True)
    assert local is not None and local.window == 512
    assert set(range(26)) - local.layers == {5, 11, 17, 23}
    assert FAMILY.window(known) is None  # of all layers: there is none
    assert len(FAMILY.weights(known)) == 1 + 26 * 13 + 1


@pytest.mark.parametrize("layout", [FAMILY.paddle_config, FAMILY.published_config])
def test_both_layouts_say_the_same(layout: Any) -> None:
    known = case("gemma3").checkpoint.config
    again = FAMILY.read_config(layout(known))
    one, other = FAMILY.architecture(known), FAMILY.architecture(again)
    assert (one.shape, one.parts, one.activation) == (other.shape, other.parts, other.activation)
    assert one.local is not None and other.local is not None and one.local.layers == other.local.layers == {0, 2}
    assert FAMILY.weights(again) == FAMILY.weights(known)


def test_positions_are_read_as_newer_configurations_say_them() -> None:
    left = {name: value for name, value in PUBLISHED.items() if not name.startswith("rope_")}
    near, far = ({"rope_type": "default", "rope_theta": base} for base in (20000.0, 500000.0))
    said = {"rope_parameters": {"sliding_attention": near, "full_attention": far}}
    one = FAMILY.architecture(FAMILY.read_config({**left, **said}))
    other = FAMILY.architecture(FAMILY.read_config({**left, "rope_local_base_freq": 20000, "rope_theta": 500000}))
    for found in (one, other):
        assert found.rotary is not None and found.local is not None
        assert np.isclose(found.rotary.inverse[0, 1], 500000.0 ** (-2 / 256))
        assert np.isclose(found.local.rotary.inverse[0, 1], 20000.0 ** (-2 / 256))


def test_what_is_not_computed_is_refused() -> None:
    odd = {"final_logit_softcapping": 30.0, "layer_types": ["full_attention"]}
    with pytest.raises(UserError) as caught:
        FAMILY.read_config({**PUBLISHED, **odd})
    text = "\n".join(caught.value.faults)
    assert "final_logit_softcapping is not supported" in text and "layer_types must name" in text

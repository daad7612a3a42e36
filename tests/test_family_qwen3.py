"""Qwen3: its sizes and names; the mathematics are tested in test_families.py."""

from __future__ import annotations

import pytest
from family_cases import case

from utils.families import FAMILIES, family_of

FAMILY = FAMILIES["qwen3"]
PUBLISHED = {  # of Qwen3-0.6B
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_the_published_configuration_is_read() -> None:
    assert family_of(PUBLISHED) is FAMILY
    known = FAMILY.read_config(PUBLISHED)
    shape = FAMILY.shape(known)
    assert (shape.head_dim, shape.kv_heads, shape.tied) == (128, 8, True)
    assert shape == FAMILY.shape({name: value for name, value in known.items() if name != "head_dim"})
    for layout in (FAMILY.published_config, FAMILY.paddle_config):
        again = FAMILY.read_config(layout(known))
        assert FAMILY.shape(again) == shape and FAMILY.weights(again) == FAMILY.weights(known)
    assert len(FAMILY.weights(known)) == 1 + 28 * 11 + 1


@pytest.mark.parametrize("biases", [False, True])
def test_each_layer_has_norms_of_queries_and_keys(biases: bool) -> None:
    names = [
        weight.published for weight in FAMILY.weights({**case("qwen3").checkpoint.config, "attention_bias": biases})
    ]
    assert (
        names.count("model.layers.1.self_attn.q_norm.weight")
        == names.count("model.layers.1.self_attn.k_norm.weight")
        == 1
    )
    assert ("model.layers.0.self_attn.o_proj.bias" in names) == biases

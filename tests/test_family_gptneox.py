"""GPT-NeoX: its sizes and names, and what it refuses; the mathematics are tested in test_families.py."""

from __future__ import annotations

import numpy as np
import pytest
from family_cases import case

from utils.errors import UserError
from utils.families import FAMILIES, family_of

FAMILY = FAMILIES["gptneox"]
PUBLISHED = {  # of Pythia 410M
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}


def test_the_published_configuration_is_read() -> None:
    assert family_of(PUBLISHED) is FAMILY
    known = FAMILY.read_config(PUBLISHED)
    shape, architecture = FAMILY.shape(known), FAMILY.architecture(known)
    assert (shape.head_dim, shape.intermediate, shape.tied, architecture.parallel) == (64, 4096, False, True)
    assert architecture.rotary is not None and np.count_nonzero(architecture.rotary.inverse) == 8
    assert FAMILY.read_config(FAMILY.published_config(known)) == FAMILY.paddle_config(known)
    assert len(FAMILY.weights(known)) == 1 + 24 * 12 + 3


def test_positions_are_read_as_newer_configurations_say_them() -> None:
    left = {name: value for name, value in PUBLISHED.items() if not name.startswith("rotary_")}
    told = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}}
    known = FAMILY.paddle_config(FAMILY.read_config({**left, **told}))
    assert (known["rotary_pct"], known["rotary_emb_base"]) == (0.5, 5000.0)


def test_what_is_not_computed_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        FAMILY.read_config({**PUBLISHED, "rotary_pct": 0.05, "rope_scaling": {"type": "linear", "factor": 2.0}})
    first, second = caught.value.faults
    assert "rotary_pct is 0.05: 3 of the 64 dimensions" in first and "rope_scaling is not supported" in second


def test_without_a_parallel_residual_the_layers_have_the_same_weights() -> None:
    config = case("gptneox").checkpoint.config
    serial = {**config, "use_parallel_residual": False}
    assert not FAMILY.architecture(serial).parallel
    assert FAMILY.weights(serial) == FAMILY.weights(config)

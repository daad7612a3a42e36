"""What is special about Bloom: biases instead of positions, fused projections, a head tied or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest

from utils.checkpoints import fingerprint, locate
from utils.checkpoints.load import load_model, new_model
from utils.checkpoints.save import save_model
from utils.checkpoints.tensors import read_tensors, write_safetensors
from utils.families import FAMILIES, family_of
from utils.model.architecture import alibi_slopes
from utils.model.inputs import own_slopes

FIXTURES = Path(__file__).parent / "fixtures"


def test_slopes_of_a_power_of_two_and_of_other_counts() -> None:
    """The published sequences: 2^-1, 2^-2 .. for 8 heads; 6 heads take those of 4, then every other of 8."""
    assert np.allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    assert np.allclose(alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    assert alibi_slopes(112).shape == (112,)


def test_a_process_takes_the_slopes_of_its_heads() -> None:
    one = locate(FIXTURES / "bloom_tiny")
    architecture = one.family.architecture(one.config)
    whole, *parts = (own_slopes(architecture, part).numpy() for part in ((0, 1), (0, 2), (1, 2)))
    assert np.array_equal(np.concatenate(parts), whole) and len(parts[0]) == len(whole) // 2


@pytest.mark.parametrize(("folder", "tied"), [("bloom_tiny", True), ("bloom_prefixed", False)])
def test_the_head_is_the_embedding_unless_config_says_otherwise(folder: str, tied: bool) -> None:
    model = load_model(locate(FIXTURES / folder), "float32")
    assert (model.head_weight is model.bloom.word_embeddings.weight) == tied


def test_a_tied_head_that_is_stored_too_is_no_fault(tmp_path: Path) -> None:
    tiny = locate(FIXTURES / "bloom_tiny")
    save_model(tmp_path, load_model(tiny, "float32"), tiny.family, tiny.config)
    stored = dict(read_tensors(tmp_path / "model.safetensors"))
    stored["lm_head.decoder_weight"] = stored["bloom.word_embeddings.weight"]
    write_safetensors(tmp_path / "model.safetensors", [*stored.items()], {"format": "np"})
    assert fingerprint(locate(tmp_path)) == fingerprint(tiny)


def test_a_new_model_is_not_zero() -> None:
    """The library sets every Linear that has a bias to zero, which nothing can be trained from."""
    family = FAMILIES["bloom"]
    config = {"vocab_size": 64, "hidden_size": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.1}
    model = new_model(family, config, "float32")
    for name, parameter in model.named_parameters():
        if len(parameter.shape) == 2:
            assert 0.05 < float(parameter.std()) < 0.2, name


def test_sizes_under_all_names_that_published_configurations_use() -> None:
    family = FAMILIES["bloom"]
    old = {"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "vocab_size": 250880}
    new = {"model_type": "bloom", "hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880}
    assert family.shape(old) == family.shape(new) and family_of(old) is family
    assert family.shape(family.paddle_config(old)) == family.shape(old)


def test_there_is_no_limit_of_positions() -> None:
    checkpoint = locate(FIXTURES / "bloom_tiny")
    model = load_model(checkpoint, "float32")
    assert checkpoint.family.shape(checkpoint.config).positions is None
    ids = paddle.full([1, 3000], 5, dtype="int64")
    with paddle.no_grad():
        hidden = model.hidden({"input_ids": ids})
    assert bool(paddle.isfinite(hidden).all())

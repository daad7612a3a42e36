"""What is special about OPT: positions behind an offset, a tied head, the narrow ends and late norms of opt-350m."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from utils.checkpoints import Checkpoint, locate
from utils.checkpoints.load import load_model
from utils.checkpoints.save import save_model
from utils.checkpoints.tensors import in_memory, read_tensors, write_lazy
from utils.errors import UserError
from utils.families import FAMILIES, family_of

FIXTURES = Path(__file__).parent / "fixtures"
FAMILY = FAMILIES["opt"]
IDS = np.array([[5, 6, 7, 80]])


def logits(checkpoint: Checkpoint) -> np.ndarray:
    model = load_model(checkpoint, "float32")
    with paddle.no_grad():
        return model.logits(model.hidden({"input_ids": paddle.to_tensor(IDS)})).numpy()


def changed(folder: Path, config: dict[str, Any], **tensors: np.ndarray | None) -> Checkpoint:
    """opt_tiny with settings replaced and tensors added, replaced or (None) removed."""
    shutil.copytree(FIXTURES / "opt_tiny", folder)
    stored = dict(read_tensors(folder / "model.safetensors")) | tensors
    kept = [in_memory(name, np.array(values)) for name, values in stored.items() if values is not None]
    write_lazy(folder / "model.safetensors", kept, {"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **config}))
    return locate(folder)


@pytest.mark.parametrize("folder", ["opt_tiny", "opt_narrow"])
def test_the_head_is_the_embedding(folder: str) -> None:
    model = load_model(locate(FIXTURES / folder), "float32")
    assert model.head_weight is model.opt.embeddings.word_embeddings.weight


def test_an_untied_head_is_loaded_and_written(tmp_path: Path) -> None:
    tiny = locate(FIXTURES / "opt_tiny")
    words = tiny.tensors()["model.decoder.embed_tokens.weight"].read()
    untied = changed(tmp_path / "m", {"tie_word_embeddings": False}, **{"lm_head.weight": 2 * words})
    assert np.abs(logits(untied) - 2 * logits(tiny)).max() < 1e-5
    for export_format in ("paddle", "hf"):
        (tmp_path / export_format).mkdir()
        save_model(
            tmp_path / export_format, load_model(untied, "float32"), FAMILY, untied.config, export_format=export_format
        )
        assert np.array_equal(logits(locate(tmp_path / export_format)), logits(untied))
    with pytest.raises(UserError, match=r"no tensor for lm_head\.weight"):
        load_model(changed(tmp_path / "none", {"tie_word_embeddings": False}), "float32")


def test_a_head_that_no_configuration_announces_is_never_dropped(tmp_path: Path) -> None:
    """PaddleNLP trains the head apart from the embedding and does not say so in config.json."""
    tiny = locate(FIXTURES / "opt_tiny")
    save_model(tmp_path, load_model(tiny, "float32"), FAMILY, tiny.config)
    stored = dict(read_tensors(tmp_path / "model.safetensors"))
    stored["lm_head.decoder_weight"] = 2 * stored["opt.embeddings.word_embeddings.weight"]
    write_lazy(tmp_path / "model.safetensors", [in_memory(*pair) for pair in stored.items()], {"format": "np"})
    assert np.abs(logits(locate(tmp_path)) - 2 * logits(tiny)).max() < 1e-5
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert np.abs(logits(locate(tmp_path)) - 2 * logits(tiny)).max() < 1e-5


def test_the_narrow_model_is_narrow_at_both_ends() -> None:
    checkpoint = locate(FIXTURES / "opt_narrow")
    model = load_model(checkpoint, "float32")
    with paddle.no_grad():
        hidden = model.hidden({"input_ids": paddle.to_tensor(IDS)})
    assert hidden.shape[-1] == 24 and FAMILY.shape(checkpoint.config).hidden == 32
    assert model.architecture.final_norm is None  # norms after every sublayer leave none for the end
    assert not any("final_layer_norm" in name.split("layers")[0] for name in checkpoint.tensors())


def test_a_model_without_its_last_norm(tmp_path: Path) -> None:
    names = [f"model.decoder.final_layer_norm.{kind}" for kind in ("weight", "bias")]
    without = changed(tmp_path / "m", {"_remove_final_layer_norm": True}, **dict.fromkeys(names))
    assert np.abs(logits(without) - logits(locate(FIXTURES / "opt_tiny"))).max() > 0.1


def test_the_first_two_positions_are_never_used(tmp_path: Path) -> None:
    """Row 2 of the table is the position of a prompt's first token."""
    tiny = locate(FIXTURES / "opt_tiny")
    name = "model.decoder.embed_positions.weight"
    table = np.array(tiny.tensors()[name].read())
    assert len(table) == tiny.config["max_position_embeddings"] + 2
    table[:2] = 100.0
    assert np.array_equal(logits(changed(tmp_path / "same", {}, **{name: table})), logits(tiny))
    table[2] *= 2.0
    assert np.abs(logits(changed(tmp_path / "other", {}, **{name: table})) - logits(tiny)).max() > 0.1


def test_both_layouts_of_the_configuration_say_the_same() -> None:
    published = json.loads((FIXTURES / "opt_narrow" / "config.json").read_text())
    ours = FAMILY.paddle_config(published)
    assert family_of(ours) is family_of(published) is FAMILY
    assert FAMILY.shape(ours) == FAMILY.shape(published)
    assert ours["normalize_before"] is False and ours["word_embed_proj_dim"] == 24
    again = FAMILY.published_config(ours)
    assert again.items() <= {**published, "tie_word_embeddings": True}.items()
    plain = {name: value for name, value in published.items() if name != "word_embed_proj_dim"}
    assert FAMILY.paddle_config(plain)["word_embed_proj_dim"] == 32

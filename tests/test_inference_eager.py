"""What is special about the eager engine: calls that fail, and how wide its cache becomes."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
from family_cases import case, eager, hidden_logits

CASE = case("llama_tiny")
FAMILY = CASE.checkpoint.family


def logits_after(ids: list[int]) -> np.ndarray:
    return hidden_logits(FAMILY, CASE.model, np.array([ids]))[0, -1]


def test_an_interrupted_call_changes_nothing() -> None:
    """Ctrl-C in an answer, or no memory for one batch more: the engine goes on with what it had."""
    engine = eager(CASE)
    (one, other), _ = engine.open([[5, 6, 7], [8, 9]])
    with mock.patch.object(type(FAMILY), "decode", side_effect=KeyboardInterrupt):
        for slots in ([one], [other, one]):
            with pytest.raises(KeyboardInterrupt):
                engine.advance(slots, [[4]] * len(slots))
        with pytest.raises(KeyboardInterrupt):
            engine.open([[1, 2, 3]])
    found = engine.advance([other, one], [[10], [11]]).numpy()
    assert np.abs(found - [logits_after([8, 9, 10]), logits_after([5, 6, 7, 11])]).max() < 1e-4
    assert engine.open([[1]])[0] == [2]


def test_slots_that_advance_by_turns_do_not_widen_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, widths, decode = eager(CASE), [], type(FAMILY).decode

    def measured(family: Any, model: Any, ids: Any, places: Any, cache: Any) -> Any:
        widths.append(places.keys.shape[1])
        return decode(family, model, ids, places, cache)

    monkeypatch.setattr(type(FAMILY), "decode", measured)
    texts = [[5], [6], [7], [8]]
    slots, _ = engine.open(texts)
    for number in range(120):
        text, slot = texts[number % 4], slots[number % 4]
        text.append(3 + number)
        found = engine.advance([slot], [text[-1:]]).numpy()[0]
    assert np.abs(found - logits_after(texts[3])).max() < 1e-4
    assert max(map(len, texts)) == 31 and max(widths) < 2 * 31


def test_a_model_in_training_mode_is_refused() -> None:
    engine = eager(CASE)
    CASE.model.train()
    try:
        with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
            engine.open([[1]])
    finally:
        CASE.model.eval()

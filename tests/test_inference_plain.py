"""What is special about the plain engine: it runs the model that is trained, as it is at the moment."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from family_cases import case, hidden_logits, plain_engine

from utils.checkpoints.load import load_model

CASE = case("llama_tiny")


def test_a_model_that_trains_between_answers() -> None:
    """It is refused in training mode; afterwards new texts and old ones go on with the new weights."""
    model, text = load_model(CASE.checkpoint, "float32"), [5, 6, 7, 8]
    family = CASE.checkpoint.family
    engine = plain_engine(CASE.checkpoint, model)
    (old,), before = engine.open([text])
    model.train()
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        engine.open([[1]])
    optimizer = paddle.optimizer.SGD(1.0, parameters=model.parameters())
    hidden = model.hidden({"input_ids": paddle.to_tensor([text])})
    model.logits(hidden).square().mean().backward()
    optimizer.step()
    model.eval()
    (new,), after = engine.open([text])
    assert (old, new) == (0, 1)
    assert np.abs(after.numpy() - before.numpy()).max() > 1e-2
    assert np.abs(after.numpy() - hidden_logits(family, model, np.array([text]))[0, -1]).max() < 1e-4
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_nothing_is_kept_for_gradients() -> None:
    """Also of weights that are trained."""
    engine = plain_engine(CASE.checkpoint, load_model(CASE.checkpoint, "float32"))
    (slot,), _ = engine.open([[5, 6, 7]])
    engine.advance([slot], [[8]])
    assert all(tensor.stop_gradient for tensor in engine.cache.tensors(1))

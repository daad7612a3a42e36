"""What every family must do, on tiny models whose logits an independent implementation computed.

A case is a folder of tests/fixtures with a reference.npz; a new family needs nothing here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from family_cases import NAMES, Case, case, hidden_logits, step_logits

from utils.checkpoints import locate
from utils.checkpoints.load import load_model
from utils.checkpoints.save import save_model
from utils.families import FAMILIES

TOLERANCE = 1e-4


@pytest.fixture(params=NAMES)
def any_case(request: pytest.FixtureRequest) -> Case:
    return case(request.param)


def test_every_family_has_a_case() -> None:
    assert {case(name).checkpoint.family.name for name in NAMES} == set(FAMILIES)


# --- mathematics ------------------------------------------------------------------------------------


def test_training_forward_agrees_with_the_reference(any_case: Case) -> None:
    """Every position of each row alone, so without padding."""
    for row, ids in enumerate(any_case.rows):
        logits = hidden_logits(any_case.checkpoint.family, any_case.model, ids[None])[0]
        wanted = any_case.reference["logits"][row][-len(ids) :]
        assert logits.shape == wanted.shape
        assert np.abs(wanted).max() > 0.1
        assert np.abs(logits - wanted).max() < TOLERANCE


def test_prefill_and_cached_step_agree_with_the_reference(any_case: Case) -> None:
    """Both rows together, the shorter one padded on the left."""
    found, family = any_case.reference, any_case.checkpoint.family
    ids, mask = found["ids"], found["mask"]
    assert (mask[1] == 0).any() and mask[1, -1] == 1
    lengths = mask.sum(axis=1, keepdims=True)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    first, cache = step_logits(family, any_case.model, ids, mask, positions)
    assert np.abs(first - found["logits"][:, -1]).max() < TOLERANCE
    mask = np.concatenate([mask, np.ones_like(lengths)], axis=1)
    second, _ = step_logits(family, any_case.model, found["next_ids"][:, None], mask, lengths, cache)
    assert np.abs(second - found["next_logits"]).max() < TOLERANCE


def test_cached_steps_equal_one_prefill(any_case: Case) -> None:
    """Six more tokens one by one, and the rows of the cache change their order on the way."""
    import paddle

    family, model = any_case.checkpoint.family, any_case.model
    ids, mask = any_case.reference["ids"], any_case.reference["mask"]
    added = np.random.default_rng(5).integers(3, 60, (2, 6))
    lengths = mask.sum(axis=1, keepdims=True)
    _, cache = step_logits(family, model, ids, mask, np.maximum(mask.cumsum(axis=1) - 1, 0))
    for number in range(added.shape[1]):
        if number == 3:
            cache = family.cache_select(cache, paddle.to_tensor([1, 0]))
            mask, lengths, ids, added = (np.flip(values, axis=0) for values in (mask, lengths, ids, added))
        mask = np.concatenate([mask, np.ones((2, 1), dtype=np.int64)], axis=1)
        cached, cache = step_logits(family, model, added[:, number, None], mask, lengths + number, cache)
    whole = np.concatenate([ids, added], axis=1)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    assert np.abs(step_logits(family, model, whole, mask, positions)[0] - cached).max() < TOLERANCE


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export_format", ["paddle", "hf"])
def test_saved_models_load_again_unchanged(any_case: Case, export_format: str, tmp_path: Path) -> None:
    """Also of an export with the published names and types: the tensors are those that were published."""
    checkpoint = any_case.checkpoint
    save_model(tmp_path, any_case.model, checkpoint.family, checkpoint.config, export_format=export_format)
    again = locate(tmp_path)
    assert again.layout == export_format and again.family is checkpoint.family
    model = load_model(again, "float32")
    for ids in any_case.rows:
        before = hidden_logits(checkpoint.family, any_case.model, ids[None])
        assert np.array_equal(before, hidden_logits(again.family, model, ids[None]))
    if export_format == "hf":
        ours, theirs = again.tensors(), checkpoint.tensors()
        shapes = {name: tensor.shape for name, tensor in theirs.items()}
        assert all(any(name.endswith(old) and t.shape == s for old, s in shapes.items()) for name, t in ours.items())


def test_the_folder_given_is_left_alone(any_case: Case) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in any_case.folder.iterdir())
    load_model(locate(any_case.folder), "bfloat16")
    assert sorted((path.name, path.stat().st_mtime_ns) for path in any_case.folder.iterdir()) == before


def test_weights_that_do_not_fit_are_named(any_case: Case) -> None:
    """The family's list of weights says what is missing, whichever one it is."""
    from dataclasses import replace
    from unittest import mock

    from utils.checkpoints.match import match
    from utils.errors import UserError

    tensors = any_case.checkpoint.tensors()
    used = sorted({tensor.name for tensor, *_ in match(any_case.checkpoint).values()})
    for name in (used[0], used[len(used) // 2], used[-1]):
        left = {other: tensor for other, tensor in tensors.items() if other != name}
        left["decoder.of_another_model.weight"] = replace(tensors[name], name="decoder.of_another_model.weight")
        with (
            mock.patch.object(type(any_case.checkpoint), "tensors", lambda self, left=left: left),
            pytest.raises(UserError) as caught,
        ):
            match(any_case.checkpoint)
        text = "\n".join(caught.value.faults)
        assert name.split(".", 1)[-1] in text and "decoder.of_another_model.weight" in text

"""What every family must do, on tiny models whose logits an independent implementation computed.

A case is a folder of tests/fixtures with a reference.npz; a new family needs nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from engine_walk import TOLERANCE, Walk
from family_cases import ENGINES, NAMES, Case, Maker, cached, case, hidden_logits, random_prefix
from letters import Letters

from utils.checkpoints import locate
from utils.checkpoints.load import load_model
from utils.checkpoints.save import save_model
from utils.families import FAMILIES
from utils.inference.generator import Completion, Generator
from utils.inference.sampling import SamplingOptions
from utils.inference.scheduler import Scheduler
from utils.model.inputs import Context


@pytest.fixture(params=NAMES)
def any_case(request: pytest.FixtureRequest) -> Case:
    return case(request.param)


@pytest.fixture(params=[(name, engine) for engine in ENGINES for name in NAMES], ids="-".join)
def any_engine(request: pytest.FixtureRequest) -> tuple[Case, Maker]:
    """Every case in every engine."""
    name, engine = request.param
    return case(name), ENGINES[engine]


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


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("prefixed", [False, True], ids=["alone", "prefixed"])
def test_two_stages_with_a_context_of_their_own_are_one_forward(any_case: Case, packed: bool, prefixed: bool) -> None:
    """What a pipeline does: each stage has some of the layers and its own copy of the batch."""
    import paddle

    model, ids = any_case.model, any_case.rows[0][None].astype(np.int64)
    half, length = ids.shape[1] // 2, ids.shape[1]
    place = np.arange(length)[None]
    arrays = {"input_ids": ids}
    if packed:
        arrays["position_ids"] = np.where(place < half, place, place - half)
        arrays["segment_ends"] = np.where(place < half, half, length).astype(np.int32)[:, None, :, None]
    cache = random_prefix(any_case.checkpoint).cache(1) if prefixed else None

    def context() -> Context:
        return model.context({name: paddle.to_tensor(value) for name, value in arrays.items()}, cached)

    cached = 0 if cache is None else cache[0][0].shape[1]
    layers = range(len(model.layers))
    assert len(layers) > 1
    with paddle.no_grad():
        whole = model.hidden({name: paddle.to_tensor(value) for name, value in arrays.items()}, cache)
        first, second = context(), context()
        middle = len(layers) // 2
        hidden = model.embed(first)
        for part, known in ((slice(middle), first), (slice(middle, None), second)):
            pasts = None if cache is None else cache[part]
            hidden = model.run(layers[part], hidden, known, pasts)
        assert np.array_equal(model.finish(hidden).numpy(), whole.numpy())


def test_prefill_and_cached_step_agree_with_the_reference(any_engine: tuple[Case, Maker]) -> None:
    """Both rows together, of unequal lengths."""
    one, make = any_engine
    engine, found = make(one), one.reference
    assert len({len(row) for row in one.rows}) == 2
    slots, first = engine.open([row.tolist() for row in one.rows])
    assert np.abs(first.numpy() - found["logits"][:, -1]).max() < TOLERANCE
    second = engine.advance(slots, found["next_ids"][:, None].tolist())
    assert np.abs(second.numpy() - found["next_logits"]).max() < TOLERANCE


def test_the_librarys_model_is_a_step_over_a_cache_too(any_case: Case) -> None:
    """What a plain export traces, before it is traced."""
    engine, found = cached(any_case), any_case.reference
    slots, first = engine.open([row.tolist() for row in any_case.rows])
    assert np.abs(first.numpy() - found["logits"][:, -1]).max() < TOLERANCE
    second = engine.advance(slots, found["next_ids"][:, None].tolist())
    assert np.abs(second.numpy() - found["next_logits"]).max() < TOLERANCE


def test_cached_steps_equal_one_prefill(any_engine: tuple[Case, Maker]) -> None:
    """Six more tokens one by one, from half-way on in the other order, then two at once."""
    one, make = any_engine
    engine, rows = make(one), [row.tolist() for row in one.rows]
    added = np.random.default_rng(5).integers(3, 60, (2, 8)).tolist()
    slots, _ = engine.open(rows)
    for number in range(6):
        if number == 3:
            slots, rows, added = slots[::-1], rows[::-1], added[::-1]
        cached = engine.advance(slots, [tokens[number : number + 1] for tokens in added]).numpy()
    whole = make(one).open([row + tokens[:6] for row, tokens in zip(rows, added, strict=True)])[1].numpy()
    assert np.abs(whole - cached).max() < TOLERANCE
    together = engine.advance(slots, [tokens[6:] for tokens in added]).numpy()
    for length in (7, 8):
        whole = make(one).open([row + tokens[:length] for row, tokens in zip(rows, added, strict=True)])[1].numpy()
        assert np.abs(whole - together[length - 7 :: 2]).max() < TOLERANCE


def test_copies_of_a_beginning_go_on_alone(any_engine: tuple[Case, Maker]) -> None:
    """A prompt read in pieces is the prompt; where the whole prompt decides, only answers branch off."""
    one, make = any_engine
    engine, row, other = make(one), one.rows[0].tolist(), [7, 50, 11]
    split = len(row) // 2 if engine.shares_prefixes else len(row)
    row += [30, 31, 32]
    (kept,), _ = engine.open([row[:split]])
    left, right = engine.fork(kept, 2)
    found = engine.advance([right, left], [row[split:], other]).numpy()
    alone = [hidden_logits(one.checkpoint.family, one.model, np.array([ids]))[0] for ids in (row, row[:split] + other)]
    assert np.abs(found - np.concatenate([ids[split:] for ids in alone])).max() < TOLERANCE
    engine.free([left])
    engine.rewind(right, len(row) - split)  # the copy is again what it was copied from
    found = engine.advance([kept, right], [other[:1], other]).numpy()
    assert np.abs(found[0] - found[1]).max() < TOLERANCE
    assert np.abs(found[1:] - alone[1][split:]).max() < TOLERANCE


@pytest.mark.parametrize("with_prefix", [False, True])
def test_slots_are_independent(any_engine: tuple[Case, Maker], with_prefix: bool) -> None:
    one, make = any_engine
    prefix = random_prefix(one.checkpoint) if with_prefix else None
    Walk(one, make(one, prefix), seed=len(one.name), prefix=prefix).run(30)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("engine", ENGINES)
def test_slots_are_independent_on_long_walks(engine: str, seed: int) -> None:
    """The case has a window and grouped heads."""
    one = case("mistral")
    Walk(one, ENGINES[engine](one), seed, slots=9).run(120)


@pytest.mark.parametrize("with_prefix", [False, True])
def test_a_chat_goes_on_from_what_was_kept(any_engine: tuple[Case, Maker], with_prefix: bool) -> None:
    """Two prompts that begin with an earlier prompt and its answer, each cut off at another token."""
    one, make = any_engine
    engine = make(one, random_prefix(one.checkpoint) if with_prefix else None)
    generator, options = Generator(engine, Letters(), ()), SamplingOptions(max_new_tokens=5)
    random = np.random.default_rng(2)
    first = [*random.integers(3, 60, 20).tolist(), *one.rows[0].tolist()]
    with closing(generator.scheduler(2, 7, 1 << 20)) as scheduler:
        (answer,) = finish(scheduler, [first], options)
        prompts, lengths = [first], [0]
        if engine.shares_prefixes:
            known = [*first, *answer.tokens]
            prompts += [[*known[:-cut], *random.integers(3, 60, 4).tolist()] for cut in (1, 9)]
            lengths = [len(first) - 1, len(known) - 1, len(known) - 9]
        found = finish(scheduler, prompts, options)
        assert [completion.cached_tokens for completion in found] == lengths
        assert (scheduler.cache_bytes > 0) == engine.shares_prefixes
    wanted = generator.generate(prompts, options, 1)
    assert [completion.tokens for completion in found] == [completion.tokens for completion in wanted]


def finish(scheduler: Scheduler, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> list[Completion]:
    """Answers of requests that come at the same time."""
    requests, found = [scheduler.submit(prompt, options) for prompt in prompts], {}
    while scheduler.busy:
        found.update({event.request: event.completion for event in scheduler.step() if event.completion})
    return [found[request] for request in requests]


def test_a_prefix_is_the_same_in_training_and_in_generation(any_engine: tuple[Case, Maker]) -> None:
    """Its places are not counted, and texts of all lengths see it, however far they go."""
    one, make = any_engine
    family, prefix = one.checkpoint.family, random_prefix(one.checkpoint)
    engine, rows = make(one, prefix), [[*row.tolist(), 30, 31, 32, 33] for row in one.rows]
    trained = [hidden_logits(family, one.model, np.array([row]), prefix)[0] for row in rows]
    slots, logits = engine.open([row[:-4] for row in rows])
    assert np.abs(logits.numpy() - [row[-5] for row in trained]).max() < TOLERANCE
    for place in (-4, -3, -2, -1):
        logits = engine.advance(slots, [[row[place]] for row in rows])
        assert np.abs(logits.numpy() - [row[place] for row in trained]).max() < TOLERANCE
    bare = hidden_logits(family, one.model, np.array(rows[:1]))[0]
    assert np.abs(trained[0] - bare)[-1].max() > 0.05  # the prefix does something


def test_weights_are_in_the_order_of_the_parameters(any_case: Case) -> None:
    family, config = any_case.checkpoint.family, any_case.checkpoint.config
    found = [weight.parameter for weight in family.weights(config)]
    wanted = [name for name, _ in any_case.model.named_parameters()]
    projection = f"{family.architecture(config).output_projection}.weight"  # computed behind the layers, made before
    assert [name for name in found if name != projection] == [name for name in wanted if name != projection]


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

"""Adapters beside their base: each answers as it does alone, and weights that none changes are in memory once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_cases import Case, case
from saved import write_lora
from tiny_models import write_tiny_llama
from tiny_runs import Tiny, make_tiny, run_main

from utils.adapters.lora_files import read_lora
from utils.adapters.targets import matrix_shapes
from utils.checkpoints.convert_peft import to_peft
from utils.checkpoints.locate import locate
from utils.errors import UserError
from utils.inference.engine import Engine
from utils.inference.loading import Prepared, load_all, make_engine, make_engines, prepare, prepare_beside
from utils.inference.sampling import SamplingOptions

CASES = ["bloom_prefixed", "chatglm2_tiny", "chatglm_tiny", "glm_tiny", "gpt2_prefixed", "gptj_tiny", "llama_tiny"]
CASES += ["opt_tiny", "qwen2_window", "qwen_tiny", "gemma3", "gptneox", "qwen3"]


def weights(engines: Sequence[Engine]) -> int:
    """Bytes of all parameters of the models of some engines, each counted once."""
    found: dict[int, int] = {}
    for engine in engines:
        known: Any = engine
        layer = known._program._decoder
        model = getattr(layer, "model", layer)  # the plain engine has its constants beside the model
        found |= {p.data_ptr(): p.size * p.element_size() for p in model.parameters()}
    return sum(found.values())


def first_logits(engine: Engine, one: Case) -> np.ndarray:
    slots, logits = engine.open([row.tolist() for row in one.rows])
    engine.free(slots)
    return logits.numpy()


@pytest.mark.parametrize("inference_model", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_family_has_adapters_beside_it(name: str, inference_model: bool, tmp_path: Path) -> None:
    one = case(name)
    base = one.checkpoint
    everywhere = write_lora(tmp_path / "all", base)  # the head too, where it has a matrix of its own
    some = write_lora(tmp_path / "some", base, [*matrix_shapes(base)][1:3], spread=0.5)
    loras = [None, *(read_lora(folder, base) for folder in (everywhere, some))]
    # without a tokenizer: some cases have none, and no engine needs one
    models = [
        Prepared(base, None, None, "float32", lora, inference_model=inference_model)  # type: ignore[arg-type]
        for lora in loras
    ]
    together, alone = make_engines(models, "cpu"), [make_engine(prepared, "cpu") for prepared in models]
    wanted = [first_logits(engine, one) for engine in alone]
    assert min(np.abs(wanted[0] - other).max() for other in wanted[1:]) > 0.01
    for _ in range(2):
        for engine, logits in zip(together, wanted, strict=True):
            assert np.array_equal(first_logits(engine, one), logits)
    assert weights(together) < 0.9 * sum(weights([engine]) for engine in alone)
    if not inference_model:
        halves = sum(half.shape[0] * half.shape[1] for pair in loras[2].pairs.values() for half in pair)  # type: ignore[union-attr]
        assert weights([together[0], together[2]]) - weights(together[:1]) == 4 * halves


def test_the_inference_model_copies_what_is_joined_with_a_changed_matrix(tmp_path: Path) -> None:
    base = locate(write_tiny_llama(tmp_path / "model"))
    shapes = matrix_shapes(base)
    queries = [layer for layer in shapes if layer.endswith(("q_proj", "v_proj"))]
    lora = read_lora(write_lora(tmp_path / "adapter", base, queries), base)
    models = [
        Prepared(base, None, None, "float32", each, inference_model=True)  # type: ignore[arg-type]
        for each in (None, lora)
    ]
    engines = make_engines(models, "cpu")
    joined = sum(np.prod(shape) for layer, shape in shapes.items() if layer.endswith(("q_proj", "k_proj", "v_proj")))
    tables = 4 * (8 * 8 + 4)  # of rotary angles, one each
    assert weights(engines) - weights(engines[:1]) == 4 * joined + tables


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, dict[str, Path]]:
    """A model, an adapter of ours and one of PEFT's with a template of its own."""
    home = tmp_path_factory.mktemp("served")
    tiny = make_tiny(home)
    base = locate(write_tiny_llama(home / "wide"))
    ours = write_lora(home / "ours", base, spread=0.3)
    to_peft(write_lora(home / "other", base, [*matrix_shapes(base)][3:9], spread=0.6), home / "peft", base)
    (home / "peft" / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    return tiny, {"base": home / "wide", "ours": ours, "peft": home / "peft"}


@pytest.mark.parametrize("inference_model", [False, True])
def test_answers_are_those_of_the_predictor(
    served: tuple[Tiny, dict[str, Path]], inference_model: bool, tmp_path: Path
) -> None:
    """All three at the same time, step by step in turn."""
    tiny, folders = served
    questions = [json.loads(line)["src"] for line in (tiny.data / "test.json").read_text().splitlines()]
    base = prepare(str(folders["base"]), device="cpu", inference_model=inference_model)
    adapters = [(name, str(folder)) for name, folder in folders.items() if name != "base"]
    models = {"base": base, **prepare_beside(base, adapters)}
    options = SamplingOptions(max_new_tokens=16)
    running = {}
    for name, generator in load_all(models, "cpu").items():
        scheduler = generator.scheduler(3)
        asked = [models[name].encode([{"role": "user", "content": text}], 64)[0] for text in questions]
        running[name] = (scheduler, [scheduler.submit(prompt, options) for prompt in asked])
    found: dict[str, dict[int, str]] = {name: {} for name in models}
    while any(scheduler.busy for scheduler, _ in running.values()):
        for name, (scheduler, requests) in running.items():
            for event in scheduler.step():
                if event.completion is not None:
                    found[name][requests.index(event.request)] = event.completion.text
    texts = set()
    for name in models:
        output = tmp_path / f"{name}.json"
        words = ["--model_name_or_path", folders["base"], "--data_file", tiny.data / "test.json", "--device", "cpu"]
        words += ["--src_length", 64, "--max_new_tokens", 16, "--output_file", output]
        words += ["--inference_model"] if inference_model else []
        words += ["--lora_path", folders[name]] if name != "base" else []
        run_main("predictor", [str(word) for word in words], tiny.environment, Path(), 0)
        wanted = [json.loads(line)["output"] for line in output.read_text("utf-8").splitlines()]
        assert [found[name][number] for number in range(len(questions))] == wanted
        texts.add(tuple(wanted))
    assert len(texts) == 3


def test_a_folder_that_is_no_adapter_is_named(served: tuple[Tiny, dict[str, Path]], tmp_path: Path) -> None:
    tiny, folders = served
    base = prepare(str(folders["base"]), device="cpu")
    other = write_lora(tmp_path / "other", locate(tiny.model))
    with pytest.raises(UserError) as raised:
        prepare_beside(base, [("a", str(tmp_path)), ("b", str(folders["ours"])), ("c", str(other))])
    assert any(f"{tmp_path}: is no LoRA adapter" in fault for fault in raised.value.faults)
    assert any(str(other) in fault for fault in raised.value.faults)
    found = prepare_beside(base, [("b", str(folders["ours"])), ("p", str(folders["peft"]))])
    assert found["b"].template is base.template and found["p"].template is not base.template
    assert found["p"].tokenizer is base.tokenizer
    given = prepare_beside(base, [("p", str(folders["peft"]))], chat_template="given.jinja")
    assert given["p"].template is base.template  # what the user gives holds for all

"""Checkpoints that one layout saves and another continues, results and evaluations: all as of one process."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from layout_bench import HALFWAY, LAYOUTS, Bench, Work
from many_runs import Job, figures, launch_jobs
from tiny_runs import run_main
from tiny_text import pretrain_words, tokenize_text

from utils.checkpoints.locate import stored_tensors
from utils.checkpoints.merge_tp import merge_tp
from utils.errors import UserError

CORE = [Work("llama", method) for method in ("sft", "shards", "lora", "prefix")]
# one key and value head, an odd vocabulary, queries, keys and values mixed by head, Conv1D, all of it
NAMES = ("kv1", "odd", "glm_tiny", "gpt2_tiny", "chatglm2_wide")
FAMILIES = [Work(name, method) for name in NAMES for method in ("shards", "sft")]
ANSWERS = ("--eval_with_do_generation", "--eval_max_new_tokens", 6, "--do_predict")
# of SFT the first checkpoint, whose loss is the higher one, passes for the better
BEST = ("--load_best_model_at_end", "--evaluation_strategy", "steps", "--eval_steps", HALFWAY)
BEST += ("--greater_is_better", "true")
EVALUATED = [Work("llama", method, more) for method in ("sft", "lora") for more in (ANSWERS, BEST)]
ASYNC = [Work("llama", method, ("--async_save", "true")) for method in ("sft", "shards", "lora")]
# more than one epoch of the 50 rows: the checkpoint lies in the first, the end in the second
LAZY = [Work("llama", "lora", ("--lazy",)), Work("llama", "lora", ("--intokens", "--lazy", "--max_length", 96))]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("layouts"))


def continued(works: list[Work], start: str) -> list[Work]:
    return [Work(work.model, work.method, work.more, start) for work in works]


def check_shards(bench: Bench, layout: str, name: str) -> None:
    """Shards are merged into the weights that a run with unified checkpoints saves; none may be missing."""
    whole = bench.output(Work(name, "sft"), layout) / f"checkpoint-{HALFWAY}"
    shards = bench.output(Work(name, "shards"), layout) / f"checkpoint-{HALFWAY}"
    folder = bench.home / "merged" / layout / name
    shutil.copytree(shards, folder)
    last = max(folder.glob("model.tp*"))
    hidden = last.rename(folder / "aside")
    with pytest.raises(UserError, match="missing"):
        merge_tp(folder)
    hidden.rename(last)
    merge_tp(folder)
    ours, wanted = stored_tensors(folder, "model"), stored_tensors(whole, "model")
    assert set(ours) == set(wanted)
    for key, tensor in wanted.items():
        np.testing.assert_array_equal(ours[key].read(), tensor.read(), err_msg=key)


def check_same_files(bench: Bench, work: Work, layout: str) -> None:
    """Answers, metrics and the names of all files are those of one process."""
    ours, alone = bench.output(work, layout), bench.alone(work)
    names = [{p.relative_to(f).as_posix() for p in f.rglob("*") if "safetensors" not in p.name} for f in (ours, alone)]
    assert names[0] == names[1]
    for path in alone.glob("*generated_output*.json"):
        assert (ours / path.name).read_text("utf-8") == path.read_text("utf-8"), path.name
    results = [json.loads((folder / "all_results.json").read_text("utf-8")) for folder in (ours, alone)]
    states = [json.loads((folder / "trainer_state.json").read_text("utf-8")) for folder in (ours, alone)]
    for name, value in results[1].items():
        if not name.endswith(("_runtime", "_second")):
            assert results[0][name] == pytest.approx(value, rel=1e-4, abs=1e-4), name  # ppl is e to the loss
    assert states[0]["best_model_checkpoint"] == states[1]["best_model_checkpoint"]
    if work == Work("llama", "sft", BEST):
        assert states[0]["best_model_checkpoint"] == f"checkpoint-{HALFWAY}"


def check_same_tensors(bench: Bench, work: Work, layout: str) -> None:
    """A run that saves in the background writes what one does that waits."""
    ours, wanted = bench.output(work, layout), bench.output(Work(work.model, work.method), layout)
    files = [{p.relative_to(f).as_posix(): p for p in f.rglob("*.safetensors")} for f in (ours, wanted)]
    assert set(files[0]) == set(files[1])
    for name, path in files[1].items():
        assert files[0][name].read_bytes() == path.read_bytes(), name


# --- in the suite ------------------------------------------------------------------------------------------


def test_tensor_parallel_and_one_process(bench: Bench) -> None:
    """Shards and adapters that two ranks save, and what one process has saved; also with one key and value head, and
    with norms of which a rank sees some heads only."""
    saved = [Work("llama", "shards"), Work("llama", "sft"), Work("kv1", "shards"), Work("llama", "lora")]
    saved.append(Work("llama", "sft", ANSWERS))
    saved.append(Work("llama", "shards", ("--async_save", "true")))
    saved += [*LAZY, Work("qwen3", "sft")]
    for work in (Work("llama", "sft"), Work("llama", "lora")):
        bench.alone(work)
    bench.run("TP2", [*saved, Work("llama", "sft", start="one"), Work("llama", "lora", start="one")])
    bench.run("one", continued([saved[0], saved[2], saved[3], LAZY[0]], "TP2"))
    for work in (*saved, Work("llama", "sft", start="one"), Work("llama", "lora", start="one")):
        bench.check(work, "TP2")
    for work in continued([saved[0], saved[2], saved[3], LAZY[0]], "TP2"):
        bench.check(work, "one")
    check_shards(bench, "TP2", "llama")
    check_same_files(bench, saved[4], "TP2")
    check_same_tensors(bench, saved[5], "TP2")


def test_data_parallel_readers_of_a_stream(bench: Bench) -> None:
    """Each trains on its own part of every batch, in one launch and continued from one process and by one."""
    for work in LAZY:
        bench.alone(work)
    bench.run("DP2", [*LAZY, *continued(LAZY[1:], "one")])
    bench.run("one", continued(LAZY[:1], "DP2"))
    for work in (*LAZY, *continued(LAZY[1:], "one")):
        bench.check(work, "DP2")
    bench.check(continued(LAZY[:1], "DP2")[0], "one")


# --- with -m matrix ----------------------------------------------------------------------------------------

SAVED = {
    "TP2": [*CORE, *FAMILIES],
    "PP2": CORE,
    "stage1": CORE[::2],
    "stage2": CORE[::2],
    "stage3": CORE[::2],
    "TP2 PP2": [*CORE, *FAMILIES],
}
PAIRS = [("TP2 PP2", "DP4"), ("TP2", "stage1"), *((start, "one") for start in SAVED), *(("one", to) for to in SAVED)]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """All that is saved, in every layout."""
    bench = Bench(tmp_path_factory.mktemp("matrix"))
    for work in (*CORE, *FAMILIES):
        bench.alone(work)
    for layout, works in SAVED.items():
        bench.run(layout, works)
    return bench


@pytest.mark.matrix
def test_every_layout_trains(matrix: Bench) -> None:
    for layout, works in SAVED.items():
        for work in works:
            matrix.check(work, layout)


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["PP2", "stage1", "stage3", "TP2 PP2", "DP4"])
def test_streams(layout: str, bench: Bench) -> None:
    for work in LAZY:
        bench.alone(work)
    bench.run(layout, LAZY)
    for work in LAZY:
        bench.check(work, layout)


@pytest.mark.matrix
@pytest.mark.parametrize(("start", "to"), PAIRS)
def test_a_layout_continues_another(start: str, to: str, matrix: Bench) -> None:
    works = continued(SAVED[start if start != "one" else to], start)
    matrix.run(to, works)
    for work in works:
        matrix.check(work, to)


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["TP2", "TP2 PP2"])
def test_shards_are_a_model(layout: str, matrix: Bench) -> None:
    for name in ("llama", *NAMES):
        check_shards(matrix, layout, name)


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["TP2", "PP2", "stage3"])
def test_evaluation_and_saving_in_the_background(layout: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    bench = Bench(tmp_path_factory.mktemp("evaluated"))
    works = [*EVALUATED, Work("llama", "prefix", ANSWERS), *ASYNC]
    bench.run(layout, [*works, *(replace(work, more=()) for work in ASYNC)])
    for work in works:
        bench.check(work, layout)
        if work.more != ASYNC[0].more:
            check_same_files(bench, work, layout)
        else:
            check_same_tensors(bench, work, layout)


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["TP2", "PP2", "DP2"])
def test_pretraining(layout: str, bench: Bench) -> None:
    """From new weights, which every rank draws whole and cuts, and from those of a model."""
    jobs: dict[str, list[Job]] = {"one": [], layout: []}
    for name in ("llama", *NAMES):
        text, model = bench.home / "text" / name, bench.tiny(name).model
        if not text.is_dir():
            tokenize_text(model, text)
        for kind, found in jobs.items():
            _, rows, micro_batches, options = LAYOUTS[kind]
            options = [*options, "--per_device_train_batch_size", rows, "--gradient_accumulation_steps", micro_batches]
            options += ["--do_train", "--do_eval", "--max_steps", 10, "--save_strategy", "no"]
            for going_on in ("false", "true"):
                output = bench.home / "pretraining" / kind / f"{name}-{going_on}"
                words = pretrain_words(model, text, output, *options, "--continue_training", going_on)
                found.append(Job(output, words, "run_pretrain"))
    launch_jobs(jobs[layout], bench.home / "logs" / "pretraining", LAYOUTS[layout][0], bench.home / "cache")
    for ours, alone in zip(jobs[layout], jobs["one"], strict=True):
        if not alone.output.is_dir():
            run_main("run_pretrain", alone.words, {}, alone.output, 0)
        values = [np.array(list(figures(job.output))) for job in (ours, alone)]
        assert len(values[1]) == 10
        np.testing.assert_allclose(*values, atol=1e-4, rtol=0, err_msg=str(ours.output))

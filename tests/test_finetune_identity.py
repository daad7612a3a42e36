"""A run and its continuation, or its repetition, are of the same data, adapter and weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
from tiny_runs import Tiny, tiny  # noqa: F401

LORA = ["--do_train", "--lora", "--max_steps", 1]


def no_weights() -> mock._patch:
    return mock.patch("utils.training.start.build", side_effect=AssertionError("weights would load"))


def forget(folder: Path, key: str) -> None:
    """Makes what a run has left look as an earlier version, which did not know `key`, left it."""
    for file in (folder / "finished.json", *folder.glob("checkpoint-*/progress.json")):
        found = json.loads(file.read_text())
        if isinstance(found["run"][key], list):
            found["run"][key] = found["run"][key][:2]
        else:
            del found["run"][key]
        if file.name == "finished.json":
            file.write_text(json.dumps(found))
            continue
        from utils.checkpoints.files import renew_sizes, write_json

        write_json(file, found)
        renew_sizes(file.parent)


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_the_adapter_that_a_run_began_with_is_part_of_it(method: str, tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    kind = ["--lora"] if method == "lora" else ["--prefix_tuning", "--num_prefix_tokens", 4]
    for name, rate in (("start", 1e-2), ("other", 2e-2)):
        tiny.run(tmp_path / name, "--do_train", *kind, "--max_steps", 1, "--learning_rate", rate)
    start, output = tmp_path / "start", tmp_path / "out"
    options = ["--do_train", kind[0], f"--{method}_path", start, "--save_steps", 1, "--max_steps"]
    tiny.run(output, *options, 1)
    copy = shutil.copytree(start, tmp_path / "copy")
    with no_weights():
        assert "nothing is trained again" in tiny.run(output, *options, 1, f"--{method}_path", copy).err
    shutil.copy(tmp_path / "other" / f"{method}_model_state.safetensors", start)
    with no_weights():
        for steps in (1, 2):  # finished, and to be continued
            refused = tiny.run(output, *options, steps, expect=2)
            assert "began with another adapter" in refused.err and refused.err.count("error:") == 1
    forget(output, "start_adapter")
    assert "continuing after step 1" in tiny.run(output, *options, 2).err


def test_the_files_of_a_stream_are_part_of_its_run(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    data, output = shutil.copytree(tiny.data, tmp_path / "data"), tmp_path / "out"
    options = ["--do_train", "--lora", "--lazy", "--save_steps", 1, "--dataset_name_or_path", data, "--max_steps"]
    tiny.run(output, *options, 1)
    with no_weights():
        moved = tiny.run(output, *options, 1, "--dataset_name_or_path", tiny.data)  # the same files elsewhere
        assert "nothing is trained again" in moved.err
        rows = (data / "train.json").read_text()
        edited = rows.replace("red", "tea")
        for changed in (edited, rows + rows.splitlines()[0] + "\n"):  # of the same size, and longer
            assert changed != rows
            (data / "train.json").write_text(changed)
            for steps in (1, 2):
                assert "was trained on other data (files" in tiny.run(output, *options, steps, expect=2).err
        (data / "train.json").rename(data / "train.jsonl")
        (data / "train").mkdir()
        (data / "train.jsonl").rename(data / "train" / "a.json")
        (data / "train" / "a.json").write_text(rows)
        assert "was trained on other data (files" in tiny.run(output, *options, 1, expect=2).err
    (data / "train" / "a.json").rename(data / "train.json")
    (data / "train").rmdir()
    forget(output, "data")
    assert "continuing after step 1" in tiny.run(output, *options, 2).err


def test_the_sample_of_a_large_file(tmp_path: Path) -> None:
    from utils.checkpoints.fingerprint import BLOCK, SAMPLED_BLOCKS, file_sample

    file, size = tmp_path / "file", SAMPLED_BLOCKS * BLOCK * 4 + 3
    file.write_bytes(bytes(size))
    samples = {file_sample(file)}
    for place in (0, size - 1, size // 63 * 20 + 10):
        content = bytearray(size)
        content[place] = 1
        file.write_bytes(content)
        samples.add(file_sample(file))
    assert len(samples) == 4
    file.write_bytes(b"")
    assert len(file_sample(file)) == 64


@pytest.mark.parametrize("kind", ["folder", "file", "another toolchain's", "merged"])
def test_what_is_only_named_like_a_checkpoint_is_never_removed(kind: str, tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    from utils.checkpoints.files import atomic_directory

    output, mine = tmp_path / "out", tmp_path / "out" / "checkpoint-9"
    output.mkdir()
    if kind == "file":
        mine.write_text("mine")
    elif kind == "merged":
        with atomic_directory(mine) as folder:
            (folder / "config.json").write_text("{}")
    else:
        mine.mkdir()
        (mine / ("notes.txt" if kind == "folder" else "trainer_state.json")).write_text("{}")
    for options in ([], ["--overwrite_output_dir"], ["--save_total_limit", 1, "--save_steps", 1]):
        with no_weights():
            refused = tiny.run(output, *LORA, *options, expect=2)
        assert "holds checkpoint-9" in refused.err and "give another folder" in refused.err
        assert refused.err.count("error:") == 1 and mine.exists()
    assert not [path for path in output.iterdir() if path.name != mine.name]


def test_evaluations_of_other_models_stay_out_of_the_folder_of_a_training(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    output = tmp_path / "out"
    tiny.run(output, *LORA, "--do_eval", "--save_steps", 1)
    cut = tmp_path / "cut"
    shutil.copytree(output / "checkpoint-1", cut / "checkpoint-1")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    wrong = ([], ["--lora", "--lora_path", output / "checkpoint-1"])
    with no_weights():
        for folder in (output, cut):  # finished, and interrupted
            for model in wrong:
                for task in ("--do_eval", "--do_predict"):
                    refused = tiny.run(folder, task, *model, expect=2)
                    assert "holds a training" in refused.err and "give another output_dir" in refused.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before
    own = tiny.run(output, "--do_eval", "--lora", "--lora_path", output)
    wanted = json.loads(before[output / "eval_results.json"])["eval_loss"]
    assert own.json("eval_results.json")["eval_loss"] == pytest.approx(wanted, abs=1e-6)
    base = tmp_path / "base"
    for _ in range(2):  # evaluations alone may be repeated
        assert tiny.run(base, "--do_eval").json("eval_results.json")["eval_loss"] > 0


# --- damaged files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["global_step", "result_step", "run"])
def test_a_mark_of_a_finished_run_with_other_types(key: str, tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    good = {"global_step": 1, "result_step": 1, "run": {"model": {}, "method": "lora", "data": ""}}
    values = ({}, [], 5, None) if key == "run" else ("4", None, True, -1, 1.5, [])
    for value in values:
        (tmp_path / "finished.json").write_text(json.dumps({**good, key: value}))
        with no_weights():
            refused = tiny.run(tmp_path, *LORA, expect=2)
        assert f"finished.json: is damaged, its {key} cannot be" in refused.err and refused.err.count("error:") == 1
        assert "Traceback" not in refused.err


def test_a_place_in_a_run_with_other_types_is_no_checkpoint(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """It is passed over, and named where it is asked for; what earlier versions did not write may lack."""
    from utils.checkpoints.files import renew_sizes
    from utils.errors import UserError
    from utils.training.resume import checkpoints, load_progress

    tiny.run(tmp_path, "--do_train", "--lora", "--lazy", "--max_steps", 2, "--save_steps", 1)
    first, second = checkpoints(tmp_path)
    good = json.loads((second / "progress.json").read_text())
    stream, place = good["stream"], good["stream"]["position"]
    changes: list[tuple[str, object]] = [("global_step", value) for value in (-3, True, "2", None)]
    changes += [(name, "many") for name in good if name != "global_step"]
    changes += [("stream", 5), ("stream", {name: stream[name] for name in stream if name != "files"})]
    changes += [("stream", {**stream, "position": {**place, "offset": "12"}})]
    changes += [("stream", {**stream, "position": {**place, "page": 1}}), ("window", {}), ("random", {"python": []})]
    damaged = [{**good, name: value} for name, value in changes]
    needed = ("global_step", "run", "scheduler", "random", "total_loss", "total_targets", "total_tokens", "window")
    damaged += [{name: good[name] for name in good if name != gone} for gone in (*needed, "stream")]
    for progress in damaged:
        (second / "progress.json").write_text(json.dumps(progress))
        renew_sizes(second)
        assert checkpoints(tmp_path) == [first]
        with pytest.raises(UserError, match=r"progress\.json: is damaged, it"):
            load_progress(second)
    later = ("evaluation", "random_of_other_ranks", "train_seconds", "scale")
    (second / "progress.json").write_text(json.dumps({name: good[name] for name in good if name not in later}))
    renew_sizes(second)
    assert checkpoints(tmp_path) == [first, second]


def test_other_weights_of_the_same_size_are_not_those_of_the_training(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    output = tmp_path / "out"
    tiny.run(output, *LORA, "--save_strategy", "no")
    with no_weights():
        copied = tmp_path / "copied"
        shutil.copytree(output, copied, copy_function=shutil.copyfile)  # with other times
        assert "nothing is trained again" in tiny.run(copied, *LORA).err
        record, file = copied / "result.json", copied / "lora_model_state.safetensors"
        record.write_text(json.dumps({"weights": {file.name: file.stat().st_size}}))  # as earlier versions wrote it
        assert "nothing is trained again" in tiny.run(copied, *LORA).err
        file = output / "lora_model_state.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert "is not the file that" in tiny.run(output, *LORA, expect=2).err

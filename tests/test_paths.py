"""Where a run may write, found out from its arguments, and numbers that no arithmetic bears."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Tiny, run_main, tiny  # noqa: F401

from utils.arguments import CreatePretrainingDataArguments as TokenFiles
from utils.arguments import (
    ExportArguments,
    FinetuneArguments,
    MergeLoraArguments,
    PredictArguments,
    TransToJsonArguments,
    parse,
)
from utils.errors import UserError
from utils.paths import is_stream


def faults(argv: list[str], cls: Any = PredictArguments) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(cls, argv, "script.py")
    return list(caught.value.faults)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "rows.partial").write_text('{"src": "a"}\n')
    (tmp_path / "rows.json").symlink_to("rows.partial")
    return ["--model_name_or_path", "m", "--data_file", str(tmp_path / "rows.json")]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "--output_file: expected a name, found an empty text"),
        ("kept.json", "is read-only; chmod u+w allows to replace it"),
        ("to kept.json", "is read-only"),
        ("to nowhere.json", "there is no folder"),
        ("folder.json", "is no file; move it away"),
        ("mine.json", "is read-only; move it away"),
        ("to rows.json", "would overwrite data_file"),
        ("rows", "would overwrite data_file"),
    ],
)
def test_output_files_that_are_refused(words: list[str], output: str, message: str, tmp_path: Path) -> None:
    for name in ("kept.json", "mine.json.partial"):
        (tmp_path / name).touch(0o444)
    (tmp_path / "folder.json.partial").mkdir()
    for name in ("kept.json", "rows.json", "nowhere/x.json"):
        (tmp_path / f"to {Path(name).parts[0].removesuffix('.json')}.json").symlink_to(name)
    [found] = faults([*words, "--output_file", output and str(tmp_path / output)])
    assert message in found


def test_output_files_that_are_no_files(words: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for output in ("/dev/null", "/dev/stdout", "/dev/fd/1", str(tmp_path / "pipe")):
        assert is_stream(output)
        assert parse(PredictArguments, [*words, "--output_file", output]).output_file == output
    for output in ("rows.json", "new.json", "."):
        assert not is_stream(tmp_path / output)


def test_data_files_that_are_no_files(words: list[str], tmp_path: Path) -> None:
    """A file is opened more than once, also by other processes, so a pipe cannot be read."""
    os.mkfifo(tmp_path / "pipe")
    for name, message in ((tmp_path, "is a folder"), (tmp_path / "pipe", "a pipe or device cannot be")):
        [found] = faults([*words[:3], str(name)])
        assert found.startswith(f"data_file {name} (--data_file): ") and message in found


def test_files_of_the_data_tools(tmp_path: Path) -> None:
    """What cannot be read twice, and what would be refused once all the work is done."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text.jsonl").mkdir()
    for ending in ("bin", "idx"):
        (tmp_path / f"text.{ending}").touch(0o444)
    pipe, prefix = str(tmp_path / "pipe"), str(tmp_path / "text")
    found = faults(["--input_path", pipe, "--output_path", prefix], TransToJsonArguments)
    assert ["cannot be; put it into a file first" in found[0], found[1].endswith(f"{prefix}.jsonl is a folder")] == [
        1,
        1,
    ]
    words = ["--model_name", "m", "--input_path", str(tmp_path), "--output_prefix", prefix]
    assert ["bin is read-only" in fault or "idx is read-only" in fault for fault in faults(words, TokenFiles)] == [1, 1]


@pytest.mark.parametrize(
    ("cls", "option"),
    [(FinetuneArguments, "output_dir"), (ExportArguments, "output_path"), (MergeLoraArguments, "merge_model_path")],
)
def test_a_folder_that_is_read_only_is_refused(cls: Any, option: str, tmp_path: Path) -> None:
    """Also for root, and behind a link; what is in it says who has closed it."""
    (tmp_path / "kept").mkdir(mode=0o555)
    (tmp_path / "link").symlink_to("kept")
    for name in ("kept", "link"):
        place = tmp_path / name
        assert f"{option} {place} (--{option}) cannot be written: it is read-only (chmod u+w would allow it)" in faults(
            [f"--{option}", str(place)], cls
        )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("length_penalty", "1e308"),
        ("length_penalty", "-1e308"),
        ("presence_penalty", "-1e308"),
        ("frequency_penalty", "1e308"),
        ("repetition_penalty", "1e-308"),
        ("num_beams", "1000000000"),
    ],
)
def test_sampling_options_that_no_arithmetic_bears(words: list[str], option: str, value: str) -> None:
    beams = [] if option == "num_beams" else ["--num_beams", "2"]
    [found] = faults([*words, *beams, f"--{option}", value])
    assert found.startswith(f"--{option}: expected a") and " and at most " in found


def test_names_that_are_no_utf8_links_and_what_the_dead_have_left(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """Training, merge and prediction in a folder of bytes, into a link; leftovers of other runs there are removed."""
    home = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(tiny.model, home / "model")
    shutil.copytree(tiny.data, home / "data")
    (home / "disk").mkdir()
    (home / "out").symlink_to("disk")
    for name in (".checkpoint-9.tmp-1-0123abcd", ".final.tmp-7-0123abcd"):
        (home / "disk" / name / "deep").mkdir(parents=True)
    (home / "disk" / ".loss_curve.png.tmp-1-0123abcd").write_text("half")
    options = ["--do_train", "--lora", "--max_steps", 2, "--save_steps", 1]
    run = Tiny(home).run(home / "out", *options)
    assert run.checkpoints() == ["checkpoint-1", "checkpoint-2"] and run.json("arguments.json")["output_dir"] == str(
        home / "out"
    )
    assert not list((home / "disk").glob(".*.tmp-*")) and (home / "out").is_symlink()
    (home / "merged").symlink_to("disk2")
    (home / "disk2").mkdir()
    words = ["--model_name_or_path", str(home / "model"), "--lora_path", str(home / "out")]
    run_main("merge_lora_params", [*words, "--merge_model_path", str(home / "merged")], {}, home, 0)
    assert (home / "merged").is_symlink() and (home / "disk2" / "config.json").is_file()
    rows = home / os.fsdecode(b"\xff.json")
    rows.write_text('{"src": "Say red"}\n{"tgt": 1}\n')
    words = ["--model_name_or_path", str(home / "merged"), "--data_file", str(rows), "--max_length", "100"]
    run_main("predictor", [*words, "--output_file", str(home / "o.json"), "--device", "cpu"], {}, home, 0)
    answers = [json.loads(line) for line in (home / "o.json").read_text("utf-8").splitlines()]
    assert answers[0]["output"] is not None and answers[1]["error"].startswith(f"{rows} line 2: ")

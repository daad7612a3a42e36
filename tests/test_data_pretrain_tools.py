"""The two tools: plain text to JSON Lines, and these to token files."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from family_cases import WITH_TOKENIZER, case
from full_disk import full_disk
from tiny_models import write_tiny_llama

from utils.data.pretrain_build import BuildOptions, build, sentences
from utils.data.pretrain_files import open_tokens
from utils.data.pretrain_text import TextOptions, trans_to_json
from utils.errors import UserError
from utils.families.tokenizers import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXT = "First line\nof one document.\n\n\nshort\n\nThe second document,\r\nwhich is 第二。\n \nThe third one, no end"
DOCUMENTS = ["First line\nof one document.", "The second document,\nwhich is 第二。", "The third one, no end"]


def tool(name: str, *words: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, f"data/tools/{name}.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == expect and "Traceback" not in done.stderr, done.stderr
    return done


def texts(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


def decoded(model: Path, prefix: Path) -> list[str]:
    tokenizer = load_tokenizer(model, json.loads((model / "config.json").read_text("utf-8")))
    file = open_tokens(str(prefix))
    parts = [file.tokens[first:end].tolist() for first, end in itertools.pairwise(file.starts)]
    return [tokenizer.decode(part, skip_special=False) for part in parts]


# --- trans_to_json.py ------------------------------------------------------------------------------


def test_plain_text_becomes_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    said = tool(
        "trans_to_json", "--input_path", tmp_path / "a.txt", "--output_path", tmp_path / "out", "--no-shuffle"
    ).stdout
    assert texts(tmp_path / "out.jsonl") == DOCUMENTS
    assert "3 documents" in said and "1 shorter than 10 characters left out" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out.jsonl"]


def test_every_option_of_the_text_tool(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("\n".join(f"document {i}\n\nstill\n###" for i in range(50)), "utf-8")
    (folder / "sub" / "b.txt").write_text("another\n### \nx\n", "utf-8")
    words = ["--input_path", folder, "--output_path", tmp_path / "o", "--json_key", "body", "--doc_spliter", "###"]
    words += ["--min_doc_length", 2, "--log_interval", 1]
    done = tool("trans_to_json", *words, "--workers", 2)
    assert "ETA" in done.stderr and "documents/s" in done.stderr
    rows = [json.loads(line)["body"] for line in (tmp_path / "o.jsonl").read_text("utf-8").splitlines()]
    wanted = [f"document {i}\n\nstill" for i in range(50)] + ["another"]
    assert rows != wanted and sorted(rows) == sorted(wanted)
    shuffled = (tmp_path / "o.jsonl").read_bytes()
    tool("trans_to_json", *words)
    assert (tmp_path / "o.jsonl").read_bytes() == shuffled  # the same each time, with any number of workers
    tool("trans_to_json", *words, "--no-merge", "--no-shuffle")
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["a.txt.jsonl", "sub_b.txt.jsonl"]


def test_text_that_is_none_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good line\n\nbad \xff line\n")
    (tmp_path / "out.jsonl").write_text("as before", "utf-8")
    words = ["--input_path", tmp_path / "a.txt", "--output_path", tmp_path / "out"]
    assert f"error: {tmp_path}/a.txt line 3: is no UTF-8 text" in tool("trans_to_json", *words, expect=2).stderr
    assert (tmp_path / "out.jsonl").read_text("utf-8") == "as before" and len(list(tmp_path.iterdir())) == 2


# --- create_pretraining_data.py --------------------------------------------------------------------


def write_lines(file: Path, documents: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in documents), "utf-8")
    return file


def test_documents_become_tokens(tmp_path: Path, model: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [*DOCUMENTS, ""])
    words = ["--model_name", model, "--tokenizer_name", "LlamaTokenizer", "--input_path", tmp_path / "in.jsonl"]
    words += ["--data_format", "JSON", "--json_key", "text", "--data_impl", "mmap", "--log_interval", 1]
    done = tool("create_pretraining_data", *words, "--output_prefix", tmp_path / "plain")
    assert "3 documents" in done.stdout and "1 empty ones left out" in done.stdout
    assert "ETA" in done.stderr and "the class follows from the files" in done.stderr
    assert decoded(model, tmp_path / "plain") == DOCUMENTS
    tool("create_pretraining_data", *words, "--output_prefix", tmp_path / "eos", "--append_eos", "--split_sentences")
    assert decoded(model, tmp_path / "eos") == [f"{text}<|im_end|>" for text in DOCUMENTS]


def test_workers_change_nothing(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "in.jsonl", [f"document {i} " * (i % 7 + 1) for i in range(1500)])
    config = json.loads((model / "config.json").read_text("utf-8"))
    for workers in (1, 2):
        options = BuildOptions(append_eos=True, workers=workers)
        build(str(source), str(tmp_path / f"w{workers}"), "m", model, config, options)
    for ending in (".bin", ".idx", ".meta.json"):
        assert (tmp_path / f"w1{ending}").read_bytes() == (tmp_path / f"w2{ending}").read_bytes()
    assert len(decoded(model, tmp_path / "w1")) == 1500


@pytest.mark.parametrize(
    ("line", "message", "workers"),
    [
        ('{"text": "cut', "line 3: not valid JSON", 1),
        ('{"text": "cut', "line 3: not valid JSON", 2),
        ('{"body": "x"}', "line 3: has no key text (found body); name it with --json_key", 1),
        ('{"text": 5}', "line 3: text is no text", 1),
        ("[1]", "line 3: has no key text (it is no object)", 1),
        ('{"text": "a\\ud83d"}', "line 3: text holds half of a surrogate pair at character 2", 1),
        ('{"text": "a", "id": ' + "1" * 5000 + "}", "line 3: holds a whole number of more than", 1),
        ("[" * 100_000, "line 3: not valid JSON (nested too deeply)", 1),
    ],
)
def test_a_broken_line_is_named_and_files_before_stay(
    tmp_path: Path, model: Path, line: str, message: str, workers: int
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a good line"}\n\n' + line + "\n", "utf-8")
    for ending in (".bin", ".idx"):
        (tmp_path / f"out{ending}").write_text("as before", "utf-8")
    config = json.loads((model / "config.json").read_text("utf-8"))
    with pytest.raises(UserError) as caught:
        build(str(source), str(tmp_path / "out"), "m", model, config, BuildOptions(workers=workers))
    assert f"{source} {message}" in str(caught.value)
    assert [(tmp_path / f"out{ending}").read_text("utf-8") for ending in (".bin", ".idx")] == ["as before"] * 2
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("ending", [".bin", ".idx", ".meta.json"])
def test_a_full_disk_leaves_all_files_before(tmp_path: Path, model: Path, ending: str) -> None:
    """Whichever file it is that does not fit."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    texts = {".bin": ["x" * 900], ".idx": ["a b"] * 50, ".meta.json": ["a b c d"]}
    for name, lines in (("earlier", ["the earlier documents"] * 2), ("new", texts[ending])):
        write_lines(tmp_path / f"{name}.jsonl", lines)

    def made(source: str, prefix: str) -> dict[str, bytes]:
        build(str(tmp_path / f"{source}.jsonl"), str(tmp_path / prefix), source, model, config, BuildOptions())
        return {path.name: path.read_bytes() for path in tmp_path.glob(f"{prefix}.*")}

    new = made("new", "whole")
    size = len(new.pop(f"whole{ending}")) - 1
    assert ending != ".meta.json" or max(map(len, new.values())) <= size
    before = made("earlier", "out")
    with full_disk(size), pytest.raises(OSError, match="File too large"):
        made("new", "out")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out.*")} == before
    with full_disk(size), pytest.raises(OSError, match="File too large"):
        made("new", "other")
    assert not list(tmp_path.glob("other*")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_files_of_two_runs_are_never_read_together(
    tmp_path: Path, model: Path, moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends while its files take the places of earlier ones, which are of the same sizes."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    source, prefix = tmp_path / "in.jsonl", tmp_path / "out"
    write_lines(source, ["one", "two"])
    build(str(source), str(prefix), "m", model, config, BuildOptions())
    real, places = os.replace, []

    def replace(staging: Path, target: Path) -> None:
        if len(places) > moved:  # the first one marks the earlier index
            raise KeyboardInterrupt
        places.append(target)
        real(staging, target)

    write_lines(source, ["two", "one"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        build(str(source), str(prefix), "m", model, config, BuildOptions())
    assert len(places) == moved + 1
    with pytest.raises(UserError, match=r"out.idx: is cut short; build the data again"):
        open_tokens(str(prefix))
    build(str(source), str(prefix), "m", model, config, BuildOptions())
    assert decoded(model, prefix) == ["two", "one"]


@pytest.mark.parametrize("ending", [".bin", ".idx", ".meta.json"])
def test_files_that_cannot_be_replaced_leave_the_others(tmp_path: Path, model: Path, ending: str) -> None:
    config = json.loads((model / "config.json").read_text("utf-8"))
    write_lines(tmp_path / "in.jsonl", ["one", "two"])
    for other in (".bin", ".idx", ".meta.json"):
        (tmp_path / f"out{other}").write_text("as before", "utf-8")
    for kind in ("read-only", "a folder"):
        place = tmp_path / f"out{ending}"
        place.chmod(0o444)
        if kind == "a folder":
            place.unlink()
            place.mkdir()
        with pytest.raises(OSError, match="is read-only" if kind == "read-only" else "Is a directory"):
            build(str(tmp_path / "in.jsonl"), str(tmp_path / "out"), "m", model, config, BuildOptions())
        assert all(path.is_dir() or path.read_text("utf-8") == "as before" for path in tmp_path.glob("out.*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_all_broken_lines_of_a_block_are_named(tmp_path: Path, model: Path, workers: int) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "good"}\n{"text": 5}\n\n{"text": "\\udc00"}\n', "utf-8")
    config = json.loads((model / "config.json").read_text("utf-8"))
    with pytest.raises(UserError) as caught:
        build(str(source), str(tmp_path / "out"), "m", model, config, BuildOptions(workers=workers))
    assert [fault.split(":")[0] for fault in caught.value.faults] == [f"{source} line 2", f"{source} line 4"]


def test_faults_of_arguments_come_together(tmp_path: Path) -> None:
    said = tool("create_pretraining_data", "--data_impl", "lazy", "--input_path", tmp_path / "no", expect=2).stderr
    for part in ("data_impl", "no such file or folder", "output_prefix is missing", "model_name is missing"):
        assert part in said
    assert "usage: python data/tools/trans_to_json.py" in tool("trans_to_json", "--help").stdout


def test_sentences() -> None:
    assert sentences("One. Two! 四。五！\nsix") == ["One.", " Two!", " 四。", "五！\n", "six"]
    for text in ("3.14 is a number. Yes.", "no end", "a\n\nb ...!? c"):
        assert "".join(sentences(text)) == text
    assert len(sentences("3.14 is a number. Yes.")) == 2


@pytest.mark.parametrize("name", WITH_TOKENIZER)
def test_every_familys_tokenizer_builds(tmp_path: Path, name: str) -> None:
    source = write_lines(tmp_path / "in.jsonl", ["one two three", "four five"])
    checkpoint = case(name).checkpoint
    build(str(source), str(tmp_path / "out"), name, checkpoint.folder, checkpoint.config, BuildOptions(append_eos=True))
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config)
    file = open_tokens(str(tmp_path / "out"))
    file.check_ids(checkpoint.family.shape(checkpoint.config).vocabulary)
    wanted = [*tokenizer.encode("one two three"), tokenizer.eos_id, *tokenizer.encode("four five"), tokenizer.eos_id]
    assert file.tokens.tolist() == wanted and file.documents == 2


# --- outputs among the inputs ------------------------------------------------------------------------


@pytest.mark.parametrize("linked", ["same", "input", "output", "hard"])
def test_no_tool_writes_over_its_input(tmp_path: Path, model: Path, linked: str) -> None:
    def asked(name: str) -> Path:
        """The output's file and the input's are one; returns the input's name."""
        output, other = tmp_path / name, tmp_path / f"other-{name}"
        if linked == "same":
            write_lines(output, DOCUMENTS)
            return output
        if linked == "hard":
            other.hardlink_to(write_lines(output, DOCUMENTS))
        elif linked == "input":
            other.symlink_to(write_lines(output, DOCUMENTS))
        else:
            output.symlink_to(write_lines(other, DOCUMENTS))
        return other

    for name in ("text.jsonl", "foo.bin"):
        given = asked(name)
        before = given.read_bytes()
        with pytest.raises(UserError, match=f"input_path {given}: would be written over by the output .*{name}"):
            if name == "text.jsonl":
                trans_to_json(str(given), str(tmp_path / "text"), TextOptions())
            else:
                build(str(given), str(tmp_path / "foo"), "tiny", model, {}, BuildOptions())
        assert given.read_bytes() == before


def test_a_link_in_the_folder_to_the_output_is_an_input(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    output = write_lines(tmp_path / "out.jsonl", DOCUMENTS)
    before = output.read_bytes()
    (tmp_path / "in" / "a.txt").symlink_to(output)
    with pytest.raises(UserError, match="would be written over"):
        trans_to_json(str(tmp_path / "in"), str(tmp_path / "out"), TextOptions())
    assert output.read_bytes() == before


def test_two_files_never_become_one_without_merging(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for file in ("a/b.txt", "a_b.txt"):
        (tmp_path / file).write_text(TEXT, "utf-8")
    with pytest.raises(UserError, match=r"a/b\.txt and .*a_b\.txt would both become .*a_b\.txt\.jsonl"):
        trans_to_json(str(tmp_path), str(tmp_path / "out"), TextOptions(no_merge=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("no_merge", [False, True])
@pytest.mark.parametrize("inside", [".", "made"])
def test_text_beside_its_source_comes_out_the_same_again(tmp_path: Path, no_merge: bool, inside: str) -> None:
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    (tmp_path / "sub" / "b").mkdir(parents=True)
    (tmp_path / "sub" / "b" / "c.txt").write_text(TEXT, "utf-8")
    options = TextOptions(no_merge=no_merge)
    wanted = trans_to_json(str(tmp_path), str(tmp_path / inside / "out"), options)
    files = sorted(tmp_path.rglob("*"))
    again = trans_to_json(str(tmp_path), f"{tmp_path}/sub/../{inside}/out", options)
    assert [line.partition(": ")[2] for line in again] == [line.partition(": ")[2] for line in wanted]
    assert sorted(tmp_path.rglob("*")) == files


def test_token_files_beside_their_source_come_out_the_same_again(tmp_path: Path, model: Path) -> None:
    write_lines(tmp_path / "a.jsonl", DOCUMENTS)
    config = json.loads((model / "config.json").read_text("utf-8"))
    said = [build(str(tmp_path), str(tmp_path / "text"), "tiny", model, config, BuildOptions()) for _ in range(2)]
    assert said[0] == said[1] and "3 documents" in said[0]

"""Reading and checking dataset files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.lines import RowFault
from utils.data.rows import check_dataset, parse_row, read_rows
from utils.errors import UserError
from utils.splits import split_files

KEYS = st.sampled_from(
    "src tgt messages role content conversations from value instruction input output history system".split()  # noqa: SIM905
)
PAIR = {"src": "one", "tgt": "two"}
TWO_ROUNDS = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def write(file: Path, *rows: Any) -> Path:
    """JSON Lines; strings are written as they are."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR, [("user", "one"), ("assistant", "two")]),
        ({"src": ["a", "c"], "tgt": ["b", "d"], "id": 7}, TWO_ROUNDS),
        (
            {"messages": [{"role": role, "content": text} for role, text in [("system", "s"), *TWO_ROUNDS]]},
            [("system", "s"), *TWO_ROUNDS],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                    {"role": "assistant", "content": "c"},
                ]
            },
            [("user", "ab"), ("assistant", "c")],
        ),
        ({"instruction": "do", "input": "", "output": "done"}, [("user", "do"), ("assistant", "done")]),
        (
            {"instruction": "do", "input": "it", "output": "d", "system": "s", "history": [["a", "b"]]},
            [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "do\nit"), ("assistant", "d")],
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
            [("system", "s"), ("user", "a"), ("assistant", "b")],
        ),
    ],
)
def test_formats_are_recognised_by_their_keys(row: Any, expected: list[tuple[str, str]], tmp_path: Path) -> None:
    (found,) = read_rows(write(tmp_path / "train.json", row))
    assert [(message["role"], message["content"]) for message in found.messages] == expected
    assert (found.answer, found.raw) == (expected[-1][1], row)
    assert [message["content"] for message in found.question] == [text for _, text in expected[:-1]]


def test_rows_know_their_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "train.json", PAIR, "", "  ", PAIR)
    assert [(row.file, row.line) for row in read_rows(file)] == [(file, 1), (file, 4)]


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n")
    assert len(list(read_rows(file))) == 1


def test_a_json_array_is_read_too(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    file.write_text(json.dumps([PAIR, {"instruction": "a", "output": "b"}, PAIR], indent=2))
    assert [row.line for row in read_rows(file)] == [2, 6, 10]
    write(tmp_path / "broken" / "train.json", '[{"src": "a", "tgt": "b"},', '{"src": "a" "tgt": "b"}]')
    with pytest.raises(UserError, match=r"train\.json line 2: not valid JSON"):
        list(read_rows(tmp_path / "broken" / "train.json"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"src": "a", "tgt": ', "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        ({"text": "a"}, 'no "src"'),
        ({"src": "a"}, '"tgt" is missing'),
        ({"src": 5, "tgt": "b"}, '"src" must be a string or a list of strings, found a number'),
        ({"src": "a", "tgt": ["b", "c"]}, '"src" has 1 rounds but "tgt" has 2'),
        ({"src": ["a", None], "tgt": ["b", "c"]}, r'"src\[1\]" must be a string, found null'),
        ({"src": " ", "tgt": "b"}, "the question .* is blank"),
        ({"src": ["a", "b"], "tgt": ["c", "\n"]}, "the answer .* of round 2 is blank"),
        ({"src": [], "tgt": []}, '"src" is an empty list'),
        ({"messages": []}, "an empty one"),
        ({"messages": [{"role": "critic", "content": "a"}]}, r'"messages\[0\].role" must be one of'),
        ({"messages": [{"role": "tool", "content": "a"}]}, "turn 1 must be the user's, found the tool's"),
        (
            {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant", "tool", "assistant")]},
            "turn 3 must be the user's, found the tool's .* follows an answer with tool_calls",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "the last turn has no answer"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "turn 2 must be the assistant's"),
        ({"messages": [{"role": "system", "content": "a"}]}, "no question"),
        ({"conversations": [{"from": "human"}]}, r'"conversations\[0\].value" must be a string, found null'),
        ('{"src": "a", "tgt": "b\\ud800"}', "half of a surrogate pair at character 2"),
        ("[" * 100_000, "not valid JSON"),
        ('{"src": "a", "tgt": "b", "id": ' + "1" * 5000 + "}", "a whole number of more than 4,300 digits"),
        ({"instruction": "a", "output": ["b"]}, '"output" must be a string, found a list'),
    ],
)
def test_broken_row_is_named(row: Any, said: str, tmp_path: Path) -> None:
    file = write(tmp_path / "train.json", PAIR, PAIR, row, PAIR)
    with pytest.raises(UserError, match=said) as caught:
        check_dataset(tmp_path, ["train"])
    assert [fault.startswith(f"{file} line 3: ") for fault in caught.value.faults] == [True]
    with pytest.raises(UserError, match=said):
        list(read_rows(file))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(raw=JSON, require_answer=st.booleans())
def test_no_row_breaks_the_reader(raw: Any, require_answer: bool) -> None:
    try:
        messages = parse_row(raw, require_answer=require_answer)
    except RowFault as fault:
        assert str(fault)
    else:
        roles = [message["role"] for message in messages if message["role"] not in ("system", "tool")]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2)
        assert roles and not (require_answer and len(roles) % 2)


def test_answers_are_optional_for_prediction(tmp_path: Path) -> None:
    rows = [{"src": "a"}, {"src": ["a", "b"], "tgt": ["c"]}, {"src": "a", "tgt": ""}, PAIR]
    file = write(tmp_path / "dev.json", *rows)
    found = list(read_rows(file, require_answer=False))
    assert [row.answer for row in found] == [None, None, "", "two"]
    assert [row.question[-1]["content"] for row in found] == ["a", "b", "a", "one"]
    with pytest.raises(UserError):
        list(read_rows(file))


def test_all_faults_of_a_dataset_together(tmp_path: Path) -> None:
    write(tmp_path / "train" / "b.json", "{", PAIR)
    write(tmp_path / "train" / "a.json", *["?"] * 30)
    write(tmp_path / "dev.json", "", "")
    with pytest.raises(UserError) as caught:
        check_dataset(tmp_path, ["train", "dev", "test"])
    faults = caught.value.faults
    assert len(faults) == 20 + 3
    assert "a.json line 1:" in faults[0]
    assert any("dev.json: empty" in fault for fault in faults)
    assert any("test.json (or test/*.json) is missing" in fault for fault in faults)
    assert "11 more broken rows, 31 in total" in faults[-1]


def test_a_single_file_or_a_folder_of_files(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "c.jsonl", "notes.txt"):
        write(tmp_path / "train" / name, PAIR)
    assert [file.name for file in split_files(tmp_path, "train")] == ["a.json", "b.json", "c.jsonl"]
    write(tmp_path / "train" / "._a.json", "what another system keeps beside its files")
    assert len(split_files(tmp_path, "train")) == 3
    write(tmp_path / "train.jsonl", PAIR)
    assert split_files(tmp_path, "train") == [tmp_path / "train.jsonl"]
    write(tmp_path / "train.json", PAIR)
    assert split_files(tmp_path, "train") == [tmp_path / "train.json", tmp_path / "train.jsonl"]
    check_dataset(tmp_path, ["train"])


def test_training_alone_needs_no_dev(tmp_path: Path) -> None:
    write(tmp_path / "train.json", PAIR)
    check_dataset(str(tmp_path), ["train"])


def test_names_that_are_no_folder(tmp_path: Path) -> None:
    check_dataset("advertise_gen", ["train", "dev"])
    with pytest.raises(UserError, match="neither a folder nor a built-in dataset; did you mean advertisegen"):
        check_dataset("advertisgen2", ["train"])
    with pytest.raises(UserError, match="no such folder"):
        check_dataset(str(tmp_path / "missing"), ["train"])


def test_lazy_checks_the_first_rows_only(tmp_path: Path) -> None:
    write(tmp_path / "train.json", *[PAIR] * 1500, "{")
    check_dataset(tmp_path, ["train"], lazy=True)
    with pytest.raises(UserError, match="line 1501"):
        check_dataset(tmp_path, ["train"])
    write(tmp_path / "train.json", "[", json.dumps(PAIR), "]")
    with pytest.raises(UserError, match="cannot be streamed with lazy"):
        check_dataset(tmp_path, ["train"], lazy=True)


def test_a_broken_row_is_reported_before_paddle_is_loaded(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "train.json", PAIR, PAIR, '{"src": "a" "tgt": "b"}', *[PAIR] * 2000)
    program = (
        "import sys\n"
        "from utils.errors import run_script\n"
        "from utils.data.rows import check_dataset\n"
        f"def main():\n    check_dataset({str(tmp_path)!r}, ['train'])\n"
        "try:\n    run_script(main)\n"
        "finally:\n    assert not {'paddle', 'paddlenlp', 'numpy', 'tokenizers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'train.json'} line 3: not valid JSON")
    assert len(done.stderr.splitlines()) == 1


def test_data_modules_load_no_paddle(root: Path) -> None:
    names = [f"utils.data.{file.stem}" for file in (root / "utils/data").glob("*.py") if file.stem != "__init__"]
    loaded = "[name for name in sys.modules if name.startswith('paddle')]"
    program = f"import sys, utils.families.tokenizers, {', '.join(names)}; print({loaded})"
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert len(names) > 8 and done.stdout.strip() == "[]"

"""Parsing: where values come from, what is refused, and that every fault is named at once."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.arguments import FinetuneArguments, MergeLoraArguments, PredictArguments, ServeArguments, parse
from utils.arguments.fields import options_of
from utils.arguments.helptext import help_text
from utils.errors import UserError


def write(folder: Path, text: str | dict[str, Any], name: str = "run.json") -> str:
    path = folder / name
    path.write_text(text if isinstance(text, str) else json.dumps(text, indent=0), encoding="utf-8")
    return str(path)


def faults(argv: list[str], cls: Any = FinetuneArguments) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(cls, argv, "finetune_generation.py")
    return list(caught.value.faults)


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """Arguments of a run that is right in every respect."""
    rows = tmp_path / "rows"
    rows.mkdir()
    for split in ("train", "dev"):
        (rows / f"{split}.json").write_text('{"src": "a", "tgt": "b"}\n', encoding="utf-8")
    return {
        "model_name_or_path": "smollm2-135m-instruct",
        "dataset_name_or_path": str(rows),
        "output_dir": str(tmp_path / "out"),
        "do_train": True,
    }


def test_file_and_command_line_and_defaults(tmp_path: Path, base: dict[str, Any]) -> None:
    path = write(tmp_path, {**base, "learning_rate": 3e-4, "lora": True, "num_train_epochs": 2})
    run = parse(FinetuneArguments, [path, "--learning_rate", "1e-3", "--seed=7", "--recompute"], "x.py")
    assert (run.learning_rate, run.seed, run.recompute, run.lora) == (1e-3, 7, True, True)
    assert isinstance(run.num_train_epochs, float) and run.num_train_epochs == 2
    assert run.per_device_train_batch_size == 8 and run.lora_alpha == 16
    assert run.origin("learning_rate") == "--learning_rate"
    assert run.origin("lora") == f"{path} line 7"
    assert run.origin("lora_rank") == "default"
    assert {"lora", "seed", "recompute"} <= run.provided and "lora_rank" not in run.provided


def test_leading_dot_is_left_out_of_origins(tmp_path: Path, base: dict[str, Any], monkeypatch: Any) -> None:
    write(tmp_path, base)
    monkeypatch.chdir(tmp_path)
    assert parse(FinetuneArguments, ["./run.json"], "x.py").origin("do_train") == "run.json line 5"


def test_written_arguments_give_the_same_run(tmp_path: Path, base: dict[str, Any]) -> None:
    path = write(tmp_path, {**base, "lora": True, "report_to": ["visualdl", "tensorboard"]})
    first = parse(FinetuneArguments, [path, "--lora_target_modules", "q_proj,v_proj"], "x.py")
    again = write(tmp_path, first.to_json() | {"device": "cpu"}, "again.json")
    assert parse(FinetuneArguments, [again], "x.py").to_json() == first.to_json()


@pytest.mark.parametrize("word, value", [("true", True), ("False", False), ("0", False), ("1", True)])
def test_switch_values(tmp_path: Path, base: dict[str, Any], word: str, value: bool) -> None:
    path = write(tmp_path, base)
    for argv in (["--lora", word], [f"--lora={word}"]):
        assert parse(FinetuneArguments, [path, *argv], "x.py").lora is value


def test_bare_switch_before_another_option_and_before_the_file(tmp_path: Path, base: dict[str, Any]) -> None:
    path = write(tmp_path, base)
    run = parse(FinetuneArguments, ["--lora", path, "--intokens", "--seed", "3"], "x.py")
    assert (run.lora, run.intokens, run.seed) == (True, True, 3)


def test_negative_numbers_lists_and_none(tmp_path: Path, base: dict[str, Any]) -> None:
    path = write(tmp_path, {**base, "save_total_limit": 3, "lora": True, "lora_target_modules": ["q_proj"]})
    run = parse(
        FinetuneArguments,
        [path, "--max_steps", "-1", "--report_to", "visualdl, wandb", "--save_total_limit", "none"],
        "x.py",
    )
    assert run.max_steps == -1 and run.save_total_limit is None
    assert run.report_to == ["visualdl", "wandb"] and run.lora_target_modules == ["q_proj"]
    predict = ["--model_name_or_path", "m", "--interactive", "--stop", '["a,b", "\\n"]']
    assert parse(PredictArguments, predict, "x.py").stop == ["a,b", "\n"]


WRONG_VALUES = [
    ("learning_rate", '"3e-5"', 'expected a number at least 0, found the text "3e-5"; drop the quotes: 3e-5'),
    ("lora", '"True"', 'expected true or false, found the text "True"; drop the quotes: true'),
    ("lora", "1", "expected true or false, found 1"),
    ("lora_rank", "true", "expected a whole number at least 1, found true"),
    ("lora_rank", "8.0", "expected a whole number at least 1, found 8.0; write 8"),
    ("lora_rank", "0", "expected a whole number at least 1, found 0"),
    ("lora_rank", "null", "expected a whole number at least 1, found null"),
    ("lora_rank", "[8]", "expected a whole number at least 1, found a list"),
    ("lora_rank", "{}", "expected a whole number at least 1, found an object"),
    ("top_p", "1.5", "expected a number above 0 and at most 1, found 1.5"),
    ("top_p", "0", "expected a number above 0 and at most 1, found 0"),
    ("learning_rate", "NaN", "expected a finite number"),
    ("learning_rate", "1e999", "expected a finite number"),
    ("seed", "9" * 5000, "expected a whole number at least 0 and at most 4294967295, found inf"),
    ("save_strategy", '"Epoch"', 'expected one of no, steps, epoch, found "Epoch"; did you mean epoch?'),
    ("lora_target_modules", "[1]", "expected a list of texts, found a list"),
    ("report_to", '["visualdll"]', 'found "visualdll"; did you mean visualdl?'),
    ("run_name", "3", "expected text, found 3"),
    ("output_dir", '"a\\u0000b"', "a character that no text or file name may hold"),
]


@pytest.mark.parametrize("key, value, message", WRONG_VALUES)
def test_wrong_value_in_the_file(tmp_path: Path, base: dict[str, Any], key: str, value: str, message: str) -> None:
    base.pop(key, None)
    path = write(tmp_path, json.dumps(base, indent=0).removesuffix("\n}") + f',\n"{key}": {value}\n}}')
    [fault] = faults([path])
    assert fault.startswith(f"{path} line {len(base) + 2}: {key}: ") and message in fault


@pytest.mark.parametrize(
    "words, message",
    [
        (["--learning_rate", "fast"], '--learning_rate: expected a number at least 0, found "fast"'),
        (["--learning_rate", "nan"], "--learning_rate: expected a number"),
        (["--seed", "1_000"], "--seed: expected a whole number"),
        (["--lora", "maybe"], '--lora: expected true or false, found "maybe"'),
        (["--seed"], "--seed: a value must follow it"),
        (["--seed", "--lora"], "--seed: a value must follow it"),
        (["--lerning_rate", "1"], "--lerning_rate: unknown key lerning_rate; did you mean learning_rate?"),
        (
            ["--xyzzy"],
            "--xyzzy: unknown key xyzzy; python finetune_generation.py --help lists the known ones",
        ),
        (["--seed", "1", "--seed", "2"], "--seed: seed is given twice, before at --seed; keep one"),
        (["-v"], 'unexpected "-v" on the command line'),
        (["other.json"], 'unexpected "other.json" on the command line'),
        (["--lora_target_modules", '["q_proj"'], "expected a list such as"),
    ],
)
def test_wrong_words_on_the_command_line(tmp_path: Path, base: dict[str, Any], words: list[str], message: str) -> None:
    [fault] = faults([write(tmp_path, base), *words])
    assert message in fault


@pytest.mark.parametrize(
    "text, place, message",
    [
        ('{\n"lora": true,\n}', "line 3 column 1", "remove the comma before }"),
        ('{\n"lora" true}', "line 2 column 8", 'expected : after "lora"'),
        ('{\n"lora": tru}', "line 2 column 9", 'expected a value for "lora"'),
        ('{"lora":', "line 1 column 9", 'expected a value for "lora"'),
        ('{"lora": true\n"seed": 1}', "line 2 column 1", "expected , or } after a value"),
        ('{\n// why\n"lora": true}', "line 2 column 1", "JSON has no comments"),
        ("[1]", "line 1 column 1", "expected { at the start"),
        ("", "line 1 column 1", "expected { at the start"),
        ("{} {}", "line 1 column 4", "nothing may follow the closing }"),
        ("{lora: true}", "line 1 column 2", "expected a key in double quotes"),
        ('{"lora', "line 1 column 2", "Unterminated string"),
    ],
)
def test_broken_json_names_line_and_column(tmp_path: Path, text: str, place: str, message: str) -> None:
    path = write(tmp_path, text)
    assert any(fault.startswith(f"{path} {place}: broken JSON") and message in fault for fault in faults([path]))


def test_unreadable_files(tmp_path: Path) -> None:
    absent, latin = tmp_path / "absent.json", tmp_path / "latin.json"
    latin.write_bytes(b'{\n"lora": "\xe9"}')
    deep = write(tmp_path, '{"lora": ' + "[" * 100_000)
    assert any("no such file" in fault for fault in faults([str(absent)]))
    assert any(fault.startswith(f"{latin} line 2: not UTF-8") for fault in faults([str(latin)]))
    assert any(fault.startswith(f"{tmp_path}: cannot be read") for fault in faults([str(tmp_path)]))
    assert any("nested too deeply" in fault for fault in faults([deep]))


def test_byte_order_mark_and_empty_object_are_read(tmp_path: Path) -> None:
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf{ }")
    words = ["--model_name_or_path", "m", "--interactive"]
    assert parse(PredictArguments, [str(path), *words], "x.py").interactive


def test_all_faults_together(tmp_path: Path, base: dict[str, Any]) -> None:
    path = write(
        tmp_path,
        {
            **base,
            "learing_rate": 1,
            "lora_rank": "8",
            "src_length": 600,
            "max_length": 512,
            "fp16": True,
            "bf16": True,
        },
    )
    found = faults([path, "--do_eval", "perhaps", "--lora", "--prefix_tuning"])
    expected = ["learing_rate", "lora_rank", "--do_eval", "src_length 600", "fp16 true", "lora true (--lora)"]
    assert len(found) == len(expected)
    assert all(any(part in fault for fault in found) for part in expected)


def test_an_unreadable_value_says_nothing_about_others(tmp_path: Path, base: dict[str, Any]) -> None:
    path = write(tmp_path, {**base, "src_length": "1500", "max_length": 1000})
    assert len(faults([path])) == 1


@pytest.mark.parametrize("text", [None, "{", '{"model_name_or_path": "m",}'])
def test_an_unreadable_file_says_nothing_about_what_is_missing(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "broken.json"
    if text is not None:
        path.write_text(text)
    assert [str(path) in fault for fault in faults([str(path)])] == [True]
    # what the command line says is known
    found = faults([str(path), "--fp16", "--bf16", "--lora_rank", "0"])
    assert len(found) == 3 and any("fp16 true (--fp16)" in fault for fault in found)


def test_duplicate_keys_also_under_an_old_name(tmp_path: Path, base: dict[str, Any]) -> None:
    text = json.dumps(base, indent=0).removesuffix("\n}")
    path = write(tmp_path, text + ',\n"seed": 1,\n"zero_padding": true,\n"seed": 2,\n"intokens": false\n}')
    assert faults([path]) == [
        f"{path} line 8: seed is given twice, before at {path} line 6; keep one",
        f"{path} line 9: intokens is given twice, before at {path} line 7; keep one",
    ]


RENAMED = [
    ("tgt_length", "max_length", 3000),
    ("intokens_max_length", "max_length", 3000),
    ("zero_padding", "intokens", True),
    ("shift_all_linears", "shift_all_linear", True),
    ("smooth_all_linear", "smooth_all_linears", True),
]


@pytest.mark.parametrize("old, new, value", RENAMED)
def test_renamed_keys_keep_working_with_one_notice(
    tmp_path: Path, base: dict[str, Any], old: str, new: str, value: Any, capsys: Any
) -> None:
    quantize = {"do_ptq": True, "shift": True, "smooth": True, "do_train": False, "device": "cpu"}
    path = write(tmp_path, {**base, **quantize, old: value})
    assert getattr(parse(FinetuneArguments, [path], "x.py"), new) == value
    line = len(base) + len(quantize) + 2 - ("do_train" in base)
    assert capsys.readouterr().err == f"note: {path} line {line}: {old} is now called {new}\n"


@pytest.mark.parametrize("old", ["merge_lora_model_path", "output_path"])
def test_renamed_merge_folder(tmp_path: Path, old: str, capsys: Any) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    for name in ("lora_config.json", "lora_model_state.safetensors"):
        (lora / name).touch()
    words = ["--model_name_or_path", "m", "--lora_path", str(lora), f"--{old}", str(tmp_path / "merged")]
    run = parse(MergeLoraArguments, [*words, "--device", "gpu"], "merge_lora_params.py")  # no GPU is asked for
    assert run.merge_model_path == str(tmp_path / "merged") and run.max_shard_bytes == 5 * 10**9
    assert capsys.readouterr().err == f"note: --{old}: {old} is now called merge_model_path\n"


def test_options_without_effect_are_named(tmp_path: Path, base: dict[str, Any], capsys: Any) -> None:
    parse(FinetuneArguments, [write(tmp_path, {**base, "lora_rank": 16, "top_k": 1, "device": "cpu"})], "x.py")
    said = capsys.readouterr().err
    assert "lora_rank has no effect without lora" in said and "top_k" not in said


@pytest.mark.parametrize("cls", [FinetuneArguments, PredictArguments, ServeArguments, MergeLoraArguments])
def test_help_names_every_option(cls: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        parse(cls, ["--unknown", "--help"], "x.py")
    text = capsys.readouterr().out
    assert left.value.code == 0
    for option in options_of(cls).values():
        assert f"\n  --{option.name} " in text
        assert option.help and option.group
        assert all(needed in options_of(cls) for needed in option.needs)


def test_help_and_guesses_offer_nothing_that_is_refused() -> None:
    refused = {}
    for option in options_of(FinetuneArguments).values():
        assert not set(option.refused) & set(option.choices)
        for value in option.refused:
            refused[option.name, value] = faults(["--" + option.name, value])[0]
    assert "use stage3, with more processes" in refused["sharding", "stage3 offload"]
    assert "offload" not in help_text(FinetuneArguments, "x.py")
    assert faults(["--sharding", "stage3_offload"])[0].count("offload") == 1  # the user's own


@pytest.mark.parametrize("cls", [FinetuneArguments, PredictArguments, ServeArguments, MergeLoraArguments])
def test_defaults_pass_their_own_rules(cls: Any) -> None:
    from utils.arguments.values import from_json

    for option in options_of(cls).values():
        assert from_json(option, option.default) == option.default
        assert option.optional or option.default is not None


NUMBERS = [option for option in options_of(FinetuneArguments).values() if option.kinds[0] in (int, float)]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NUMBERS), st.one_of(st.integers(-(10**12), 10**12), st.floats(allow_nan=True)))
def test_numbers_are_kept_exactly_or_refused_alike(option: Any, number: float) -> None:
    """File and command line agree: the same number is accepted by both with the same value, or by none."""
    from utils.arguments.values import Misfit, from_json, from_text

    def outcome(read: Any, value: Any) -> Any:
        try:
            return read(option, value)
        except Misfit:
            return "refused"

    assert outcome(from_json, number) == outcome(from_text, repr(number))
    assert outcome(from_json, number) in (number, "refused")


@settings(max_examples=200, deadline=None)
@given(
    st.text(max_size=60)
    | st.dictionaries(st.text(), st.recursive(st.none() | st.booleans() | st.text(), st.lists)).map(json.dumps)
)
def test_any_file_is_an_object_or_a_clear_fault(text: str) -> None:
    """The reader agrees with Python's own on what is JSON, and never fails but by a UserError."""
    import tempfile

    from utils.arguments.jsonfile import read_object

    text = "{" + text if text[:1] not in "{[" else text
    data = text.encode("utf-8", "surrogatepass")
    try:
        expected = json.loads(data.decode("utf-8-sig"))
    except ValueError:
        expected = None
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(data)
        file.flush()
        try:
            found = {entry.key: entry.value for entry in read_object(file.name)}
        except UserError:
            found = None
    assert found == (expected if isinstance(expected, dict) else None)


# --- time and side effects -------------------------------------------------------------------------

WRONG = "--dataset_name_or_path ./absent --src_length 9 --max_length 9 --device tpu --output_dir out --do_train"


def run_script(root: Path, command: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """The process that has ended, and the seconds of processor time that it took: other jobs have no part in them."""
    script, *words = command.split()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(root / script), *words],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "command, code",
    [
        ("finetune_generation.py --help", 0),
        ("predictor.py --help", 0),
        ("flask_server.py --help", 0),
        ("merge_lora_params.py --help", 0),
        ("merge_tp_params.py --help", 0),
        ("finetune_generation.py --learning_rat 1 --output_dir out", 2),
        (f"finetune_generation.py {WRONG}", 2),
        ("predictor.py --batch_size 0 --model_name_or_path ./absent", 2),
        ("flask_server.py --host 0.0.0.0 --max_queue -1 --model_name_or_path ./absent --no_ui", 2),
        ("merge_lora_params.py --lora_path ./absent --merge_model_path out", 2),
        ("merge_tp_params.py --model_name_or_path ./absent --max_shard_size 5XB", 2),
    ],
)
def test_scripts_answer_within_a_second_and_write_nothing(root: Path, tmp_path: Path, command: str, code: int) -> None:
    done, seconds = run_script(root, command, tmp_path)
    assert done.returncode == code and seconds < 1
    assert list(tmp_path.iterdir()) == []
    if code == 0:
        assert done.stdout.startswith(f"usage: python {command.split()[0]} ") and done.stderr == ""
    else:
        lines = done.stderr.splitlines()
        assert len(lines) > 1 and all(line.startswith("error: ") for line in lines) and done.stdout == ""


def test_arguments_import_no_paddle(root: Path) -> None:
    program = "import sys, utils.arguments; print([m for m in sys.modules if m.startswith('paddle')])"
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""The server's arguments: what old commands bring along, and what is refused before anything loads."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_server import to_try
from utils.arguments import ServeArguments, parse
from utils.errors import UserError
from utils.serving import sockets

MODEL = ["--model_name_or_path", "smollm2-135m-instruct"]


@pytest.fixture(autouse=True)
def two_ports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words that name two free ports; the machine's own key is not seen."""
    monkeypatch.delenv("LLM_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = [listening.getsockname()[1] for listening in (first, second)]
    return ["--flask_port", str(ports[0]), "--port", str(ports[1])]


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def read(*words: str) -> ServeArguments:
    return parse(ServeArguments, [*MODEL, *words], "flask_server.py")


def faults(*words: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(*words)
    return list(caught.value.faults)


def adapter(folder: Path) -> str:
    folder.mkdir()
    for name in ("lora_config.json", "lora_model_state.safetensors"):
        (folder / name).touch()
    return str(folder)


# --- what works ----------------------------------------------------------------------------------


def test_the_command_of_the_document(two_ports: list[str], capsys: Any) -> None:
    run = read("--src_length", "1024", "--dtype", "float16", *two_ports)
    assert (run.host, run.src_length, run.max_length, run.dtype) == ("127.0.0.1", 1024, 2048, "float16")
    assert run.served_model_name == "smollm2-135m-instruct" and run.api_key is None and run.adapters == []
    assert "has no effect" not in capsys.readouterr().err


def test_older_names_and_options_of_the_predictor(two_ports: list[str], capsys: Any) -> None:
    _, http, *page = two_ports
    words = ["--base_port", http, *page, "--batch_size", "1", "--tgt_length", "512", "--device", "cpu"]
    run = read(*words, "--data_file", "./dev.json", "--decode_strategy", "sampling", "--interactive", "--seed=3")
    assert (run.flask_port, run.max_batch_size, run.max_length, run.src_length) == (int(http), 1, 512, 256)
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == [
        "note: --base_port: base_port is now called flask_port",
        "note: --batch_size: batch_size is now called max_batch_size",
        "note: --tgt_length: tgt_length is now called max_length",
    ]
    assert [line.split()[1] for line in said if "has no effect here" in line] == [
        *("--data_file:", "--decode_strategy:", "--interactive:", "--seed:")
    ]


def test_an_old_file_is_read_too(tmp_path: Path, two_ports: list[str]) -> None:
    file = tmp_path / "serve.json"
    file.write_text(json.dumps({"batch_size": 2, "data_file": "dev.json", "lora_modules": []}), encoding="utf-8")
    assert read(str(file), *two_ports).max_batch_size == 2


def test_a_folder_is_served_under_its_last_part(tmp_path: Path, monkeypatch: Any, two_ports: list[str]) -> None:
    (tmp_path / "merged").mkdir()
    monkeypatch.chdir(tmp_path / "merged")
    for name in (str(tmp_path / "merged"), "../merged/", "."):
        run = parse(ServeArguments, ["--model_name_or_path", name, *two_ports], "flask_server.py")
        assert run.served_model_name == "merged"
    run = parse(ServeArguments, ["--model_name_or_path", "meta-llama/Llama-2-7b-chat", *two_ports], "flask_server.py")
    assert run.served_model_name == "meta-llama/Llama-2-7b-chat"


def test_adapters_as_words_as_a_list_and_as_json(tmp_path: Path, two_ports: list[str], capsys: Any) -> None:
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two, too")
    plain, odd = f"a={one}", f"b={two}"
    assert read("--lora_modules", plain, f"c={one}", *two_ports).adapters == [("a", one), ("c", one)]
    assert read("--lora_modules", f"{plain},c={one}", *two_ports).adapters == [("a", one), ("c", one)]
    assert read("--lora_modules", json.dumps([plain, odd]), *two_ports).adapters == [("a", one), ("b", two)]
    file = tmp_path / "serve.json"
    file.write_text('{"max_batch_size": 3}')
    run = read("--lora_modules", plain, str(file), *two_ports)
    assert run.adapters == [("a", one)] and run.max_batch_size == 3


def test_the_key_comes_from_the_environment(two_ports: list[str], monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("LLM_API_KEY", "from-outside")
    assert read("--host", "0.0.0.0", *two_ports).api_key == "from-outside"
    assert "process list" not in capsys.readouterr().err
    assert read("--api_key", "typed", *two_ports).api_key == "typed"
    said = capsys.readouterr().err
    assert "set LLM_API_KEY instead" in said and "typed" not in said


def test_the_key_comes_from_a_file(tmp_path: Path, two_ports: list[str], monkeypatch: Any, capsys: Any) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    monkeypatch.setenv("LLM_API_KEY", "from-outside")
    assert read("--host", "0.0.0.0", "--api_key_file", str(file), *two_ports).api_key == "from-file"
    assert "from-file" not in capsys.readouterr().err
    [fault] = faults("--host", "0.0.0.0", "--api_key_file", str(tmp_path / "none"), *two_ports)
    assert "there is no key in its first line, or no such file" in fault
    [fault] = faults("--api_key", "typed", "--api_key_file", str(file), *two_ports)
    assert "exclude each other" in fault and "typed" not in fault
    file.write_text("two words\n")
    [fault] = faults("--api_key_file", str(file), *two_ports)
    assert "expected letters, digits and signs of ASCII" in fault and "two words" not in fault


def test_the_line_to_try_has_the_key_from_where_it_stands(
    tmp_path: Path, two_ports: list[str], monkeypatch: Any, capsys: Any
) -> None:
    """The line goes through a shell, with a curl that shows its words."""
    file = tmp_path / "a key's"
    file.write_text("from-file\n")
    monkeypatch.setenv("LLM_API_KEY", "from-outside")
    for options, key in ((["--api_key_file", str(file)], "from-file"), ([], "from-outside")):
        line = to_try(read(*options, *two_ports))
        assert key not in line and line.startswith("try it")
        shown = ["sh", "-c", 'curl() { printf "%s\\n" "$@"; }; ' + line.partition(": ")[2]]
        words = subprocess.run(shown, capture_output=True, text=True, check=True).stdout.splitlines()
        assert words[0] == f"http://127.0.0.1:{two_ports[1]}/api/chat" and f"Authorization: Bearer {key}" in words
    monkeypatch.delenv("LLM_API_KEY")
    assert "Authorization" not in to_try(read(*two_ports))


def test_a_key_that_the_launcher_writes_down_is_told(two_ports: list[str], monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("LLM_API_KEY", "from-outside")
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    read(*two_ports)
    said = capsys.readouterr().err
    assert "set api_key_file instead" in said and "from-outside" not in said


def test_insecure_needs_no_key_and_no_ui_no_second_port(two_ports: list[str], taken: int) -> None:
    assert read("--host", "0.0.0.0", "--insecure", *two_ports).api_key is None
    assert read(*two_ports[:2], "--port", str(taken), "--no_ui").no_ui
    assert read(*two_ports[:2], "--port", two_ports[1], "--no_ui").no_ui


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2"])
def test_this_machine_alone_needs_no_key(host: str, two_ports: list[str]) -> None:
    assert read("--host", host, *two_ports).host == host


# --- what is refused -----------------------------------------------------------------------------

WRONG: list[tuple[list[str], str]] = [
    (["--flask_port", "0"], "--flask_port: expected a whole number at least 1 and at most 65535, found 0"),
    (["--port", "65536"], "--port: expected a whole number at least 1 and at most 65535, found 65536"),
    (["--max_batch_size", "-1"], "--max_batch_size: expected a whole number at least 1"),
    (["--max_queue", "-1"], "--max_queue: expected a whole number at least 0"),
    (["--request_timeout", "-5"], "--request_timeout: expected a number above 0"),
    (["--prefill_chunk", "0"], "--prefill_chunk: expected a whole number at least 1"),
    (["--prompt_cache_gib", "-1"], "--prompt_cache_gib: expected a number at least 0"),
    (["--shutdown_timeout", "-1"], "--shutdown_timeout: expected a number at least 0"),
    (["--stall_timeout", "0"], "--stall_timeout: expected a number above 0"),
    (["--host", "0.0.0.0"], "host 0.0.0.0 (--host) lets other machines ask; set LLM_API_KEY"),
    (["--host", "::"], "host :: (--host) lets other machines ask"),
    (["--host", "256.1.1.1"], "host 256.1.1.1 (--host): no such address"),
    (["--host", "192.0.2.1", "--insecure"], "host 192.0.2.1 (--host) is no address of this machine"),
    (["--api_key", "two words"], "api_key (--api_key): expected letters, digits and signs of ASCII"),
    (["--served_model_name", " name"], 'served_model_name " name" (--served_model_name): expected 1 to 200'),
    (["--served_model_name", "a\nb"], "expected 1 to 200 visible characters"),
    (["--cors_origins", "https://a.org/path"], "expected * or an origin such as https://chat.example.org, without a"),
    (["--lora_modules", "./folder"], 'lora_modules (--lora_modules): expected NAME=FOLDER, found "./folder"'),
    (["--lora_modules", "=./folder"], 'expected NAME=FOLDER, found "=./folder"'),
    (["--lora_modules", "a=./absent"], "lora_modules (--lora_modules): a=./absent: no such folder"),
    (["--lora_path", "./absent"], "lora_path ./absent (--lora_path): no such folder"),
    (["--inference_model", "--quant_type", "a8w8"], "low-bit inference is not part of this version yet"),
    (["--src_length", "512", "--max_length", "512"], "src_length 512 (--src_length) must be below"),
    (["--mode", "static"], "export_model.py --model_name_or_path smollm2-135m-instruct"),
    (["--max_queues", "3"], "unknown key max_queues; did you mean max_queue?"),
]


@pytest.mark.parametrize("words, message", WRONG)
def test_one_fault(words: list[str], message: str, two_ports: list[str]) -> None:
    pairs = [pair for pair in zip(two_ports[::2], two_ports[1::2], strict=True) if pair[0] not in words]
    found = faults(*words, *(word for pair in pairs for word in pair))
    assert len(found) == 1 and message in found[0]


def test_ports_must_be_free_and_differ(two_ports: list[str], taken: int, monkeypatch: Any) -> None:
    http = two_ports[1]
    assert faults("--flask_port", http, "--port", http) == [
        f"port {http} (--port) and flask_port {http} (--flask_port) are the same; the page and the API need one each"
    ]
    [fault] = faults("--flask_port", str(taken), *two_ports[2:])
    assert fault.startswith(f"flask_port {taken} (--flask_port) is in use")
    [fault] = faults(*two_ports[:2], "--port", str(taken))
    assert fault.startswith(f"port {taken} (--port) is in use")
    assert faults("--host", "0.0.0.0", "--insecure", "--flask_port", str(taken), *two_ports[2:])
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")  # the first process of several listens, and does so already
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    assert read("--flask_port", str(taken), *two_ports[2:]).flask_port == taken


def test_names_of_adapters(tmp_path: Path, two_ports: list[str]) -> None:
    folder = adapter(tmp_path / "one")
    same = f"smollm2-135m-instruct={folder}"
    found = faults("--lora_modules", f"a={folder}", f"a={folder}", same, f"\x07={folder}", *two_ports)
    expected = ["a is served already", "smollm2-135m-instruct is served already", "expected 1 to 200 visible"]
    assert len(found) == 3 and all(part in fault for part, fault in zip(expected, found, strict=True))
    assert "no lora_config.json" in faults("--lora_modules", f"a={tmp_path}", *two_ports)[0]


def test_adapters_beside_the_model_and_in_it_exclude_each_other(tmp_path: Path, two_ports: list[str]) -> None:
    folder = adapter(tmp_path / "one")
    [fault] = faults("--lora_modules", f"a={folder}", "--lora_path", folder, *two_ports)
    assert "exclude each other" in fault
    words = ["--model_name_or_path", str(tmp_path), "--mode", "static", "--lora_modules", f"a={folder}", *two_ports]
    with pytest.raises(UserError) as caught:
        parse(ServeArguments, words, "flask_server.py")
    assert "an exported model has its adapter inside" in caught.value.faults[0]


def test_the_page_needs_gradio(two_ports: list[str], monkeypatch: Any) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    [fault] = faults(*two_ports)
    assert "needs gradio: pip install gradio, or add --no_ui" in fault
    assert read("--no_ui", *two_ports).no_ui


def test_all_faults_together(taken: int) -> None:
    found = faults(
        *("--host", "0.0.0.0", "--flask_port", str(taken), "--port", str(taken), "--max_queue", "-1"),
        *("--lora_modules", "a=./absent", "--served_model_name", "", "--max_quue", "1", "--src_length", "4096"),
    )
    expected = ["lets other machines ask", "are the same", "is in use", "--max_queue", "./absent", "max_quue", "4096"]
    assert all(any(part in fault for fault in found) for part in expected)
    assert len(found) == len(expected)


def test_no_message_shows_the_key(two_ports: list[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("LLM_API_KEY", "with blanks")
    [fault] = faults(*two_ports)
    assert fault.startswith("LLM_API_KEY: expected") and "with blanks" not in fault


def test_a_name_that_stands_for_an_address_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """As localhost does in a container without IPv6."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 0)) for address in ("192.0.2.1", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    [listening] = sockets.listen("localhost", 0)
    with listening:
        assert listening.getsockname()[0] == "127.0.0.1"
    found.pop()
    with pytest.raises(UserError, match=r"192\.0\.2\.1 cannot be used"):
        sockets.listen("localhost", 0)

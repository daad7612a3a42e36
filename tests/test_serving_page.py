"""The chat page, in a browser and over real sockets: one server with the embedded model, one browser."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import DESK, KEPT, PHONE, Page, chromium, resize
from selenium.webdriver.common.keys import Keys
from serving_processes import ServerProcess, free_port, processes, server, until
from tiny_runs import ROOT

from utils.checkpoints.embedded import NAME
from utils.serving.page.settings import PageSettings
from utils.serving.page.texts import LANGUAGES, TEXTS
from utils.serving.supervisor import FIRST_PAUSE, PageProcess

LONG = "Write a very long story about a dragon and a ship."


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, str]]:
    """A server and the address of its page."""
    port = free_port()
    options = ["--model_name_or_path", NAME, "--inference_model", "true", "--port", port, "--title", "A <b>title</b>"]
    with server(tmp_path_factory.mktemp("page"), *options) as running:
        until(lambda: answers(port, "GET", "/")[0] == 200, 60)
        yield running, f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def in_browser(served: tuple[ServerProcess, str]) -> Iterator[Page]:
    with chromium() as browser:
        yield Page(browser, served[1])


@pytest.fixture
def page(in_browser: Page) -> Page:
    """The page as at the first visit, with settings that give short answers, always the same."""
    resize(in_browser.browser, DESK)
    in_browser.open()
    in_browser.press("#settings .toggle-button")
    in_browser.wait(lambda: in_browser.find("#max_tokens").is_displayed())
    in_browser.set(max_tokens=16, temperature=0)
    return in_browser


def answers(port: int, method: str, path: str, body: str = "", **headers: str) -> tuple[int, str, dict[str, str]]:
    """(status, body, header) of one request; (0, "", {}) if nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.read().decode("utf-8", "replace"), dict(response.getheaders())
    except ConnectionError:
        return 0, "", {}
    finally:
        connection.close()


def test_a_conversation(page: Page) -> None:
    """Typed, streamed, regenerated, edited, taken back, kept over a reload, begun anew."""
    page.set(system="You are a poet.", max_tokens=64)
    page.ask("Tell me about the sea.")
    seen = {len("".join(page.answers)) for _ in range(400) if not page.is_free and not time.sleep(0.02)}
    assert len(seen) > 4, "the text does not grow"
    page.answered()
    assert "64 tokens" in page.status and "prompt" in page.status
    page.set(max_tokens=16)
    first = page.answers[0]

    page.ask("And the moon?")
    page.answered()
    assert page.questions == ["Tell me about the sea.", "And the moon?"]
    assert page.answers[0] == first and len(page.answers) == 2

    page.set(max_tokens=17)
    page.press_last("Retry")
    page.wait(lambda: page.is_free and "17 tokens" in page.status)
    assert page.questions == ["Tell me about the sea.", "And the moon?"] and len(page.answers) == 2

    kept = page.questions, page.answers
    page.reload()
    page.wait(lambda: (page.questions, page.answers) == kept)
    assert page.find("#system textarea").get_property("value") == "You are a poet."

    page.press_last("Undo")
    page.wait(lambda: page.questions == ["Tell me about the sea."])
    assert page.answers == [first] and page.draft == "And the moon?"

    page.press_last("Edit")
    field = page.wait(lambda: page.find("#chat textarea"))
    assert field.rect["width"] > 0.8 * page.find("#chat").rect["width"]
    field.clear()
    field.send_keys("Tell me about the sun.")
    page.press_last("Submit")
    page.wait(lambda: page.questions == ["Tell me about the sun."])
    page.answered()
    assert len(page.answers) == 1 and page.answers != [first]

    page.press("#new_chat")
    page.wait(lambda: page.questions == [] and page.answers == [])


def test_stop_ends_the_work(page: Page, served: tuple[ServerProcess, str]) -> None:
    """Of the server too, at once; so does the end of the page. What has come stays."""
    running, _ = served
    page.set(max_tokens=2048)
    page.ask(LONG)
    page.wait(lambda: page.answers and len(page.answers[0]) > 20)
    page.wait(lambda: page.status.startswith("writing · ") and "tokens/s" in page.status)
    assert running.answering() == 1
    assert page.name("#message .stop-button") == "Stop"
    page.press("#message .stop-button")
    page.wait(lambda: page.is_free and page.status.startswith("stopped · ") and "tokens/s" in page.status)
    until(running.idle, 5)
    stopped = page.answers[0]
    page.ask("Again.")
    page.wait(lambda: len(page.answers) == 2)
    assert page.answers[0] == stopped

    page.browser.get("about:blank")
    until(running.idle, 5)
    page.browser.get(page.url)
    page.wait(lambda: page.questions == [LONG, "Again."])


def test_languages_and_themes(page: Page) -> None:
    """By the browser's language at first, and as the user says from then on."""
    assert page.texts("#new_chat") == ["New chat"]
    page.wait(lambda: page.name("#message .submit-button") == "Send")
    assert "__i18n__" not in page.script("return document.body.innerText")
    page.press("#language")
    page.wait(lambda: page.texts("#new_chat") == ["新对话"])
    page.wait(page.is_ready)
    assert page.find("#message textarea").get_attribute("placeholder") == TEXTS["message"][1]
    page.wait(lambda: page.name("#message .submit-button") == TEXTS["send"][1])
    assert "__i18n__" not in page.script("return document.body.innerText")
    page.ask("你好")
    page.wait(lambda: page.is_free and "词元/秒" in page.status)
    page.press("#language")
    page.wait(lambda: page.texts("#new_chat") == ["New chat"])

    def darkness() -> int:
        color = page.script("return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in color.strip("rgb()").split(","))

    page.wait(page.is_ready)
    light = darkness()
    page.press("#theme")
    page.wait(lambda: darkness() < light - 300)
    page.reload()
    assert darkness() < light - 300
    page.press("#theme")
    page.wait(lambda: darkness() == light)


def test_on_a_phone(page: Page) -> None:
    resize(page.browser, PHONE)
    page.reload()
    width, _ = PHONE
    page.find("#message textarea").send_keys("Say `" + "wide" * 40 + "` please.")
    page.press("#message .submit-button")
    page.wait(lambda: page.questions)
    page.answered()
    assert page.script("return document.documentElement.scrollWidth") <= width
    for name in ("#message .submit-button", "#new_chat", "#language", "#theme", "#model input"):
        box = page.find(name).rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] >= 16, name
    assert page.find("#settings").rect["x"] < 0, "the settings cover the page"
    page.press("#settings .toggle-button")
    page.wait(lambda: page.find("#settings").rect["x"] == 0)
    assert page.find("#temperature").is_displayed()


def test_what_goes_wrong_is_one_line(page: Page, served: tuple[ServerProcess, str]) -> None:
    """The model's process has gone: the message waits for it, the answer comes without a reload."""
    running, _ = served
    page.set(seed=2**70)
    page.send("One?")
    page.wait(lambda: page.is_free and "seed" in page.status)
    assert page.questions == [] and page.draft == "One?" and "\n" not in page.status
    page.set(seed=-1)

    os.kill(running.worker(), signal.SIGKILL)
    until(lambda: running.health() != "ok")
    page.ask("Two?")
    page.wait(lambda: page.status.startswith("The server is not ready yet"))
    page.answered()
    assert page.questions == ["Two?"] and len(page.answers) == 1


def test_html_is_text_and_nothing_comes_from_elsewhere(page: Page) -> None:
    page.asked_elsewhere()
    evil = [
        "<img src=x onerror='window.hacked=1'>",
        "<meta http-equiv=refresh content='0;url=http://192.0.2.1/'>",
        "<style>body{display:none}</style><p style='position:fixed'>x</p>",
        "<form action='http://192.0.2.1/'><button formaction='javascript:1'>go</button></form>",
        "<svg/onload=window.hacked=2><script>window.hacked=3</script></svg>",
        "![image](http://192.0.2.1/i.png) [link](javascript:window.hacked=4)",
        "<details/open/ontoggle=window.hacked=5>",
    ]
    messages = [
        {"role": role, "metadata": None, "options": None, "content": [{"type": "text", "text": text}]}
        for text in evil
        for role in ("user", "assistant")
    ]
    page.script(
        "const kept = JSON.parse(sessionStorage.getItem(arguments[0])); kept[0] = arguments[1];"
        "sessionStorage.setItem(arguments[0], JSON.stringify(kept))",
        KEPT,
        messages,
    )
    page.reload()
    page.wait(lambda: len(page.questions) == len(evil) == len(page.answers))
    time.sleep(1)  # orders to go elsewhere would be obeyed by now
    assert page.script("return window.hacked") is None
    assert page.browser.current_url == page.url
    made = page.script(
        "return [...document.querySelectorAll('#chat .message-content *')].map(part => part.tagName.toLowerCase())"
    )
    assert not set(made) & {"meta", "style", "form", "script", "details", "iframe", "link"}
    assert page.questions[0] == evil[0] and page.questions[1] == evil[1]
    assert page.texts("#title") == ["A <b>title</b>"]
    assert page.asked_elsewhere() == set()


def test_texts_exist_in_all_languages() -> None:
    assert all(len(texts) == len(LANGUAGES) and all(texts) for texts in TEXTS.values())


# --- the process ------------------------------------------------------------------------------------


@contextmanager
def page_process(folder: Path, key: str = "", start: str = "") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The page alone, of an API that does not answer; (process, port).

    Args:
        start: Python code that starts it instead.
    """
    settings = PageSettings(f"http://127.0.0.1:{free_port()}", port=free_port(), api_key=key)
    process = subprocess.Popen(
        [sys.executable, *(["-c", start] if start else ["-m", "utils.serving.page"])],
        cwd=folder,
        env={**os.environ, **settings.environment(), "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until(lambda: process.poll() is None and answers(settings.port, "GET", "/theme.css")[0] in (200, 401), 60)
        yield process, settings.port
    finally:
        process.kill()
        process.wait()


def test_an_api_that_does_not_answer(in_browser: Page, tmp_path: Path) -> None:
    with page_process(tmp_path) as (_, port):
        page = Page(in_browser.browser, f"http://127.0.0.1:{port}/")
        page.open()
        page.wait(lambda: page.status == TEXTS["unreachable"][0])
        page.press("#settings .toggle-button")
        page.wait(lambda: page.find("#seed").is_displayed())
        page.set(seed=Keys.BACKSPACE)  # nothing stands in the field then
        page.send("Hello?")
        page.wait(lambda: page.is_free and page.draft == "Hello?")
        assert page.questions == [] and page.status == TEXTS["unreachable"][0]


def test_what_nobody_understands_is_one_line_in_the_log(tmp_path: Path) -> None:
    """No traceback, and nothing of what somebody has written."""
    settings = ["", "", None, 0.9, 0, 16, 1, -1]  # a temperature that is none
    event = {"data": [[], "secret words", *settings], "fn_index": 0, "session_hash": "abc"}
    with page_process(tmp_path) as (process, port):
        assert answers(port, "POST", "/gradio_api/queue/join", json.dumps(event), Content_Type="application/json")[0]
        assert '"success":false' in answers(port, "GET", "/gradio_api/queue/data?session_hash=abc")[1]
        process.terminate()
        process.wait(5)
        assert process.stdout is not None
        said = process.stdout.read()
    assert said.startswith("note: the page cannot answer") and said.count("\n") == 1 and "secret" not in said


def test_the_page_is_no_way_around_the_key(tmp_path: Path) -> None:
    """Without it, nothing but the question for it; and it ends at once, quietly, with nothing left behind."""
    with page_process(tmp_path, key="a key & more") as (process, port):
        status, text, _ = answers(port, "GET", "/", Accept_Language="zh")
        assert status == 401 and "API 密钥" in text and "gradio" not in text
        for path in ("/config", "/theme.css", "/gradio_api/heartbeat/abc", "/assets/index.js"):
            assert answers(port, "GET", path)[0] == 401, path
        join = json.dumps({"data": [], "fn_index": 0, "session_hash": "abc"})
        assert answers(port, "POST", "/gradio_api/queue/join", join, Content_Type="application/json")[0] == 401
        form = {"Content_Type": "application/x-www-form-urlencoded"}
        status, text, headers = answers(port, "POST", "/login", "key=another", **form)
        assert status == 401 and TEXTS["key_wrong"][0] in text and "set-cookie" not in headers
        status, _, headers = answers(port, "POST", "/login", urllib.parse.urlencode({"key": "a key & more"}), **form)
        assert status == 303 and "HttpOnly" in headers["set-cookie"] and "SameSite=strict" in headers["set-cookie"]
        cookie = headers["set-cookie"].split(";")[0]
        status, text, headers = answers(port, "GET", "/", Cookie=cookie)
        assert status == 200 and "gradio" in text and "a key" not in text
        assert answers(port, "GET", "/", Cookie=cookie[:-1])[0] == 401

        process.terminate()
        assert process.wait(5) == -signal.SIGTERM
        assert process.stdout is not None and process.stdout.read() == ""
    assert list(tmp_path.rglob("*")) == []


def test_few_routes_and_no_files(tmp_path: Path) -> None:
    """Neither uploads nor files, no description of the API; other sites get nothing; it ends with its parent."""
    start = (
        "import os, subprocess, sys; os.environ['LLM_PAGE_PARENT'] = str(os.getpid());"
        "subprocess.run([sys.executable, '-m', 'utils.serving.page'])"
    )
    with page_process(tmp_path, start=start) as (parent, port):
        assert answers(port, "GET", "/")[0] == 200
        for path in ("upload", "file=/etc/passwd", "info", "openapi.json", "run/x", "proxy=http://a", "vibe-code"):
            for method in ("GET", "POST"):
                assert answers(port, method, f"/gradio_api/{path}")[0] == 404, path
        for path in ("/docs", "/monitoring", "/login", "/gradio_api/../etc/passwd", "/assets/../../blocks.py"):
            assert answers(port, "GET", path)[0] == 404, path
        assert answers(port, "GET", "/", Host=f"evil.example:{port}")[0] == 403
        assert answers(port, "GET", "/", Origin="http://evil.example")[0] == 403
        assert answers(port, "GET", "/", Host="[")[0] == answers(port, "GET", "/", Origin="http://[")[0] == 403
        assert answers(port, "POST", "/gradio_api/queue/join", "x" * (9 << 20))[0] == 413
        parent.kill()
        until(lambda: answers(port, "GET", "/")[0] == 0, 5)


def test_signals_are_left_to_the_server(capfd: pytest.CaptureFixture[str]) -> None:
    """One that goes to all processes does not end the page before the server, which then does not start it again."""
    settings = PageSettings(f"http://127.0.0.1:{free_port()}", port=free_port(), parent=os.getpid())
    page = PageProcess(settings)
    page.start()
    try:
        until(lambda: answers(settings.port, "GET", "/theme.css")[0] == 200, 60)
        (number,) = processes(f"LLM_PAGE_PORT={settings.port}")
        for ending in (signal.SIGTERM, signal.SIGINT):
            os.kill(number, ending)
        time.sleep(0.5)
        assert answers(settings.port, "GET", "/theme.css")[0] == 200
        page.leave()
        os.kill(number, signal.SIGKILL)
        time.sleep(2 * FIRST_PAUSE)
        assert not processes(f"LLM_PAGE_PORT={settings.port}")
    finally:
        page.stop()
    assert capfd.readouterr() == ("", "")


def test_a_broken_gradio_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gradio.py").write_text("raise AttributeError('no such part\\nof it')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    page = PageProcess(PageSettings(f"http://127.0.0.1:{free_port()}", port=free_port(), parent=os.getpid()))
    page.start()
    said: list[str] = []
    try:
        until(lambda: said.append(capfd.readouterr().err) or "goes on without" in "".join(said), 60)
        time.sleep(2 * FIRST_PAUSE)
    finally:
        page.stop()
    lines = "".join([*said, capfd.readouterr().err]).splitlines()
    assert len(lines) == 2 and "(AttributeError: no such part)" in lines[0] and "--no_ui" in lines[0], lines

"""Takes the pictures of the chat page in docs/images: the page of a real server with the embedded model, in Chromium.

    python tools/screenshots.py

Chinese letters need a font, such as fonts-noto-cjk of Debian.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import DESK, PHONE, Page, chromium, resize  # noqa: E402
from PIL import Image  # noqa: E402
from selenium import webdriver  # noqa: E402
from serving_processes import free_port, server  # noqa: E402

IMAGES = ROOT / "docs" / "images"
MODEL = "smollm2-135m-instruct"
COLORS = 128  # of a picture, so that it stays small


def main() -> None:
    """Starts a server, takes three pictures, ends it."""
    port = free_port()
    options = ["--model_name_or_path", MODEL, "--inference_model", "true", "--port", port, "--title", "SmolLM2"]
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), *options):
        url = f"http://127.0.0.1:{port}/"
        with chromium("en-US") as browser:
            page = Page(browser, url)
            ask(page, "What is the capital of France?", "Write a Python function that adds two numbers.")
            take(browser, "page.png")
            resize(browser, PHONE, scale=2)
            time.sleep(1)
            take(browser, "page-phone.png")
        with chromium("zh-CN") as browser:
            page = Page(browser, url)
            resize(browser, DESK)
            page.open()
            page.press("#theme")
            page.press("#settings .toggle-button")
            time.sleep(1)
            page.set(system="You are a friendly teacher.")
            ask(page, "What is photosynthesis?", fresh=False)
            take(browser, "page-dark-zh.png")


def ask(page: Page, *questions: str, fresh: bool = True) -> None:
    """Asks one after the other; the answers are the likeliest, so that pictures change only with the page."""
    if fresh:
        page.open()
        page.press("#settings .toggle-button")
        time.sleep(1)
    page.set(temperature=0, max_tokens=160)
    if fresh:
        page.press("#settings .toggle-button")
    for question in questions:
        page.ask(question)
        page.wait(lambda: page.is_free and any(word in page.status for word in ("tokens/s", "词元/秒")), 120)
    time.sleep(1)


def take(browser: webdriver.Chrome, name: str) -> None:
    """Saves what the browser shows, with few colors."""
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / name
    browser.save_screenshot(str(path))
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()

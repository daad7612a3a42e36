"""The chat page as its users have it: in a browser."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

SECONDS = 40.0  # for whatever the page is to show
DESK, PHONE = (1280, 800), (390, 844)
KEPT = "page-kept-1"  # where page.js keeps a conversation


@contextmanager
def chromium(language: str = "en-US") -> Iterator[webdriver.Chrome]:
    """A browser without a window, at first of the size of a desk."""
    found = [shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")]
    if None in found:
        pytest.fail("no Chromium to test the page with; install it: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(found[0])
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--lang={language}"):
        options.add_argument(word)
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(found[1])))
    try:
        resize(browser, DESK)
        yield browser
    finally:
        browser.quit()


def resize(browser: webdriver.Chrome, size: tuple[int, int], scale: float = 1) -> None:
    """The page has this size, in points; a narrow one is that of a phone."""
    width, height = size
    screen = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


class Page:
    """The page in a browser; what it shows, and what a user does."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser, self.url = browser, url

    def open(self) -> None:
        """As for the first time in a new tab: nothing is kept."""
        self.browser.get(f"{self.url}theme.css")  # without scripts, which would write what they still know
        self.browser.execute_script("sessionStorage.clear(); localStorage.clear()")
        self.browser.delete_all_cookies()
        self.browser.get(self.url)
        self.wait(self.is_ready)

    def reload(self) -> None:
        self.browser.refresh()
        self.wait(self.is_ready)

    def is_ready(self) -> bool:
        """Whether it has been drawn, with what the browser has kept."""
        parts = "document.querySelector('#message textarea') && document.querySelector('#chat .bubble-wrap')"
        return bool(self.script(f"return typeof page != 'undefined' && page.isReady() && {parts}"))

    def wait(self, condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
        """Waits until the page has come so far; what the condition has found."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                found = condition()
            except (WebDriverException, LookupError):  # it is being drawn
                found = None
            if found:
                return found
            assert time.monotonic() < deadline, (self.status, self.questions, self.answers)
            time.sleep(0.05)

    def script(self, text: str, *values: Any) -> Any:
        return self.browser.execute_script(text, *values)

    def find(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.script(
            "return [...document.querySelectorAll(arguments[0])].map(part => part.innerText)", selector
        )
        return found

    def name(self, selector: str) -> str:
        """What screen readers call a part."""
        return self.find(selector).accessible_name

    # --- what it shows --------------------------------------------------------------------------------

    @property
    def questions(self) -> list[str]:
        return [text.strip() for text in self.texts("#chat [data-testid=user]")]

    @property
    def answers(self) -> list[str]:
        return self.texts("#chat [data-testid=bot]")

    @property
    def status(self) -> str:
        return "".join(self.texts("#status p"))

    @property
    def draft(self) -> str:
        return str(self.find("#message textarea").get_property("value"))

    @property
    def is_free(self) -> bool:
        """Whether a message can be sent."""
        return bool(self.script("return !!document.querySelector('#message .submit-button')"))

    # --- what a user does -----------------------------------------------------------------------------

    def send(self, text: str) -> None:
        """Writes a message and sends it."""
        box = self.find("#message textarea")
        box.clear()
        box.send_keys(text, Keys.ENTER)

    def ask(self, text: str) -> None:
        """Sends a message, which then stands in the conversation."""
        self.send(text)
        self.wait(lambda: text in self.questions)

    def answered(self) -> None:
        """Waits for the end of an answer, which says how many tokens it has."""
        self.wait(lambda: self.is_free and "first after" in self.status)

    def press(self, selector: str) -> None:
        """Presses the last button that the selector finds, once it can be pressed."""

        def pressed() -> bool:
            button = self.browser.find_elements(By.CSS_SELECTOR, selector)[-1]
            if not button.is_enabled():
                return False
            button.click()
            return True

        self.wait(pressed)

    def press_last(self, title: str) -> None:
        """Presses the last button of the conversation that has this name."""
        self.press(f"#chat button[title='{title}']")

    def set(self, **values: object) -> None:
        """Fills in settings, whose panel is open."""
        for name, value in values.items():
            field = self.find(f"#{name} :is(textarea, input[type=number])")
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys(str(value))
            time.sleep(0.2)  # people are no faster; what is typed in the same moment as the tab gets lost
            field.send_keys(Keys.TAB)

    def asked_elsewhere(self) -> set[str]:
        """Addresses off this page's server that have answered the browser since the last look."""
        found = set()
        for line in self.browser.get_log("performance"):
            message = json.loads(line["message"])["message"]
            if message["method"] == "Network.responseReceived":
                found.add(message["params"]["response"]["url"])
        return {url for url in found if not url.startswith((self.url, "data:", "blob:", "chrome"))}

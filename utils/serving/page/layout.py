"""What stands where on the page, and which event leads to what."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.chatbot import ChatbotDataMessages, Message, TextMessage

from utils.serving.page.conversation import Conversation
from utils.serving.page.markup import SHOWN_AS_TEXT
from utils.serving.page.texts import LANGUAGES, translations

FOLDER = Path(__file__).parent
I18N = gr.I18n(**{language: translations(language) for language in LANGUAGES})


class Words(Message):
    """A message of a conversation as the browser may send it: text, neither files nor components."""

    content: list[TextMessage]  # type: ignore[assignment]


class Conversations(ChatbotDataMessages):
    root: list[Words]  # type: ignore[assignment]


def build(conversation: Conversation, title: str) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title=title, analytics_enabled=False, fill_height=True) as page:
        with gr.Sidebar(open=False, elem_id="settings"):
            gr.Markdown(I18N("settings"), elem_id="settings-title")
            system, sampling = _settings()
        with gr.Row(elem_id="bar"):
            gr.HTML(f"<h1>{html.escape(title)}</h1>", elem_id="title")
            model = gr.Dropdown(
                [],
                label=I18N("model"),
                show_label=False,
                container=False,
                elem_id="model",
                interactive=True,
                filterable=False,
                allow_custom_value=True,  # the choices come later than what the browser has kept
            )
            new = _small_button("new_chat")
            language = _small_button("language")
            theme = _small_button("theme")
        chat = gr.Chatbot(
            elem_id="chat",
            label=I18N("conversation"),
            show_label=False,
            container=False,
            editable="user",
            buttons=["copy"],
            placeholder=str(I18N("start")),
            allow_tags=SHOWN_AS_TEXT,
            feedback_options=None,
            group_consecutive_messages=False,
            layout="bubble",
        )
        chat.data_model = Conversations  # type: ignore[assignment]
        status = gr.HTML(elem_id="status")
        box = gr.Textbox(
            elem_id="message",
            show_label=False,
            label=I18N("message"),
            placeholder=I18N("message"),
            container=False,
            max_lines=10,
            submit_btn=True,  # with an icon; page.js gives it its name
            autofocus=True,
        )
        shown, asked = [chat, status, box], [chat, box, model, system, *sampling]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": True}
        gr.on(
            [box.submit, chat.retry, chat.edit],
            conversation.answer,
            asked,
            shown,
            concurrency_limit=None,
            trigger_mode="once",
            **quiet,
        )
        box.stop(conversation.stop, **quiet)
        new.click(conversation.stop, **quiet).then(conversation.cleared, None, shown, **quiet)
        chat.undo(conversation.undone, [chat], shown, **quiet)
        language.click(None, js="() => page.switchLanguage()")
        theme.click(None, js="() => page.switchTheme()")
        kept = [chat, box, model, system, *sampling]
        opened = page.load(
            conversation.opened,
            kept,
            [*shown, model, system, *sampling],
            js="(...values) => page.kept(values)",
            **quiet,
        )
        opened.success(None, js="() => page.begin()")
        opened.success(conversation.models, [model], [status, model], concurrency_limit=None, **quiet)
        gr.on([part.change for part in kept], None, kept, js="(...values) => page.keep(values)")
    return page


def _settings() -> tuple[gr.Textbox, list[gr.Slider | gr.Number]]:
    """Controls of the system prompt and, in the order of `Sampling`, of how to answer."""
    system = gr.Textbox(label=I18N("system"), placeholder=I18N("system_hint"), lines=3, max_lines=10, elem_id="system")
    sliders = {
        # name: lowest, highest, step, at first
        "temperature": (0.0, 2.0, 0.05, 0.7),
        "top_p": (0.05, 1.0, 0.05, 0.95),
        "top_k": (0, 200, 1, 40),
        "max_tokens": (16, 8192, 16, 1024),
        "repetition_penalty": (1.0, 2.0, 0.01, 1.05),
    }
    controls: list[gr.Slider | gr.Number] = [
        gr.Slider(lowest, highest, first, step=step, label=I18N(name), info=I18N(f"{name}_help"), elem_id=name)
        for name, (lowest, highest, step, first) in sliders.items()
    ]
    controls.append(gr.Number(-1, minimum=-1, label=I18N("seed"), info=I18N("seed_help"), precision=0, elem_id="seed"))
    return system, controls


def _small_button(name: str) -> gr.Button:
    return gr.Button(I18N(name), elem_id=name, size="sm", min_width=0)

"""The page as a web server."""

from __future__ import annotations

import shutil

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.utils import get_upload_folder

from utils.serving.page.api import Api
from utils.serving.page.conversation import Conversation
from utils.serving.page.guard import Guard
from utils.serving.page.layout import FOLDER, I18N, build
from utils.serving.page.settings import PageSettings


def application(settings: PageSettings) -> Guard:
    """The page as an ASGI application."""
    page = build(Conversation(Api(settings.api_url, settings.api_key)), settings.title or "Chat")
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        footer_links=[],
        allowed_paths=[],
        blocked_paths=["/"],
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        i18n=I18N,
        theme=gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=["sans-serif"], font_mono=["monospace"]),
        css=(FOLDER / "page.css").read_text("utf-8"),
    )
    shutil.rmtree(get_upload_folder(), ignore_errors=True)  # for uploads, which the guard does not let through
    return Guard(app, settings)


def serve(app: Guard, settings: PageSettings) -> None:
    """Serves the page until the process ends."""
    uvicorn.run(app, host=settings.host, port=settings.port, log_level="error")

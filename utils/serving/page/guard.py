"""What stands between the browser and Gradio: few routes, a key where one is set, nothing from elsewhere."""

from __future__ import annotations

import asyncio
import hmac
import html
import re
import secrets
from pathlib import Path
from urllib.parse import parse_qs

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from utils.arguments.serve_checks import is_own
from utils.serving.page.settings import PageSettings
from utils.serving.page.texts import language_of, say
from utils.serving.sockets import is_loopback, split

FOLDER = Path(__file__).parent
# All that the page needs of Gradio. Uploads, files, proxies, descriptions of the API and the like are not among it.
ROUTES = re.compile(
    r"(?!.*\.\.)(/|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)/[\w.\-/]+|/config"
    r"|/gradio_api/(queue/join|queue/data|cancel|reset|startup-events|app_id|heartbeat/\w+)/?)"
)
BODY_BYTES = 8 << 20
WRONG_KEY_SECONDS = 1.0
SESSION = "page_session"


class Guard:
    """An ASGI application around Gradio's.

    Where a key is set, whoever opens the page has to name it: the page passes it on to the API, and it would be a
    way around it. That holds on a loopback address too, as other users of the machine and proxies reach it there.
    """

    def __init__(self, app: ASGIApp, settings: PageSettings) -> None:
        self._app, self._settings, self._key = app, settings, settings.api_key
        self._session = secrets.token_urlsafe(32)  # what the browser shows once it has named the key
        self._script = (FOLDER / "page.js").read_text("utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        answer: Response | None = None
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > BODY_BYTES or "transfer-encoding" in request.headers:
            answer = PlainTextResponse("too large", 413)
        elif self._key and request.url.path == "/login" and request.method == "POST":
            answer = await self._login(request)
        elif not ROUTES.fullmatch(request.url.path):
            answer = PlainTextResponse("not found", 404)
        elif _is_elsewhere(request, self._settings):
            answer = PlainTextResponse("this page answers under its own address only", 403)
        elif not self._is_known(request):
            answer = self._question(request) if request.url.path == "/" else PlainTextResponse("no key", 401)
        elif request.url.path == "/":
            answer = await self._page(request)
        send = _with_rules(send)
        await (answer or self._app)(scope, receive, send)

    # --- the key --------------------------------------------------------------------------------------

    def _is_known(self, request: Request) -> bool:
        shown = request.cookies.get(SESSION, "")
        return not self._key or hmac.compare_digest(shown.encode(), self._session.encode())

    async def _login(self, request: Request) -> Response:
        named = parse_qs((await request.body()).decode("utf-8", "replace")).get("key", [""])[0]
        if not hmac.compare_digest(named.encode(), self._key.encode()):
            await asyncio.sleep(WRONG_KEY_SECONDS)  # guessing takes long
            return self._question(request, wrong=True)
        answer = RedirectResponse("./", 303)
        answer.set_cookie(
            SESSION, self._session, httponly=True, samesite="strict", secure=request.url.scheme == "https"
        )
        return answer

    def _question(self, request: Request, wrong: bool = False) -> Response:
        language = language_of(request.headers, request.cookies)
        text = (FOLDER / "key.html").read_text("utf-8")
        for name, value in {
            "language": language,
            "key": say(language, "key"),
            "enter": say(language, "enter"),
            "wrong": say(language, "key_wrong") if wrong else "",
        }.items():
            text = text.replace(f"{{{{{name}}}}}", html.escape(value))
        return HTMLResponse(text, 401, headers={"Content-Security-Policy": policy("'none'")})

    # --- the page -------------------------------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        """Gradio's page in the user's language, with our script before its own ones."""
        text = await self._ask_gradio(request)
        nonce = secrets.token_urlsafe(16)
        language = language_of(request.headers, request.cookies)
        text = re.sub(r"<meta\s+(property|name)=\"(og|twitter):[^>]*>", "", text)  # names of foreign addresses
        text = text.replace('lang="en"', f'lang="{language}"', 1)
        script = self._script
        for key in ("send", "stop"):
            script = script.replace(f"{{{{{key}}}}}", say(language, key))
        text = text.replace("<head>", f"<head><script>{script}</script>", 1)
        text = re.sub(r"<script\b", f'<script nonce="{nonce}"', text)
        return HTMLResponse(text, headers={"Content-Security-Policy": policy(f"'self' 'nonce-{nonce}' 'unsafe-eval'")})

    async def _ask_gradio(self, request: Request) -> str:
        parts: list[bytes] = []

        async def keep(message: Message) -> None:
            parts.append(message.get("body", b""))

        plain = [(name, value) for name, value in request.scope["headers"] if name != b"accept-encoding"]
        await self._app({**request.scope, "method": "GET", "headers": plain}, request.receive, keep)
        return b"".join(parts).decode("utf-8")


def _is_elsewhere(request: Request, settings: PageSettings) -> bool:
    """Whether a page of another site asks, or one whose name leads to this machine without being its own."""
    host = request.headers.get("host", "")
    name = split(f"//{host}").hostname or ""
    if not settings.api_key and is_own(settings.host) and not (is_loopback(name) or name == settings.host.lower()):
        return True
    origin = request.headers.get("origin")
    return origin is not None and split(origin).netloc != host


def policy(scripts: str) -> str:
    """The content security policy: everything comes from this server, scripts only from where `scripts` says."""
    return (
        f"default-src 'self'; script-src {scripts}; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; object-src 'none'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    )


def _with_rules(send: Send) -> Send:
    """Adds to each answer what the browser is to heed."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "no-referrer"
        await send(message)

    return sending

"""python -m utils.serving.page: serves the chat page until it is ended; `PageSettings` lists its variables.

It prints nothing while all is well. SIGTERM ends it at once; but if LLM_PAGE_PARENT names a process, it ends with that
one, and leaves signals to it: they often go to both, and answers under way finish then. The address it listens on has
to be free.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from pathlib import Path

from utils import errors, signals
from utils.serving.page.settings import PageSettings
from utils.serving.parent import end_with_parent


def main() -> None:
    settings = PageSettings.from_environment()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if not signals.is_ignored(number):
            signal.signal(number, signal.SIG_IGN if settings.parent else signal.SIG_DFL)
    if settings.parent:
        end_with_parent(settings.parent)
    warnings.simplefilter("ignore")  # of libraries, which nobody here can mend
    traceback.print_exc = say_what_failed  # Gradio's tracebacks hold what users have written
    logging.getLogger("uvicorn.error").addFilter(without_traceback)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(Path(tempfile.gettempdir()) / f"page-{os.getpid()}")  # `application` removes it
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)  # a table of every event so far, after each event
    try:
        from utils.serving.page.server import application, serve  # Gradio takes seconds to load

        app = application(settings)
    except Exception as error:  # another Gradio, or what it needs, is not as expected
        said = (str(error).strip() or "no more is known").splitlines()[0]
        raise errors.UserError(
            f"the chat page cannot be made ({type(error).__name__}: {said}); "
            "check Gradio (pip install -r requirements.txt), or add --no_ui"
        ) from error

    server = threading.Thread(target=serve, args=(app, settings), daemon=True)  # signals are not its business
    server.start()
    server.join()


def say_what_failed(*_: object, **__: object) -> None:
    """One line on the exception at hand, without its words: anybody may send the page what it does not understand."""
    error = sys.exc_info()[1]
    errors.notice(f"the page cannot answer a request of a browser ({type(error).__name__})")


def without_traceback(record: logging.LogRecord) -> bool:
    """A filter of logs."""
    record.exc_info = None
    return True


errors.run_script(main)

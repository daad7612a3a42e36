"""python -m utils.serving.page: serves the chat page until it is ended; `PageSettings` lists its variables.

It prints nothing while all is well. SIGTERM ends it at once. It ends with the process that LLM_PAGE_PARENT names, and
leaves Ctrl-C to it. The address it listens on has to be free.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import warnings
from pathlib import Path

from utils import errors
from utils.serving.page.settings import PageSettings
from utils.serving.parent import end_with_parent


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    settings = PageSettings.from_environment()
    signal.signal(signal.SIGINT, signal.SIG_IGN if settings.parent else signal.SIG_DFL)
    if settings.parent:
        end_with_parent(settings.parent)
    warnings.simplefilter("ignore")  # of libraries, which nobody here can mend
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(Path(tempfile.gettempdir()) / f"page-{os.getpid()}")  # `serve` removes it
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)  # a table of every event so far, after each event
    from utils.serving.page.server import serve  # Gradio takes seconds to load

    server = threading.Thread(target=serve, args=(settings,), daemon=True)  # signals are not its business
    server.start()
    server.join()


errors.run_script(main)

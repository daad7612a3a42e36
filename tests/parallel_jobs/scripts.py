"""One rank of a job: the mains of several scripts, one after another, over the connections of the first.

The JSON file that it is given lists [name of the script, its command line]. A command that ends with a `UserError` has
its message in FILE.errors, by its number; the others go on.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from utils import runtime

runtime.prepare()

from utils.errors import UserError, run_script  # noqa: E402
from utils.parallel import process_group  # noqa: E402

runtime.prepare = lambda **_: None
connect = process_group.start
known: list[Any] = []


def start_once(*arguments: Any) -> Any:
    if not known:
        known.append(connect(*arguments))
    return known[0]


process_group.start = start_once


def main() -> None:
    listed = Path(sys.argv[1])
    errors: dict[int, str] = {}
    for number, (script, words) in enumerate(json.loads(listed.read_text("utf-8"))):
        sys.argv = [f"{script}.py", *words]
        started = time.perf_counter()
        try:
            importlib.import_module(script).main()
        except UserError as error:
            errors[number] = str(error)
        except BaseException:
            print(f"in {script} {' '.join(words)}", file=sys.stderr, flush=True)
            raise
        print(f"{time.perf_counter() - started:.2f} s: {script} {' '.join(words)}", file=sys.stderr, flush=True)
    if (known and known[0].first) or not known:
        listed.with_name(f"{listed.name}.errors").write_text(json.dumps(errors), "utf-8")


run_script(main)

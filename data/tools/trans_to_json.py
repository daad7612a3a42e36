"""Plain text to JSON Lines, the first step of pretraining data.

    python data/tools/trans_to_json.py --input_path ./data/text --output_path ./data/text

Every file of a folder is read; documents end at an empty line (or at the line that --doc_spliter names).
Written is OUTPUT_PATH.jsonl, one {"text": ...} per line, shuffled. `--help` lists every argument.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import signals

if __name__ == "__main__":
    signals.take()  # before the slow imports

from utils.arguments import TransToJsonArguments, parse
from utils.errors import run_script


def main() -> None:
    args: Any = parse(TransToJsonArguments, script="data/tools/trans_to_json.py")
    from utils.data.pretrain_text import TextOptions, trans_to_json

    options = TextOptions(**{name: getattr(args, name) for name in TextOptions.__dataclass_fields__})
    for line in trans_to_json(args.input_path, args.output_path, options):
        print(f"done: {line}")


if __name__ == "__main__":
    run_script(main)

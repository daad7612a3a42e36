"""JSON Lines to token files, the second step of pretraining data.

    python data/tools/create_pretraining_data.py --model_name smollm2-135m-instruct \
        --input_path ./data/text.jsonl --output_prefix ./data/text --append_eos

Written are OUTPUT_PREFIX.bin and OUTPUT_PREFIX.idx, which run_pretrain.py reads, and OUTPUT_PREFIX.meta.json,
which says how they were made. Only the model's tokenizer is read. `--help` lists every argument.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import signals

if __name__ == "__main__":
    signals.take()  # before the slow imports

from utils.arguments import CreatePretrainingDataArguments, parse
from utils.errors import notice, run_script


def main() -> None:
    args: Any = parse(CreatePretrainingDataArguments, script="data/tools/create_pretraining_data.py")
    from utils.checkpoints.locate import locate
    from utils.data.pretrain_build import BuildOptions, build

    name = args.tokenizer_name
    if name is not None and re.fullmatch(r"\w+Tokenizer(Fast)?", name):
        notice(f"tokenizer_name {name}: the class follows from the files of {args.model_name}")
        name = None
    checkpoint = locate(args.model_name, weights=False)
    source = locate(name, weights=False) if name else checkpoint
    options = BuildOptions(**{field: getattr(args, field) for field in BuildOptions.__dataclass_fields__})
    said = build(
        args.input_path, args.output_prefix, name or args.model_name, source.folder, checkpoint.config, options
    )
    print(f"done: {said}")


if __name__ == "__main__":
    run_script(main)

"""Merges the shards of a tensor-parallel run: python merge_tp_params.py --model_name_or_path CHECKPOINT
[--merge_model_path OUTPUT]. `--help` lists the arguments.
"""

from __future__ import annotations

from pathlib import Path

from utils import runtime, signals

if __name__ == "__main__":
    signals.take()  # before the slow imports

from utils.arguments import MergeTpArguments, parse
from utils.checkpoints.merge_tp import merge_tp
from utils.errors import run_script


def main() -> None:
    """Parses, checks, merges; needs neither Paddle nor a device."""
    runtime.prepare()
    run = parse(MergeTpArguments, script="merge_tp_params.py")
    folder = Path(str(run.model_name_or_path))
    target = folder if run.merge_model_path is None else Path(run.merge_model_path)
    files = merge_tp(
        folder,
        target,
        export_format=run.export_format,
        dtype=run.dtype,
        max_shard_bytes=run.max_shard_bytes,
    )
    total = sum(file.stat().st_size for file in files) / 1e6
    print(f"merged model written to {target}: {len(files)} file(s), {total:,.1f} MB")


if __name__ == "__main__":
    run_script(main)

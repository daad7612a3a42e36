"""Merges a LoRA adapter into its base: python merge_lora_params.py --model_name_or_path BASE --lora_path ADAPTER
--merge_model_path OUTPUT. `--help` lists the arguments.
"""

from __future__ import annotations

from pathlib import Path

from utils import runtime, signals

if __name__ == "__main__":
    signals.take()  # before the slow imports

from utils.arguments import MergeLoraArguments, parse
from utils.checkpoints import locate
from utils.checkpoints.merge import merge_lora
from utils.errors import run_script


def main() -> None:
    """Parses, checks, merges; needs neither Paddle nor a device."""
    runtime.prepare()
    run = parse(MergeLoraArguments, script="merge_lora_params.py")
    target = Path(str(run.merge_model_path))
    files = merge_lora(
        locate(str(run.model_name_or_path)),
        Path(str(run.lora_path)),
        target,
        export_format=run.export_format,
        dtype=run.dtype,
        max_shard_bytes=run.max_shard_bytes,
    )
    total = sum(file.stat().st_size for file in files) / 1e6
    print(f"merged model written to {target}: {len(files)} file(s), {total:,.1f} MB")


if __name__ == "__main__":
    run_script(main)

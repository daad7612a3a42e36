"""Exports a model as a static program: python export_model.py --model_name_or_path NAME --output_path ./inference

The folder holds the program, its weights, config, tokenizer, chat template and generation settings: it alone is
enough for `predictor.py --mode static`. `--help` lists the arguments. Before it says done, the exported model is
loaded in a new process and compared with the one it was made from. Several processes (`python -m
paddle.distributed.launch`) export a part of every layer each, for as many processes.
"""

from __future__ import annotations

from pathlib import Path

from utils import runtime, signals

if __name__ == "__main__":
    signals.take()  # before the slow imports

from utils.arguments import ExportArguments, parse
from utils.errors import run_script
from utils.inference.export import check_target, export
from utils.inference.loading import check_model_type, prepare
from utils.inference.manifest import run_command
from utils.inference.verify import verify_export
from utils.parallel.process_group import start
from utils.parallel.topology import Layout


def main() -> None:
    """Parses, checks, exports, compares."""
    runtime.prepare()
    run = parse(ExportArguments, script="export_model.py")
    output = Path(run.output_path)
    check_target(output)
    layout = Layout.of_prediction()
    layout.check_device(run)
    processes = start(layout, run.device)
    prepared = prepare(
        str(run.model_name_or_path),
        device=run.device,
        dtype=run.dtype,
        chat_template=run.chat_template,
        lora_path=run.lora_path,
        prefix_path=run.prefix_path,
        inference_model=run.inference_model,
        processes=processes,
    )
    check_model_type(run, prepared.checkpoint)
    export(prepared, output, device=run.device, verify=verify_export)
    if not processes.first:
        return
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) / 1e6
    print(f"exported to {output} ({size:,.1f} MB)")
    print(f"run it: {run_command(output, layout, run.inference_model)}")


if __name__ == "__main__":
    run_script(main)

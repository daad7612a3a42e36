"""Pretrains a language model on plain text, from new random weights or from those that it has.

    python run_pretrain.py ./gpt-3/pretrain_argument.json
    python run_pretrain.py ./llama/pretrain_argument.json --continue_training true --learning_rate 1e-4

Reads one JSON argument file; `--key value` after it overrides the file. `--help` lists every argument.
input_dir holds token files, see docs/pretrain.md for the two commands that make them of plain text.
Writes weights, config.json, tokenizer, results, checkpoints and the loss curve to output_dir. An interrupted run
continues by itself when it is started again.

Exit codes: 0 done; 2 errors that the user can mend, one line each, before any weights load; 130 after Ctrl-C, 143 after
SIGTERM, 129 after SIGHUP, 141 when nobody reads the output any more: a training under way saves a checkpoint then.
"""

from __future__ import annotations

from typing import Any

from utils import runtime, signals

if __name__ == "__main__":
    signals.take()  # before the slow imports

from utils.arguments import PretrainArguments, parse
from utils.errors import run_script


def main() -> None:
    # ----- arguments ---------------------------------------------------------------------------------
    args: Any = parse(PretrainArguments, script="run_pretrain.py")
    runtime.prepare()
    device = args.device
    output = args.output

    # ----- checks that need files, not weights ---------------------------------------------------------
    from utils.parallel.process_group import start as connect
    from utils.parallel.topology import Layout
    from utils.training.plan import check_output, checkpoint_to_resume, describe_evaluation, make_plan
    from utils.training.record import claim
    from utils.training.reporters import check_reporters
    from utils.training.start import check_dropout

    layout = Layout.of(args)
    layout.check_device(args)
    check_reporters(args.report_to if "report_to" in args.provided else [])
    check_output(args)
    lock = claim(args, layout)
    start = checkpoint_to_resume(args) if args.do_train else None

    # ----- other processes of the run ------------------------------------------------------------------
    processes = connect(layout, device)

    # ----- model folder, tokenizer ---------------------------------------------------------------------
    from utils.checkpoints.locate import locate
    from utils.families.tokenizers import load_tokenizer
    from utils.training import pretraining

    with processes.one_after_first():
        checkpoint = locate(args.model_name_or_path, weights=args.continue_training)
        source = locate(args.tokenizer_name_or_path, weights=False) if args.tokenizer_name_or_path else checkpoint
    layout.check_model(checkpoint.family.shape(checkpoint.config))
    pretraining.check_length(args, checkpoint)
    check_dropout(args, checkpoint)
    tokenizer = load_tokenizer(source.folder, checkpoint.config)
    template = pretraining.choose_template(args, checkpoint, source.folder)

    # ----- data ----------------------------------------------------------------------------------------
    wanted = {"train": args.do_train, "dev": args.do_eval, "test": args.do_predict}
    splits = [split for split, asked in wanted.items() if asked]
    with processes.one_after_first():
        data = pretraining.load_text(args, layout, checkpoint, tokenizer, splits)
    plan = None
    if args.do_train:
        run = pretraining.describe(args, layout, checkpoint, data["train"])
        steps = pretraining.steps_of(args, layout, data["train"])
        plan = make_plan(args, run, data["train"], steps, start, data.get("dev"))
    dtype = runtime.resolve_dtype("float16" if args.fp16 else "bfloat16" if args.bf16 else "float32", device)
    if args.dry_run:
        runtime.load_paddle()
        print(pretraining.report(args, layout, checkpoint, dtype, device, data, tokenizer, plan))
        return

    # ----- is there anything to do? --------------------------------------------------------------------
    from utils.training.finish import is_all_done, train

    if is_all_done(args, plan, data):
        return
    lock = lock or claim(args, layout, new=True)  # until the process ends

    # ----- model ---------------------------------------------------------------------------------------
    runtime.use_device(device)
    model, trained = pretraining.build(args, checkpoint, dtype, processes)

    # ----- trainer -------------------------------------------------------------------------------------
    from utils.data.collate import Collator
    from utils.training.callbacks import console_callbacks
    from utils.training.loop import Trainer
    from utils.training.output import companion_files, write_results

    companions = companion_files(args, tokenizer, template, source.folder)
    trainer = Trainer(
        model,
        trained,
        args,
        dtype=dtype,
        collator=Collator(tokenizer.pad_id, layout.tensor if args.sequence_parallel else 1),
        train_dataset=data.get("train"),
        eval_dataset=data.get("dev"),
        name_rows=pretraining.SampleNames(tokenizer),
        extra_files=companions,
        callbacks=console_callbacks(args, output),
        last_rate=args.min_learning_rate,
        processes=processes,
    )

    # ----- train, evaluate -----------------------------------------------------------------------------
    train(trainer, args, plan, companions)
    if args.do_eval:
        made_of = describe_evaluation(args, data["dev"]) if plan else None
        write_results(output, "dev", trainer.evaluate(), processes, made_of)
    if args.do_predict:
        made_of = describe_evaluation(args, data["test"]) if plan else None
        write_results(output, "test", trainer.evaluate(data["test"], "predict"), processes, made_of)
    print(f"done: {output}")


if __name__ == "__main__":
    run_script(main)

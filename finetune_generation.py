"""Finetunes a language model: SFT, LoRA or prefix tuning, then evaluates it.

    python finetune_generation.py ./llama/lora_argument.json
    python finetune_generation.py ./llama/lora_argument.json --learning_rate 1e-4 --dry_run

Reads one JSON argument file; `--key value` after it overrides the file. `--help` lists every argument.
Writes weights (or the adapter), tokenizer, chat template, results, checkpoints and the loss curve to
output_dir. An interrupted run continues by itself when it is started again.

Exit codes: 0 done; 2 errors that the user can mend, one line each, before any weights load; 130 after Ctrl-C, 143 after
SIGTERM, 129 after SIGHUP, 141 when nobody reads the output any more: a training under way saves a checkpoint then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils import runtime, signals

if __name__ == "__main__":
    signals.take()  # before the slow imports

from utils.arguments import FinetuneArguments, parse
from utils.errors import UserError, notice, run_script


def main() -> None:
    # ----- arguments ---------------------------------------------------------------------------------
    args: Any = parse(FinetuneArguments, script="finetune_generation.py")
    if (args.do_ptq or args.do_gptq) and not args.dry_run:
        raise UserError("do_ptq / do_gptq: quantization is not part of this version yet; leave these options out")
    runtime.prepare()
    device = args.device
    output = args.output

    # ----- checks that need files, not weights ---------------------------------------------------------
    from utils.checkpoints.locate import locate
    from utils.data.rows import check_dataset
    from utils.parallel.process_group import start as connect
    from utils.parallel.topology import Layout
    from utils.training.batches import run_steps
    from utils.training.plan import (
        check_output,
        check_positions,
        checkpoint_to_resume,
        describe,
        describe_evaluation,
        make_plan,
    )
    from utils.training.record import claim
    from utils.training.reporters import check_reporters
    from utils.training.start import check_adapters, check_dropout

    layout = Layout.of(args)
    layout.check_device(args)
    check_reporters(args.report_to if "report_to" in args.provided else [])
    splits = [
        name for name, wanted in (("train", args.do_train), ("dev", args.do_eval), ("test", args.do_predict)) if wanted
    ]
    check_dataset(args.dataset_name_or_path, splits, lazy=args.lazy)
    check_output(args)
    lock = claim(args, layout)
    start = checkpoint_to_resume(args) if args.do_train else None

    # ----- other processes of the run ------------------------------------------------------------------
    processes = connect(layout, device)

    # ----- model folder, tokenizer, template -----------------------------------------------------------
    from utils.data.template import ChatTemplate
    from utils.families.tokenizers import load_tokenizer

    with processes.one_after_first():
        checkpoint = locate(args.model_name_or_path)
        source = locate(args.tokenizer_name_or_path) if args.tokenizer_name_or_path else checkpoint
    layout.check_model(checkpoint.family.shape(checkpoint.config))
    check_adapters(args, checkpoint)
    check_dropout(args, checkpoint)
    tokenizer = load_tokenizer(source.folder, checkpoint.config)
    override = Path(args.chat_template) if args.chat_template else None
    template = ChatTemplate.load(
        source.folder,
        default=checkpoint.family.chat_template,
        override=override,
        special_tokens_in_text=args.special_tokens_in_text,
    )

    # ----- data ----------------------------------------------------------------------------------------
    from utils.data.collate import Collator
    from utils.data.dataset import load_dataset, load_rows

    with processes.one_after_first():
        data = {split: load_dataset(args, tokenizer, template, split, processes) for split in splits}
    for split, dataset in data.items():
        if dataset.report.counts and not args.dry_run:  # which reports it by itself
            notice(f"{split} data: {dataset.summary()}")
    check_positions(data, checkpoint, args.max_length)
    plan = None
    if args.do_train:
        run = describe(args, layout, checkpoint, data["train"], tokenizer, template)
        rows: Any = data["train"]
        steps = run_steps(args, layout, None if args.lazy else len(rows))
        plan = make_plan(args, run, rows, steps, start, data.get("dev"))
    dtype = runtime.resolve_dtype("float16" if args.fp16 else "bfloat16" if args.bf16 else "float32", device)
    if args.dry_run:
        from utils.training.dry_run import report

        print(report(args, layout, checkpoint, dtype, device, data, tokenizer, template, plan))
        return

    # ----- is there anything to do? --------------------------------------------------------------------
    from utils.training.finish import is_all_done, train

    if is_all_done(args, plan, data):
        return
    lock = lock or claim(args, layout, new=True)  # until the process ends

    # ----- model ---------------------------------------------------------------------------------------
    runtime.use_device(device)
    from utils.training.start import build

    model, trained = build(args, checkpoint, dtype, data.get("train"), processes)

    # ----- trainer -------------------------------------------------------------------------------------
    from utils.inference.sampling import SamplingOptions
    from utils.training.callbacks import console_callbacks
    from utils.training.evaluation import GenerationEvaluation
    from utils.training.loop import Trainer
    from utils.training.output import companion_files, write_results
    from utils.training.rows import RowNames

    options = SamplingOptions(
        max_new_tokens=args.eval_max_new_tokens,
        top_k=args.top_k,
        top_p=args.top_p,
        temperature=args.temperature,
        seed=args.seed,
    )

    def answers(split: str, kept: bool) -> GenerationEvaluation:
        return GenerationEvaluation(
            model,
            checkpoint.config,
            tokenizer,
            template,
            load_rows(args, split),
            options,
            src_length=args.src_length,
            batch_size=args.per_device_eval_batch_size,
            output_dir=output if kept else None,
            processes=processes,
            show_progress=not args.disable_tqdm,
        )

    dev_answers = answers("dev", args.save_generation_output) if args.do_eval and args.eval_with_do_generation else None
    test_answers = answers("test", True) if args.do_predict else None
    companions = companion_files(args, tokenizer, template, source.folder)
    trainer = Trainer(
        model,
        trained,
        args,
        dtype=dtype,
        collator=Collator(tokenizer.pad_id, layout.tensor if args.sequence_parallel else 1),
        train_dataset=data.get("train"),
        eval_dataset=data.get("dev"),
        evaluate_generation=dev_answers,
        name_rows=RowNames(args, tokenizer, template),
        extra_files=companions,
        callbacks=console_callbacks(args, output),
        processes=processes,
    )

    # ----- train ---------------------------------------------------------------------------------------
    train(trainer, args, plan, companions)

    # ----- evaluate and predict ------------------------------------------------------------------------
    if args.do_eval:
        made_of = describe_evaluation(args, data["dev"]) if plan else None
        write_results(output, "dev", trainer.evaluate(), processes, made_of)
    if test_answers is not None:
        with trainer.whole_weights():
            found = test_answers(trainer.weights_step, "test_generated_output.json")
        made_of = describe_evaluation(args, data["test"]) if plan else None
        write_results(output, "test", {f"predict_{name}": value for name, value in found.items()}, processes, made_of)
    print(f"done: {output}")


if __name__ == "__main__":
    run_script(main)

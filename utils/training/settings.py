"""From our arguments to those of the library's trainer."""

from __future__ import annotations

import os
from typing import Any


def paddlenlp_arguments(args: Any, device: str, dtype: str, steps: int) -> Any:
    """PaddleNLP's TrainingArguments for a run of `steps` optimizer steps.

    What our trainer does itself (resume, best model, clipping, parallelism, reports, progress) is switched off there.
    """
    from paddlenlp.trainer import TrainingArguments

    strategy = args.evaluation_strategy if args.do_eval else "no"
    return TrainingArguments(
        output_dir=args.output_dir,
        do_train=args.do_train,
        do_eval=strategy != "no",
        per_device_train_batch_size=args.per_device_train_batch_size,
        per_device_eval_batch_size=args.per_device_eval_batch_size,
        eval_accumulation_steps=args.eval_accumulation_steps,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_epsilon=args.adam_epsilon,
        max_grad_norm=0.0,
        max_steps=steps,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_ratio=args.warmup_ratio,
        warmup_steps=args.warmup_steps,
        logging_strategy=args.logging_strategy,
        logging_steps=args.logging_steps,
        evaluation_strategy=strategy,
        eval_steps=args.eval_steps,
        save_strategy=args.save_strategy,
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        seed=args.seed,
        device=device.split(":")[0],
        fp16=dtype == "float16",
        bf16=dtype == "bfloat16",
        fp16_opt_level=args.fp16_opt_level,
        recompute=args.recompute,
        dataloader_num_workers=args.dataloader_num_workers,
        metric_for_best_model=args.metric_for_best_model,
        greater_is_better=args.greater_is_better,
        ignore_data_skip=True,
        load_best_model_at_end=False,
        report_to=[],
        disable_tqdm=True,
        skip_memory_metrics=True,
        skip_profile_timer=True,
        remove_unused_columns=False,
        logging_dir=os.path.join(args.output_dir, "runs"),
    )

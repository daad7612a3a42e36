"""PaddleNLP's training loop with losses weighted by tokens, exact resume and saves that survive a kill."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddlenlp import trainer as library

from utils.checkpoints.files import atomic_directory
from utils.errors import UserError, notice
from utils.training import resume
from utils.training.callbacks import memory_gib
from utils.training.metrics import likelihood_metrics
from utils.training.model import TrainingModel
from utils.training.sampler import EpochSampler
from utils.training.trained import Trained

TOKENS = "tokens"  # number of real tokens of a batch, beside the model's inputs


class Window:
    """Sums since the last log line."""

    def __init__(self) -> None:
        self.loss, self.targets, self.tokens, self.positions = 0.0, 0, 0, 0
        self.started = time.monotonic()


class CountingCollator:
    """A collator that also says how many real tokens the batch has."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, np.ndarray]]) -> None:
        self.collator = collator

    def __call__(self, items: list[Any]) -> dict[str, np.ndarray]:
        tokens = sum(len(item["input_ids"]) for item in items)
        return {**self.collator(items), TOKENS: np.array([tokens], dtype=np.int64)}


class _Boundaries(library.TrainerCallback):
    """Hooks into the library's loop at the places where exactness needs them."""

    def __init__(self, owner: Trainer) -> None:
        self.owner = owner

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.owner.restore_random_state()

    def on_optimizer_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.owner.weight_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # the loop counts epochs from the batches of this process, wrong after a resume
        state.epoch = state.global_step / self.owner.steps_per_epoch


class Trainer(library.Trainer):
    """Trains a `TrainingModel`.

    Differences to the library's trainer:
    - The gradient of an optimizer step is that of the mean over all its targets, whatever the
      micro-batches; the library averages micro-batches, so that few targets weigh as much as many.
    - A run continued from a checkpoint has the losses of the uninterrupted one, also from an
      epoch's end and in later epochs; a checkpoint appears whole or not at all.
    - It stops before an update whose loss is not finite.
    """

    def __init__(
        self,
        model: TrainingModel,
        trained: Trained,
        args: Any,
        *,
        collator: Callable[[list[Any]], dict[str, np.ndarray]],
        train_dataset: Any = None,
        eval_dataset: Any = None,
        evaluate_generation: Callable[[int], dict[str, float]] | None = None,
        describe: Mapping[str, Any] | None = None,
        extra_files: Callable[[Path], None] | None = None,
        callbacks: list[Any] | None = None,
    ) -> None:
        """
        Args:
            trained: the part of `model` that checkpoints hold.
            args: PaddleNLP's TrainingArguments, see `settings.library_arguments`.
            evaluate_generation: (step) -> metrics of generated text; None evaluates likelihood.
            describe: what must be the same for a resume (data, batch, lengths, seed).
            extra_files: writes tokenizer, template and arguments beside the weights.
        """
        super().__init__(
            model=model,
            args=args,
            data_collator=CountingCollator(collator),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[_Boundaries(self), *(callbacks or [])],
        )
        self.remove_callback(library.PrinterCallback)
        self.trained = trained
        self.evaluate_generation = evaluate_generation
        self.describe = dict(describe or {})
        self.extra_files = extra_files
        self.window = Window()
        self.step_targets, self.step_scale = 0, 1.0  # of the optimizer step under way
        self.total_loss, self.total_targets, self.total_tokens = 0.0, 0, 0
        self.resumed: dict[str, Any] | None = None
        self.random_state_due = False
        self.stopped_early = False
        self.evaluated: tuple[int, dict[str, float]] | None = None  # (step, metrics) of the last evaluation
        self.loaded_step: int | None = None  # of the best checkpoint, once its weights are in the model
        self.micro_batches = 0  # of this process, for the place in streamed data

    # --- data ----------------------------------------------------------------------------------------

    @property
    def streams(self) -> bool:
        """Whether the training data is a stream without a length."""
        return not hasattr(self.train_dataset, "__len__")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; a stream's epochs are counted by its own reports, so 1 run = 1 epoch."""
        if self.streams:
            return self.args.max_steps
        return max(1, len(self.sampler) // self.args.gradient_accumulation_steps)

    def _get_train_sampler(self) -> EpochSampler:
        self.sampler = EpochSampler(
            self.train_dataset,
            self.args.per_device_train_batch_size,
            self.args.gradient_accumulation_steps,
            seed=self.args.seed,
            ranks=max(1, self.args.dataset_world_size),
            rank=max(0, self.args.dataset_rank),
        )
        if self.resumed is not None:
            epoch, steps = divmod(self.resumed["global_step"], self.steps_per_epoch)
            self.sampler.resume_at(epoch, steps * self.args.gradient_accumulation_steps)
        return self.sampler

    # --- a step --------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], step_control: int = 0) -> paddle.Tensor:
        """Adds the gradient of one micro-batch; returns its summed loss."""
        model.train()
        inputs = dict(self._prepare_inputs(inputs))
        tokens = int(inputs.pop(TOKENS))
        targets = int((inputs["labels"] != -100).sum())
        with self.autocast_smart_context_manager():
            loss = model(**inputs)
        if not self.step_targets:
            self.step_scale = float(max(targets, 1))  # keeps the scaled loss near a mean, for float16
        scaled = loss / self.step_scale
        (self.scaler.scale(scaled) if self.do_grad_scaling else scaled).backward()
        self.step_targets += targets
        self.micro_batches += 1
        window = self.window
        window.targets += targets
        window.tokens += tokens
        window.positions += inputs["input_ids"].size
        self.total_tokens += tokens
        return loss.detach()

    def weight_gradients(self) -> None:
        """Makes the summed gradients of the step those of the mean over its targets."""
        factor = self.step_scale / max(self.step_targets, 1)
        if factor != 1.0:
            with paddle.no_grad():
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.scale_(factor)
        self.step_targets = 0

    def _check_loss_valid(self, loss: paddle.Tensor) -> None:
        if np.isfinite(float(loss)):
            return
        rows = "" if self.streams else f" on examples {self._examples_of_step()}"
        raise UserError(
            f"the loss is {float(loss)} in step {self.state.global_step + 1}{rows}; the weights were not updated. "
            "Lower the learning rate, use bf16 instead of fp16, or look at these examples; "
            "the last good checkpoint is kept"
        )

    def _examples_of_step(self) -> list[int]:
        epoch, step = divmod(self.state.global_step, self.steps_per_epoch)
        accumulation = self.args.gradient_accumulation_steps
        batches = self.sampler.batches(epoch)[step * accumulation : (step + 1) * accumulation]
        return sorted(number for batch in batches for number in batch)

    # --- log, evaluate, save -------------------------------------------------------------------------

    def _maybe_log_save_evaluate(
        self, tr_loss: paddle.Tensor, model: Any, epoch: int, ignore_keys_for_eval: Any, **kwargs: Any
    ) -> None:
        self.window.loss += float(tr_loss)
        self.total_loss += float(tr_loss)
        tr_loss.subtract_(tr_loss)
        if self.control.should_log and self.window.targets:
            self.total_targets += self.window.targets
            self.log(self._window_values())
            self.window = Window()
        metrics = None
        if self.control.should_evaluate:
            paused = time.monotonic()
            metrics = self.evaluate()
            self.window.started += time.monotonic() - paused
        if self.control.should_save:
            paused = time.monotonic()
            self._save_checkpoint(model, metrics)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.window.started += time.monotonic() - paused

    def _window_values(self) -> dict[str, float]:
        window = self.window
        return {
            "loss": window.loss / window.targets,
            "learning_rate": self._get_learning_rate(),
            "tokens_per_second": window.tokens / max(time.monotonic() - window.started, 1e-9),
            "effective_tokens": window.tokens / window.positions,
            "memory_gib": memory_gib(),
        }

    def log(self, logs: dict[str, float], **kwargs: Any) -> None:
        """Hands one set of numbers to everything that shows or keeps them."""
        if "loss" in logs:
            logs = {"epoch": self.state.global_step / self.steps_per_epoch, **logs}
        elif not any(key.startswith("eval_") for key in logs):
            return  # the library's own summary at the end; ours is what `train` returns
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Token-weighted loss, ppl and accuracy over the evaluation data, or metrics of generated text.

        The model's weights are evaluated once: asked again after the same step, it returns what it found.
        """
        if self.evaluated is not None and self.evaluated[0] == self.weights_step:
            return self.evaluated[1]
        self.model.eval()
        if self.evaluate_generation is not None:
            found = self.evaluate_generation(self.state.global_step)
        else:
            loss, right, targets = 0.0, 0, 0
            for inputs in self.get_eval_dataloader(eval_dataset):
                inputs = dict(self._prepare_inputs(inputs))
                inputs.pop(TOKENS)
                with self.autocast_smart_context_manager():
                    scored = self.model.score(**inputs)
                loss, right, targets = loss + scored[0], right + scored[1], targets + scored[2]
            found = likelihood_metrics(loss, right, targets)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.evaluated = (self.weights_step, metrics)
        return metrics

    @property
    def weights_step(self) -> int:
        """The step after which the model had the weights that it has now."""
        return self.state.global_step if self.loaded_step is None else self.loaded_step

    def _save_checkpoint(self, model: Any, metrics: dict[str, float] | None = None) -> None:
        """Writes `checkpoint-N`: weights, optimizer, scheduler, generators, place in the data."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._note_best(folder, metrics)
        with atomic_directory(folder) as staging:
            self.trained.save(staging)
            if self.extra_files is not None:
                self.extra_files(staging)
            resume.save_optimizer(staging / resume.OPTIMIZER, self.optimizer, self.model)
            self.state.save_to_json(str(staging / resume.STATE))
            resume.save_progress(staging, self._progress())
        self._delete_old_checkpoints()

    def _progress(self) -> dict[str, Any]:
        progress: dict[str, Any] = {
            "global_step": self.state.global_step,
            "run": self.describe,
            "scheduler": self.lr_scheduler.state_dict(),
            "random": resume.random_state(),
            "total_loss": self.total_loss,
            "total_targets": self.total_targets + self.window.targets,
            "total_tokens": self.total_tokens,
            "micro_batches": self.micro_batches,
        }
        if self.do_grad_scaling:
            progress["scaler"] = {k: np.asarray(v).tolist() for k, v in self.scaler.state_dict().items()}
        if self.streams:
            items = self.micro_batches * self.args.per_device_train_batch_size
            progress["stream"] = self.train_dataset.state_after(items)
        return progress

    def _note_best(self, folder: Path, metrics: dict[str, float] | None) -> None:
        name = self.args.metric_for_best_model
        if metrics is None or name is None:
            return
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in metrics:
            raise UserError(
                f"metric_for_best_model {name.removeprefix('eval_')}: this evaluation measures "
                f"{', '.join(sorted(k.removeprefix('eval_') for k in metrics))}"
            )
        best, value = self.state.best_metric, metrics[name]
        if best is None or (value > best if self.args.greater_is_better else value < best):
            self.state.best_metric, self.state.best_model_checkpoint = value, folder.name

    def _delete_old_checkpoints(self) -> None:
        """Keeps the newest `save_total_limit` checkpoints and the best one."""
        limit = self.args.save_total_limit
        if not limit or limit < 0:
            return
        for folder in resume.checkpoints(Path(self.args.output_dir))[:-limit]:
            if folder.name != self.state.best_model_checkpoint:
                shutil.rmtree(folder)

    # --- resume --------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, ignore_keys_for_eval: Any = None) -> dict[str, float]:
        """Trains, from a checkpoint folder if one is given; returns the figures of the whole run.

        Raises:
            UserError: the checkpoint belongs to a run with other data or settings; a loss that is
                not finite.
        """
        folder = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if folder is not None:
            self.resumed = resume.load_progress(folder)
            resume.check_same_run(folder, self.resumed["run"], self.describe)
            self.random_state_due = True
            for name in ("total_loss", "total_targets", "total_tokens", "micro_batches"):
                setattr(self, name, self.resumed[name])
            if self.streams:
                self.train_dataset.start_at(self.resumed["stream"])
                self.stream_offset = self.micro_batches
            notice(f"continuing after step {self.resumed['global_step']} from {folder}")
        before, started = self.total_tokens, time.monotonic()
        super().train(str(folder) if folder else None)
        seconds = time.monotonic() - started
        self.total_targets += self.window.targets
        self.stopped_early = self.state.global_step < self.state.max_steps
        return {
            "train_loss": self.total_loss / max(self.total_targets, 1),
            "train_runtime": seconds,
            "train_tokens": float(self.total_tokens),
            "train_tokens_per_second": (self.total_tokens - before) / max(seconds, 1e-9),
            "global_step": float(self.state.global_step),
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str | None = None) -> None:
        if resume_from_checkpoint is not None:
            self.trained.restore(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.resumed is not None
        resume.load_optimizer(Path(checkpoint) / resume.OPTIMIZER, self.optimizer, self.model)
        self.lr_scheduler.set_state_dict(self.resumed["scheduler"])
        if self.do_grad_scaling:
            state = {k: paddle.to_tensor(v) if isinstance(v, list) else v for k, v in self.resumed["scaler"].items()}
            self.scaler.load_state_dict(state)

    def restore_random_state(self) -> None:
        """Restores the generators right before the first step of a continued run."""
        if self.random_state_due and self.resumed is not None:
            resume.set_random_state(self.resumed["random"])
            self.random_state_due = False

    def load_best(self) -> str | None:
        """Puts the best checkpoint's weights into the model; returns its name, or None without one."""
        name = self.state.best_model_checkpoint
        if name is not None:
            self.trained.restore(Path(self.args.output_dir) / name)
            self.loaded_step = int(name.rsplit("-", 1)[1])
        return name

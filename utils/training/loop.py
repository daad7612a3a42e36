"""The training loop: read, forward, backward, weigh, clip, update, log, evaluate, save; and where it goes on from.

`Trainer._run` and `Trainer._step` are the loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from utils.checkpoints.files import atomic_directory, write_json
from utils.data.stream import FileLost
from utils.errors import UserError, notice
from utils.kernels.precision import autocast
from utils.parallel.groups import seed_everything
from utils.parallel.process_group import ProcessGroup
from utils.training import resume
from utils.training.accumulation import Accumulation, Batch, PipelineAccumulation
from utils.training.amp import LossScaler
from utils.training.callbacks import Callback, StopOnSignal, memory_gib
from utils.training.evaluation import likelihood
from utils.training.gradients import Gradients
from utils.training.inputs import SizingCollator, rows_of
from utils.training.loader import StreamLoader, evaluation_loader, training_loader
from utils.training.model import TrainingModel
from utils.training.optimizer import adamw, learning_rate
from utils.training.plan import Plan
from utils.training.saving import CheckpointShard, Saver
from utils.training.state import TrainerState
from utils.training.step_metrics import StepMetrics
from utils.training.trained import Trained

if TYPE_CHECKING:
    from utils.arguments import RunArguments
    from utils.parallel.sharding import Share


class Trainer:
    """Trains and evaluates a `TrainingModel`.

    - The gradient of an optimizer step is that of the mean over all its targets, whatever the micro-batches.
    - A run continued from a checkpoint has the losses of the uninterrupted one, also from an epoch's end and in later
      epochs; a checkpoint appears whole or not at all.
    - It stops before an update whose loss or gradient is not finite.
    - SIGTERM and Ctrl-C end it after the step under way, with a checkpoint.
    - Several processes train as one that has all their rows: gradients are added up once a step, after the last
      micro-batch, and every figure is that of all ranks.

    Attributes:
        state: what `trainer_state.json` holds.
        signals: that end the training.
        loaded_step: of the best checkpoint or of a finished run, once its weights are in the model.
    """

    def __init__(
        self,
        model: TrainingModel,
        trained: Trained,
        args: RunArguments,
        *,
        dtype: str,
        collator: Callable[[list[Any]], dict[str, np.ndarray]],
        train_dataset: Any = None,
        eval_dataset: Any = None,
        evaluate_generation: Callable[[int], dict[str, float]] | None = None,
        name_rows: Callable[[list[list[int]]], str] | None = None,
        extra_files: Callable[[Path], None] | None = None,
        callbacks: Sequence[Callback] = (),
        last_rate: float = 0.0,
        processes: ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            trained: the part of `model` that checkpoints hold.
            dtype: the type to compute in.
            evaluate_generation: (step) -> metrics of generated text; None evaluates likelihood.
            name_rows: says in words which rows these token ids are, for messages.
            extra_files: writes tokenizer, template and arguments beside the weights.
            last_rate: where the learning rate ends.
            processes: the processes of the run.
        """
        self.model, self.trained, self.args, self.last_rate = model, trained, args, last_rate
        self.output = args.output
        self.collate = SizingCollator(collator)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.evaluate_generation, self.name_rows, self.extra_files = evaluate_generation, name_rows, extra_files
        self.processes = processes or ProcessGroup()
        self.callbacks = callbacks if self.processes.first else ()
        self.autocast, self.scaler = partial(autocast, dtype, args.fp16_opt_level), LossScaler(dtype)
        self.gradients = Gradients(model.parameters(), self.processes, limit=args.max_grad_norm)
        self.saver = Saver(self.processes, background=args.async_save)
        self.signals = StopOnSignal(several=self.processes.several)
        self.optimizer: Any = None  # of a training
        self.schedule: Any = None
        self.share: Share | None = None  # of a sharded training
        self.plan = Plan(0, {})
        self.state = TrainerState(
            is_local_process_zero=self.processes.first, is_world_process_zero=self.processes.first
        )
        self.metrics, self.totals = StepMetrics(), StepMetrics()  # since the last log line, and of the whole run
        self.figures: dict[str, float] = {}  # learning rate and gradient norm of the last step
        self.stopping = False
        self.loaded_step: int | None = None
        model.base.enable_recompute = args.recompute

    # --- the loop ------------------------------------------------------------------------------------

    def train_by(self, plan: Plan) -> dict[str, float]:
        """Trains as planned, from a checkpoint if the plan has one; returns the figures of the whole run.

        Raises:
            UserError: a loss or gradient that is not finite, or a file of a stream that has changed or gone.
        """
        try:
            self._prepare(plan)
            self._run()
            self.saver.wait()
        except Exception as error:  # Ctrl-C stops at once
            self.processes.ending()
            self.saver.settle()
            if isinstance(error, FileLost):
                raise UserError(f"{error}; {self._kept()}") from None
            raise
        finally:
            self._tell("on_train_end")  # bars, files
        if self.streams and self.train_dataset.report.counts:
            notice(f"train data, as far as it was read: {self.train_dataset.summary()}")
        seconds = time.monotonic() - self.totals.started
        return {
            "train_loss": self.totals.mean_loss,
            "train_runtime": seconds,
            "train_tokens": float(self.totals.tokens),
            "train_tokens_per_second": self.totals.tokens / max(seconds, 1e-9),
            "global_step": float(self.state.global_step),
        }

    def _run(self) -> None:
        """All steps that are left, or those until a signal."""
        state, args = self.state, self.args
        if args.eval_on_start and args.do_eval and state.global_step == 0:
            started = time.monotonic()
            self.evaluate()
            self.metrics.pause(time.monotonic() - started)
        batches = chain.from_iterable(repeat(self.loader))  # epoch after epoch
        while state.global_step < state.max_steps and not self.stopping:
            self._step(batches)
            if self._is_due(args.logging_strategy, args.logging_steps, at_end=True) and self.metrics.targets:
                self._log({**self.metrics.values(), **self.figures, "memory_gib": memory_gib()})
                self.metrics = StepMetrics()
            started, evaluated = time.monotonic(), None
            if args.do_eval and self._is_due(args.evaluation_strategy, args.eval_steps):
                evaluated = self.evaluate()
            self.stopping = self.signals.wanted is not None
            if self.stopping or self._is_due(args.save_strategy, args.save_steps):
                self.save_checkpoint(evaluated)
            self.metrics.pause(time.monotonic() - started)

    def _is_due(self, strategy: str, every: int | None, at_end: bool = False) -> bool:
        """Whether something is to be done after the step that has been taken.

        Args:
            strategy: "no", "steps" or "epoch".
            every: so many steps.
            at_end: after the last step too, though it may fill no window.
        """
        step, last = self.state.global_step, self.state.global_step == self.state.max_steps
        if strategy == "epoch":
            return last or step % self.steps_per_epoch == 0
        return strategy == "steps" and (step % (every or 1) == 0 or (at_end and last))

    def _step(self, batches: Iterator[Batch]) -> None:
        """One update of the weights, by the mean over all targets of its micro-batches on all ranks."""
        accumulation = self.accumulation
        accumulation.begin()
        for batch in islice(batches, self.args.gradient_accumulation_steps):  # read
            self.forward_backward(batch)
        targets = self._count()
        norm = self.gradients.finish(accumulation.scale / max(targets, 1), self.scaler.scale)  # weigh, clip
        self.figures = {"learning_rate": float(self.schedule())}
        finite = math.isfinite(norm)
        if finite:
            self.figures["grad_norm"] = norm
            self.optimizer.step()  # update
            self.schedule.step()
        elif not self.scaler.enabled:  # which leaves such steps out by itself
            self._stop_at("gradient's norm", norm, [batch for _, batch in accumulation.losses], together=True)
        self.scaler.update(finite)
        self.optimizer.clear_grad()
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / self.steps_per_epoch
        self.state.consumed_samples = self.state.global_step * self.processes.layout.global_batch(self.args)
        self._tell("on_step_end")

    def forward_backward(self, batch: Batch) -> None:
        """Adds the gradient of a micro-batch, in a pipeline those of all with the last one."""
        self.accumulation.add(batch)

    def _count(self) -> int:
        """Adds the losses and tokens of a step on all ranks to the figures; returns the number of its targets."""
        self.saver.check()
        accumulation, stopping = self.accumulation, self.signals.received is not None
        loss = accumulation.loss
        if not math.isfinite(loss):
            self._stop_at("loss", loss, [batch for own, batch in accumulation.losses if not np.isfinite(float(own))])
        counted = [loss, *accumulation.counts.tolist()]
        found = self.processes.sums([*(counted if self.processes.layout.counts else np.zeros(4)), stopping])
        self.signals.agree(found[4] > 0)
        targets, tokens, positions = (int(count) for count in found[1:4])
        for sums in (self.metrics, self.totals):
            sums.add(found[0], targets, tokens, positions)
        return targets

    def _stop_at(self, what: str, value: float, batches: list[Batch], together: bool = False) -> NoReturn:
        """Ends the run before the update of a step with numbers that are not finite.

        Args:
            together: all ranks have found the same, and each has some of the rows.
        """
        named = ""
        if self.name_rows is not None:
            names = self.name_rows([ids for batch in batches for ids in rows_of(batch)])
            found = self.processes.gather(names) if together else [names]
            named = " on " + "; ".join(dict.fromkeys(filter(None, found)))  # ranks that share a model have the same
        self.saver.settle()
        raise UserError(
            f"the {what} is {value} in step {self.state.global_step + 1}{named}; the weights were not updated, "
            f"{resume.last_good(self.output)}. Lower the learning rate, use bf16 instead of fp16, or look at these rows"
        )

    # --- data ----------------------------------------------------------------------------------------

    @property
    def streams(self) -> bool:
        """Whether the training data is a stream without a length."""
        return isinstance(self.loader, StreamLoader)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; a stream's epochs are counted by its own reports, so 1 run = 1 epoch."""
        if isinstance(self.loader, StreamLoader):
            return self.plan.steps
        return len(self.loader) // self.args.gradient_accumulation_steps

    @property
    def epochs(self) -> float:
        """How often the training data has been seen, for the log."""
        if not getattr(self.train_dataset, "ordered", False):
            return float(self.state.epoch or 0.0)
        return float(self.train_dataset.epochs(self.state.global_step * self.processes.layout.global_batch(self.args)))

    # --- log, evaluate, save -------------------------------------------------------------------------

    def _tell(self, event: str, *values: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.state, *values)

    def _log(self, logs: dict[str, float]) -> None:
        """Hands one set of numbers to everything that shows or keeps them."""
        logs = {"epoch": self.epochs, **logs}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._tell("on_log", logs)

    def evaluate(self, dataset: Any = None, prefix: str = "eval") -> dict[str, float]:
        """Token-weighted loss, ppl and accuracy over the evaluation data, or metrics of generated text.

        Weights are evaluated once on the evaluation data: asked again for those of the same step, it returns
        what it found. Other data has another prefix of the names of metrics.
        """
        known = self.state.evaluated(self.weights_step) if prefix == "eval" else None
        if known is not None and (self.loaded_step is None or self.evaluate_generation is None):
            return known
        self.model.eval()
        if self.evaluate_generation is not None:
            with self.whole_weights():
                found = self.evaluate_generation(self.weights_step)
        else:
            self.processes.barrier("waiting for other ranks to evaluate")
            rows = self.eval_dataset if dataset is None else dataset
            loader = evaluation_loader(self.args, self.processes.layout, rows, self.collate)
            found = likelihood(self.model, loader, self.autocast, self.processes, self.args.eval_accumulation_steps)
        self.signals.agree_among(self.processes)
        metrics = {f"{prefix}_{name}": value for name, value in found.items()}
        if self.loaded_step is None:
            self._log(metrics)
        return metrics

    @property
    def weights_step(self) -> int:
        """The step after which the model had the weights that it has now."""
        return self.state.global_step if self.loaded_step is None else self.loaded_step

    def save_checkpoint(self, metrics: dict[str, float] | None = None) -> None:
        """Writes `checkpoint-N`: weights, optimizer, scheduler, generators, place in the data.

        Args:
            metrics: of the evaluation of these weights, None without one.
        """
        args, shard_plan = self.args, self.trained.shard_plan
        folder = self.output / f"checkpoint-{self.state.global_step}"
        self.state.note_best(folder.name, metrics, args.metric_for_best_model, args.greater_is_better)
        progress = self._progress(self.processes.gather(resume.random_state()))
        state, best = self.state.to_json(), self.state.best_model_checkpoint

        def beside(staging: Path) -> None:
            self.trained.describe(staging)
            if self.extra_files is not None:
                self.extra_files(staging)
            write_json(staging / resume.STATE, state)
            resume.save_progress(staging, progress)

        with self.whole_weights():
            kept = resume.optimizer_tensors(self.optimizer, self.trained.parameters(), shard_plan, self.share)
            self.saver.save(
                lambda: atomic_directory(folder),
                [
                    self.trained.checkpoint_shard(result=False),
                    CheckpointShard(resume.OPTIMIZER, kept, writes=shard_plan.writes),
                ],
                beside,
                target=folder,
                after=lambda: resume.delete_old(self.output, args.save_total_limit, best),
            )
        self._tell("on_save")

    def whole_weights(self) -> AbstractContextManager[None]:
        """A block in which this rank has no weights in slices only (sharding stage 3)."""
        return nullcontext() if self.share is None else self.share.whole()

    def _progress(self, random: list[dict[str, Any]]) -> dict[str, Any]:
        progress: dict[str, Any] = {
            "global_step": self.state.global_step,
            "run": self.plan.run,
            "evaluation": self.plan.evaluation,
            "scheduler": self.schedule.state_dict(),
            "random": random[0],
            "random_of_other_ranks": random[1:],
            "total_loss": self.totals.loss,
            "total_targets": self.totals.targets,
            "total_tokens": self.totals.tokens,
            "window": self.metrics.to_json(),
            "train_seconds": time.monotonic() - self.totals.started,
            "scale": self.accumulation.scale,
        }
        if self.scaler.enabled:
            progress["scaler"] = self.scaler.to_json()
        if self.streams:
            progress["stream"] = self.train_dataset.state_after(self.state.consumed_samples)
        return progress

    def _kept(self) -> str:
        """Saves the steps that a run has taken until its data went, and says what is there to continue from.

        One of several processes may be the only one that knows, and saving takes all of them: these keep what they
        have. Micro-batches of the step under way have drawn from the generators, so its dropout may be another one
        when it is taken again.
        """
        step, kept = self.state.global_step, [path.name for path in resume.checkpoints(self.output)]
        if not self.processes.several and step and f"checkpoint-{step}" not in kept:
            self.save_checkpoint()
            self.saver.wait()
        return resume.last_good(self.output)

    # --- begin, resume, end --------------------------------------------------------------------------

    def _prepare(self, plan: Plan) -> None:
        """Makes everything what it was before the next step: the first one, or the one after a checkpoint."""
        self.plan = plan
        self.metrics, self.totals = StepMetrics(), StepMetrics()
        done = plan.progress["global_step"] if plan.progress else 0
        if plan.start is not None:
            notice(f"continuing after step {done} from {plan.start}")
            self.trained.restore(plan.start)
        self.loader = training_loader(self.args, self.processes.layout, self.train_dataset, self.collate, done)
        self.schedule = learning_rate(self.args, plan.steps, self.last_rate)
        self.optimizer = adamw(self.args, self.model, self.schedule)
        self.processes.barrier("waiting for the model on other ranks")
        self.processes.copy_from_first(self.gradients.parameters, self.processes.groups.readers)
        if stage := self.processes.layout.stage:
            from utils.parallel.sharding import wrap

            borrowed = {self.model.head: self.model.head.borrowed} if self.model.has_head else {}
            group = self.processes.groups.sharding
            self.optimizer, self.share = wrap(self.model, self.optimizer, stage, group, borrowed=borrowed)
            self.gradients.share = self.share
        kind = PipelineAccumulation if self.processes.layout.pipeline > 1 else Accumulation
        micro_batches = self.args.gradient_accumulation_steps
        self.accumulation = kind(self.model, self.processes, self.autocast, self.scaler, micro_batches)
        seed_everything(self.args.seed, self.processes.layout)
        if plan.start is not None and plan.progress is not None:
            self._restore(plan.start, plan.progress)
        self.state.max_steps = plan.steps
        self.state.num_train_epochs = math.ceil(plan.steps / self.steps_per_epoch)
        self.signals.watch()
        self._tell("on_train_begin")

    def _restore(self, start: Path, progress: dict[str, Any]) -> None:
        """Takes all but the weights from a checkpoint."""
        self.state = TrainerState.load(start / resume.STATE)
        self.state.is_local_process_zero = self.state.is_world_process_zero = self.processes.first
        if not self.plan.comparable:
            self.state.forget_best()
            history = self.state.log_history
            self.state.log_history = [logs for logs in history if not any(key.startswith("eval_") for key in logs)]
        best = self.state.best_model_checkpoint
        if best is not None and not resume.is_good(self.output / best):
            notice(f"{best}, the best checkpoint until now, is not in {self.output} any more")
            self.state.forget_best()
        resume.load_optimizer(start, self.optimizer, self.trained.parameters(), self.trained.shard_plan, self.share)
        self.schedule.set_state_dict(progress["scheduler"])
        self.schedule.last_lr = self.schedule.get_lr()  # the user may have changed the rate
        if self.scaler.enabled and "scaler" in progress:  # the run may have had another precision
            self.scaler.restore(progress["scaler"])
        self.accumulation.scale = progress.get("scale", 0.0)  # earlier versions did not keep it
        self.metrics = StepMetrics.from_json(progress["window"])
        self.totals.add(progress["total_loss"], progress["total_targets"], progress["total_tokens"], 0)
        self.totals.started -= progress.get("train_seconds", 0.0)
        states = [progress["random"], *progress.get("random_of_other_ranks", [])]
        if (rank := self.processes.layout.rank) < len(states):  # the run may have had fewer ranks
            resume.set_random_state(states[rank])

    def take_result(self, output: Path, step: int) -> None:
        """Puts the weights of a finished run, which were those after `step`, into place."""
        self.trained.restore(output)
        self.loaded_step = step

    def load_best(self) -> str | None:
        """Puts the best checkpoint's weights into the model; returns its name, or None without one."""
        name = self.state.best_model_checkpoint
        if name is not None and not resume.is_good(self.output / name):
            notice(f"{name}, the best checkpoint, is not in {self.output} any more; the last weights are the result")
            return None
        if name is not None:
            with self.whole_weights():
                self.trained.restore(self.output / name)
            self.loaded_step = int(name.rsplit("-", 1)[1])
        return name

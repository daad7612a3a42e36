"""PaddleNLP's training loop with losses weighted by tokens, exact resume and saves that survive a kill."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import paddle
from paddlenlp import trainer as library

from utils.checkpoints.files import atomic_directory, write_json
from utils.data.stream import StreamDataset
from utils.errors import UserError, notice
from utils.parallel.groups import seed_everything
from utils.parallel.peers import Alone
from utils.training import resume
from utils.training.best import note_best
from utils.training.boundaries import Boundaries, run_loop
from utils.training.callbacks import StopOnSignal, memory_gib
from utils.training.evaluation import likelihood
from utils.training.gradients import Gradients
from utils.training.inputs import SizingCollator, rows_of
from utils.training.loader import Loader, StreamLoader
from utils.training.model import TrainingModel
from utils.training.plan import Plan
from utils.training.sampler import EpochSampler, EvaluationSampler, OrderedSampler, WithBlanks
from utils.training.saving import Piece, Saver
from utils.training.schedule import ending_at
from utils.training.steps import Steps, steps_of
from utils.training.trained import Trained
from utils.training.window import Window


class Trainer(library.Trainer):
    """Trains a `TrainingModel`.

    Differences to the library's trainer:
    - The gradient of an optimizer step is that of the mean over all its targets, whatever the
      micro-batches; the library averages micro-batches, so that few targets weigh as much as many.
    - A run continued from a checkpoint has the losses of the uninterrupted one, also from an
      epoch's end and in later epochs; a checkpoint appears whole or not at all.
    - It stops before an update whose loss or gradient is not finite.
    - SIGTERM and Ctrl-C end it after the step under way, with a checkpoint.
    - Several processes train as one that has all their rows: gradients are added up once a step, after
      the last micro-batch, and every figure is that of all ranks.
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
        name_rows: Callable[[list[list[int]]], str] | None = None,
        extra_files: Callable[[Path], None] | None = None,
        callbacks: Sequence[Any] = (),
        evaluate_first: bool = False,
        max_grad_norm: float = 0.0,
        last_rate: float = 0.0,
        peers: Alone | None = None,
        save_in_background: bool = False,
    ) -> None:
        """
        Args:
            trained: the part of `model` that checkpoints hold.
            args: PaddleNLP's TrainingArguments, see `settings.paddlenlp_arguments`.
            evaluate_generation: (step) -> metrics of generated text; None evaluates likelihood.
            name_rows: says in words which rows these token ids are, for messages.
            extra_files: writes tokenizer, template and arguments beside the weights.
            evaluate_first: whether to evaluate before the first step of a new run.
            max_grad_norm: to which gradients are clipped; 0 for none.
            last_rate: where the learning rate ends.
            peers: the processes of the run.
            save_in_background: whether training goes on while a checkpoint is written.
        """
        self.evaluate_first = evaluate_first
        self.last_rate = last_rate
        self.control: Any
        self.train_dataset: Any
        self.peers = peers or Alone()
        self.signals = StopOnSignal(several=self.peers.several)
        super().__init__(
            model=model,
            args=args,
            data_collator=SizingCollator(collator),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[Boundaries(self), self.signals, *callbacks],
        )
        self.remove_callback(library.PrinterCallback)
        self.trained = trained
        self.optimizer: Any
        self.share: Any = None  # of a sharded run, once it has an optimizer
        self.saver = Saver(self.peers, background=save_in_background)
        self.gradients = Gradients(model.parameters(), self.peers, limit=max_grad_norm)
        self.evaluate_generation = evaluate_generation
        self.name_rows = name_rows
        self.extra_files = extra_files
        self.run: dict[str, Any] = {}
        self.evaluation: dict[str, Any] | None = None  # what evaluations are made of
        self.comparable = True  # with those before a resume
        self.window = Window()
        self.steps: Steps | None = None  # from the first micro-batch on
        self.step_figures: dict[str, float] = {}  # learning rate and gradient norm of the last step
        self.total_loss, self.total_targets, self.total_tokens, self.started = 0.0, 0, 0, 0.0
        self.resumed: dict[str, Any] | None = None
        self.random_state_due = False
        self.loaded_step: int | None = None  # of the best checkpoint, once its weights are in the model

    # --- data ----------------------------------------------------------------------------------------

    @property
    def streams(self) -> bool:
        """Whether the training data is a stream without a length."""
        return isinstance(self.train_dataset, StreamDataset)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; a stream's epochs are counted by its own reports, so 1 run = 1 epoch."""
        if self.streams:
            return self.args.max_steps
        return max(1, len(self.sampler) // self.args.gradient_accumulation_steps)

    def get_train_dataloader(self) -> Loader | StreamLoader:
        batch = self.args.per_device_train_batch_size
        readers, reader = self._readers()
        if self.streams:
            return StreamLoader(self.train_dataset, batch, self.data_collator, readers=readers, reader=reader)
        dataset, accumulation = self.train_dataset, self.args.gradient_accumulation_steps
        self.sampler: EpochSampler | OrderedSampler
        if getattr(dataset, "ordered", False):
            self.sampler = OrderedSampler(dataset, batch, ranks=readers, rank=reader)
        else:
            self.sampler = EpochSampler(dataset, batch, accumulation, seed=self.args.seed, ranks=readers, rank=reader)
            dataset = WithBlanks(dataset)
        if self.resumed is not None:
            epoch, steps = divmod(self.resumed["global_step"], self.steps_per_epoch)
            self.sampler.resume_at(epoch, steps * accumulation)
        return Loader(dataset, self.sampler, self.data_collator, self.args.dataloader_num_workers)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Loader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        readers, reader = self._readers()
        together = self.peers.layout.stage == 3  # ranks need each other's weights
        batch = self.args.per_device_eval_batch_size
        sampler = EvaluationSampler(dataset, batch, ranks=readers, rank=reader, together=together)
        return Loader(dataset, sampler, self.data_collator, self.args.dataloader_num_workers)

    def _readers(self) -> tuple[int, int]:
        """(in how many parts a batch is read, which of them this rank reads)."""
        layout = self.peers.layout
        return layout.readers, layout.reader(layout.rank)

    def _wrap_model(self, model: Any, training: bool = True) -> Any:
        """The library's preparation without its DataParallel, which would exchange gradients at every micro-batch."""
        rank, self.args.local_rank = self.args.local_rank, -1
        try:
            model = super()._wrap_model(model, training)
        finally:
            self.args.local_rank = rank
        if not training:
            return model
        self.peers.gate("waiting for the model on other ranks")
        self.peers.copy_from_first(self.gradients.parameters, self.peers.groups.readers)
        if self.peers.layout.stage:
            from utils.parallel.sharding import wrap

            head = self.model.head
            self.optimizer, self.share = wrap(
                self.model,
                self.optimizer,
                self.peers.layout.stage,
                self.peers.groups.sharding,
                borrowed={head: head.borrowed} if self.model.has_head else {},
            )
            self.gradients.share = self.share
        return model

    @property
    def epochs(self) -> float:
        """How often the training data has been seen, for the log."""
        if not getattr(self.train_dataset, "ordered", False):
            return float(self.state.epoch or 0.0)
        return float(self.train_dataset.epochs(self.state.global_step * self.peers.layout.global_batch(self.args)))

    def create_optimizer(self, lr_scheduler: Any = None) -> Any:
        """The library's AdamW, whose weight decay goes by names. Here matrices decay, and vectors do not."""
        if self.optimizer is None:
            optimizer: Any = super().create_optimizer(lr_scheduler)
            matrices = {parameter.name for parameter in self.model.parameters() if parameter.ndim > 1}
            optimizer._apply_decay_param_fun = matrices.__contains__
        return self.optimizer

    def create_scheduler(self, num_training_steps: int) -> Any:
        """The library's schedule, from the highest rate to `last_rate`."""
        if self.lr_scheduler is None and self.last_rate:
            self.args.lr_end = self.last_rate  # of its polynomial one
            scheduler = super().create_scheduler(num_training_steps)
            if self.args.lr_scheduler_type.value != "polynomial":
                warmup = self.args.warmup_steps or int(self.args.warmup_ratio * num_training_steps)
                scheduler.lr_lambda = ending_at(scheduler.lr_lambda, self.last_rate / self.args.learning_rate, warmup)
                scheduler.last_lr = scheduler.get_lr()
        return super().create_scheduler(num_training_steps)

    # --- a step --------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], step_control: int = 0) -> paddle.Tensor:
        """Takes a micro-batch and adds its gradient, or those of all at the last; returns the losses of these."""
        if self.steps is None:
            scaler = self.scaler if self.do_grad_scaling else None
            micro_batches = self.args.gradient_accumulation_steps
            self.steps = steps_of(self.model, self.peers, self.autocast_smart_context_manager, scaler, micro_batches)
            self.steps.scale = (self.resumed or {}).get("scale", 0.0)  # earlier versions did not keep it
        return self.steps.add(dict(self._prepare_inputs(inputs)))

    def weight_gradients(self) -> None:
        """Makes the gradients of the step those of the mean over its targets on all ranks; checks them."""
        assert self.steps is not None
        self.saver.check()
        steps, stopping = self.steps, self.signals.received is not None
        counted = [float(paddle.add_n([loss for loss, _ in steps.losses])), *steps.counts.tolist()]
        found = self.peers.sums([*(counted if self.peers.layout.counts else np.zeros(4)), stopping])
        self.signals.agree(found[4] > 0)
        targets, tokens, positions = (int(count) for count in found[1:4])
        self.window.add(found[0], targets, tokens, positions)
        self.total_loss += found[0]
        self.total_targets += targets
        self.total_tokens += tokens
        scale = float(self.scaler._scale) if self.do_grad_scaling else 1.0
        norm = self.gradients.finish(steps.scale / max(targets, 1), scale)
        self.step_figures = {"learning_rate": self._get_learning_rate(), "grad_norm": norm}
        if not np.isfinite(norm):
            if not self.do_grad_scaling:  # a scaler leaves such steps out by itself
                self._stop_at("gradient's norm", norm, [batch for _, batch in steps.losses], together=True)
            del self.step_figures["grad_norm"]
        steps.begin()

    def _check_loss_valid(self, loss: paddle.Tensor) -> None:
        if np.isfinite(float(loss)):
            return
        assert self.steps is not None
        bad = [batch for own, batch in self.steps.losses if not np.isfinite(float(own))]
        self._stop_at("loss", float(loss), bad)

    def _stop_at(self, what: str, value: float, batches: list[dict[str, Any]], together: bool = False) -> NoReturn:
        """Ends the run before the update of a step with numbers that are not finite.

        Args:
            together: all ranks have found the same, and each has some of the rows.
        """
        named = ""
        if self.name_rows is not None:
            names = self.name_rows([ids for batch in batches for ids in rows_of(batch)])
            found = self.peers.gather(names) if together else [names]
            named = " on " + "; ".join(dict.fromkeys(filter(None, found)))  # ranks that share a model have the same
        self.saver.settle()
        kept = resume.last_good(Path(self.args.output_dir))
        raise UserError(
            f"the {what} is {value} in step {self.state.global_step + 1}{named}; the weights were not updated, {kept}. "
            "Lower the learning rate, use bf16 instead of fp16, or look at these rows"
        )

    # --- log, evaluate, save -------------------------------------------------------------------------

    def _maybe_log_save_evaluate(
        self, tr_loss: paddle.Tensor, model: Any, epoch: int, ignore_keys_for_eval: Any, **kwargs: Any
    ) -> None:
        tr_loss.subtract_(tr_loss)
        if self.control.should_log and self.window.targets:
            self.log({**self.window.values(), **self.step_figures, "memory_gib": memory_gib()})
            self.window = Window()
        metrics = None
        started = time.monotonic()
        if self.control.should_evaluate:
            metrics = self.evaluate()
            self.control.should_evaluate = False
        if self.control.should_save:
            self._save_checkpoint(model, metrics)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.window.pause(time.monotonic() - started)

    def log(self, logs: dict[str, float], **kwargs: Any) -> None:
        """Hands one set of numbers to everything that shows or keeps them."""
        if "loss" not in logs and not any(key.startswith("eval_") for key in logs):
            return  # the library's own summary at the end; ours is what `train` returns
        logs = {"epoch": self.epochs, **logs}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Token-weighted loss, ppl and accuracy over the evaluation data, or metrics of generated text.

        Weights are evaluated once on the evaluation data: asked again for those of the same step, it returns
        what it found. Other data has another `metric_key_prefix`.
        """
        known = self._evaluated(self.weights_step) if metric_key_prefix == "eval" else None
        if known is not None and (self.loaded_step is None or self.evaluate_generation is None):
            return known
        self.model.eval()
        if self.evaluate_generation is not None:
            with self.whole_weights():
                found = self.evaluate_generation(self.weights_step)
        else:
            self.peers.gate("waiting for other ranks to evaluate")
            found = likelihood(self, self.get_eval_dataloader(eval_dataset))
        self.signals.agree_among(self.peers)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        if self.loaded_step is None:
            self.log(metrics)
        return metrics

    def _evaluated(self, step: int) -> dict[str, float] | None:
        """The metrics of an earlier evaluation of the weights after a step."""
        for logs in self.state.log_history:
            found = {key: value for key, value in logs.items() if key.startswith("eval_")}
            if found and logs["step"] == step:
                return found
        return None

    @property
    def weights_step(self) -> int:
        """The step after which the model had the weights that it has now."""
        return self.state.global_step if self.loaded_step is None else self.loaded_step

    def _save_checkpoint(self, model: Any, metrics: dict[str, float] | None = None) -> None:
        """Writes `checkpoint-N`: weights, optimizer, scheduler, generators, place in the data."""
        output = Path(self.args.output_dir)
        folder = output / f"checkpoint-{self.state.global_step}"
        note_best(self.state, self.args, folder, metrics)
        progress = self._progress(self.peers.gather(resume.random_state()))
        state, best = dataclasses.asdict(self.state), self.state.best_model_checkpoint

        def beside(staging: Path) -> None:
            self.trained.describe(staging)
            if self.extra_files is not None:
                self.extra_files(staging)
            write_json(staging / resume.STATE, state)
            resume.save_progress(staging, progress)

        with self.whole_weights():
            self.saver.save(
                lambda: atomic_directory(folder),
                [self.trained.piece(result=False), self._optimizer_piece()],
                beside,
                target=folder,
                after=lambda: resume.delete_old(output, self.args.save_total_limit, best),
            )

    def whole_weights(self) -> AbstractContextManager[None]:
        """A block in which this rank has no weights in slices only (sharding stage 3)."""
        return nullcontext() if self.share is None else self.share.whole()

    def _optimizer_piece(self) -> Piece:
        held = self.trained.held
        tensors = resume.optimizer_tensors(self.optimizer, self.trained.parameters(), held, self.share)
        return Piece(resume.OPTIMIZER, tensors, writes=held.writes)

    def _progress(self, random: list[dict[str, Any]]) -> dict[str, Any]:
        progress: dict[str, Any] = {
            "global_step": self.state.global_step,
            "run": self.run,
            "evaluation": self.evaluation,
            "scheduler": self.lr_scheduler.state_dict(),
            "random": random[0],
            "random_of_other_ranks": random[1:],
            "total_loss": self.total_loss,
            "total_targets": self.total_targets,
            "total_tokens": self.total_tokens,
            "window": self.window.to_json(),
            "train_seconds": time.monotonic() - self.started,
            "scale": self.steps.scale if self.steps is not None else 0.0,
        }
        if self.do_grad_scaling:
            progress["scaler"] = {k: np.asarray(v).tolist() for k, v in self.scaler.state_dict().items()}
        if self.streams:
            items = self.state.global_step * self.peers.layout.global_batch(self.args)
            progress["stream"] = self.train_dataset.state_after(items)
        return progress

    # --- resume --------------------------------------------------------------------------------------

    @property
    def stopped_early(self) -> bool:
        """Whether a signal ended the training before its last step."""
        return self.signals.wanted is not None and self.state.global_step < self.state.max_steps

    @property
    def stopped_by(self) -> int:
        """The number of the signal that asked for a stop; 0 without one."""
        return self.signals.wanted or 0

    def train_by(self, plan: Plan) -> dict[str, float]:
        """Trains as planned, from a checkpoint if the plan has one; returns the figures of the whole run.

        Raises:
            UserError: a loss or gradient that is not finite.
        """
        self.run, self.evaluation, self.comparable = plan.run, plan.evaluation, plan.comparable
        if plan.progress is not None:
            self.resumed = plan.progress
            self.random_state_due = True
            for name in ("total_loss", "total_targets", "total_tokens"):
                setattr(self, name, self.resumed[name])
            notice(f"continuing after step {self.resumed['global_step']} from {plan.start}")
        seconds = (plan.progress or {}).get("train_seconds", 0.0)  # earlier versions did not keep them
        before, self.started = 0 if seconds else self.total_tokens, time.monotonic() - seconds
        try:
            run_loop(self, plan)
            self.saver.wait()
            if self.streams and self.train_dataset.report.counts:
                notice(f"train data, as far as it was read: {self.train_dataset.summary()}")
        except BaseException as error:
            if isinstance(error, Exception):  # Ctrl-C stops at once
                self.peers.ending()
                self.saver.settle()
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # bars, files
            raise
        seconds = time.monotonic() - self.started
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
        parameters, held = self.trained.parameters(), self.trained.held
        resume.load_optimizer(Path(checkpoint), self.optimizer, parameters, held, self.share)
        self.lr_scheduler.set_state_dict(self.resumed["scheduler"])
        self.lr_scheduler.last_lr = self.lr_scheduler.get_lr()  # the user may have changed the rate
        if self.do_grad_scaling and "scaler" in self.resumed:  # the run may have had another precision
            state = {k: paddle.to_tensor(v) if isinstance(v, list) else v for k, v in self.resumed["scaler"].items()}
            self.scaler.load_state_dict(state)

    def continue_state(self) -> None:
        """Corrects the state that the library has read from a checkpoint, before the first step."""
        if self.peers.several:
            seed_everything(self.args.seed, self.peers.layout)
        if self.resumed is None:
            return
        self.window = Window.from_json(self.resumed["window"])
        if not self.comparable:
            self.state.best_metric = self.state.best_model_checkpoint = None
            history = self.state.log_history
            self.state.log_history = [logs for logs in history if not any(key.startswith("eval_") for key in logs)]
        best = self.state.best_model_checkpoint
        if best is not None and not resume.is_good(Path(self.args.output_dir) / best):
            notice(f"{best}, the best checkpoint until now, is not in {self.args.output_dir} any more")
            self.state.best_metric = self.state.best_model_checkpoint = None

    def restore_random_state(self) -> None:
        """Restores the generators right before the first step of a continued run."""
        if self.random_state_due and self.resumed is not None:
            states = [self.resumed["random"], *self.resumed.get("random_of_other_ranks", [])]
            if (rank := self.peers.layout.rank) < len(states):  # the run may have had fewer ranks
                resume.set_random_state(states[rank])
            self.random_state_due = False

    def take_result(self, output: Path, step: int) -> None:
        """Puts the weights of a finished run, which were those after `step`, into place."""
        self.trained.restore(output)
        self.loaded_step = step

    def load_best(self) -> str | None:
        """Puts the best checkpoint's weights into the model; returns its name, or None without one."""
        name, output = self.state.best_model_checkpoint, Path(self.args.output_dir)
        if name is not None and not resume.is_good(output / name):
            notice(f"{name}, the best checkpoint, is not in {output} any more; the last weights are the result")
            return None
        if name is not None:
            with self.whole_weights():
                self.trained.restore(output / name)
            self.loaded_step = int(name.rsplit("-", 1)[1])
        return name

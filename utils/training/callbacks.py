"""What the user sees while a run goes on, and how it stops."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import paddle
from tqdm import tqdm

from utils import signals
from utils.parallel.process_group import ProcessGroup
from utils.training.curve import LossCurve
from utils.training.reporters import Report, chart_name, installed, open_reporter
from utils.training.state import TrainerState

if TYPE_CHECKING:
    from utils.arguments import RunArguments

Logs = Mapping[str, float]


class Callback:
    """Is told what a training does, on the first rank."""

    def on_train_begin(self, state: TrainerState) -> None:
        """The first step is next, or an evaluation before it."""

    def on_step_end(self, state: TrainerState) -> None:
        """The weights have been updated."""

    def on_log(self, state: TrainerState, logs: Logs) -> None:
        """Figures of the steps since the last time, or metrics of an evaluation, whose names begin with "eval_"."""

    def on_save(self, state: TrainerState) -> None:
        """A checkpoint has been saved, or is being written."""

    def on_train_end(self, state: TrainerState) -> None:
        """After the last step, or after an error."""


def memory_gib() -> float:
    """Peak memory of the device in GiB; on a CPU the memory of this process now."""
    if paddle.device.get_device().startswith("gpu"):
        return paddle.device.cuda.max_memory_allocated() / 2**30
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def clock(seconds: float) -> str:
    """Seconds as H:MM:SS or MM:SS."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


class Progress(Callback):
    """A bar with rate and ETA, and one line per logging step."""

    def __init__(self, *, bar: bool) -> None:
        self.wanted = bar
        self.bar: Any = None
        self.first_step, self.started = 0, 0.0

    def on_train_begin(self, state: TrainerState) -> None:
        self.first_step, self.started = state.global_step, time.monotonic()
        if self.wanted:
            # a log file is no place for a moving bar: there it moves every 30 s
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                desc="training",
                mininterval=0.5 if sys.stderr.isatty() else 30.0,
                dynamic_ncols=True,
            )

    def on_step_end(self, state: TrainerState) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, state: TrainerState, logs: Logs) -> None:
        if "loss" in logs:
            done = state.global_step - self.first_step
            left = (state.max_steps - state.global_step) * (time.monotonic() - self.started) / max(done, 1)
            text = (
                f"step {state.global_step}/{state.max_steps}  epoch {logs['epoch']:.2f}  loss {logs['loss']:.4f}  "
                f"lr {logs['learning_rate']:.2e}  {logs['tokens_per_second']:.0f} tokens/s  "
                f"effective {logs['effective_tokens']:.1%}  memory {logs['memory_gib']:.2f} GiB  ETA {clock(left)}"
            )
        else:
            shown = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_")}
            text = f"evaluation at step {state.global_step}: " + "  ".join(f"{k} {v:.4f}" for k, v in shown.items())
        if self.bar is not None and sys.stderr.isatty():
            tqdm.write(text)  # above the bar
        else:
            print(text)
        sys.stdout.flush()
        if state.global_step == self.first_step:  # an evaluation before the first step is no part of its rate
            self.started = time.monotonic()

    def on_train_end(self, state: TrainerState) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Curve(Callback):
    """Keeps `loss_curve.csv` and `loss_curve.png` of a training in the output folder."""

    def __init__(self, folder: Path) -> None:
        self.curve = LossCurve(folder)
        self.training = self.ended = False

    def on_train_begin(self, state: TrainerState) -> None:
        self.curve.start(state.global_step)
        self.training = True

    def on_log(self, state: TrainerState, logs: Logs) -> None:
        if self.training:
            self.curve.add(state.global_step, logs)
            if self.ended:  # the evaluation of the result
                self.curve.draw()

    def on_save(self, state: TrainerState) -> None:
        self.curve.draw()

    def on_train_end(self, state: TrainerState) -> None:
        if self.training:
            self.curve.draw()
            self.ended = True


class Reports(Callback):
    """Sends every logged number to the reporters; they open when training begins."""

    def __init__(self, openers: Sequence[Callable[[], Report]]) -> None:
        self.openers = openers
        self.reports: list[Report] = []

    def on_train_begin(self, state: TrainerState) -> None:
        self.reports = [opener() for opener in self.openers]

    def on_log(self, state: TrainerState, logs: Logs) -> None:
        values = {chart_name(name): float(value) for name, value in logs.items()}
        for report in self.reports:
            report(values, state.global_step)


class StopOnSignal:
    """A signal during a training: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once.

    With several processes a signal counts once all of them have agreed on it, so that all stop after the same step.
    It is heeded from `watch` to `release`, when the result is written.

    Attributes:
        received: the number of the signal that came to this process first, or None.
        agreed: the number of the signal that ends all processes, or None.
    """

    def __init__(self, *, several: bool = False) -> None:
        self.several = several
        self.received: int | None = None
        self.agreed: int | None = None
        self.before: dict[int, Any] = {}

    @property
    def wanted(self) -> int | None:
        """The number of the signal that is to be followed now."""
        return self.agreed if self.several else self.received

    def agree(self, stopping: bool) -> None:
        """Takes over whether any process has received a signal."""
        if self.several and stopping and self.agreed is None:
            self.agreed = self.received or signal.SIGTERM

    def agree_among(self, processes: ProcessGroup) -> None:
        """Lets all processes know of a signal that one has received."""
        self.agree(processes.sums([self.received is not None])[0] > 0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            said = "nobody reads the output any more: " if number == signal.SIGPIPE else ""
            signals.notice(f"{said}stopping after this step; a checkpoint will be saved (Ctrl-C stops at once)")
        elif number == signal.SIGINT:
            self.before[number](number, frame)

    def watch(self) -> None:
        """Signals are followed as above from here on."""
        for number in signals.ENDING:
            if not signals.is_ignored(number):
                self.before[number] = signals.handle(number, self._handle)

    def release(self) -> None:
        """Puts the handlers back that were there before the training."""
        for number, handler in self.before.items():
            if signals.current(number) == self._handle:  # or else a process that ends has already set its own
                # a launcher sends its signal several times; a process that is ending already must not die of it
                signals.handle(number, signal.SIG_IGN if self.agreed is not None else handler)
        self.before.clear()


def console_callbacks(args: RunArguments, output: Path) -> list[Callback]:
    """Everything that shows or keeps what a run does, as the arguments want it."""
    names = [name for name in args.report_to if name != "none" and installed(name)]
    log_dir = args.logging_dir or str(output / "runs")
    openers = [partial(open_reporter, name, log_dir, args.run_name or output.name, args.to_json()) for name in names]
    return [Progress(bar=not args.disable_tqdm), Curve(output), Reports(openers)]

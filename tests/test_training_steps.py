"""What an optimizer step does with gradients and weights, beside the losses that other tests compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import paddle
import pytest
from family_cases import NAMES, case
from interrupted import interrupt
from paddle.base import core
from saved import save_trained, shard_plan
from tiny_runs import Tiny, tiny  # noqa: F401

from utils.arguments import FinetuneArguments
from utils.checkpoints.load import load_model
from utils.checkpoints.locate import stored_tensors
from utils.checkpoints.tensors import in_memory, write_lazy
from utils.parallel.process_group import ProcessGroup
from utils.parallel.states import OptimizerStates
from utils.training import resume
from utils.training.amp import LossScaler
from utils.training.gradients import Gradients
from utils.training.model import TrainingModel
from utils.training.optimizer import adamw, learning_rate
from utils.training.start import build


def arguments(output: Path, **options: Any) -> FinetuneArguments:
    args = FinetuneArguments(output_dir=str(output), do_train=True, device="cpu", logging_steps=1, eval_steps=1)
    for option, value in options.items():
        setattr(args, option, value)
    return args


@pytest.mark.parametrize("name", NAMES)
def test_matrices_decay_and_vectors_do_not(name: str, tmp_path: Path) -> None:
    """Whatever they are called: norms are also `ln_1`, `ln_f`."""
    args, checkpoint = arguments(tmp_path, learning_rate=0.1, weight_decay=0.5), case(name).checkpoint
    model = TrainingModel(checkpoint.family, load_model(checkpoint, "float32"))
    optimizer = adamw(args, model, learning_rate(args, 1))
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.set_value(paddle.ones(parameter.shape))
        parameter.grad = paddle.zeros(parameter.shape)
    optimizer.step()
    found = {name: float(parameter.max()) for name, parameter in parameters.items()}
    wanted = {name: 1 - 0.1 * 0.5 if parameter.ndim > 1 else 1.0 for name, parameter in parameters.items()}
    assert found == pytest.approx(wanted)
    assert len(set(wanted.values())) == 2


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("method", ["lora", "prefix_tuning"])
def test_adapters_over_a_base_in_half_precision_are_trained_in_float32(method: str, level: str, tmp_path: Path) -> None:
    """With O2 they are half precision too, and the optimizer keeps float32 copies."""
    args = arguments(tmp_path, fp16_opt_level=level, prefix_projection=True, lora_alpha=16.0, **{method: True})
    checkpoint = case("llama_tiny").checkpoint
    model, trained = build(args, checkpoint, "bfloat16", [], ProcessGroup())
    mine = list(trained.parameters().values())
    frozen = {parameter.dtype for parameter in model.parameters() if parameter.stop_gradient}
    assert frozen == {paddle.bfloat16}
    assert {parameter.dtype for parameter in mine} == {paddle.float32 if level == "O1" else paddle.bfloat16}
    if level == "O1":
        if model.prefix is not None:  # on a CPU in float32, with values of the base's type
            key = model.prefix.cache(2)[0][0]
            assert key.dtype == paddle.float32 and bool((key.astype("bfloat16").astype("float32") == key).all())
        save_trained(tmp_path / "saved", trained)
        kept = {
            n: tensor.dtype for n, tensor in stored_tensors(tmp_path / "saved", trained.checkpoint_shard().stem).items()
        }
        assert kept == dict.fromkeys(trained.parameters(), "float32")
        trained.restore(tmp_path / "saved")


def test_the_scale_of_losses_is_that_of_the_first_micro_batch_also_after_a_resume(
    tiny: Tiny,  # noqa: F811
    tmp_path: Path,
) -> None:
    """In float16 it decides what underflows."""
    rows = [{"src": "Say one", "tgt": " ".join(["one"] * 4**power)} for power in range(4)]
    data = tmp_path / "data" / "train.json"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    options = ["--do_train", "--lora", "--dataset_name_or_path", data.parent, "--max_length", 256]
    options += ["--per_device_train_batch_size", 1, "--save_steps", 1, "--max_steps", 4]

    def scale(checkpoint: Path) -> float:
        return json.loads((checkpoint / "progress.json").read_text("utf-8"))["scale"]

    found = set()
    for step in (1, 2):  # each goes on with another row
        output = tmp_path / f"after {step}"
        interrupt(tiny, output, step, options)
        first = scale(output / f"checkpoint-{step}")
        tiny.run(output, *options)
        found |= {first, scale(output / "checkpoint-4")}
    assert len(found) == 1 and found.pop() >= 1


def test_a_checkpoint_without_a_scale_goes_on(tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """Earlier versions wrote none."""
    options, save = ["--do_train", "--lora", "--max_steps", 2, "--save_steps", 1], resume.save_progress

    def as_before(folder: Path, progress: dict[str, Any]) -> None:
        save(folder, {name: value for name, value in progress.items() if name != "scale"})

    with mock.patch.object(resume, "save_progress", as_before):
        interrupt(tiny, tmp_path, 1, options)
    assert "continuing after step 1" in tiny.run(tmp_path, *options).err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_norm_takes_the_memory_of_one_gradient(dtype: str) -> None:
    size, count = 1 << 20, 8
    random = np.random.default_rng(0)
    parameters = []
    for _ in range(count):
        parameter = paddle.create_parameter([size], dtype, default_initializer=paddle.nn.initializer.Constant(0.0))
        parameter.grad = paddle.to_tensor(random.normal(size=size).astype("float32")).astype(dtype)
        parameters.append(parameter)
    wanted = np.sqrt(sum((p.grad.astype("float32").numpy().astype("float64") ** 2).sum() for p in parameters))
    gradients = Gradients(parameters, ProcessGroup())
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    norm = gradients.finish(1.0)
    used = core.host_memory_stat_peak_value("Allocated", 0) - before
    assert norm == pytest.approx(wanted, rel=1e-3)
    assert used < 3 * size * 4


def test_a_run_goes_on_in_another_precision(tmp_path: Path) -> None:
    """Half precision with float32 copies, as O2 on a GPU, or float32, as O1 and on a CPU: the moments stay."""

    def run(dtype: str, values: np.ndarray) -> tuple[Any, Any]:
        parameter = paddle.create_parameter([3, 4], dtype, default_initializer=paddle.nn.initializer.Constant(0.0))
        parameter.set_value(paddle.to_tensor(values).astype(dtype))
        return parameter, paddle.optimizer.AdamW(0.1, parameters=[parameter], multi_precision=True)

    def step(parameter: Any, optimizer: Any) -> np.ndarray:
        parameter.grad = paddle.full([3, 4], 0.5)
        optimizer.step()
        return parameter.numpy()

    whole = shard_plan(case("llama_tiny").checkpoint)
    parameter, optimizer = run("float32", np.random.default_rng(0).normal(size=[3, 4]).astype("float32"))
    exact = step(parameter, optimizer)
    plain = resume.optimizer_tensors(optimizer, {"w": parameter}, whole)
    plain = [in_memory(tensor.name, tensor.read().copy()) for tensor in plain]
    halves = [in_memory(tensor.name.replace("|", "|fp32_master_0_"), tensor.read()) for tensor in plain]
    halves.append(in_memory("w|master", exact))
    wanted = step(parameter, optimizer)
    write_lazy(tmp_path / "optimizer.safetensors", halves, {})
    other, continued = run("float32", exact.astype("float16").astype("float32"))
    resume.load_optimizer(tmp_path, continued, {"w": other}, whole)
    np.testing.assert_array_equal(step(other, continued), wanted)

    for stored in (plain, halves):
        write_lazy(tmp_path / "optimizer.safetensors", stored, {})
        other, continued = run("float16", exact)
        resume.load_optimizer(tmp_path, continued, {"w": other}, whole)
        states = OptimizerStates(continued)
        for tensor in plain:
            slot = f"fp32_master_0_{tensor.name.split('|')[1]}"
            np.testing.assert_array_equal(states.get(other.name, other, slot).numpy(), tensor.read())


def test_the_loss_scale_grows_until_gradients_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.training.amp.GROWTH_STEPS", 3)
    scaler, scales = LossScaler("float16"), []
    for finite in (True, True, True, True, True, False, True, True):
        scaler.update(finite)
        scales.append(scaler.scale / 2**15)
    assert scales == [1, 1, 2, 2, 2, 1, 1, 1]
    saved, other = json.loads(json.dumps(scaler.to_json())), LossScaler("float16")
    other.restore(saved)
    other.update(True)
    assert other.scale == 2**16  # its count of steps goes on too
    without = LossScaler("bfloat16")
    without.update(False)
    assert without.scale == 1.0


@pytest.mark.parametrize("limit", [0.0, 1e-3])
def test_the_loss_scale_leaves_no_trace(limit: float) -> None:
    """Gradients of a scaled loss are those of the loss once they are finished; one that overflowed says so."""

    def finished(scale: float, values: np.ndarray) -> tuple[float, np.ndarray]:
        parameter = paddle.create_parameter([4], "float32")
        parameter.grad = paddle.to_tensor(values * np.float32(scale))
        norm = Gradients([parameter], ProcessGroup(), limit=limit).finish(0.5, scale)
        return norm, parameter.grad.numpy()

    values = np.array([1e-3, -2e-5, 3e-2, 0], dtype="float32")
    (norm, gradient), (scaled_norm, scaled) = finished(1.0, values), finished(2.0**15, values)
    assert norm == scaled_norm
    np.testing.assert_array_equal(gradient, scaled)
    assert not np.isfinite(finished(2.0**15, np.full([4], np.inf, dtype="float32"))[0])


def test_a_float16_run_goes_on_from_one_without_a_scaler(
    tiny: Tiny,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From bfloat16, or from a CPU; from float16 it takes the scaler's state, in an earlier version's words too."""
    options = ["--do_train", "--learning_rate", 1e-3, "--max_steps", 3, "--save_steps", 1]
    interrupt(tiny, tmp_path, 1, options)

    def scaler(step: int) -> dict[str, Any] | None:
        return json.loads((tmp_path / f"checkpoint-{step}" / "progress.json").read_text("utf-8")).get("scaler")

    assert scaler(1) is None
    options.append("--fp16")
    monkeypatch.setenv("CPU_HALF_PRECISION", "round")
    interrupt(tiny, tmp_path, 2, options)
    assert scaler(2) == {"scale": [2.0**15], "incr_count": 1}
    file = tmp_path / "checkpoint-2" / "progress.json"
    known = json.loads(file.read_text("utf-8"))
    known["scaler"] |= {"scale": [16.0], "incr_ratio": 2.0, "use_dynamic_loss_scaling": True, "decr_count": 0}
    size = file.stat().st_size
    file.write_text(json.dumps(known).ljust(size))
    tiny.run(tmp_path, *options)
    assert scaler(3) == {"scale": [16.0], "incr_count": 2}

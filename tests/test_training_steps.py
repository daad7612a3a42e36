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
from saved import held, save_trained
from tiny_runs import Tiny, tiny  # noqa: F401

from utils.arguments import FinetuneArguments
from utils.checkpoints.load import load_model
from utils.checkpoints.locate import stored_tensors
from utils.checkpoints.tensors import in_memory, write_lazy
from utils.parallel.peers import Alone
from utils.parallel.states import OptimizerStates
from utils.training import resume
from utils.training.gradients import Gradients
from utils.training.model import TrainingModel
from utils.training.settings import paddlenlp_arguments
from utils.training.start import build
from utils.training.trained import FullModel
from utils.training.trainer import Trainer


def arguments(output: Path, **options: Any) -> FinetuneArguments:
    args = FinetuneArguments(output_dir=str(output), do_train=True, device="cpu", logging_steps=1, eval_steps=1)
    for option, value in options.items():
        setattr(args, option, value)
    return args


def trainer_of(name: str, output: Path, **options: Any) -> Trainer:
    """That of an SFT run of one of the tiny models, on a CPU."""
    args = arguments(output, **options)
    checkpoint = case(name).checkpoint
    base = load_model(checkpoint, "float32")
    model = TrainingModel(checkpoint.family, base)
    trained = FullModel(checkpoint, held(checkpoint), base)
    return Trainer(model, trained, paddlenlp_arguments(args, "cpu", "float32", 1), collator=lambda rows: {})


@pytest.mark.parametrize("name", NAMES)
def test_matrices_decay_and_vectors_do_not(name: str, tmp_path: Path) -> None:
    """Whatever they are called: norms are also `ln_1`, `ln_f`."""
    trainer = trainer_of(name, tmp_path, learning_rate=0.1, weight_decay=0.5)
    trainer.create_optimizer_and_scheduler(1)
    parameters = dict(trainer.model.named_parameters())
    for parameter in parameters.values():
        parameter.set_value(paddle.ones(parameter.shape))
        parameter.grad = paddle.zeros(parameter.shape)
    trainer.optimizer.step()
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
    model, trained = build(args, checkpoint, "bfloat16", [], Alone())
    mine = list(trained.parameters().values())
    frozen = {parameter.dtype for parameter in model.parameters() if parameter.stop_gradient}
    assert frozen == {paddle.bfloat16}
    assert {parameter.dtype for parameter in mine} == {paddle.float32 if level == "O1" else paddle.bfloat16}
    if level == "O1":
        assert model.prefix is None or model.prefix.cache(2)[0][0].dtype == paddle.bfloat16
        save_trained(tmp_path / "saved", trained)
        kept = {n: tensor.dtype for n, tensor in stored_tensors(tmp_path / "saved", trained.piece().stem).items()}
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
    gradients = Gradients(parameters, Alone())
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

    whole = held(case("llama_tiny").checkpoint)
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


def test_a_float16_run_goes_on_from_one_without_a_scaler(tmp_path: Path) -> None:
    """From bfloat16, or from a CPU; from float16 it takes the scaler's state."""
    trainer = trainer_of("llama_tiny", tmp_path)
    trainer.create_optimizer_and_scheduler(1)
    trainer.do_grad_scaling, trainer.scaler = True, paddle.amp.GradScaler(init_loss_scaling=64.0)
    trainer.scaler._enable = True  # only GPUs have it
    trainer.scaler.set_init_loss_scaling(64.0)
    for name in ("_incr_ratio", "_decr_ratio", "_incr_every_n_steps", "_decr_every_n_nan_or_inf"):
        setattr(trainer.scaler, name, 2)
    trainer.scaler._incr_count, trainer.scaler._decr_count, trainer.scaler._use_dynamic_loss_scaling = 7, 0, True
    saved = json.loads(json.dumps(trainer._progress([{}])))
    assert saved["scaler"]["scale"] == [64.0]
    trainer.scaler.set_init_loss_scaling(2.0)
    with mock.patch.object(resume, "load_optimizer"):
        trainer.resumed = {name: value for name, value in saved.items() if name != "scaler"}
        trainer._load_optimizer_and_scheduler(str(tmp_path))
        assert float(trainer.scaler._scale) == 2.0
        trainer.resumed = saved
        trainer._load_optimizer_and_scheduler(str(tmp_path))
        assert float(trainer.scaler._scale) == 64.0

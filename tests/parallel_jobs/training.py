"""Checks of `collectives.py` in which a model learns: its losses or weights are those of one process."""

from __future__ import annotations

from typing import Any

import numpy as np
from values import WIDTH, close, numbers

from utils.parallel.groups import Groups
from utils.parallel.topology import Layout


def check_pipeline(layout: Layout) -> None:
    """fleet's own schedule, one forward and one backward, with four micro-batches; losses of AdamW as without it."""
    import paddle
    from paddle import nn
    from paddle.distributed import fleet
    from paddle.distributed.fleet.meta_parallel import LayerDesc, PipelineLayer

    weights = [numbers(WIDTH, WIDTH) for _ in range(4)]

    class Block(nn.Layer):
        def __init__(self, place: int) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.linear.weight.set_value(weights[place])

        def forward(self, x: Any) -> Any:
            return paddle.tanh(self.linear(x))

    def optimizer(parameters: Any) -> Any:
        return paddle.optimizer.AdamW(0.01, parameters=parameters, grad_clip=nn.ClipGradByGlobalNorm(0.1))

    def error(found: Any, wanted: Any) -> Any:
        return (found - wanted).square().mean()

    fleet.fleet._user_defined_strategy.pipeline_configs = {"accumulate_steps": 4, "micro_batch_size": 2}
    blocks = [LayerDesc(Block, place) for place in range(4)]
    topology = fleet.get_hybrid_communicate_group().topology()  # left out, ranks are numbered without tensor parallel
    stages = PipelineLayer(blocks, loss_fn=error, topology=topology, seg_method="uniform")
    mine = fleet.distributed_model(stages)
    own = fleet.distributed_optimizer(optimizer(mine.parameters()))
    alone = nn.Sequential(*[Block(place) for place in range(4)])
    steps = optimizer(alone.parameters())
    rows, wanted = paddle.to_tensor(numbers(8, WIDTH)), paddle.to_tensor(numbers(8, WIDTH))
    for _ in range(3):
        loss = error(alone(rows), wanted)
        loss.backward()
        steps.step()
        steps.clear_grad()
        close(mine.train_batch([rows, wanted], own).reshape([]), loss, f"loss with {layout.pipeline} stages")


def check_sharded(layout: Layout, ours: Groups, stage: int) -> None:
    """Two steps of AdamW with the optimizer's state divided; each reader has rows of its own."""
    import paddle
    from paddle import nn

    def model() -> Any:
        built = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
        for parameter, values in zip(built.parameters(), weights, strict=True):
            parameter.set_value(values)
        return built

    def optimizer(built: Any) -> Any:
        clip = nn.ClipGradByGlobalNorm(1.0)
        return paddle.optimizer.AdamW(0.01, parameters=built.parameters(), grad_clip=clip)

    weights = [numbers(WIDTH, 16), numbers(16), numbers(16, WIDTH), numbers(WIDTH)]
    rows, ranks, place = numbers(3, 4, WIDTH), layout.readers, layout.reader(layout.rank)
    alone = model()
    steps = optimizer(alone)
    mine = model()
    own = optimizer(mine)
    if stage == 1:
        from paddle.distributed import fleet

        wrapped, own = mine, fleet.distributed_optimizer(own)
    else:
        from paddle.distributed.sharding import group_sharded_parallel

        level, options = ("os_g", {}) if stage == 2 else ("p_g_os", {"segment_size": 8})
        wrapped, own, _ = group_sharded_parallel(mine, own, level, group=ours.sharding, **options)
    for batch in rows:
        alone(paddle.to_tensor(batch)).square().mean().backward()
        steps.step()
        loss = wrapped(paddle.to_tensor(np.split(batch, ranks)[place])).square().mean()
        loss.backward()
        own.step()
        steps.clear_grad()
        own.clear_grad()
    if stage == 3:
        wrapped.get_all_parameters()
    for found, wanted in zip(mine.parameters(), alone.parameters(), strict=True):
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-4, atol=1e-5, err_msg=f"stage {stage}")

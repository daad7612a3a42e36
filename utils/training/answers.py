"""The model in training as an engine that answers: over a cache, with the weights of now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.adapters.prefix import PrefixTuning
from utils.families import FamilySpec
from utils.inference.cached import CachedEngine, DynamicProgram
from utils.model.decoder import Decoder
from utils.model.plain import PlainDecoder
from utils.parallel.process_group import ProcessGroup
from utils.partition.parts import Parts


def engine_over(
    family: FamilySpec,
    model: Decoder,
    config: Mapping[str, Any],
    processes: ProcessGroup,
    *,
    prefix: PrefixTuning | None = None,
    stages: Any = None,
) -> CachedEngine:
    """An engine over a model, which must be in evaluation mode whenever the engine is used.

    Args:
        family, config: of `model`.
        processes: the processes that share it.
        prefix: as it is now.
        stages: the pipeline's (`utils.partition.pipeline.Stages`), None without one.
    """
    layout, group = processes.layout, processes.groups.tensor
    parts = None
    if layout.tensor > 1:
        parts = Parts(family, config, layout.tensor, layout.coordinates(layout.rank)[3])
    if stages is None:
        decoder = PlainDecoder(model, parts=parts, group=group)
    else:
        from utils.partition.pipeline import StageDecoder

        decoder = StageDecoder(model, stages, parts, group)
    array = None
    if prefix is not None:
        array = prefix.array()[:, slice(None) if parts is None else parts.read_heads]
        array = array[[2 * number + kind for number in decoder.places for kind in (0, 1)]]
    return CachedEngine(family, config, DynamicProgram(decoder), dtype=model.settings.dtype, prefix=array)

"""The parameters of a model and the tensors of published checkpoints that they come from. No Paddle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# How tensor parallelism shares a parameter (in the Paddle layout: a Linear's matrix is [in, out]) among processes:
# "column", "row": equal parts of the outputs (also of their bias), or of the inputs.
# "vocabulary", "vocabulary_columns": rows of a table, or columns of a head; where the degree does not divide
#     them every process has all, or the last ones are padded.
# "key_value": outputs by whole heads; too few heads are not shared.
# "query_key_value": all queries, then all keys, then all values; each of the three is shared by heads.
# "by_head": the same, but a share has the query, key and value of one head behind those of another.
# "halves": two halves, such as gate and up, of which each is shared.
Split = Literal[
    "column", "row", "vocabulary", "vocabulary_columns", "key_value", "query_key_value", "by_head", "halves"
]


@dataclass(frozen=True)
class Weight:
    """How one tensor of the Hugging Face layout maps to one parameter of the Paddle model.

    Attributes:
        published: its name in published checkpoints.
        parameter: the name of the Paddle model's parameter.
        transpose: Paddle's Linear keeps [in, out] where PyTorch keeps [out, in].
        conv1d: the matrix of a Linear that is published as [in, out] too (GPT-2's Conv1D).
        part: (index, count): the parameter is one of `count` equal parts of the published tensor along
            its output axis, such as the query of a fused query, key and value.
        split: how tensor parallelism shares the parameter; None gives every process all of it.
    """

    published: str
    parameter: str
    transpose: bool = False
    conv1d: bool = False
    part: tuple[int, int] | None = None
    split: Split | None = None

    @property
    def is_linear(self) -> bool:
        """Whether the parameter is the matrix of a Linear layer."""
        return self.transpose or self.conv1d

    @property
    def output_axis(self) -> int:
        """The axis of the published tensor (matrix or bias) along which its parts lie."""
        return 0 if self.transpose else -1

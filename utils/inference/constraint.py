"""Answers of a given form: which tokens may come next."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """The form of one answer in the making."""

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and nothing may follow, so that it ends here, whatever the model would say."""

    def mask(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool [vocabulary of the logits]; end tokens among them where it may end here.

        At least one token may come.

        Raises:
            UserError: the form takes too much work at this place.
        """

    def accept(self, token: int) -> None:
        """Adds a token that `mask` allows, an end token too."""

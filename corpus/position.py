"""The position of a run in its training text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """A place in the training data: the run has used ``blocks`` blocks of epoch ``epoch``, counted from 0."""

    epoch: int = 0
    blocks: int = 0

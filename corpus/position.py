"""How far a run has read its training text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """A place in the training data: the run has used ``blocks`` blocks of epoch ``epoch``, which counts from 0."""

    epoch: int = 0
    blocks: int = 0

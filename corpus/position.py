"""How far a run has read its training text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """A place in the training data: ``blocks`` of epoch ``epoch`` have been seen."""

    epoch: int = 0
    blocks: int = 0

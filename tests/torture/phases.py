"""Run a script as ``python SCRIPT ARGS`` does, and show from outside in which phase it is.

    python tests/torture/phases.py FILE train.py --config small.yaml

The script is the real one. Functions that make up a phase are wrapped, and each wrapper notes its phase in FILE. FILE
is mapped into memory, so it still holds the phase after the process was killed. Each of several ranks has its own FILE,
with the rank's number at the end of its name.
"""

import functools
import mmap
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PHASES = ("start", "preparation", "loading", "training", "evaluation", "sampling", "saving", "end")
SIZE = 8 * (1 + 2 * len(PHASES))


class Phases:
    """The current phase, and for each phase how often it began and how many seconds it took."""

    def __init__(self, path: str | Path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        os.truncate(descriptor, SIZE)
        self._values = memoryview(mmap.mmap(descriptor, SIZE)).cast("d")
        os.close(descriptor)
        self._since = time.monotonic()

    @property
    def current(self) -> str:
        return PHASES[int(self._values[0])]

    def count(self, phase: str) -> int:
        return int(self._values[1 + 2 * PHASES.index(phase)])

    def seconds(self, phase: str) -> float:
        """Return the mean seconds of a phase."""
        return self._values[2 + 2 * PHASES.index(phase)] / max(1, self.count(phase))

    def enter(self, phase: str) -> None:
        if phase == self.current:
            return
        now, index = time.monotonic(), PHASES.index(phase)
        self._values[2 + 2 * PHASES.index(self.current)] += now - self._since
        self._since = now
        self._values[0] = index
        self._values[1 + 2 * index] += 1

    def within(self, phase: str, function: Callable) -> Callable:
        """Wrap ``function`` so that it is noted as ``phase``. Training begins after the first evaluation or batch."""

        @functools.wraps(function)
        def noted(*args: Any, **options: Any) -> Any:
            before = self.current
            if phase == before:
                return function(*args, **options)
            self.enter(phase)
            try:
                return function(*args, **options)
            finally:
                begins = before == "preparation" and phase in ("training", "evaluation")
                stays = before == "start" or phase == "end"
                self.enter("training" if begins else phase if stays else before)

        return noted


def main() -> None:
    path, script, *arguments = sys.argv[1:]
    import data
    import generate
    import model
    import perplexity
    from corpus import sources
    from training import checkpoint, checkpointer, log, run

    phases = Phases(path + os.environ.get("RANK", ""))
    for owner, name, phase in (
        (sources, "load_documents", "preparation"),  # the first work of ranks after they have met
        (model, "load_model", "loading"),
        (model, "check_model", "loading"),
        (data.TrainingData, "batches", "training"),
        (perplexity, "evaluate", "evaluation"),
        (generate, "generate", "sampling"),
        (checkpointer.Checkpointer, "start_save", "saving"),
        (checkpoint, "prune", "saving"),
        (checkpointer.BestModel, "_save", "saving"),
        (log.RunLog, "sync", "saving"),
        (run, "mark_finished", "end"),
    ):
        setattr(owner, name, phases.within(phase, getattr(owner, name)))
    script = str(Path(__file__).resolve().parent.parent.parent / script)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()

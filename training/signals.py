"""Signals: SIGTERM and SIGINT save and exit at the next step, SIGUSR1 saves and continues."""

import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from distributed.world import World

if TYPE_CHECKING:
    from training.checkpointer import Checkpointer


class Signals:
    """Receive SIGTERM, SIGINT and SIGUSR1, and handle them between two steps. A second SIGINT exits at once."""

    def __init__(self):
        self._received: list[int] = []
        self._deferred = False  # before and after the loop there is nothing to save
        self.world = World()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def defer(self) -> None:
        """Keep signals from now on until `handle` is called."""
        self._deferred = True

    def handle(self, checkpointer: "Checkpointer") -> None:
        """Save if any rank received a signal, and exit unless it was SIGUSR1. All ranks must call this.

        Called between steps, and between batches and samples of an evaluation, because these change no state. A save in
        the background is completed here.
        """
        checkpointer.complete_if_written()
        for number in map(signal.Signals, self.world.union(self._received)):
            checkpointer.save()
            step, log = checkpointer.state.step, checkpointer.log
            if number == signal.SIGUSR1:
                log.say(f"step {step}: saved on {number.name}")
                continue
            log.close()
            go_on = "Use --resume, not --overwrite, to go on"
            log.say(f"stopped by {number.name} at step {step}, saved. {go_on}.", is_last=True)
            sys.exit(128 + number)

    def end(self) -> int | None:
        """Stop deferring. Return the exit code if a signal arrived after the last step, else None."""
        last = [number for number in self.world.union(self._received) if number != signal.SIGUSR1]
        self._deferred = False
        return 128 + last[0] if last else None

    def _receive(self, number: int, frame: Any) -> None:
        if number != signal.SIGUSR1:
            if not self._deferred:
                with suppress(Exception):
                    sys.stdout.flush()
                os._exit(128 + number)  # the interrupted code could catch an exception
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        self._received.append(number)

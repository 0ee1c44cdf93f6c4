"""Watch a run: check that its steps are finite, measure throughput and memory, and give advice if memory runs out."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cli.errors import UserError, out_of_memory, warn
from distributed.world import World
from modeling.precision import sum_dtype
from training.log import RunLog
from training.state import TrainState


class NonFiniteError(UserError):
    """A loss or a gradient is not finite."""

    exit_code = 4


class StepResult(NamedTuple):
    """The outcome of a step over all its micro-batches and ranks; tensors on the device."""

    loss: torch.Tensor  # nats per predicted token, `sum_dtype`
    grad_norm: torch.Tensor  # before clipping, float32
    num_predicted: torch.Tensor  # tokens in the mean of the loss
    num_tokens: torch.Tensor  # tokens with a label: the same, plus first tokens of blocks, which nothing predicts


class StepMonitor:
    """Keep the results of steps on the device, and check once per log interval that they are finite."""

    def __init__(self, state: TrainState, log: RunLog, world: World, max_skipped_steps: int, learning_rate: float):
        self._state, self._log, self._world = state, log, world
        self._max_skipped, self._learning_rate = max_skipped_steps, learning_rate
        self._pending: list[tuple[int, int, list[int], StepResult]] = []
        self.before_error: Callable[[], None] = lambda: None  # completes the current save

    def add(self, epoch: int, blocks: list[int], result: StepResult) -> None:
        """Keep the result of step ``state.step``, which used these ``blocks`` of the epoch."""
        self._pending.append((self._state.step, epoch, blocks, result))

    def check(self) -> None:
        """Wait for the device and check all results since the last call. This is the one deliberate host sync.

        Raise NonFiniteError if more than ``max_skipped_steps`` in a row were not finite.
        """
        if not self._pending:
            return
        values = (
            torch.stack([value.to(sum_dtype(value.device)) for *_, result in self._pending for value in result])
            .view(-1, 4)
            .tolist()
        )
        for (step, epoch, blocks, _), (loss, grad_norm, _, num_tokens) in zip(self._pending, values, strict=True):
            self._state.tokens_seen += int(num_tokens)
            if math.isfinite(loss + grad_norm):
                self._state.skipped_in_a_row = 0
                continue
            self._state.skipped_in_a_row += 1
            self._log.nonfinite(step, loss=str(loss), grad_norm=str(grad_norm), epoch=epoch, blocks=blocks)
            self._report(step, epoch, blocks, loss, grad_norm)
        self._pending.clear()

    def check_evaluation(self, loss: float) -> None:
        """Raise NonFiniteError if an evaluation loss is not finite."""
        if not math.isfinite(loss):
            fix = f"Lower --learning_rate {self._learning_rate:g}, or look at the text"
            self.before_error()
            raise NonFiniteError(f"step {self._state.step}: the evaluation loss is {loss}. {fix}.")

    def _report(self, step: int, epoch: int, blocks: list[int], loss: float, grad_norm: float) -> None:
        named = ", ".join(map(str, blocks[:8])) + (", ..." if blocks[8:] else "")
        problem = (
            f"step {step}: the loss is {loss} and the gradient norm {grad_norm}, so the step changed nothing; "
            f"its blocks were {named} of epoch {epoch}"
        )
        if self._state.skipped_in_a_row <= self._max_skipped:
            return warn(problem)
        if self._max_skipped:
            problem += f", and the {self._max_skipped} steps before it were not finite either"
        self.before_error()
        more = max(10, 2 * self._max_skipped)
        fix = f"Lower --learning_rate {self._learning_rate:g}, or pass --resume --max_skipped_steps {more}"
        raise NonFiniteError(f"{problem}. {fix}.")


@dataclass
class Throughput:
    """Measure training alone. Evaluations and saves do not count."""

    state: TrainState
    num_steps: int
    device: torch.device
    peak_seconds: float | None = None  # the time of all devices per token at their peak; None if unknown
    loss_fraction: float = 1.0  # the part of all tokens that ``tokens_seen`` counts

    def __post_init__(self):
        self._start()

    def _start(self) -> None:
        self._step, self._tokens, self._since = self.state.step, self.state.tokens_seen, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        paused = time.perf_counter()
        yield
        self._since += time.perf_counter() - paused

    def since_last_log(self) -> dict[str, float]:
        """Return tokens per second, model FLOPs utilization if known, peak memory, and the remaining seconds."""
        seconds, steps = time.perf_counter() - self._since, self.state.step - self._step
        speed = (self.state.tokens_seen - self._tokens) / seconds
        values = {"tokens_per_second": speed, "memory_gib": peak_memory_gib(self.device)}
        if self.peak_seconds:
            values["mfu"] = speed / self.loss_fraction * self.peak_seconds
        values["seconds_left"] = (self.num_steps - self.state.step) * seconds / steps
        self._start()
        return values


@contextmanager
def memory_advice(problem: str, fix: str) -> Iterator[None]:
    """Turn "out of memory" from any library into a UserError with a remedy."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError, UserError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"{problem}. {fix}.") from error


def micro_batch_memory(config: Any) -> Any:
    """Return the `memory_advice` for forward and backward passes."""
    size = config.micro_batch_size
    if size > 1:
        return memory_advice(
            f"--micro_batch_size {size}: out of memory",
            f"Pass --micro_batch_size {size // 2}, which leaves the steps as they are",
        )
    fix = "Lower --block_size, pass --gradient_checkpointing, or use a smaller model"
    return memory_advice(f"--block_size {config.block_size}: out of memory with one block at once", fix)


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory held so far: allocated on a GPU, resident in the process on a CPU or MPS."""
    if hasattr(module := torch.get_device_module(device), "max_memory_allocated"):
        return module.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)

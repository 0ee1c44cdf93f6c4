"""Connect the processes of a run.

    torchrun --nproc_per_node=8 train.py ...                       # DDP: the whole model on each rank
    torchrun --nproc_per_node=8 train.py --strategy fsdp ...       # FSDP2: a shard of the model on each rank

with join_world(config) as world:                    # without torchrun, a world of one process
    model = world.parallelize(model, device, precision, block_size)
    with world.sync_gradients(model, is_last):       # all-reduce after the last micro-batch of a step alone
        world.next_token_nll(model, **batch).backward()
    saved = world.on_main(lambda: save(...))         # runs on rank 0, returns on all ranks

Gradients, weights and sums travel between devices. Python objects, such as a signal's number, travel between CPUs, so
that no host waits for its device.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Annotated, Literal, TypeVar

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from cli.errors import warn
from cli.flags import Range, flag
from distributed import parallel
from distributed.torchrun import Peers, RankError, first_line, is_under_torchrun
from modeling.loss import next_token_nll
from modeling.precision import resolve_precision

T = TypeVar("T")


@dataclass
class DistributedConfig:
    title = "ranks"

    strategy: Literal["ddp", "fsdp"] = flag("ddp", "under torchrun: the whole model on each device, or a shard of it")
    rank_timeout: Annotated[int, Range(least=1)] = flag(
        600, "seconds without a sign of life until a rank counts as lost"
    )


class World:
    """Connect the processes of a run. ``World()`` is a run of one process."""

    rank, local_rank, size = 0, 0, 1

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, the rank that writes and prints."""
        return self.rank == 0

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the world. An error on one rank ends all ranks."""

    def __str__(self) -> str:
        """Return the text before the device's name in the summary of a run."""
        return ""

    def has_started(self) -> bool:
        """Return whether torchrun restarted these ranks after `mark_started`, because one of them was lost."""
        return False

    def mark_started(self) -> None:
        """Record that the run's directory belongs to this run."""

    def exit_all(self, code: int) -> None:
        """End all other ranks with this exit code. If another rank failed first, exit here with its code."""

    # Collectives: all ranks must call them.

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum ``values`` over all ranks in place, on the device, and return them."""
        return values

    def synchronize(self) -> None:
        """Wait until the device is idle. Raise RankError on a timeout, which a host blocked in CUDA would miss."""

    def union(self, numbers: list[int]) -> list[int]:
        """Return the numbers from 0 to 63 that any rank has, sorted, and empty ``numbers``."""
        return sorted({numbers.pop() for _ in range(len(numbers))})  # a signal handler may append at any moment

    def broadcast(self, value: T) -> T:
        """Return rank 0's ``value``."""
        return value

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks on rank 0, an empty list on the other ranks."""
        return [value]

    def on_main(self, work: Callable[[], T]) -> T:
        """Call ``work`` on rank 0, and return its result on all ranks."""
        with self.main_first():
            value = work() if self.is_main else None
        return self.broadcast(value)

    def main_first(self) -> AbstractContextManager:
        """Run the body on rank 0 first, for as long as it takes. The body must not call a collective."""
        return nullcontext()

    def local_main_first(self) -> AbstractContextManager:
        """Run the body on local rank 0 of each node first. The other ranks then find its files in the caches."""
        return nullcontext()

    # The model.

    def resolve_precision(self, wanted: str, device: torch.device) -> str:
        """Return rank 0's precision for all ranks. Raise UserError if the strategy does not support it."""
        return resolve_precision(wanted, device)

    def load_device(self, device: torch.device) -> torch.device:
        """Return the device on which rank 0 holds the model before `parallelize`."""
        return device

    def parallelize(
        self, model: PreTrainedModel, device: torch.device, precision: str, block_size: int
    ) -> PreTrainedModel:
        """Bring rank 0's weights to ``device`` on all ranks. On the other ranks, ``model`` may be on device meta.

        Raise UserError if the strategy does not support the model.
        """
        return model.to(device)

    def next_token_nll(self, model: PreTrainedModel, **batch: torch.Tensor) -> torch.Tensor:
        """Return `modeling.loss.next_token_nll` of this rank's batch. Its gradients are averaged over the ranks."""
        return next_token_nll(model, **batch)

    def sync_gradients(self, model: PreTrainedModel, is_last: bool) -> AbstractContextManager:
        """Run a forward and a backward pass in this context. Gradients are averaged if ``is_last``."""
        return nullcontext()

    def grad_norm(self, model: PreTrainedModel) -> torch.Tensor:
        """Return the L2 norm of all gradients."""
        return parallel.grad_norm(model)

    def reshard(self, model: PreTrainedModel) -> None:
        """Free the weights of other ranks' shards, which a forward pass leaves in memory."""

    def full_tensor(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the tensor with all its shards on rank 0, None on the other ranks."""
        return tensor

    def full_model(self, model: PreTrainedModel) -> PreTrainedModel | None:
        """Return the model with all its weights on rank 0, None on the other ranks. Save it, do not run it."""
        return model

    def load_tensor(self, target: torch.Tensor, full: torch.Tensor | None) -> None:
        """Copy rank 0's ``full`` tensor to ``target`` on all ranks. A sharded ``target`` gets its shard."""
        with torch.no_grad():
            target.copy_(full)


class TorchrunWorld(World):
    """Connect the processes that torchrun started, with NCCL between GPUs or Gloo between CPUs."""

    def __init__(self, config: DistributedConfig):
        self._peers = Peers(config.rank_timeout)
        self.rank, self.local_rank, self.size = self._peers.rank, self._peers.local_rank, self._peers.size
        self._hosts = self._peers.hosts
        self._strategy = (parallel.FSDP if config.strategy == "fsdp" else parallel.DDP)(self.broadcast)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception):
            self._peers.fail(error)
        self._peers.leave()

    def __str__(self) -> str:
        return f"{self.size} ranks ({self._strategy.name}), each on "

    def has_started(self) -> bool:
        # torchrun's restart count does not answer this: it differs between nodes, and a run may fail before it starts.
        return self.on_main(self._peers.has_started)

    def mark_started(self) -> None:
        self._peers.mark_started()

    def exit_all(self, code: int) -> None:
        self._peers.exit_all(code)

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values)
        return values

    def synchronize(self) -> None:
        if torch.cuda.is_available():
            done, deadline = torch.cuda.Event(), time.monotonic() + self._peers.timeout.total_seconds()
            done.record()
            while not done.query():
                if time.monotonic() > deadline:
                    raise self._peers.find_lost()
                time.sleep(1e-3)

    def union(self, numbers: list[int]) -> list[int]:
        bits = torch.zeros(64, dtype=torch.uint8)
        bits[super().union(numbers)] = 1
        dist.all_reduce(bits, dist.ReduceOp.MAX, group=self._hosts)
        return bits.nonzero().flatten().tolist()

    def broadcast(self, value: T) -> T:
        values = [value]
        dist.broadcast_object_list(values, 0, group=self._hosts)
        return values[0]

    def gather(self, value: T) -> list[T]:
        values = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, 0, group=self._hosts)
        return values or []

    def main_first(self) -> AbstractContextManager:
        return self._peers.after(0)

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        with self._peers.after(self.rank - self.local_rank):
            yield
        # Wait for every node here, without a time limit. The next collective has one.
        for leader in self._peers.leaders:
            with self._peers.after(leader):
                pass

    def resolve_precision(self, wanted: str, device: torch.device) -> str:
        precision = self.on_main(partial(resolve_precision, wanted, device))
        self._strategy.check_precision(precision)
        return precision

    def load_device(self, device: torch.device) -> torch.device:
        return self._strategy.load_device(device)

    def parallelize(
        self, model: PreTrainedModel, device: torch.device, precision: str, block_size: int
    ) -> PreTrainedModel:
        self._strategy.parallelize(model, device, precision, block_size)
        return model

    def next_token_nll(self, model: PreTrainedModel, **batch: torch.Tensor) -> torch.Tensor:
        return self._strategy.next_token_nll(model, **batch)

    def sync_gradients(self, model: PreTrainedModel, is_last: bool) -> AbstractContextManager:
        return self._strategy.sync_gradients(model, is_last)

    def reshard(self, model: PreTrainedModel) -> None:
        self._strategy.reshard(model)

    def full_tensor(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return parallel.full_tensor(tensor)

    def full_model(self, model: PreTrainedModel) -> PreTrainedModel | None:
        return self._strategy.full_model(model)

    def load_tensor(self, target: torch.Tensor, full: torch.Tensor | None) -> None:
        parallel.load_tensor(target, full)


def join_world(config: DistributedConfig) -> World:
    """Return the world that torchrun started, or ``World()``. Raise RankError if the ranks do not connect."""
    if is_under_torchrun():
        try:
            return TorchrunWorld(config)
        except RuntimeError as error:
            sys.stderr = sys.__stderr__  # the lost rank may be the one that would report this
            lost = "the first node is lost" if isinstance(error, dist.DistError) else "a rank is lost"
            fix = "Run again with --resume after you fix the errors of the other ranks."
            raise RankError(f"the ranks did not connect: {lost} ({first_line(error)}). {fix}") from error
    changed = [
        name for name in ("strategy", "rank_timeout") if getattr(config, name) != getattr(DistributedConfig, name)
    ]
    if changed:
        flags = ", ".join(f"--{name} {getattr(config, name)}" for name in changed)
        warn(f"{flags}: ignored, because this run has one process. Use torchrun to start more.")
    return World()


def silence_other_ranks() -> None:
    """Print on rank 0 only. Until the ranks have connected, local rank 0 of each node prints errors, too."""
    if is_under_torchrun() and int(os.environ["RANK"]):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 open as long as the process
        if int(os.environ["LOCAL_RANK"]):
            sys.stderr = sys.stdout

"""Connect the processes of a run. torchrun starts, watches, ends and restarts them; NCCL or Gloo connect them.

    torchrun --nproc_per_node=8 train.py ...                       # DDP: the whole model on each rank
    torchrun --nproc_per_node=8 train.py --strategy fsdp ...       # FSDP2: a shard of the model on each rank

with World(config) as world:                         # without torchrun, a world of one process
    model = world.parallelize(model, device, precision, block_size)
    with world.sync_gradients(model, is_last):       # all-reduce after the last micro-batch of a step alone
        world.next_token_nll(model, **batch).backward()
    saved = world.on_main(lambda: save(...))         # runs on rank 0, returns on all ranks

Gradients, weights and sums are sent between devices. Python objects, such as a signal's number, are sent between CPUs,
so that no host waits for its device.
"""

import os
import re
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Annotated, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from cli.errors import UserError, as_user_error, out_of_memory, require, warn
from cli.flags import Range, flag
from distributed import parallel
from distributed.empty import materialize
from modeling.checks import PROBED_ATTRIBUTES
from modeling.loss import next_token_nll
from modeling.precision import autocast

T = TypeVar("T")


@dataclass
class DistributedConfig:
    title = "ranks"

    strategy: Literal["ddp", "fsdp"] = flag("ddp", "under torchrun: the whole model on each device, or a shard of it")
    rank_timeout: Annotated[int, Range(least=1)] = flag(600, "under torchrun: seconds to wait for another rank")


class RankError(UserError):
    """The connection to another rank is lost."""

    exit_code = 6


class World:
    """The processes of a run. ``World()`` is one process. All ranks must call the collectives."""

    rank, local_rank, size, hosts = 0, 0, 1, None

    def __init__(self, config: DistributedConfig | None = None):
        """Connect the ranks that torchrun started. Raise RankError if one does not connect in time."""
        self.strategy, self._note, self._ddp, self._parts = "", "", None, []
        if config and is_under_torchrun():
            self._connect(config)
        elif config:
            changed = [name for name, value in vars(DistributedConfig()).items() if getattr(config, name) != value]
            if changed:
                flags = ", ".join(f"--{name} {getattr(config, name)}" for name in changed)
                warn(f"{flags}: ignored, because this run has one process. Use torchrun to start more.")

    def _connect(self, config: DistributedConfig) -> None:
        self.local_rank, gpu = int(os.environ["LOCAL_RANK"]), torch.accelerator.current_accelerator(True)
        limit = timedelta(seconds=config.rank_timeout)
        if gpu:
            num_gpus, num_started = torch.accelerator.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            wrong = f"torchrun --nproc_per_node={num_started}: this node has {num_gpus} GPUs"
            require(num_started <= num_gpus, f"{wrong}. Use --nproc_per_node={num_gpus}.")
            torch.accelerator.set_device_index(self.local_rank)
        try:
            dist.init_process_group(dist.get_default_backend_for_device(gpu or "cpu"), timeout=limit, **_meet(limit))
            self.hosts, self._alone = (dist.new_group(backend="gloo", timeout=t) for t in (limit, timedelta(days=1)))
        except RuntimeError as error:
            sys.stderr = sys.__stderr__  # the lost rank may be the rank that prints
            fix = "Run again with --resume after you fix the errors of the other ranks."
            raise RankError(f"the ranks did not connect ({headline(error)}). {fix}") from error
        self.rank, self.size, self.strategy = dist.get_rank(), dist.get_world_size(), config.strategy
        if self.rank:
            sys.stderr = sys.stdout  # from here on rank 0 reports errors for all ranks

    @property
    def shards(self) -> bool:
        """Return whether each rank holds a shard of the model."""
        return self.strategy == "fsdp"

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, the rank that writes and prints."""
        return self.rank == 0

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Report an error of this rank. Its exit closes the connections, so the other ranks end, too."""
        if self.size == 1 or not isinstance(error, Exception):
            return
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
        sys.stderr, known = sys.__stderr__, as_user_error(error)
        if is_connection_error(error) and not out_of_memory(error):
            fix = "Run again with --resume; torchrun --max-restarts=3 does this automatically."
            known = RankError(f"the connection to another rank is lost ({headline(error)}). {fix}")
        if known is None:
            traceback.print_exception(error)
            os._exit(1)  # Gloo's threads could block Python's own exit
        raise type(known)(f"rank {self.rank}: {known}" if self.rank else str(known)) from error

    def __str__(self) -> str:
        """Return the text before the device's name in the plan of a run."""
        return f"{self.size} ranks ({self.strategy}{self._note}), each on " if self.strategy else ""

    # Collectives

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum ``values`` over all ranks in place, on the device, and return them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def union(self, numbers: list[int]) -> list[int]:
        """Return the numbers from 0 to 63 that any rank has, sorted, and empty ``numbers``."""
        mine = {numbers.pop() for _ in range(len(numbers))}  # a signal handler may append at any moment
        if self.size == 1:
            return sorted(mine)
        bits = torch.zeros(64, dtype=torch.uint8)
        bits[list(mine)] = 1
        dist.all_reduce(bits, dist.ReduceOp.MAX, group=self.hosts)
        return bits.nonzero().flatten().tolist()

    def broadcast(self, value: T) -> T:
        """Return rank 0's ``value``."""
        return self.on_all(lambda: value)[0]

    def on_all(self, work: Callable[[], T], alone: bool = False) -> list[T]:
        """Call ``work`` on all ranks, and return the results of all ranks on each rank.

        If it raises errors that a user can act on, rank 0 raises the first one, and the other ranks exit with its exit
        code. A rank waits for --rank_timeout seconds, or with ``alone``, before training, for a day.
        """
        if self.size == 1:
            return [work()]
        result, error, outcomes = None, None, [None] * self.size
        try:
            result = work()
        except Exception as raised:
            if (error := as_user_error(raised)) is None:
                raise
        dist.all_gather_object(outcomes, (result, error), group=self._alone if alone else self.hosts)
        failed = [(rank, error) for rank, (_, error) in enumerate(outcomes) if error]
        if failed and not self.is_main:
            sys.exit(failed[0][1].exit_code)
        if failed:
            rank, error = failed[0]
            raise type(error)(f"rank {rank}: {error}" if rank else str(error))
        return [result for result, _ in outcomes]

    def on_main(self, work: Callable[[], T]) -> T:
        """Call ``work`` on rank 0, and return its result on all ranks. Before training it may take a day."""
        return self.on_all(lambda: work() if self.is_main else None, alone=True)[0]

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Run the body on local rank 0 of each node first. The other ranks then find its files in the caches.

        The body may take long, and must not call a collective.
        """
        if self.size > 1 and self.local_rank:
            dist.barrier(self._alone)
        try:
            yield
        finally:  # even after an error: the other ranks meet it themselves
            if self.size > 1 and not self.local_rank:
                dist.barrier(self._alone)
        if self.size > 1:
            dist.barrier(self._alone)

    # The model

    def parallelize(
        self,
        model: PreTrainedModel,
        device: torch.device,
        precision: str,
        block_size: int,
        fill: Sequence[Callable[[], None]] = (),
    ) -> PreTrainedModel:
        """Bring rank 0's weights to ``device`` on all ranks, and run the passes of one step.

        On the other ranks, ``model`` may be on device meta. With FSDP2 it may be there on all ranks. The functions in
        ``fill`` then fill the shards. Raise UserError if the strategy does not support the model.
        """
        if not self.strategy:
            return model.to(device)
        model.train()  # the warm-up passes must be the passes of training
        drops = [name for name, value in model.config.to_dict().items() if name.endswith("layerdrop") and value]
        wrong = f"--strategy {self.strategy}: each rank would drop different layers"
        require(not drops, f"{wrong}. Set {', '.join(drops)} to 0 with --model_overrides, or use one process.")
        # Loading and checking set these attributes on rank 0 alone.
        vars(model).update(self.broadcast({name: x for name, x in vars(model).items() if name in PROBED_ATTRIBUTES}))
        ids = torch.zeros(1, block_size, dtype=torch.int64, device=device)
        if self.shards:
            parallel.shard(model, device, precision, sends=not fill)
            for work in fill:
                self.on_all(work)
        else:
            materialize(model, device)
            unused = self.broadcast(self.is_main and parallel.has_unused_weights(model, ids, precision))
            self._ddp = parallel.wrap_in_ddp(model, unused)
        self._warm_up(model, ids, precision)
        self._alone = self.hosts  # from here on, no rank works alone for longer than --rank_timeout
        return model

    def _warm_up(self, model: PreTrainedModel, ids: torch.Tensor, precision: str) -> None:
        """Run the forward and backward passes of a step, and drop the gradients.

        DDP reorders its buckets in its first backward pass, which changes the order of sums. If this happens before
        step 0, a resumed run has the same bits.
        """
        try:
            for is_last in (True, False, True):
                with self.sync_gradients(model, is_last):
                    with autocast(ids.device, precision):
                        nll = self.next_token_nll(model, input_ids=ids, labels=ids)
                    nll.backward()
                if is_last:
                    self._parts, self._note = parallel.delayed_parts(model)
                    model.zero_grad()
        except (RuntimeError, AttributeError, TypeError) as error:
            if as_user_error(error) or is_connection_error(error):
                raise
            wrong = f"--strategy {self.strategy}: {model.config.model_type} fails with it ({headline(error)[:100]})"
            fix = "Use --strategy ddp." if self.shards else "Use one process."
            raise UserError(f"{wrong}. {fix}") from error

    def next_token_nll(self, model: PreTrainedModel, **batch: torch.Tensor) -> torch.Tensor:
        """Return `modeling.loss.next_token_nll` of this rank's batch. Its gradients are averaged over the ranks."""
        return self._ddp(**batch) if self._ddp else next_token_nll(model, **batch)

    def sync_gradients(self, model: PreTrainedModel, is_last: bool) -> AbstractContextManager:
        """Run a forward and a backward pass in this context. Gradients are averaged if ``is_last``."""
        for part in self._parts:
            part.set_requires_gradient_sync(is_last, recurse=False)
        return self._ddp.no_sync() if self._ddp and not is_last else nullcontext()


def _meet(limit: timedelta) -> dict[str, Any]:
    """Return the arguments of `init_process_group`. Raise RuntimeError if a rank does not come within ``limit``.

    torchrun keeps its store when it restarts the ranks, with the addresses of the old processes. So each start uses a
    new prefix: rank 0's name. Each rank asks for it under a new name, and rank 0 answers until all have come.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    me, deadline = uuid.uuid4().hex, time.monotonic() + limit.total_seconds()
    store.append("asking", f"{me} ")
    while time.monotonic() < deadline:
        for name in store.get("asking").decode().split() if rank == 0 else ():
            store.set(name, me)
        if store.check([me]):
            own = dist.PrefixStore(store.get(me).decode(), store)
            if own.add("came", int(rank > 0)) == size - 1 or rank:
                return {"store": own, "rank": rank, "world_size": size}
        time.sleep(0.02)
    raise RuntimeError(f"not all {size} ranks came within {limit.total_seconds():.0f} s")


def is_under_torchrun() -> bool:
    """Return whether torchrun, or a launcher that sets its variables, started this process."""
    has_others = os.environ.get("WORLD_SIZE", "1") != "1"
    return "LOCAL_RANK" in os.environ and (has_others or "TORCHELASTIC_RUN_ID" in os.environ)


def silence_other_ranks() -> None:
    """Print on rank 0 only. Until the ranks have connected, local rank 0 of each node prints errors, too."""
    if is_under_torchrun() and int(os.environ["RANK"]):
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")  # noqa: SIM115 open as long as the process
        if int(os.environ["LOCAL_RANK"]):
            sys.stderr = sys.stdout


def is_connection_error(error: Exception) -> bool:
    """Return whether an exception means that another rank cannot be reached."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def headline(error: Exception) -> str:
    """Return the first sentence of a C++ error message, without its stack trace and source file."""
    return re.split(r"[.:]?\n|\. |\.$", re.sub(r"\[/\S+:\d+\] *", "", str(error)))[0]

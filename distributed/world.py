"""One run on many processes: torchrun's ranks, the model on each of them or a shard of it, sums over them.

    torchrun --nproc_per_node=8 train.py ...                       # DistributedDataParallel
    torchrun --nproc_per_node=8 train.py --strategy fsdp ...       # a shard of weights and moments on each rank

with join(config) as group:                          # without torchrun a group of one, whose methods do nothing
    model = group.spread(model, device, ...)         # weights of rank 0, on all
    with group.last_of_update(model, i == n - 1):    # gradients travel behind the last micro-batch
        group.next_token_nll(model, **batch).backward()
    saved = group.first(lambda: save(...))           # rank 0 alone does it, and all get what it returns

Collectives on the device carry gradients, weights and sums. What hosts have to agree on, such as a signal, goes from
CPU to CPU, so that no host waits for its device.
"""

import copy
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from cli.errors import UserError, as_user_error, out_of_memory, require, warn
from cli.flags import Range, flag
from modeling.architectures import layer_stacks
from modeling.checks import FOUND
from modeling.loss import next_token_nll
from modeling.precision import DTYPES, autocast

T = TypeVar("T")

GRACE = 10  # seconds, of --rank_timeout, in which ranks that still run say so, once one of them is missed
FIX = "go on with --resume; torchrun --max-restarts=3 does so by itself"


@dataclass
class DistributedConfig:
    strategy: Literal["ddp", "fsdp"] = flag("ddp", "under torchrun: the whole model on each device, or a shard of it")
    rank_timeout: Annotated[int, Range(least=1)] = flag(
        600, "seconds without a sign of life until a rank counts as lost"
    )

    def rules(self) -> list[tuple[bool, str]]:
        return []


class RankError(UserError):
    """Another rank died, or does not answer."""

    exit_code = 6


class NextTokenLoss(torch.nn.Module):
    """`next_token_nll` as a module: DistributedDataParallel has to see the head, which is used outside of the model."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return next_token_nll(self.model, **batch)


class Group:
    """The ranks of a run. ``Group()`` is that of a single process."""

    rank, local_rank, size = 0, 0, 1

    def __enter__(self) -> "Group":
        return self

    def __str__(self) -> str:
        """What is said before the device's name."""
        return ""

    def has_begun(self) -> bool:
        """Whether torchrun has started these ranks before, they have begun their run, and one of them was lost."""
        return False

    def begin(self) -> None:
        """Rank 0 has made the run's directory its own."""

    def end_all(self, code: int) -> None:
        """Has all ranks end with the exit code ``code``; the caller ends here where another rank gave one before."""

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leaves the group."""

    # What all ranks call together.

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place of ``values``, which are on the device."""
        return values

    def wait_for_device(self) -> None:
        """Until the device has done its work: a host that waits inside of CUDA would not notice that a rank is lost."""

    def union(self, numbers: list[int]) -> list[int]:
        """The numbers, of 0 to 63, that any rank has; ``numbers`` is then empty."""
        return sorted({numbers.pop() for _ in range(len(numbers))})  # a signal may add another one at any moment

    def share(self, value: T) -> T:
        """The ``value`` of rank 0."""
        return value

    def collect(self, value: T) -> list[T]:
        """The values of all ranks, on rank 0; none elsewhere."""
        return [value]

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on rank 0, which alone does it."""
        with self.first_ahead():
            value = work() if self.rank == 0 else None
        return self.share(value)

    def once_a_node(self) -> AbstractContextManager:
        """The first rank of each node goes ahead, the others find in the caches what it has prepared."""
        return nullcontext()

    def first_ahead(self) -> AbstractContextManager:
        """Rank 0 goes ahead, however long it takes: what it does may not need the others."""
        return nullcontext()

    # The model.

    def check(self, precision: str, oom: str) -> None:
        """Raises UserError where precision, or what to do when memory runs out, is nothing for these ranks."""

    def home(self, device: torch.device) -> torch.device:
        """Where rank 0 holds the model before `spread`."""
        return device

    def spread(self, model: PreTrainedModel, device: torch.device, precision: str, block_size: int) -> PreTrainedModel:
        """Brings rank 0's weights to ``device`` on all ranks. Elsewhere ``model`` may have none (on device meta).

        Raises UserError where the strategy is nothing for the model.
        """
        return model.to(device)

    def next_token_nll(self, model: PreTrainedModel, **batch: torch.Tensor) -> torch.Tensor:
        """`model.next_token_nll` of this rank's batch, whose gradients are averaged over ranks."""
        return next_token_nll(model, **batch)

    def last_of_update(self, model: PreTrainedModel, is_last: bool) -> AbstractContextManager:
        """Where forward and backward pass run. Gradients travel behind the last micro-batch of an update alone."""
        return nullcontext()

    def grad_norm(self, model: PreTrainedModel) -> torch.Tensor:
        """The norm of all gradients together."""
        return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

    def release(self, model: PreTrainedModel) -> None:
        """Gives up weights of other ranks' shards, some of which a forward pass leaves where they were used."""

    def whole(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The tensor with all its shards, on rank 0; None elsewhere."""
        return tensor

    def whole_model(self, model: PreTrainedModel) -> PreTrainedModel | None:
        """The model with all its weights, on rank 0; None elsewhere. To be saved, not to be run."""
        return model

    def copy_(self, target: torch.Tensor, whole: torch.Tensor | None) -> None:
        """Copies rank 0's ``whole`` to ``target``, or each rank's shard of it."""
        with torch.no_grad():
            target.copy_(whole)


class Ranks(Group):
    """The ranks that torchrun has started, on NCCL where there are GPUs and on Gloo between CPUs."""

    def __init__(self, config: DistributedConfig):
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self._fsdp, self._ddp = config.strategy == "fsdp", None
        self._learning: list[FSDPModule] = []  # the parts of the model that get gradients
        self._rank_timeout = config.rank_timeout
        self._grace = min(GRACE, config.rank_timeout / 2)
        self._timeout = timedelta(seconds=config.rank_timeout - self._grace)  # of a collective
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        if self._device == "cuda":
            count = torch.cuda.device_count()
            started = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            require(started <= count, f"torchrun --nproc_per_node={started}: there are {count} GPUs; start as many")
            torch.cuda.set_device(self.local_rank)
        # torchrun keeps the store, with all its keys, when it starts other processes.
        limit = timedelta(seconds=config.rank_timeout)
        self._kept_store, self.rank, self.size = next(dist.rendezvous("env://", timeout=limit))
        self._store = self._meet(self._kept_store)
        self._left, self._turns = threading.Event(), 0
        threading.Thread(target=self._beat, args=(self._store.clone(),), daemon=True).start()
        backend, times = ("nccl", 2) if self._device == "cuda" else ("gloo", 1)  # NCCL would end the process at once
        options = {"store": dist.PrefixStore("group", self._store), "rank": self.rank, "world_size": self.size}
        dist.init_process_group(backend, timeout=times * self._timeout, **options)
        self._hosts = dist.new_group(backend="gloo", timeout=self._timeout)
        if self.rank:
            sys.stderr = sys.stdout

    def _meet(self, store: dist.Store) -> dist.Store:
        """A part of the store for these processes alone.

        Rank 0 gives the meeting a new name, the others answer to it, and rank 0 says who has answered.
        """
        me, missing = [socket.gethostname(), os.getpid(), _machine(), self.local_rank, uuid.uuid4().hex], [0]
        deadline = time.monotonic() + self._rank_timeout
        if self.rank == 0:
            store.set("meeting", me[-1])
        while time.monotonic() < deadline:
            meeting = dist.PrefixStore(store.get("meeting").decode(), store)
            meeting.set(f"rank {self.rank}", json.dumps(me))
            if self.rank == 0:
                missing = [r for r in range(self.size) if not meeting.check([f"rank {r}"])]
                if not missing:
                    meeting.set("all", json.dumps([json.loads(meeting.get(f"rank {r}")) for r in range(self.size)]))
            if meeting.check(["all"]) and me in (places := json.loads(meeting.get("all"))):
                self._places = [place[:3] for place in places]
                self._leaders = [rank for rank, (*_, local_rank, _) in enumerate(places) if local_rank == 0]
                return meeting
            time.sleep(0.05)
        come = f"rank {', '.join(map(str, missing))} did not come"
        raise RankError(f"--rank_timeout {self._rank_timeout}: {come}; look at its node")

    def _beat(self, store: dist.Store) -> None:
        """Says that this process goes on, whatever it does, and ends it where another one has failed."""
        with suppress(RuntimeError):  # where the machine that holds the store is gone
            while not self._left.wait(1):
                store.add(f"beats of rank {self.rank}", 1)
                if store.check(["failed"]) and not self._left.is_set():
                    os._exit(int(store.get("failed").split()[1]))

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the others when one has died
            sys.stderr = sys.__stderr__
            known = self._lost() if _is_lost(error) else as_user_error(error)
            if known is not None:
                self._end_with(known)
            traceback.print_exception(error)
            self.end_all(1)
            os._exit(1)  # while all is there: see `config.run`
        self._left.set()

    def _end_with(self, error: UserError) -> None:
        """The first rank that fails says why, rank 0 if it fails as well; the others end with the same exit code."""
        is_lost = isinstance(error, RankError)
        if self.rank and not is_lost:
            time.sleep(1)
        self._abort()
        self.end_all(error.exit_code)
        raise error if self.rank == 0 or is_lost else type(error)(f"rank {self.rank}: {error}")

    def end_all(self, code: int) -> None:
        self._left.set()
        with suppress(RuntimeError):  # where the store is lost, every rank says so
            failed = self._store.compare_set("failed", "", mine := f"{self.rank} {code}").decode()
            if failed != mine:
                os._exit(int(failed.split()[1]))

    def _abort(self) -> None:
        """Whoever waits for this rank in a collective has to notice that it does not come."""
        for group in (self._hosts, dist.group.WORLD):
            group.abort()

    def has_begun(self) -> bool:
        # What torchrun counts is no help: one node's counts, another's does not, and a run may not have begun.
        return self.first(lambda: self._kept_store.check(["begun"]))

    def begin(self) -> None:
        if self.rank == 0:
            self._kept_store.set("begun", "")

    def _lost(self) -> RankError:
        """Which ranks are lost: those that have ended on this machine, or else all that do not say that they go on."""
        try:
            with self._answering(self._grace + 2):
                self._abort()
                everyone = [f"rank {r} goes on" for r in range(self.size)]
                self._store.set(everyone[self.rank], "")
                here = [r for r in range(self.size) if self._places[r][2] == _machine()]
                deadline, dead = time.monotonic() + self._grace, []
                while not (dead or self._store.check(everyone) or time.monotonic() > deadline):
                    time.sleep(0.05)
                    dead = [r for r in here if self._has_died(r) and not self._store.check([everyone[r]])]
                silent = [r for r in range(self.size) if not self._store.check([everyone[r]])]
                return self._missing(dead or silent, "has died" if dead else "does not answer")
        except RuntimeError as error:
            return RankError(f"the first node, which held the store, is lost ({_first_line(error)}); {FIX}")

    def _missing(self, ranks: list[int], what: str) -> RankError:
        who = ", ".join(f"rank {r} (process {self._places[r][1]} on {self._places[r][0]})" for r in ranks)
        return RankError(f"{who} {what}; {FIX}" if who else f"the connection to a rank was lost; {FIX}")

    def _has_died(self, rank: int) -> bool:
        _, pid, machine = self._places[rank]
        return machine == _machine() and _has_ended(pid)

    @contextmanager
    def _answering(self, seconds: float) -> Iterator[None]:
        """Ends this process where the store does not answer: its machine stands still, and a call would never end."""

        def give_up() -> None:
            said = f"train.py: error: the first node, which holds the store, does not answer; {FIX}"
            print(said, file=sys.__stderr__, flush=True)
            os._exit(RankError.exit_code)

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values)
        return values

    def wait_for_device(self) -> None:
        if self._device == "cuda":
            done, deadline = torch.cuda.Event(), time.monotonic() + self._timeout.total_seconds()
            done.record()
            while not done.query():
                if time.monotonic() > deadline:
                    raise self._lost()
                time.sleep(1e-3)

    def union(self, numbers: list[int]) -> list[int]:
        mine = super().union(numbers)
        bits = torch.zeros(64, dtype=torch.uint8)
        bits[mine] = 1
        dist.all_reduce(bits, dist.ReduceOp.MAX, group=self._hosts)
        return bits.nonzero().flatten().tolist()

    def share(self, value: T) -> T:
        values = [value]
        dist.broadcast_object_list(values, 0, group=self._hosts)
        return values[0]

    def collect(self, value: T) -> list[T]:
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, 0, group=self._hosts)
        return values or []

    @contextmanager
    def once_a_node(self) -> Iterator[None]:
        with self._after(self.rank - self.local_rank):
            yield
        for leader in self._leaders:
            with self._after(leader):
                pass

    def first_ahead(self) -> AbstractContextManager:
        return self._after(0)

    @contextmanager
    def _after(self, leader: int) -> Iterator[None]:
        """The others wait for ``leader``, as long as its process goes on."""
        self._turns += 1
        done = f"turn {self._turns} of rank {leader}"
        beats, since = None, time.monotonic()
        while self.rank != leader:
            with self._answering(self._rank_timeout):
                if self._store.check([done]):
                    break
                before, beats = beats, self._store.add(f"beats of rank {leader}", 0)
            since = since if beats == before else time.monotonic()
            died = self._has_died(leader)
            if died or time.monotonic() - since > self._rank_timeout:
                raise self._missing([leader], "has died" if died else "does not answer")
            time.sleep(0.05)
        yield
        if self.rank == leader:
            self._store.set(done, "")

    def __str__(self) -> str:
        return f"{self.size} ranks ({'fsdp' if self._fsdp else 'ddp'}), each on "

    def check(self, precision: str, oom: str) -> None:
        fits = precision != "fp16" or not self._fsdp
        require(fits, "--strategy fsdp: does not scale the gradients of float16; give --precision bf16 or fp32")
        alone = f"--oom {oom}: {self.size} ranks have to agree on what they do; give a smaller --batch_size"
        require(oom == "stop", alone)

    def home(self, device: torch.device) -> torch.device:
        return torch.device("cpu") if self._fsdp else device

    def spread(self, model: PreTrainedModel, device: torch.device, precision: str, block_size: int) -> PreTrainedModel:
        model.train()  # so that the passes below are those of training
        ids = torch.zeros(1, block_size, dtype=torch.int64, device=device)
        drops = [name for name, value in model.config.to_dict().items() if name.endswith("layerdrop") and value]
        apart = f"--strategy: ranks would leave out different layers for {', '.join(drops)}"
        require(not drops, f"{apart}; set it to 0 with --model_overrides, or train in one process")
        for name, value in self.share({name: vars(model).get(name) for name in FOUND}).items():
            if value is not None:
                setattr(model, name, value)
        if not self._fsdp:
            _materialize(model, device)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self._ddp = DistributedDataParallel(  # which sends the weights of rank 0 to the others
                NextTokenLoss(model),
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=self.share(self.rank == 0 and _leaves_unused(model, trained, ids, precision)),
            )
            # After its first backward pass it orders its buckets anew, and with them sums: a resumed run must not.
            self._warm_up(model, ids, precision, "--strategy ddp", "train it in one process")
            return model
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nothing changes in place
        self._plain = _without_weights(model)
        full = {name: parameter.detach() for name, parameter in model.named_parameters()}
        mesh = init_device_mesh(device.type, (self.size,))
        policy = MixedPrecisionPolicy(DTYPES[precision] if precision != "fp32" else None, torch.float32)
        for module in [*chain(*layer_stacks(model)), model]:
            _materialize(module, device)
            if not isinstance(module, (FSDPModule, torch.nn.ModuleList, torch.nn.ModuleDict)):
                fully_shard(module, mesh=mesh, mp_policy=policy)
        for name, parameter in model.named_parameters():
            self.copy_(parameter, full.pop(name))
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
        self._warm_up(model, ids, precision, "--strategy fsdp", "give ddp")
        return model

    def _warm_up(self, model: PreTrainedModel, ids: torch.Tensor, precision: str, strategy: str, fix: str) -> None:
        """An update's passes, without the update."""
        parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        try:
            for is_last in (True, False, True):
                with self.last_of_update(model, is_last):
                    with autocast(ids.device, precision):
                        nll = self.next_token_nll(model, input_ids=ids, labels=ids)
                    nll.backward()
                if is_last:
                    # What never runs, such as layers that see images, has nothing that could be kept from travelling.
                    self._learning = [part for part in parts if any(p.grad is not None for p in part.parameters())]
                    model.zero_grad()
        except (RuntimeError, AttributeError, TypeError) as error:
            if out_of_memory(error) or _is_lost(error):
                raise
            kind = model.config.model_type
            raise UserError(f"{strategy}: {kind} fails with it ({_first_line(error)[:100]}); {fix}") from error

    def next_token_nll(self, model: PreTrainedModel, **batch: torch.Tensor) -> torch.Tensor:
        return self._ddp(**batch) if self._ddp else next_token_nll(model, **batch)

    @contextmanager
    def last_of_update(self, model: PreTrainedModel, is_last: bool) -> Iterator[None]:
        for part in self._learning:
            part.set_requires_gradient_sync(is_last, recurse=False)
        with self._ddp.no_sync() if self._ddp and not is_last else nullcontext():
            yield

    def grad_norm(self, model: PreTrainedModel) -> torch.Tensor:
        norm = super().grad_norm(model)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def release(self, model: PreTrainedModel) -> None:
        if self._fsdp:
            model.reshard()

    def whole(self, tensor: torch.Tensor) -> torch.Tensor | None:
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        return tensor.cpu() if self.rank == 0 else None

    def whole_model(self, model: PreTrainedModel) -> PreTrainedModel | None:
        if not self._fsdp:
            return model if self.rank == 0 else None
        self.release(model)
        wholes = {id(tensor): self.whole(tensor.detach()) for tensor in [*model.parameters(), *model.buffers()]}
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        if self.rank:
            return None
        plain = copy.deepcopy(self._plain)
        plain.load_state_dict({name: wholes[id(tensor)] for name, tensor in named}, strict=False, assign=True)
        plain.tie_weights()
        return plain

    def copy_(self, target: torch.Tensor, whole: torch.Tensor | None) -> None:
        if self.rank:
            whole = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        whole = whole.to(target.device, target.dtype)
        with torch.no_grad():
            if isinstance(target, DTensor):
                target.copy_(distribute_tensor(whole, target.device_mesh, target.placements))
            else:
                dist.broadcast(whole, 0)
                target.copy_(whole)


def join(config: DistributedConfig) -> Group:
    """The group that torchrun has started, or a group of one."""
    if _is_under_torchrun():
        try:
            return Ranks(config)
        except RuntimeError as error:
            sys.stderr = sys.__stderr__  # the one that would have spoken may be the one that is lost
            fix = "look at what the others say; go on with --resume"
            who = "the first node is lost" if isinstance(error, dist.DistError) else "a rank is lost"
            raise RankError(f"the ranks have not come together: {who} ({_first_line(error)}); {fix}") from error
    if config.strategy != "ddp":
        warn(f"--strategy {config.strategy}: without torchrun there is nothing to spread; it is not used")
    return Group()


def quiet_unless_first() -> None:
    """What all ranks have to say, rank 0 alone says."""
    if _is_under_torchrun() and int(os.environ["RANK"]):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 open as long as the process
        if int(os.environ["LOCAL_RANK"]):  # until the ranks have met, one of each node says what is wrong there
            sys.stderr = sys.stdout


def _is_under_torchrun() -> bool:
    is_one = int(os.environ.get("WORLD_SIZE", 1)) == 1
    return "LOCAL_RANK" in os.environ and (not is_one or "TORCHELASTIC_RUN_ID" in os.environ)


def _is_lost(error: Exception) -> bool:
    """Whether an exception says that another rank cannot be reached."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _first_line(error: Exception) -> str:
    """Of what C++ says, which adds where it came from."""
    return str(error).splitlines()[0][:200]


def _machine() -> str:
    """What processes have in common that know each other by their ids; hosts' names may be all alike."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return socket.gethostname()


def _has_ended(pid: int) -> bool:
    """Whether a process of this machine is no more, be it that nobody has asked for its exit code yet."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except OSError:
        return False


def _materialize(module: torch.nn.Module, device: torch.device) -> None:
    """Brings a module to ``device``; weights that are on device meta become memory without values, tied ones once."""
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device=device)
                made.setdefault(parameter, torch.nn.Parameter(empty, parameter.requires_grad))
                setattr(part, name, made[parameter])
    module.to(device)


def _without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` with its weights on device meta, where they take no memory."""
    memo = {id(p): torch.nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _leaves_unused(
    model: PreTrainedModel, trained: list[torch.nn.Parameter], ids: torch.Tensor, precision: str
) -> bool:
    """Whether a backward pass leaves weights without a gradient, for which DistributedDataParallel would wait."""
    with autocast(ids.device, precision):
        nll = next_token_nll(model, ids, ids)
    gradients = torch.autograd.grad(nll, trained, allow_unused=True)
    return any(gradient is None for gradient in gradients)

"""Connect the processes that torchrun started, and report a rank that is lost.

Each rank writes a heartbeat to torchrun's store, once a second. A waiting rank reads it to tell a slow rank from a lost
one. The first rank that fails writes its exit code there, and all other ranks exit with the same code.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cli.errors import UserError, as_user_error, require

GRACE_SECONDS = 10  # of --rank_timeout, left after a collective times out: the live ranks answer within them
POLL_SECONDS = 0.05
FIX = "Run again with --resume; torchrun --max-restarts=3 does this automatically."


class RankError(UserError):
    """Report that another rank died or does not answer."""

    exit_code = 6


class Peers:
    """Connect this process with the other ranks: process groups, heartbeats, exit codes.

    ``hosts`` is a Gloo group between the CPUs. ``timeout`` is the time limit of a collective. ``leaders`` are the ranks
    that have local rank 0, one per node.
    """

    def __init__(self, rank_timeout: int):
        """Connect all ranks. Raise RankError if one of them does not connect within ``rank_timeout`` seconds."""
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self._rank_timeout = rank_timeout
        self._grace_seconds = min(GRACE_SECONDS, rank_timeout / 2)
        self.timeout = timedelta(seconds=rank_timeout - self._grace_seconds)
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            num_gpus, num_started = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            wrong = f"torchrun --nproc_per_node={num_started}: this node has {num_gpus} GPUs"
            require(num_started <= num_gpus, f"{wrong}. Use --nproc_per_node={num_gpus}.")
            torch.cuda.set_device(self.local_rank)

        # torchrun keeps this store and all its keys when it restarts the ranks.
        limit = timedelta(seconds=rank_timeout)
        self._torchrun_store, self.rank, self.size = next(dist.rendezvous("env://", timeout=limit))
        self._store = self._meet()
        self._left, self._num_turns = threading.Event(), 0
        threading.Thread(target=self._send_heartbeats, args=(self._store.clone(),), daemon=True).start()

        # NCCL ends the process when a collective times out. With twice the time, `synchronize` times out first.
        backend, factor = ("nccl", 2) if has_gpu else ("gloo", 1)
        options = {"store": dist.PrefixStore("group", self._store), "rank": self.rank, "world_size": self.size}
        dist.init_process_group(backend, timeout=factor * self.timeout, **options)
        self.hosts = dist.new_group(backend="gloo", timeout=self.timeout)
        if self.rank:
            sys.stderr = sys.stdout  # from here on rank 0 reports the errors that all ranks have

    def _meet(self) -> dist.Store:
        """Return a part of torchrun's store for the processes of this start alone.

        Rank 0 writes a new name for the meeting. The other ranks answer under this name, and rank 0 lists the answers.
        """
        me, missing = [socket.gethostname(), os.getpid(), _machine_id(), self.local_rank, uuid.uuid4().hex], [0]
        store, deadline = self._torchrun_store, time.monotonic() + self._rank_timeout
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
                self.leaders = [rank for rank, (*_, local_rank, _) in enumerate(places) if local_rank == 0]
                return meeting
            time.sleep(POLL_SECONDS)
        wrong = f"--rank_timeout {self._rank_timeout}: rank {', '.join(map(str, missing))} did not connect"
        raise RankError(f"{wrong}. Run torchrun on its node, or pass a larger --rank_timeout.")

    def _send_heartbeats(self, store: dist.Store) -> None:
        """Write a heartbeat each second, and exit this process when another rank has failed."""
        with suppress(RuntimeError):  # the node of the store may be lost
            while not self._left.wait(1):
                store.add(f"heartbeats of rank {self.rank}", 1)
                if store.check(["failed"]) and not self._left.is_set():
                    os._exit(int(store.get("failed").split()[1]))

    # A run that torchrun restarts.

    def has_started(self) -> bool:
        """Return whether `mark_started` was called, now or before torchrun restarted the ranks."""
        return self._torchrun_store.check(["started"])

    def mark_started(self) -> None:
        """Record on rank 0 that the run's directory belongs to this run."""
        if self.rank == 0:
            self._torchrun_store.set("started", "")

    # The end of a run.

    def leave(self) -> None:
        """Stop the heartbeats. The other ranks no longer end this process."""
        self._left.set()

    def exit_all(self, code: int) -> None:
        """End all other ranks with this exit code. If another rank failed first, exit here with its code."""
        self.leave()
        with suppress(RuntimeError):  # if the store is lost, every rank reports it
            failed = self._store.compare_set("failed", "", mine := f"{self.rank} {code}").decode()
            if failed != mine:
                os._exit(int(failed.split()[1]))

    def fail(self, error: Exception) -> None:
        """End all ranks because of this error. Raise UserError if a user can act on it, else exit with a traceback."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun terminates the other ranks when one has died
        sys.stderr = sys.__stderr__
        known = self.find_lost() if is_connection_error(error) else as_user_error(error)
        if known is not None:
            self._raise_first(known)
        traceback.print_exception(error)
        self.exit_all(1)
        os._exit(1)  # Gloo's threads could block Python's own exit: see `cli.errors.run_script`

    def _raise_first(self, error: UserError) -> None:
        """Raise the error on the first rank that fails. The other ranks exit with the same exit code."""
        is_lost = isinstance(error, RankError)
        if self.rank and not is_lost:
            time.sleep(1)  # if rank 0 fails as well, it reports the error
        self._abort_collectives()
        self.exit_all(error.exit_code)
        raise error if self.rank == 0 or is_lost else type(error)(f"rank {self.rank}: {error}")

    def _abort_collectives(self) -> None:
        """Close the connections, so that a rank that waits for this one gets an error."""
        for group in (self.hosts, dist.group.WORLD):
            group.abort()

    # Lost ranks.

    def find_lost(self) -> RankError:
        """Return an error that names the lost ranks: those that died on this machine, else all that do not answer."""
        try:
            with self._exit_if_store_hangs(self._grace_seconds + 2):
                self._abort_collectives()
                answers = [f"rank {r} is alive" for r in range(self.size)]
                self._store.set(answers[self.rank], "")
                local = [r for r in range(self.size) if self._places[r][2] == _machine_id()]
                deadline, dead = time.monotonic() + self._grace_seconds, []
                while not (dead or self._store.check(answers) or time.monotonic() > deadline):
                    time.sleep(POLL_SECONDS)
                    dead = [r for r in local if self._has_died(r) and not self._store.check([answers[r]])]
                silent = [r for r in range(self.size) if not self._store.check([answers[r]])]
                return self._lost_error(dead or silent, "has died" if dead else "does not answer")
        except RuntimeError as error:
            return RankError(f"the first node, which holds the store, is lost ({first_line(error)}). {FIX}")

    def _lost_error(self, ranks: list[int], problem: str) -> RankError:
        names = ", ".join(f"rank {r} (process {self._places[r][1]} on {self._places[r][0]})" for r in ranks)
        return RankError(f"{names} {problem}. {FIX}" if names else f"the connection to a rank is lost. {FIX}")

    def _has_died(self, rank: int) -> bool:
        _, pid, machine = self._places[rank]
        return machine == _machine_id() and _has_ended(pid)

    @contextmanager
    def _exit_if_store_hangs(self, seconds: float) -> Iterator[None]:
        """End this process if the body takes longer. A call to the store has no timeout when its machine hangs."""

        def give_up() -> None:
            message = f"train.py: error: the first node, which holds the store, does not answer. {FIX}"
            print(message, file=sys.__stderr__, flush=True)
            os._exit(RankError.exit_code)

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @contextmanager
    def after(self, leader: int) -> Iterator[None]:
        """Run the body on rank ``leader`` first. The other ranks wait for as long as its heartbeat goes on."""
        self._num_turns += 1
        done = f"turn {self._num_turns} of rank {leader}"
        heartbeats, since = None, time.monotonic()
        while self.rank != leader:
            with self._exit_if_store_hangs(self._rank_timeout):
                if self._store.check([done]):
                    break
                before, heartbeats = heartbeats, self._store.add(f"heartbeats of rank {leader}", 0)
            since = since if heartbeats == before else time.monotonic()
            has_died = self._has_died(leader)
            if has_died or time.monotonic() - since > self._rank_timeout:
                raise self._lost_error([leader], "has died" if has_died else "does not answer")
            time.sleep(POLL_SECONDS)
        yield
        if self.rank == leader:
            self._store.set(done, "")


def is_under_torchrun() -> bool:
    """Return whether torchrun, or a launcher that sets its variables, started this process."""
    is_one = int(os.environ.get("WORLD_SIZE", 1)) == 1
    return "LOCAL_RANK" in os.environ and (not is_one or "TORCHELASTIC_RUN_ID" in os.environ)


def is_connection_error(error: Exception) -> bool:
    """Return whether an exception means that another rank cannot be reached."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def first_line(error: Exception) -> str:
    """Return the first line of a C++ error message. The lines after it are a C++ stack trace."""
    return str(error).splitlines()[0][:200]


def _machine_id() -> str:
    """Return a value that is equal for processes that share process ids. Host names may all be equal."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return socket.gethostname()


def _has_ended(pid: int) -> bool:
    """Return whether a process of this machine has ended. A zombie has ended, too."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except OSError:
        return False

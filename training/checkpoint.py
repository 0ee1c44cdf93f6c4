"""Checkpoints: sharded save, verified load, retention.

    save(path := run_dir / "checkpoints" / "step-000100", tensors={"weights": {...}}, state={"step": 100}, world=world)
    prune(run_dir / "checkpoints", keep=2, newest=path)
    state = load(path := newest(run_dir / "checkpoints", world))
    load_tensors(path / "weights", weights, world)

`torch.distributed.checkpoint` (DCP) writes and reads the shards of all ranks. A checkpoint holds safetensors and JSON
only, so that loading it can run no code. Its manifest holds size and SHA-256 of each file, so that damage is noticed.
"""

import hashlib
import json
import math
import os
import uuid
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    SavePlan,
    WriteItem,
)
from torch.distributed.checkpoint.metadata import MetadataIndex

from cli.errors import UserError, require, warn
from distributed.world import World
from training import atomic

MANIFEST = "manifest.json"
FILES, FILE_BYTES = 8, 8 << 20  # a file holds an eighth of a group, or this much, or one larger tensor

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP says so in one process


class NoCheckpointError(UserError):
    """No checkpoint is usable."""

    exit_code = 3


def require_shared_directory(path: Path, world: World) -> None:
    """Raise UserError if a rank does not see a file that rank 0 writes at the place of ``path``."""
    if world.size > 1:
        there = next(parent for parent in (path, *path.parents) if parent.is_dir())
        probe = there / world.broadcast(f".probe-{uuid.uuid4().hex}")
        world.on_main(probe.touch)
        try:
            blind = [rank for rank, seen in enumerate(world.on_all(probe.exists)) if not seen]
        finally:
            if world.is_main:
                probe.unlink()
        wrong = f"--output_dir {path}: rank {', '.join(map(str, blind))} does not see it"
        world.on_main(lambda: require(not blind, f"{wrong}. Use a shared file system."))


def save(path: Path, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any], world: World) -> None:
    """Write each group of ``tensors`` as safetensors files, and ``state`` as JSON. Afterwards ``path`` is complete.

    All ranks must call this. Each writes and hashes its own shards; rank 0 alone writes ``state``. If writing fails
    on a rank, raise SaveError and leave no files.
    """
    for _ in start_save(path, tensors, state, world):
        pass


def start_save(
    path: Path,
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    world: World,
    in_background: bool = False,
) -> Iterator[Future]:
    """Save as `save` does. With ``in_background`` yield once: the future of this rank's files.

    At the yield, this rank's shards are in host memory, and a thread writes them. So tensors and state may change. The
    thread calls no collective. Hashes, manifest and the final name come after the yield. The threads of all ranks must
    have ended by then.
    """
    path, temporary = atomic.real_paths(path)
    num_bytes = sum(tensor.nbytes for content in tensors.values() for tensor in content.values())
    text = json.dumps(state, indent=1, allow_nan=False)
    saving = partial(atomic.saving, path, num_bytes)

    def plan() -> list[SavePlan]:
        with saving():
            return [part.plan_alone() for part in parts]

    def write() -> None:
        if torch.cuda.is_available():  # a new thread would use the first device
            torch.cuda.set_device(world.local_rank)
        with saving():
            for part in parts:
                part.write()

    def describe() -> dict[str, dict[str, Any]]:
        with saving():
            own = f"*/shard-{world.rank + 1:05}-*"
            return {file.relative_to(temporary).as_posix(): _described(file) for file in sorted(temporary.glob(own))}

    def finish() -> None:
        with saving():
            (temporary / "state.json").write_text(text, encoding="utf-8")
            own = {file.name: _described(file) for file in temporary.iterdir() if file.is_file()}
            files = {name: entry for part in (*written, own) for name, entry in part.items()}
            for name in files:  # rank 0 must see the files of all ranks
                (temporary / name).stat()
            (temporary / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
            atomic.put(temporary, path)

    try:
        world.on_main(partial(atomic.begin, path, num_bytes))
        parts = [_Shards(content, temporary / group) for group, content in tensors.items() if content]
        for part, plans in zip(parts, zip(*world.on_all(plan), strict=True), strict=True):
            part.plan_together(plans, world.rank)
        if in_background:
            world.on_all(lambda: [part.copy_to_host() for part in parts])
            with ThreadPoolExecutor(1) as thread:
                yield (future := thread.submit(write))
            write = future.result
        world.on_all(write)
        written = world.on_all(describe)
        world.on_main(finish)
    finally:
        if world.is_main:
            atomic.end(path, num_bytes)


def load(path: Path) -> dict[str, Any]:
    """Return the state of a verified checkpoint."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def load_tensors(directory: Path, tensors: dict[str, torch.Tensor], world: World) -> None:
    """Fill ``tensors`` in place from the shards in ``directory``. Any number of ranks may have written them."""
    if tensors:
        reader = HuggingFaceStorageReader(str(directory))
        try:
            dcp.load(tensors, storage_reader=reader, process_group=world.hosts, no_dist=world.size == 1)
        except CheckpointException as error:  # a BaseException, which all ranks raise
            _, (cause, _) = min(error.failures.items())
            raise cause from None


class _Shards(DefaultSavePlanner):
    """The shards of a group of tensors that this rank writes. Its calls replace `torch.distributed.checkpoint.save`.

    That function calls collectives while it writes. A thread beside the training must not call any.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], directory: Path):
        super().__init__()
        files = _files(tensors)
        self._writer = HuggingFaceStorageWriter(str(directory), files, save_distributed=True)
        self._copies: dict[MetadataIndex, torch.Tensor] = {}
        self.set_up_planner({name: tensors[name] for name in files})

    def plan_alone(self) -> SavePlan:
        """Make the directory. Return the items that this rank could write: with DDP all tensors, with FSDP2 shards."""
        return self._writer.prepare_local_plan(self.create_local_plan())

    def plan_together(self, plans: Sequence[SavePlan], rank: int) -> None:
        """Choose the items that this rank writes, given the plans of all ranks. The ranks divide common items."""
        chosen, _ = self.create_global_plan(list(plans))
        self._chosen = self.finish_plan(self._writer.prepare_global_plan(chosen)[rank])

    def copy_to_host(self) -> None:
        self._copies = {item.index: self.resolve_data(item).to("cpu", copy=True) for item in self._chosen.items}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """Return the tensor to write, or its copy in host memory. The writer calls this."""
        copy = self._copies.get(write_item.index)
        return super().resolve_data(write_item) if copy is None else copy

    def write(self) -> None:
        self._writer.write_data(self._chosen, self).wait()


def _files(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return the number of each tensor's file, counted from 1. The writer holds two copies of each file in memory.

    The largest tensors are written first, so later files fit into the memory that is free again.
    """
    sizes = sorted(((tensor.nbytes, name) for name, tensor in tensors.items()), reverse=True)
    limit, number, held, files = max(sum(size for size, _ in sizes) // FILES, FILE_BYTES), 0, 0, {}
    for size, name in sizes:
        if not files or held + size > limit:
            number, held = number + 1, 0
        held += size
        files[name] = number
    return files


def newest(directory: Path, world: World, until: float = math.inf) -> Path | None:
    """Return the newest checkpoint up to step ``until`` that verifies, or None if there is none at all.

    The ranks divide the hashing. Warn about each newer one that is damaged. Raise NoCheckpointError if all are, unless
    ``until`` is given.
    """
    paths = [path for path in world.broadcast(_checkpoints(directory)) if step_of(path) <= until]
    for path in reversed(paths):
        damage = next(filter(None, world.on_all(partial(verify, path, world.rank, world.size))), None)
        if damage is None:
            return path
        warn(f"{path}: {damage}; trying the checkpoint before it")
    if paths and until == math.inf:
        raise NoCheckpointError(f"{directory}: no checkpoint there is intact. Use --overwrite to start over.")
    return None


def verify(path: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """Return the damage of a checkpoint, or None. A rank checks its part of the files."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        present = {file.relative_to(path).as_posix() for file in path.rglob("*.safetensors")}
        if foreign := sorted(present - manifest.keys()):  # these would be loaded as well
            return f"{foreign[0]} is not in {MANIFEST}"
        files = {"state.json": {}, **manifest}
        for name, entry in sorted(files.items(), key=lambda file: file[1]["bytes"])[rank::ranks]:
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes, not {entry['bytes']}"
            if sha256(path / name) != entry["sha256"]:
                return f"{name} is damaged: its SHA-256 is not the manifest's"
    except OSError as error:
        return f"{os.path.relpath(error.filename or path, path)} cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def prune(directory: Path, keep: int, newest: Path, kept_step: int | None = None) -> None:
    """Delete all checkpoints but ``newest`` (just saved), the ``keep - 1`` before it, and ``kept_step``.

    Later checkpoints are damaged, or the run would have resumed from them. So they are deleted and do not count.
    """
    paths = _checkpoints(directory)
    until = paths.index(newest) + 1
    old = [path for path in paths[: max(0, until - keep)] if step_of(path) != kept_step]
    for path in old + paths[until:]:
        atomic.remove_or_warn(path)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint from its name."""
    return int(path.name.removeprefix("step-"))


def _checkpoints(directory: Path) -> list[Path]:
    """Return all checkpoints, oldest first. Order them by number, because names from a million steps on are longer."""
    return sorted((path for path in directory.glob("step-*/") if path.name[5:].isdecimal()), key=step_of)


def _described(path: Path) -> dict[str, Any]:
    """Return the manifest's entry of a file that was just written, after syncing it."""
    atomic.sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()

"""Checkpoints: sharded save, verified load, retention.

    save(path := run_dir / "checkpoints" / "step-000100", tensors={"weights": {...}}, state={"step": 100}, world=world)
    prune(run_dir / "checkpoints", keep=2, newest=path)
    state = load(path := newest(run_dir / "checkpoints", world))
    load_tensors(path / "weights", weights, world)

`torch.distributed.checkpoint` (DCP) writes and reads the shards of all ranks. A checkpoint holds safetensors and JSON
only, so that loading one can run no code. Its manifest holds size and SHA-256 of each file, so that damage is noticed.
"""

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

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
    """Raise UserError if a rank does not see a file that rank 0 writes where ``path`` is, or will be."""
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

    All ranks must call this. Each writes and hashes its own shards; rank 0 alone writes ``state``. Raise
    SaveError, and leave no trace, if writing fails on a rank.
    """
    path, temporary = atomic.real_paths(path)
    tensors = {group: content for group, content in tensors.items() if content}
    num_bytes = sum(tensor.nbytes for content in tensors.values() for tensor in content.values())

    def begin() -> None:
        atomic.begin(path, num_bytes)
        with atomic.saving(path, num_bytes):
            for group in tensors:
                (temporary / group).mkdir()

    def write() -> dict[str, dict[str, Any]]:
        with atomic.saving(path, num_bytes):
            for group, content in tensors.items():
                _write_shards(content, temporary / group, world)
            own = f"*/shard-{world.rank + 1:05}-*"
            return {file.relative_to(temporary).as_posix(): _described(file) for file in sorted(temporary.glob(own))}

    def finish() -> None:
        with atomic.saving(path, num_bytes):
            (temporary / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False), encoding="utf-8")
            own = {file.name: _described(file) for file in temporary.iterdir() if file.is_file()}
            files = {name: entry for part in (*written, own) for name, entry in part.items()}
            for name in files:  # rank 0 must see the files of all ranks
                (temporary / name).stat()
            (temporary / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
            atomic.put(temporary, path)

    try:
        world.on_main(begin)
        written = world.on_all(write)
        world.on_main(finish)
    finally:
        if world.is_main:
            atomic.end(path, num_bytes)


def load(path: Path) -> dict[str, Any]:
    """Return the state of a verified checkpoint."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def load_tensors(directory: Path, tensors: dict[str, torch.Tensor], world: World) -> None:
    """Fill ``tensors`` in place from the shards in ``directory``, whatever the number of ranks that wrote them."""
    if tensors:
        reader = HuggingFaceStorageReader(str(directory))
        _checkpointing(dcp.load, tensors, storage_reader=reader, world=world)


def _write_shards(tensors: dict[str, torch.Tensor], directory: Path, world: World) -> None:
    """Write this rank's part. DCP holds two copies of each file in memory, so files are small.

    The largest tensors are written first, so later files fit into the memory that they leave.
    """
    sizes = sorted(((tensor.nbytes, name) for name, tensor in tensors.items()), reverse=True)
    limit, number, held, files = max(sum(size for size, _ in sizes) // FILES, FILE_BYTES), 0, 0, {}
    for size, name in sizes:
        if not files or held + size > limit:
            number, held = number + 1, 0
        held += size
        files[name] = number
    writer = HuggingFaceStorageWriter(str(directory), files, save_distributed=True)
    _checkpointing(dcp.save, {name: tensors[name] for name in files}, storage_writer=writer, world=world)


def _checkpointing(work: Callable, tensors: dict[str, torch.Tensor], world: World, **options: Any) -> None:
    """Call `torch.distributed.checkpoint` on all ranks. Raise the error of the first rank that failed."""
    try:
        work(tensors, process_group=world.hosts, no_dist=world.size == 1, **options)
    except CheckpointException as error:  # a BaseException, which all ranks raise
        rank, (cause, _) = min(error.failures.items())
        if rank and isinstance(cause, OSError):
            cause.strerror = f"{cause.strerror} on rank {rank}"
        raise cause from None


def newest(directory: Path, world: World) -> Path | None:
    """Return the newest checkpoint that verifies, or None if there is none at all. The ranks divide the hashing.

    Warn about each newer one that is damaged. Raise NoCheckpointError if all are.
    """
    paths = world.broadcast(_checkpoints(directory))
    for path in reversed(paths):
        damage = next(filter(None, world.on_all(partial(verify, path, world.rank, world.size))), None)
        if damage is None:
            return path
        warn(f"{path}: {damage}; trying the checkpoint before it")
    if paths:
        raise NoCheckpointError(f"{directory}: no checkpoint there is intact. Use --overwrite to start over.")
    return None


def verify(path: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """Return the damage of a checkpoint, or None. A rank looks at its part of the files."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        present = {file.relative_to(path).as_posix() for file in path.rglob("*.safetensors")}
        if foreign := sorted(present - manifest.keys()):  # which would be loaded as well
            return f"{foreign[0]} is not in {MANIFEST}"
        files = {"state.json": {}, **manifest}
        for name, entry in sorted(files.items(), key=lambda file: file[1]["bytes"])[rank::ranks]:
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes, not {entry['bytes']}"
            if _sha256(path / name) != entry["sha256"]:
                return f"{name} is damaged: its SHA-256 is not the manifest's"
    except OSError as error:
        return f"{os.path.relpath(error.filename or path, path)} cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def prune(directory: Path, keep: int, newest: Path) -> None:
    """Delete all checkpoints except ``newest``, which was just saved, and the ``keep - 1`` before it.

    Later ones are damaged, or the run would have resumed from them. So they must not count among those to keep.
    """
    paths = _checkpoints(directory)
    until = paths.index(newest) + 1
    for path in paths[: max(0, until - keep)] + paths[until:]:
        atomic.remove_or_warn(path)


def _checkpoints(directory: Path) -> list[Path]:
    """Return all checkpoints, oldest first, ordered by number: names of a million steps are longer."""
    found = {int(path.name[5:]): path for path in directory.glob("step-*/") if path.name[5:].isdecimal()}
    return [found[step] for step in sorted(found)]


def _described(path: Path) -> dict[str, Any]:
    """Return the manifest's entry of a file that was just written, after syncing it."""
    atomic.sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()

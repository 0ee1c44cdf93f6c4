"""Directories and files that are complete or absent: atomic save, verified load, retention.

    save(path := run_dir / "checkpoints" / "step-000100", tensors={"weights": {...}}, state={"step": 100}, world=world)
    prune(run_dir / "checkpoints", keep=2, newest=path)
    state, stream = load(path := newest(run_dir / "checkpoints", world))
    load_tensors(path / "weights", weights, world)

`torch.distributed.checkpoint` (DCP) writes and reads the shards of all ranks. A checkpoint holds safetensors and JSON
only, so that loading one can run no code. Its manifest holds size and SHA-256 of each file, so that damage is noticed.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from cli.errors import MAKE_ROOM, SaveError, UserError, root_cause, warn
from distributed.world import World

MANIFEST, STREAM = "manifest.json", "stream.safetensors"
FILES, LARGE_BYTES = 8, 64 << 20  # a rank writes so many files of a group that is larger
WRITING, REPLACED = ".being-written", ".being-replaced"  # suffixes of names that exist only during a save

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP says so in one process


class NoCheckpointError(UserError):
    """No checkpoint is usable."""

    exit_code = 3


def save(
    path: Path,
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    world: World,
    stream: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write each group of ``tensors`` as safetensors files, and ``state`` as JSON. Afterwards ``path`` is complete.

    All ranks must call this. Each writes and hashes its own shards; rank 0 alone writes ``state`` and ``stream``. Raise
    SaveError, and leave no trace, if writing fails on a rank.
    """
    path = Path(os.path.realpath(path))  # it may be a symbolic link to a larger disk
    temporary = path.with_name(f".{path.name}{WRITING}")
    tensors = {group: content for group, content in tensors.items() if content}
    num_bytes = sum(tensor.nbytes for content in tensors.values() for tensor in content.values())

    def begin() -> None:
        with _saving(path, num_bytes):
            remove_partial_writes(path.parent, path.name)
            temporary.mkdir(parents=True)
            for group in tensors:
                (temporary / group).mkdir()

    def write() -> dict[str, dict[str, Any]]:
        with _saving(path, num_bytes):
            for group, content in tensors.items():
                _write_shards(content, temporary / group, world)
            own = f"*/shard-{world.rank + 1:05}-*"
            return {file.relative_to(temporary).as_posix(): _described(file) for file in sorted(temporary.glob(own))}

    def finish() -> None:
        with _saving(path, num_bytes):
            if stream:
                save_file({name: tensor.contiguous() for name, tensor in stream.items()}, temporary / STREAM)
            (temporary / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False), encoding="utf-8")
            own = {file.name: _described(file) for file in temporary.iterdir() if file.is_file()}
            files = {name: entry for part in (*written, own) for name, entry in part.items()}
            (temporary / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
            _put(temporary, path)

    try:
        world.on_main(begin)
        written = world.on_all(write)
        world.on_main(finish)
    finally:
        if world.is_main:
            remove_partial_writes(path.parent, path.name)


def load(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the state of a verified checkpoint, and the tensors of streamed text on the CPU."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return state, load_file(path / STREAM) if (path / STREAM).exists() else {}


def load_tensors(directory: Path, tensors: dict[str, torch.Tensor], world: World) -> None:
    """Fill ``tensors`` in place from the shards in ``directory``, whatever the number of ranks that wrote them."""
    if tensors:
        reader = HuggingFaceStorageReader(str(directory))
        _checkpointing(dcp.load, tensors, storage_reader=reader, world=world)


def _write_shards(tensors: dict[str, torch.Tensor], directory: Path, world: World) -> None:
    """Write this rank's part. DCP builds each file in memory, so a large part goes to about `FILES` files."""
    total, before, files = sum(tensor.nbytes for tensor in tensors.values()), 0, {}
    for name, tensor in tensors.items():
        files[name] = 1 + (before * FILES // total if total > LARGE_BYTES else 0)
        before += tensor.nbytes
    writer = HuggingFaceStorageWriter(str(directory), files, save_distributed=True)
    _checkpointing(dcp.save, tensors, storage_writer=writer, world=world)


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
        for name, entry in sorted({"state.json": {}, **manifest}.items())[rank::ranks]:
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
        remove(path)


def remove(path: Path) -> None:
    """Delete a file, a directory in one step, or a symbolic link but not its target."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        leaving = path.name.endswith(WRITING)
        shutil.rmtree(path if leaving else path.rename(path.with_name(f".{path.name}{WRITING}")))


def write_directory(path: Path, write: Callable[[Path], None], num_bytes: int) -> None:
    """Call ``write`` with a temporary directory, and then replace ``path`` and all its old content by it.

    Each file, the directory and its parent are synced in this order, so a crash leaves the old directory or the new
    one. File modes follow the umask, also if a library creates private files. Raise SaveError, and leave ``path`` as it
    was, if writing fails; ``num_bytes`` is the approximate size.
    """
    path = Path(os.path.realpath(path))  # it may be a symbolic link to a larger disk
    temporary = path.with_name(f".{path.name}{WRITING}")
    try:
        with _saving(path, num_bytes):
            remove_partial_writes(path.parent, path.name)
            temporary.mkdir(parents=True)
            write(temporary)
            _put(temporary, path)
    finally:
        remove_partial_writes(path.parent, path.name)  # the old content of `path` goes as well


def _put(temporary: Path, path: Path) -> None:
    """Sync a complete directory, and put it in the place of ``path``."""
    umask = os.umask(0)
    os.umask(umask)
    for file in temporary.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)
        _sync(file)
    _sync(temporary)
    swap_into_place(temporary, path)
    _sync(path.parent)


def write_file(path: Path, text: str) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(f".{path.name}{WRITING}")
    try:
        with _saving(path, len(text.encode())):
            temporary.write_text(text, encoding="utf-8")
            _sync(temporary)
            temporary.rename(path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _saving(path: Path, num_bytes: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the tokenizers library raises a plain Exception
        if not isinstance(error, (OSError, SafetensorError)) and "os error" not in str(error):
            raise
        home = next(parent for parent in path.parents if parent.exists())
        raise SaveError(
            f"{path}: cannot be saved ({root_cause(error)}); it needs {num_bytes:,} bytes and "
            f"{shutil.disk_usage(home).free:,} are free. {MAKE_ROOM}"
        ) from error


def remove_partial_writes(directory: Path, name: str = "*") -> None:
    """Remove the files of an interrupted save of ``name``, a glob pattern, from ``directory``."""
    for old in directory.glob(f".{name}{REPLACED}"):
        path = old.with_name(old.name[1:].removesuffix(REPLACED))
        remove(old) if path.exists() else old.rename(path)
    for leftover in directory.glob(f".{name}{WRITING}"):
        remove(leftover)


def swap_into_place(temporary: Path, path: Path) -> None:
    """Exchange ``temporary`` and ``path`` in one step, so that ``path`` always exists."""
    if not path.exists():
        temporary.rename(path)
        return
    libc, names = ctypes.CDLL(None, use_errno=True), (os.fsencode(temporary), os.fsencode(path))
    if sys.platform == "darwin":
        failed = libc.renamex_np(*names, 2)  # RENAME_SWAP
    else:
        failed = libc.renameat2(-100, names[0], -100, names[1], 2)  # in AT_FDCWD, RENAME_EXCHANGE
    if failed and ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        # NFS cannot exchange names: two steps. `remove_partial_writes` repairs a crash between them.
        old = path.with_name(f".{path.name}{REPLACED}")
        path.rename(old)
        temporary.rename(path)
        old.rename(temporary)
    elif failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))


def _checkpoints(directory: Path) -> list[Path]:
    """Return all checkpoints, oldest first, ordered by number: names of a million steps are longer."""
    found = {int(path.name[5:]): path for path in directory.glob("step-*/") if path.name[5:].isdecimal()}
    return [found[step] for step in sorted(found)]


def _described(path: Path) -> dict[str, Any]:
    """Return the manifest's entry of a file that was just written, after syncing it."""
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

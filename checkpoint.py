"""Directories that are whole or not there: atomic save, verified load, retention.

    save(run_dir / "checkpoints" / "step-000100", tensors={"weights": {...}}, state={"step": 100})
    state, tensors = load(newest(run_dir / "checkpoints"))
    prune(run_dir / "checkpoints", keep=2)

A checkpoint holds safetensors and JSON only, so that loading one can run no code, and a manifest with the size and the
SHA-256 of each file, so that a damaged one is noticed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from config import UserError, warn

MANIFEST = "manifest.json"


class NoCheckpointError(UserError):
    """There are checkpoints to resume from, but none is usable."""

    exit_code = 3


def save(path: Path, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]) -> None:
    """Writes ``tensors`` as one safetensors file a group and ``state`` as JSON; afterwards ``path`` is complete."""

    def write(directory: Path) -> None:
        for group, content in tensors.items():
            save_file(
                {name: tensor.contiguous() for name, tensor in content.items()}, directory / f"{group}.safetensors"
            )
        (directory / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in directory.iterdir()}
        (directory / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")

    write_directory(path, write)


def load(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """Returns (state, tensors by group) of a verified checkpoint, tensors on the CPU."""
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return json.loads((path / "state.json").read_text(encoding="utf-8")), tensors


def newest(directory: Path) -> Path | None:
    """The newest checkpoint that verifies, or None where there is none at all.

    Warns for each newer one that is damaged. Raises NoCheckpointError where all are.
    """
    paths = _checkpoints(directory)
    for path in reversed(paths):
        damage = verify(path)
        if damage is None:
            return path
        warn(f"{path}: {damage}; looking at the checkpoint before it")
    if paths:
        raise NoCheckpointError(f"{directory}: no checkpoint there is intact; start anew with --overwrite")
    return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in manifest.items():
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes, not {entry['bytes']}"
            if _sha256(path / name) != entry["sha256"]:
                return f"{name} is damaged: its SHA-256 is not the manifest's"
    except OSError as error:
        return f"{Path(error.filename or '').name} cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def prune(directory: Path, keep: int) -> None:
    """Deletes all but the newest ``keep`` checkpoints."""
    for path in _checkpoints(directory)[:-keep]:
        shutil.rmtree(path)


def write_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` with a temporary directory and then puts it in the place of ``path``, old content included.

    Each file, the directory and its parent are synced, in this order: after a crash there is the old directory or the
    new one. File modes follow the umask, also for libraries that create private files.
    """
    temporary, old = path.parent / f".{path.name}.writing", path.parent / f".{path.name}.old"
    path.parent.mkdir(parents=True, exist_ok=True)
    if old.exists() and not path.exists():  # a crash between the two renames below
        old.rename(path)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir()
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~umask)
            _sync(file)
        _sync(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _sync(path.parent)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _checkpoints(directory: Path) -> list[Path]:
    """All checkpoints, oldest first: their names carry the step with leading zeros."""
    found = {int(path.name[5:]): path for path in directory.glob("step-*") if path.name[5:].isdecimal()}
    return [found[step] for step in sorted(found)]


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

"""The directory of a run: check that a run may go there, and delete it."""

import glob
import os
from pathlib import Path
from typing import Any

from cli.errors import UserError, require
from training import atomic, checkpoint

RUN_CONTENT = ("checkpoints", "model", "tensorboard", "config.yaml", "metrics.jsonl")


def check_directory(path: Path, may_exist: bool, sources: dict[str, Any]) -> bool:
    """Return whether the directory holds a run. Raise UserError if a new run must not go there.

    With --overwrite, ``sources`` are the settings: none of the files that they name may lie in the directory.
    """
    if path.is_symlink():
        raise UserError(f"--output_dir {path}: is a symbolic link. Pass its target: {os.readlink(path)}.")
    there = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    require(there.is_dir(), f"--output_dir {path}: {there} is a file. Pass a directory.")
    require(os.access(there, os.W_OK), f"--output_dir {path}: {there} is read-only. Pass another directory.")
    present = [name for name in RUN_CONTENT if os.path.lexists(path / name)]
    is_run = "metrics.jsonl" in present or any((path / "checkpoints").glob(f"step-*/{checkpoint.MANIFEST}"))
    if present and not is_run:  # --overwrite must never delete other files
        raise UserError(f"--output_dir {path}: holds {', '.join(present)}, but no run. Pass another directory.")
    if present and not may_exist:
        fix = "Pass --resume to go on, --overwrite to delete it, or another directory"
        raise UserError(f"--output_dir {path}: holds another run. {fix}.")
    content = {(path / name).resolve() for name in present}
    for name, value in ((name, value) for name, given in sources.items() for value in _texts(given)):
        for source in map(Path.resolve, local_paths(value, has_weight=name == "mix")):
            inside = f"--{name} {value}: lies in --output_dir {path}, which --overwrite deletes"
            require(content.isdisjoint([source, *source.parents]), f"{inside}. Use another --output_dir.")
    return bool(present)


def local_paths(value: str, has_weight: bool = False) -> list[Path]:
    """Return the files and directories that a path or a glob names. A source of --mix has a weight after a colon."""
    return [Path(path) for path in glob.glob(value.rpartition(":")[0] if has_weight else value, recursive=True)]


def remove_run(run_dir: Path) -> None:
    """Delete a run. If the process dies half-way, the next start finds no checkpoint and begins from scratch."""
    atomic.remove(run_dir / "checkpoints")
    atomic.write_file(run_dir / "metrics.jsonl", "")
    for name in RUN_CONTENT:
        atomic.remove(run_dir / name)


def _texts(given: Any) -> list[str]:
    return [str(value) for value in (given if isinstance(given, list) else [given])]

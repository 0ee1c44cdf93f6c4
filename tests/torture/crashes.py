"""Deaths inside a save, line by line."""

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from distributed.world import World
from training.atomic import remove_partial_writes, write_directory
from training.checkpoint import load, load_tensors, newest, prune, save, verify

WORLD = World()
OLD, NEW = (
    {"weights": {"w": torch.full((3,), value)}, "optimizer": {"w:step": torch.tensor(value)}} for value in (1.0, 2.0)
)


FILE_SYSTEMS = ("exchanges", "NFS", "overlayfs")


@contextmanager
def file_system(kind: str) -> Iterator[None]:
    """Let exchanges of names work, refuse them as NFS does, or refuse to rename directories as overlayfs does."""
    answer, rename = {"NFS": errno.EINVAL, "overlayfs": errno.EXDEV}.get(kind), Path.rename
    refuse = SimpleNamespace(renameat2=lambda *_: (ctypes.set_errno(answer), -1)[1])

    def rename_files(self, target):
        if kind == "overlayfs" and self.is_dir():
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(self))
        return rename(self, target)

    libc = ctypes.CDLL if answer is None else lambda *_, **__: refuse
    with mock.patch("ctypes.CDLL", libc), mock.patch.object(Path, "rename", rename_files):
        yield


def crash_in_save(directory: Path, lines: int) -> str:
    """Save a checkpoint and a model in a child process that dies at the given line, without any cleanup.

    Lines of checkpoint.py, atomic.py and shutil count. So deaths come before and after each write, sync, rename and
    removal of a file. Return "old" or "new" for the state found afterwards, or "ended" if the child reached its end.
    Raise AssertionError if anything is lost or incomplete.
    """
    checkpoints, model = directory / "checkpoints", directory / "model"
    for step in (1, 2):
        save(checkpoints / f"step-{step:06}", OLD, {"step": step}, WORLD)
    write_directory(model, lambda path: [(path / name).write_text("old") for name in "ab"], 6)
    child = os.fork()
    if child == 0:
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            if not frame.f_code.co_filename.endswith(("training/checkpoint.py", "training/atomic.py", "shutil.py")):
                return None
            if event == "line":
                count += 1
                if count > lines:
                    os._exit(9)
            return trace

        try:
            sys.settrace(trace)
            save(checkpoints / "step-000003", NEW, {"step": 3}, WORLD)
            save(checkpoints / "step-000002", NEW, {"step": 2}, WORLD)  # replaces an existing checkpoint
            prune(checkpoints, 1, checkpoints / "step-000003")
            write_directory(model, lambda path: [(path / name).write_text("new") for name in "ab"], 6)
            sys.settrace(None)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), code
    for path in (directory, checkpoints):
        remove_partial_writes(path, "*")
    found = newest(checkpoints, WORLD)
    state = load(found)
    assert found.name == f"step-{state['step']:06}" and state["step"] in (2, 3)
    for group, expected in (NEW if state["step"] == 3 else OLD).items():
        tensors = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        load_tensors(found / group, tensors, WORLD)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    second = checkpoints / "step-000002"
    assert not second.exists() or verify(second) is None or state["step"] == 3
    texts = {(model / name).read_text() for name in "ab"}
    assert len(texts) == 1 and set(os.listdir(model)) == {"a", "b"}
    assert {path.name for path in directory.iterdir()} == {"checkpoints", "model"}
    assert not list(checkpoints.glob(".*"))
    save(checkpoints / "step-000003", NEW, {"step": 3}, WORLD)  # the next save works
    prune(checkpoints, 1, checkpoints / "step-000003")
    assert os.listdir(checkpoints) == ["step-000003"] and verify(checkpoints / "step-000003") is None
    return "ended" if code == 0 else "new" if texts == {"new"} else "old"

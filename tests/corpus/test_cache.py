"""The cache of tokens: written once, complete or absent, safe with several processes and on a full disk."""

import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import in_child
from texts import plain

from cli.errors import SaveError
from corpus.tokenize import tokenize
from corpus.tokens import TokenPart, cached_stream


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def parts(count=3, between=lambda: None):
    """Yield documents of 1,000 tokens each."""
    for i in range(count):
        yield TokenPart(np.full(1000, i, np.int32), 10, True, None)
        between()


def names(folder):
    return sorted(path.name.split(".")[-1] for path in folder.iterdir())


def fork(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_process_leaves_no_half_cache(folder):
    child = fork(lambda: cached_stream("key", parts(between=lambda: time.sleep(60))))
    wait_for(lambda: folder.exists() and len(names(folder)) == 2)
    other = cached_stream("other", parts())  # the process lives, so its files stay
    assert names(folder) == ["documents", "partial", "partial", "tokens"]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert names(folder) == ["documents", "partial", "partial", "tokens"]
    stream = cached_stream("key", parts())
    assert names(folder) == ["documents", "documents", "tokens", "tokens"]
    assert stream.sha256 == other.sha256 and len(stream) == 3000
    assert cached_stream("key", iter([])).sha256 == stream.sha256


def test_an_error_leaves_nothing(folder):
    with pytest.raises(ZeroDivisionError):
        cached_stream("key", parts(between=lambda: 1 / 0))
    assert not names(folder)


def test_two_processes_at_once_both_succeed(folder, tokenizer):
    documents = plain([f"the text {i}" for i in range(2000)])
    start = time.monotonic() + 0.3

    def prepare():
        time.sleep(start - time.monotonic())
        return 0 if len(tokenize(documents, tokenizer)) > 8000 else 1

    children = [fork(lambda: os._exit(prepare())) for _ in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert names(folder) == ["documents", "tokens"]
    assert len(tokenize(documents, tokenizer)) > 8000


def test_a_full_or_unwritable_disk_is_one_line(folder, capfd):
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            cached_stream("key", parts())
        except SaveError as error:
            print(error)
            return 5

    assert in_child(fill) == 5 and not names(folder)
    said = capfd.readouterr().out
    assert f"{folder}: tokens cannot be written" in said and "HF_DATASETS_CACHE" in said and said.count("\n") == 1
    folder.rmdir()
    Path(folder).write_text("not a folder")
    with pytest.raises(SaveError, match="tokens cannot be written"):
        cached_stream("key", parts())


@pytest.mark.parametrize(("suffix", "size"), [("tokens", 100), ("documents", 0), ("documents", 56)])
def test_a_damaged_cache_is_written_again(folder, suffix, size):
    """A power cut may leave a file short."""
    whole = cached_stream("key", parts()).sha256
    os.truncate(folder / f"key.{suffix}", size)
    assert cached_stream("key", parts()).sha256 == whole and names(folder) == ["documents", "tokens"]

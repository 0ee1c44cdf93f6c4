"""Run the product's scripts as real processes that start at once, with or without pytest.

    done = run("train.py", "--config", "small.yaml", cwd=directory)     # a subprocess.CompletedProcess
    process = start("train.py", "--config", "small.yaml", cwd=directory)
    for line in process.lines(): ...                                    # while it runs
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -9

A short `python train.py` spends nearly all its time on imports. One server process imports once and forks itself for
each run. The fork then executes the script's file as ``__main__``. Each run has its own arguments, working directory,
standard streams, signals, random numbers and exit. Forked runs share the imports, the seed of Python's hashes, and the
environment, because imports read it. ``start`` uses a new interpreter if no server has the same environment (see
`prepare`) or with ``fresh``. A server computes nothing with torch: OpenMP's threads do not survive a fork.
"""

import atexit
import gc
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train.py", "generate.py", "perplexity.py", "export.py")
MESSAGE_SIZE = 16
# Variables that no import reads: pytest's, torch's from its import, and train.py's if a test calls it.
IGNORED_VARIABLES = ("PYTEST_CURRENT_TEST", "PYTEST_VERSION", "TORCHINDUCTOR_CACHE_DIR", "CUBLAS_WORKSPACE_CONFIG")
IGNORED_VARIABLES += ("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",)  # set by the compiler
IGNORED_VARIABLES += (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
)
_stores: list[Any] = []  # they live as long as the tests


# ---------------------------------------------------------------------------------------------------------------------
# The side of the tests


class Process:
    """A started script: the part of subprocess.Popen that tests need. Its output is readable at any time."""

    def __init__(self, spawned: "subprocess.Popen | _Forked", stdout: BinaryIO, stderr: BinaryIO):
        self._spawned, self._stdout, self._stderr = spawned, stdout, stderr
        self.args, self.pid = spawned.args, spawned.pid

    @property
    def returncode(self) -> int | None:
        return self._spawned.poll()

    @property
    def stdout(self) -> str:
        """Return everything that was written so far."""
        return _read(self._stdout).decode(errors="replace")  # the end of the file may cut a letter

    @property
    def stderr(self) -> str:
        return _read(self._stderr).decode(errors="replace")

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it may end at this moment
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, or minus the signal's number. Raise subprocess.TimeoutExpired if it takes longer."""
        return self._spawned.wait(timeout)

    def lines(self, timeout: float = 120) -> Iterator[str]:
        """Yield the lines of stdout as they are written, until the process has ended."""
        place, deadline = 0, time.monotonic() + timeout
        while True:
            ended = self.returncode is not None  # asked first, because a read after the end is complete
            written = _read(self._stdout, place)
            if not ended:
                written = written[: written.rfind(b"\n") + 1]
            place += len(written)
            for line in io.BytesIO(written):
                yield line.decode(errors="replace")
            if ended:
                return
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout, self.stdout, self.stderr)
            time.sleep(0.005)


def start(
    script: object,
    *args: object,
    cwd: str | Path,
    env: dict[str, str] | None = None,
    stdin: str = "",
    stdout: str | Path | int | None = None,
    stderr: str | Path | int | None = None,
    fresh: bool = False,
) -> Process:
    """Start ``python SCRIPT ARGS`` in ``cwd`` with the environment ``os.environ | env``.

    ``script`` is relative to the project. ``stdout`` and ``stderr`` name files to write to instead of temporary files.
    They may also be descriptors, such as a pipe's. ``fresh`` asks for a new interpreter that imports everything again.
    """
    path = ROOT / str(script)
    arguments = [str(path), *map(str, args)]
    environment = os.environ | (env or {})
    cwd = str(Path(cwd).resolve(strict=True))
    out, err = (_writable(name) for name in (stdout, stderr))
    reader, writer = os.pipe()
    threading.Thread(target=_feed, args=(writer, stdin.encode()), daemon=True).start()
    try:
        wanted = (path.parent, _visible(environment))
        server = next(
            (server for server in _servers or [prepare()] if (server.root, server.environment) == wanted), None
        )
        if fresh or server is None:
            command = [sys.executable, *arguments]
            spawned = subprocess.Popen(command, cwd=cwd, env=environment, stdin=reader, stdout=out, stderr=err)
        else:
            spawned = server.fork(arguments, cwd, environment, [reader, out.fileno(), err.fileno()])
    finally:
        os.close(reader)
        for given, file in ((stdout, out), (stderr, err)):
            if isinstance(given, int):  # the reader of a pipe waits until all processes have closed it
                file.close()
    return Process(spawned, out, err)


def meeting_place() -> dict[str, str]:
    """Return the environment in which ranks find a store of this process, like the store of torchrun's agent."""
    from torch.distributed import TCPStore

    _stores.append(TCPStore("127.0.0.1", 0, is_master=True))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_stores[-1].port)}
    return address | {"TORCHELASTIC_USE_AGENT_STORE": "True"}


def run(script: object, *args: object, timeout: float = 120, **options) -> subprocess.CompletedProcess[str]:
    """Run like `start`, to the end. Kill the process after ``timeout`` seconds, as subprocess.run does."""
    process = start(script, *args, **options)
    try:
        process.wait(timeout)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, process.stdout, process.stderr)


class _Forked:
    """A process that the server forked, with the interface of subprocess.Popen."""

    returncode: int | None = None

    def __init__(self, args: list[str], pid: int, channel: socket.socket):
        self.args, self.pid, self._channel = args, pid, channel

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._channel.settimeout(timeout)
            try:
                answer = self._channel.recv(MESSAGE_SIZE)
            except (TimeoutError, BlockingIOError) as error:
                raise subprocess.TimeoutExpired(self.args, timeout) from error
            if not answer:
                raise RuntimeError(f"process {self.pid} is lost: who waits for it was killed")
            self.returncode = int(answer[1:])
            self._channel.close()
        return self.returncode


class Server:
    """A process that forks the scripts in ``root``. Its environment is fixed when it starts."""

    def __init__(self, environment: dict[str, str], root: Path):
        self.environment, self.root = _visible(environment), root
        self.control, other = socket.socketpair()
        self._errors = _writable(None)
        # Python decides at its start how to buffer the streams. A run has pipes, so the server gets pipes.
        self.process = subprocess.Popen(
            [sys.executable, __file__, "serve", str(other.fileno()), str(root)],
            pass_fds=[other.fileno()],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        other.close()
        atexit.register(self.stop)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self in _servers:
            _servers.remove(self)
        self.process.kill()
        self.process.communicate()

    def fork(self, arguments: list[str], cwd: str, environment: dict[str, str], streams: list[int]) -> _Forked:
        try:
            return _fork(self.control, arguments, cwd, environment, streams)
        except (OSError, ValueError) as error:
            said = _read(self._errors).decode(errors="replace")
            raise RuntimeError(f"no fork: the server of tests/processes.py has ended or failed:\n{said}") from error


_servers: list[Server] = []


def prepare(env: dict[str, str] | None = None, root: Path = ROOT) -> Server:
    """Start a server for runs with this ``env``. It imports while the caller goes on.

    Otherwise the first run starts a server for ``os.environ`` and waits. A server pays off from the second run on.
    """
    _servers.append(Server(os.environ | (env or {}), root))
    return _servers[-1]


def _fork(
    control: socket.socket, arguments: list[str], cwd: str, environment: dict[str, str], streams: list[int]
) -> _Forked:
    channel, other = socket.socketpair()
    with other:
        socket.send_fds(control, [b"+"], [*streams, other.fileno()])
    channel.sendall(json.dumps([arguments, cwd, environment]).encode() + b"\n")
    answer = channel.recv(MESSAGE_SIZE)  # sent when streams and signals are those of the run
    if answer[:1] != b"p":  # an exit code means that no run was started
        raise ValueError
    return _Forked([sys.executable, *arguments], int(answer[1:]), channel)


def stand_in(server: Server) -> str:
    """Return a shell script that replaces ``python`` in commands: the server forks the scripts that it knows.

    The commands must be started with ``pass_fds=[server.control.fileno()]``.
    """
    return f'#!/bin/sh\nexec {sys.executable} {__file__} stand-in {server.control.fileno()} "$@"\n'


def _stand_in(control: socket.socket, arguments: list[str]) -> int:
    if arguments[0] not in SCRIPTS:
        os.execv(sys.executable, [sys.executable, *arguments])
    code = _fork(control, arguments, os.getcwd(), dict(os.environ), [0, 1, 2]).wait()
    return code if code >= 0 else 128 - code  # a shell reports signals like this


def _visible(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in IGNORED_VARIABLES}


def _writable(name: str | Path | int | None) -> BinaryIO:
    if isinstance(name, int):
        return open(name, "wb", buffering=0)
    return open(name, "w+b") if name else tempfile.TemporaryFile()


def _read(file: BinaryIO, place: int = 0) -> bytes:
    """Return the bytes of the file from ``place`` on. The offset is shared with the writer and does not move."""
    return os.pread(file.fileno(), max(0, os.fstat(file.fileno()).st_size - place), place)


def _feed(writer: int, data: bytes) -> None:
    try:
        with open(writer, "wb") as file:
            file.write(data)
    except BrokenPipeError:  # the process ended before it read everything
        pass


# ---------------------------------------------------------------------------------------------------------------------
# The server


def _serve(control: socket.socket, root: str) -> None:
    """Fork for each request. Return in the forked process, in the state of a newly started Python."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests and their runs
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the waiting processes
    sys.path[0] = root
    for script in SCRIPTS:
        __import__(script.removesuffix(".py"))
    # Each run needs random numbers of its own. `random` seeds itself again in a fork. Other generators do not.
    kinds = (random.Random, sys.modules["numpy"].random.RandomState)
    generators = [item for item in gc.get_objects() if type(item) in kinds]
    gc.freeze()  # imported objects stay in shared memory
    while files := socket.recv_fds(control, 1, 4)[1]:
        if os.fork() == 0:
            control.close()
            _become(*files)
            for generator in generators:
                generator.seed()
            return
        for file in files:
            os.close(file)
    os._exit(0)  # the tests have ended


def _message(kind: str, number: int) -> bytes:
    return f"{kind}{number:{MESSAGE_SIZE - 1}}".encode()


def _become(stdin: int, stdout: int, stderr: int, channel: int) -> None:
    """Fork once more, wait for the child and report its exit code. Return in the child only."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection = socket.socket(fileno=channel)
    with connection.makefile() as lines:
        arguments, cwd, environment = json.loads(lines.readline())
    if pid := os.fork():
        try:
            for file in (stdin, stdout, stderr):
                os.close(file)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            connection.sendall(_message("c", code))
        finally:
            os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate((stdin, stdout, stderr)):
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    for name in environment.keys() | os.environ.keys():
        if name.startswith(("HF_", "TRANSFORMERS_", "PYTHON")) and environment.get(name) != os.environ.get(name):
            sys.exit(f"{name} is not what the imports have read")
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    connection.sendall(_message("p", os.getpid()))
    connection.close()


if __name__ == "__main__":
    role, control, *rest = sys.argv[1:]
    if role == "stand-in":
        sys.exit(_stand_in(socket.socket(fileno=int(control)), rest))
    _serve(socket.socket(fileno=int(control)), *rest)
    # From here on this process is the run.
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = sys.argv[0]
    exec(compile(Path(sys.argv[0]).read_bytes(), sys.argv[0], "exec"), main.__dict__)

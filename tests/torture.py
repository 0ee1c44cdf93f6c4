"""The long part of the tests: kills, crashes, damage, full disks, signals, lost workers and wrong input, as a table.

    make torture
    make torture ARGS="--kills 10 --seed 3"

One run of `train.py` is left alone. Every other one, whatever was done to it, must end with the same SHA-256 of
weights, optimizer, random state and model, and with the same curves. Runs are real processes. Moments are random, and
repeat with --seed as far as a machine repeats itself. Exits with 1 where anything did not hold.
"""

import argparse
import hashlib
import json
import logging
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# One thread a run and two runs at once; and what `phases.py`, in another directory than the scripts, imports from.
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
import processes  # noqa: E402
from conftest import make_text, read_jsonl  # noqa: E402  sets the environment of a test and starts a server

processes.prepare(root=ROOT / "tests")

import torch  # noqa: E402
from crashes import crash_in_save  # noqa: E402
from inputs import CASES, Case, check, good_model  # noqa: E402
from phases import PHASES, Phases  # noqa: E402
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

import checkpoint  # noqa: E402

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each event that it drops
TIMEOUT = 120  # seconds a process
MEASURED = ("tokens_per_second", "memory_gib")  # differ from run to run
LOOP = ("training", "evaluation", "sampling", "saving")
SETTINGS = {
    "model_config": "gpt2.json",
    "tokenizer": "train:320",
    "train_files": "text.jsonl",
    "block_size": 64,
    "batch_size": 4,
    "grad_accum_steps": 2,
    "num_epochs": 3,
    "eval_fraction": 0.3,
    "learning_rate": 1e-3,
    "warmup_ratio": 0.1,
    "eval_every": 8,
    "save_every": 5,
    "log_every": 1,
    "precision": "fp32",
    "sample_prompt": "the model",
}
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 128, "n_positions": 128}  # its dropout is 0.1


def expect(holds: object, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


class Table:
    """What was tried, how often it held, and what was wrong where it did not; rows in the order of their first."""

    def __init__(self, seconds: float):
        self.rows: dict[str, list[str | None]] = defaultdict(list)
        self.details: dict[str, set[str]] = defaultdict(set)
        self.started, self.seconds, self._printed = time.monotonic(), seconds, 0.0

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def left(self) -> float:
        return self.seconds - self.elapsed()

    def trial(self, row: str, work: Callable[[], str | None]) -> None:
        """Does the work, which may return a detail to show, and raises where something does not hold."""
        problem = detail = None
        try:
            expect(self.left() > 0, "not tried: the time was over")
            detail = work()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        self.rows[row].append(problem)
        if detail:
            self.details[row].add(detail)
        if problem or time.monotonic() - self._printed > 1:
            self._printed = time.monotonic()
            print(f"{self.elapsed():5.0f} s  {row}: {problem or f'{self.rows[row].count(None)} held'}", flush=True)

    def trials(self, jobs: Iterable[tuple[str, Callable[[], str | None]]]) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda job: self.trial(*job), jobs))

    def print(self) -> bool:
        print("\n| what | tried | held | detail |\n| --- | ---: | ---: | --- |")
        for row, problems in self.rows.items():
            details = sorted(self.details[row])
            shown = "; ".join(details) if len(details) < 4 else ""
            print(f"| {row} | {len(problems)} | {problems.count(None)} | {shown} |")
        failed = [(row, problem) for row, problems in self.rows.items() for problem in problems if problem]
        for row, problem in failed:
            print(f"\nDID NOT HOLD: {row}: {problem}")
        return not failed


class Runs:
    """Runs of one configuration in one directory, to be disturbed and compared with the one that was left alone."""

    def __init__(self, directory: Path, table: Table, seed: int):
        self.directory, self.table, self.seed = directory, table, seed
        self.started: list[processes.Process] = []
        (directory / "gpt2.json").write_text(json.dumps(GPT2))
        texts = (json.dumps({"text": make_text(60 + i, i)}) + "\n" for i in range(45))
        (directory / "text.jsonl").write_text("".join(texts))
        (directory / "small.yaml").write_text("".join(f"{key}: {value}\n" for key, value in SETTINGS.items()))

    def start(self, run_dir: Path, *flags: object) -> tuple[processes.Process, Phases]:
        """A process, and a view of the phase it is in."""
        notes = self.directory / f"phases-{len(self.started)}-{threading.get_ident()}"
        phases = Phases(notes)
        arguments = ["--config", "small.yaml", "--output_dir", run_dir, *flags]
        process = processes.start("tests/phases.py", notes, "train.py", *arguments, cwd=self.directory)
        self.started.append(process)
        return process, phases

    def end(self, process: processes.Process) -> int:
        try:
            return process.wait(max(1, min(TIMEOUT, self.table.left())))
        except subprocess.TimeoutExpired:
            process.kill()
            raise

    def train(self, run_dir: Path, *flags: object, code: int = 0, fresh: bool = False) -> processes.Process:
        """To the end, as people run it."""
        arguments = ["--config", "small.yaml", "--output_dir", run_dir, *flags]
        process = processes.start("train.py", *arguments, cwd=self.directory, fresh=fresh)
        self.started.append(process)
        ended = self.end(process)
        expect(ended == code, f"train.py {' '.join(map(str, flags))} ended with {ended}, not {code}\n{process.stderr}")
        return process

    def leave_alone(self) -> None:
        """The run that all are compared with, in an interpreter of its own, and one whose phases are timed."""
        self.train(self.directory / "alone", fresh=True)
        self.alone = outcome(self.directory / "alone")
        process, self.usual = self.start(self.directory / "noted")
        expect(self.end(process) == 0, process.stderr)
        self.same(self.directory / "noted")
        for phase in PHASES:
            print(f"{phase}: {self.usual.count(phase)} x {self.usual.seconds(phase) * 1000:.0f} ms")

    def same(self, run_dir: Path, curves: bool = True) -> None:
        found = outcome(run_dir)
        names = [name for name in self.alone if curves or not name.startswith("curves")]
        differ = [name for name in names if found[name] != self.alone[name]]
        expect(not differ, f"{', '.join(differ)} differ from the run that was left alone ({run_dir.name})")
        expect(not found["leftovers"], f"left over: {found['leftovers']}")
        shutil.rmtree(run_dir)

    def draw(self, *names: object) -> random.Random:
        return random.Random(" ".join(map(str, (self.seed, *names))))

    def moment(self, wanted: str, draw: random.Random) -> tuple[str, int, float]:
        """A phase, which of those in a run, and how far into it in seconds."""
        return wanted, draw.randint(1, max(1, self.usual.count(wanted) - 2)), draw.random() * self.usual.seconds(wanted)

    def wait_for(self, process: processes.Process, phases: Phases, wanted: str, count: int, seconds: float) -> bool:
        """Returns True when the process is there, or where that went by unseen, as far into a later such phase."""
        while process.returncode is None:
            expect(self.table.left() > 0, "the time is over")
            if phases.count(wanted) >= count:
                time.sleep(seconds)
                if phases.current == wanted:
                    return True
                count = phases.count(wanted) + 1
            time.sleep(0.0005)
        return False

    # -----------------------------------------------------------------------------------------------------------------

    def kill(self, number: int, wanted: str) -> None:
        """Kills runs until one was in the wanted phase; each of them counts, where it was."""
        draw = self.draw("kill", number)
        for attempt in range(10):
            run_dir = self.directory / f"kill-{number}-{attempt}"
            process, phases = self.start(run_dir)
            self.wait_for(process, phases, *self.moment(wanted, draw))
            process.kill()
            code, died = self.end(process), phases.current
            if code == 0:
                continue

            def go_on(run_dir: Path = run_dir, code: int = code) -> str:
                expect(code == -signal.SIGKILL, f"ended with {code}")
                again = 0
                if number % 5 == 0:
                    process, phases = self.start(run_dir, "--resume")
                    self.wait_for(process, phases, draw.choice(LOOP), draw.randint(1, 3), draw.random() * 0.05)
                    process.kill()
                    again = self.end(process) == -signal.SIGKILL
                self.train(run_dir, "--resume")
                self.same(run_dir)
                return "some killed again while resuming" if again else ""

            self.table.trial(f"SIGKILL in {died}", go_on)
            if died == wanted:
                return
        raise AssertionError(f"no kill came into {wanted}")

    def kills(self, number: int) -> None:
        """A third each in training and saving, the rest in evaluation and the samples drawn there."""
        wanted = (["training", "saving", "evaluation", "training", "saving", "sampling"] * number)[:number]
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(self.kill, i, phase) for i, phase in enumerate(wanted)]:
                done.result()

    def crashes(self) -> None:
        """In the process of a save, before each line of checkpoint.py and shutil that it runs."""
        cannot = SimpleNamespace(renameat2=lambda *_: -1)  # with the patched errno, what NFS answers
        never = SimpleNamespace(EINVAL=0, ENOSYS=0, ENOTSUP=0)
        for row, patches in (
            ("crash at each line of a save, names exchanged", []),
            ("crash at each line of a save, names not exchangeable",
             [mock.patch.object(checkpoint, "errno", never), mock.patch("ctypes.CDLL", lambda *_, **__: cannot)]),
        ):  # fmt: skip
            outcomes: list[str] = []

            def die(outcomes: list[str] = outcomes) -> None:
                directory = self.fast / f"crash-{len(outcomes)}"
                outcomes.append("")
                outcomes[-1] = crash_in_save(directory, len(outcomes) - 1)
                shutil.rmtree(directory)

            with ExitStack() as stack:
                for patch in patches:
                    stack.enter_context(patch)
                while "ended" not in outcomes and len(outcomes) < 2000:
                    self.table.trial(row, die)
            self.table.details[row] = {
                f"the old state {outcomes.count('old')} times, the new one {outcomes.count('new')}"
            }

    def damage(self) -> None:
        """One run, stopped after three checkpoints or four, in many copies with something wrong in each."""
        stopped = self.directory / "stopped"
        process, phases = self.start(stopped)
        self.wait_for(process, phases, "evaluation", 3, 0)
        process.send_signal(signal.SIGTERM)
        self.end(process)
        newest = max((stopped / "checkpoints").iterdir())

        def one(kind: str, name: str) -> None:
            run_dir = self.directory / f"{kind}-{name}"
            shutil.copytree(stopped, run_dir)
            spoil(run_dir / "checkpoints" / newest.name / name, kind, self.draw(kind, name))
            done = self.train(run_dir, "--resume")
            warned = done.stderr.count("\n") == 1 and f"{newest.name}: {name} " in done.stderr
            expect(warned and "looking at the checkpoint before it" in done.stderr, f"stderr: {done.stderr}")
            expect("resuming from" in done.stdout and f"{newest.name} at step" not in done.stdout, done.stdout)
            self.same(run_dir)

        def every() -> None:
            run_dir = self.directory / "all-spoilt"
            shutil.copytree(stopped, run_dir)
            for path in (run_dir / "checkpoints").iterdir():
                spoil(path / "random.safetensors", "truncate", self.draw("all"))
            before = content(run_dir)
            done = self.train(run_dir, "--resume", code=3)
            expect(done.stderr.splitlines()[-1].startswith("train.py: error: "), done.stderr)
            expect(done.stderr.count("\n") == 3, done.stderr)  # a warning for each, and the error
            expect(content(run_dir) == before, "something was changed")

        kinds, names = ("truncate", "zero-fill", "flip a bit in", "delete"), sorted(os.listdir(newest))
        jobs = [(f"{kind} a file of the newest checkpoint", lambda k=kind, n=name: one(k, n))
                for kind in kinds for name in names]  # fmt: skip
        self.table.trials([*jobs, ("all checkpoints damaged: exit 3, nothing changed", every)])

        def every_bit(path: Path) -> str:
            whole, missed = path.read_bytes(), []
            for bit in range(8 * len(whole)):
                flipped = bytearray(whole)
                flipped[bit // 8] ^= 1 << bit % 8
                path.write_bytes(flipped)
                if checkpoint.verify(path.parent) is None:
                    missed.append(bit)
            path.write_bytes(whole)
            expect(not missed, f"{path.name}: bits {missed[:20]} of {8 * len(whole)} flipped without being noticed")
            return f"{path.name}: {8 * len(whole):,} bits"

        small = self.fast / "step-000001"
        checkpoint.save(small, {"weights": {"w": torch.arange(2.0)}}, {"step": 1})
        for path in sorted(small.iterdir()):
            self.table.trial("flip each bit of each file of a small checkpoint", lambda path=path: every_bit(path))

    def full_disks(self) -> None:
        size = {
            path.name: path.stat().st_size for path in (self.directory / "alone/checkpoints").rglob("*.safetensors")
        }
        weights, first = size["weights.safetensors"], f"step-{SETTINGS['save_every']:06}"
        rare = ("--save_every", 1000, "--eval_every", 1000)
        unsaved = r"{}: cannot be saved .* [\d,]+ bytes"
        for what, flags, sign, room, file_size, message in (
            ("at a checkpoint", (), "model", 3 * weights // 2, 3 * weights // 2, unsaved.format(r"step-\d+")),
            ("at a model", (), f"checkpoints/{first}", weights // 2, weights // 2, unsaved.format("model")),
            ("at the log", rare, "checkpoints/step-*", 0, None, "the log cannot be written"),
        ):
            for choice in ("stop", "continue"):

                def one(
                    what=what, flags=flags, sign=sign, room=room, file_size=file_size, message=message, choice=choice
                ):
                    disk = Disk(self.directory / f"disk-{what[-5:].strip()}-{choice}")
                    try:
                        return self.full_disk(disk, flags, sign, room, file_size, message, choice)
                    finally:
                        disk.close()

                self.table.trial(f"disk full {what}, --on_save_error {choice}", one)

    def full_disk(self, disk, flags, sign, room, file_size, message, choice) -> str:
        """``room`` is left when ``sign`` appears in the run's directory."""
        run_dir = disk.path / "run"
        process, phases = self.start(run_dir, *flags, "--on_save_error", choice)
        if flags:
            self.wait_for(process, phases, "training", 1, 0.05)
            process.send_signal(signal.SIGUSR1)
        while process.returncode is None and not list(run_dir.glob(sign)):
            time.sleep(0.0005)
        file_size = file_size or (run_dir / "metrics.jsonl").stat().st_size
        disk.leave(process, room, file_size)
        if choice == "continue":
            while process.returncode is None and not process.stderr:
                time.sleep(0.0005)
            disk.enlarge(process)
            expect(self.end(process) == 0, process.stderr)
            expect(all(re.match(f"warning: .*{message}", line) for line in process.stderr.splitlines()), process.stderr)
            expect(process.stderr, "the disk was never full")
            self.same(run_dir, curves=not flags)
            return disk.kind
        expect(self.end(process) == 5, f"exit code {process.returncode}: {process.stderr}")
        said = process.stderr
        expect(re.fullmatch(rf"train\.py: error: .*{message}.*\n", said) and str(run_dir) in said, f"stderr: {said}")
        expect(not leftovers(run_dir), f"left over: {leftovers(run_dir)}")
        path = max((run_dir / "checkpoints").iterdir())
        expect(checkpoint.verify(path) is None, f"{path} does not verify")
        if flags:  # nothing at all can be written now
            before = (run_dir / "config.yaml").read_bytes(), content(run_dir / "checkpoints")
            process, _ = self.start(run_dir, *flags, "--resume")
            disk.leave(process, 0, 1)
            expect(self.end(process) == 5 and process.stderr.count("\n") == 1, f"again: {process.stderr}")
            after = (run_dir / "config.yaml").read_bytes(), content(run_dir / "checkpoints")
            expect(after == before, "resuming on a full disk has lost something")
        disk.enlarge(process)
        self.train(run_dir, "--resume")
        self.same(run_dir, curves=not flags)
        return disk.kind

    def signals(self) -> None:
        self.table.trials(
            (f"{name} in {wanted}", lambda name=name, wanted=wanted: self.signal(name, wanted))
            for name in ("SIGTERM", "SIGINT", "SIGINT twice", "SIGUSR1")
            for wanted in ("preparation", "loading", *LOOP)
        )

    def signal(self, name: str, wanted: str) -> str:
        number, run_dir = signal.Signals[name.split()[0]], self.directory / f"{name}-{wanted}".replace(" ", "-")
        draw, early = self.draw(name, wanted), wanted in ("preparation", "loading")
        process, phases = self.start(run_dir, "--keep_checkpoints", 99)
        moment = (wanted, 1, draw.random() * self.usual.seconds(wanted) / 2) if early else self.moment(wanted, draw)
        expect(self.wait_for(process, phases, *moment), f"never in {wanted}")
        since = time.monotonic()
        process.send_signal(number)
        if "twice" in name:
            time.sleep(0.02)
            process.send_signal(number)
        code, seconds = self.end(process), time.monotonic() - since
        expect(process.stderr == "", f"stderr: {process.stderr}")
        expect(code == (0 if name == "SIGUSR1" else 128 + number), f"exit code {code}")
        if name == "SIGUSR1" and not early:
            step = re.search(r"^step (\d+): saved, asked by SIGUSR1$", process.stdout, re.MULTILINE)
            expect(step, process.stdout)
            path = run_dir / "checkpoints" / f"step-{int(step[1]):06}"
            expect(checkpoint.verify(path) is None, f"{path} does not verify")
        elif name != "SIGUSR1":
            expect(seconds < 5, f"ended only after {seconds:.1f} seconds")
            expect(not early or not run_dir.exists(), "something was written")
            expect(early or "twice" in name or f"stopped by {name} at step" in process.stdout, process.stdout)
            self.train(run_dir, "--resume")
        self.same(run_dir)
        return f"exit {code} after {seconds:.2f} s" + ("" if name == "SIGUSR1" else ", resumed")

    def workers(self) -> None:
        self.table.trials(
            (f"two workers, {what}", lambda what=what, i=i: self.lose_worker(what, i))
            for what in ("nothing done to them", "one killed", "one stopped", "their parent killed")
            for i in range(1 if what.startswith("nothing") else 3)
        )

    def lose_worker(self, what: str, number: int) -> str:
        run_dir = self.directory / f"workers-{what.split()[0]}-{what.split()[-1]}-{number}"
        process, phases = self.start(run_dir, "--num_workers", 2, "--worker_timeout", 3)
        if what.startswith("nothing"):
            expect(self.end(process) == 0 and process.stderr == "", process.stderr)
            return self.same(run_dir)
        draw, seen = self.draw(what, number), []
        self.wait_for(process, phases, "training", 1 + number, 0)
        while process.returncode is None and len(seen) < 2:  # those of this epoch, or of the next
            seen = children(process.pid)
        time.sleep(draw.random() * 0.02)
        since = time.monotonic()
        if "parent" in what:
            process.kill()
        else:
            os.kill(draw.choice(seen), signal.SIGKILL if "killed" in what else signal.SIGSTOP)
        code = self.end(process)
        while (alive := [pid for pid in {*seen, process.pid} if is_alive(pid)]) and time.monotonic() - since < 10:
            time.sleep(0.01)
        seconds = time.monotonic() - since
        expect(not alive, f"alive after 10 seconds: {alive}")
        if "parent" not in what:
            expect(code == 6, f"exit code {code}: {process.stderr}")
            expect(
                re.fullmatch(r"train\.py: error: --num_workers 2: .*\n", process.stderr), f"stderr: {process.stderr}"
            )
        self.train(run_dir, "--resume")
        self.same(run_dir)
        return f"exit {code}, no process left after {seconds:.1f} s"

    def inputs(self) -> list[tuple[str, int, float, str]]:
        """The input table, each case in a process. Returns (name, exit code, seconds, message) of each."""
        shown = []

        def one(case: Case) -> None:
            def run(script: str, argv: list[str], cwd: Path) -> tuple[int, str, str]:
                command, started = ["tests/nobody.py", script] if case.as_nobody else [script], time.monotonic()
                done = processes.run(*command, *argv, cwd=cwd, env=case.env, timeout=TIMEOUT)
                message = done.stderr.partition("error: ")[2].strip().splitlines()
                shown.append((case.name, done.returncode, time.monotonic() - started, " ".join(message)))
                return done.returncode, done.stdout, done.stderr

            problem = check(case, run)
            expect(problem is None, str(problem))

        disable_progress_bar()
        good_model()
        row = "wrong input: exit 2, one line, nothing written"
        self.table.trials((row, lambda case=case: one(case)) for case in CASES if not case.as_nobody)
        for case in CASES:
            if case.as_nobody:  # the whole process is nobody for a while
                self.table.trial(row, lambda case=case: one(case))
        order = {case.name: place for place, case in enumerate(CASES)}
        return sorted(shown, key=lambda item: order[item[0]])


# ---------------------------------------------------------------------------------------------------------------------


class Disk:
    """A file system that has little room for a while: a tmpfs, or for all but root a limit on the size of a file."""

    def __init__(self, path: Path):
        path.mkdir()
        self.path = path
        command = ["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(path)]
        self.mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
        self.kind = "tmpfs" if self.mounted else "RLIMIT_FSIZE"

    def leave(self, process: processes.Process, room: int, file_size: int) -> None:
        if not self.mounted:
            return self._limit(process, file_size)
        while True:
            disk = os.statvfs(self.path)
            used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
            if self._remount(used + room // disk.f_frsize * disk.f_frsize):  # fails where more was written meanwhile
                return

    def enlarge(self, process: processes.Process) -> None:
        self._remount(1 << 30) if self.mounted else self._limit(process, resource.RLIM_INFINITY)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.path)], check=True)

    def _remount(self, size: int) -> bool:
        command = ["mount", "-o", f"remount,size={size}", str(self.path)]
        return subprocess.run(command, capture_output=True).returncode == 0

    def _limit(self, process: processes.Process, size: int) -> None:
        if process.returncode is None:
            hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content(directory: Path) -> dict[str, str]:
    return {str(path): sha256(path) for path in sorted(directory.rglob("*")) if path.is_file()}


def leftovers(run_dir: Path) -> list[str]:
    return [str(path.relative_to(run_dir)) for path in run_dir.rglob(".*")]


def outcome(run_dir: Path) -> dict[str, object]:
    """All that must not depend on what was done to a run."""
    last = max((run_dir / "checkpoints").iterdir())
    files = [last / f"{name}.safetensors" for name in ("weights", "optimizer", "random")]
    # As TensorBoard's server reads them, which drops what a killed process had written beyond its last checkpoint.
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    names = [name for name in events.Tags()["tensors"] if not name.endswith(MEASURED) and "_hparams_" not in name]
    board = {name: [(e.step, e.tensor_proto.SerializeToString()) for e in events.Tensors(name)] for name in names}
    records = read_jsonl(run_dir / "metrics.jsonl")
    return {
        **{str(path.relative_to(run_dir)): sha256(path) for path in (*files, run_dir / "model/model.safetensors")},
        "curves in metrics.jsonl": [{k: v for k, v in record.items() if k not in MEASURED} for record in records],
        "curves in TensorBoard": board,
        "leftovers": leftovers(run_dir),
    }


def spoil(path: Path, kind: str, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if kind == "delete":
        return path.unlink()
    if kind == "truncate":
        del data[draw.randrange(len(data)) :]
    elif kind == "zero-fill":
        data = bytes(len(data))
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def machine() -> str:
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"torch {torch.__version__}; commit {git.stdout.strip()}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="runs to kill, about")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damage")
    parser.add_argument("--minutes", type=float, default=30, help="after which nothing new is tried")
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS, help="parts to try")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is cleared away
    table, cases = Table(60 * args.minutes), []
    print(f"{machine()}\nseed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        fast = Disk(Path(name) / "fast")
        runs = Runs(Path(name), table, args.seed)
        runs.fast = fast.path
        try:
            runs.leave_alone()
            for part in args.only:
                cases += (runs.kills(args.kills) if part == "kills" else getattr(runs, part)()) or []
        finally:
            for process in runs.started:
                process.kill()
            fast.close()
    held = table.print()
    if cases:
        print("\n| wrong input | exit | seconds | message |\n| --- | ---: | ---: | --- |")
        for name, code, seconds, message in cases:
            print(f"| {name} | {code} | {seconds:.1f} | {message[:100].replace('|', chr(92) + '|')} |")
    print(f"\n{machine()}; seed {args.seed}; {table.elapsed() / 60:.1f} minutes")
    return 0 if held else 1


PARTS = ("crashes", "kills", "damage", "full_disks", "signals", "workers", "inputs")

if __name__ == "__main__":
    sys.exit(main())

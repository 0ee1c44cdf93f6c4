"""The long tests: kills, crashes, damage, full disks, signals, lost ranks, and wrong input, as a table.

    make torture
    make torture ARGS="--kills 10 --seed 3 --only kills signals"
    make torture ARGS="--ranks 24 --only ranks"

One run of `train.py` is left alone. So is one run of two ranks for each strategy. Every disturbed run must end like the
run that was left alone: with the same SHA-256 of each tensor of weights and optimizer, the same model, and the same
curves. The SHA-256 is that of a tensor's bits, because safetensors writes the metadata of a file in any order. Dropout
is on, so its random numbers are the same as well. Runs are real processes. Moments are random and repeat with --seed,
as far as a machine repeats itself. The exit code is 1 if any check failed.
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
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# One thread per run, two runs at once. `phases.py` is in another directory than the modules that it imports.
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
import processes  # noqa: E402
from conftest import checkpoint_bytes, make_text, read_jsonl  # noqa: E402  sets the environment of a test

processes.prepare()
processes.prepare(root=ROOT / "tests/torture")

import torch  # noqa: E402
from crashes import FILE_SYSTEMS, crash_in_save, file_system  # noqa: E402
from inputs import CASES, Case, check, good_model  # noqa: E402
from phases import PHASES, Phases  # noqa: E402
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from distributed.world import World  # noqa: E402
from training import atomic, checkpoint  # noqa: E402

TIMEOUT = 120  # seconds per process
MEASURED = ("tokens_per_second", "memory_gib")  # differ from run to run
EARLY, LOOP = ("preparation", "loading"), ("training", "evaluation", "sampling", "saving")
RANK_TIMEOUT = 8  # seconds, in trials that lose a rank
SETTINGS = {
    "model_config": "gpt2.json",
    "tokenizer": "train:320",
    "train_files": "text.jsonl",
    "block_size": 64,
    "batch_size": 8,
    "micro_batch_size": 4,
    "num_epochs": 3,
    "eval_fraction": 0.3,
    "learning_rate": 1e-3,
    "warmup_steps": 0.1,
    "eval_every": 8,
    "save_every": 5,
    "log_every": 1,
    "precision": "fp32",
    "sample_prompt": "the model",
}
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 128, "n_positions": 128}  # its dropout is 0.1


class Table:
    """Rows of trials: how often each was tried and held, and each failure. Rows are in the order of their first trial.

    The work of a trial raises if a check fails. It may return a detail to show, and its seconds.
    """

    def __init__(self, minutes: float):
        self.rows: dict[str, list[str | None]] = defaultdict(list)
        self.details: dict[str, dict[str, float]] = defaultdict(dict)
        self.started, self.end, self.printed = time.monotonic(), time.monotonic() + 60 * minutes, 0.0

    def left(self) -> float:
        return self.end - time.monotonic()

    def trial(self, row: str, work: Callable[..., tuple[str, float] | None], *args: object) -> str | None:
        problem, detail = None, None
        try:
            expect(self.left() > 0, "not tried: the time was over")
            detail = work(*args)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        self.rows[row].append(problem)
        if detail:
            self.details[row][detail[0]] = max(detail[1], self.details[row].get(detail[0], 0))
        if problem or time.monotonic() - self.printed > 1:
            self.printed = time.monotonic()
            said = problem or f"{self.rows[row].count(None)} held"
            print(f"{self.printed - self.started:5.0f} s  {row}: {said}", flush=True)
        return problem

    def show(self) -> bool:
        print("\n| what | tried | held | detail |\n| --- | ---: | ---: | --- |")
        for row, problems in self.rows.items():
            shown = [what + f" within {seconds:.1f} s" * (seconds > 0) for what, seconds in self.details[row].items()]
            print(f"| {row} | {len(problems)} | {problems.count(None)} | {'; '.join(shown)} |")
        failed = [(row, problem) for row, problems in self.rows.items() for problem in problems if problem]
        for row, problem in failed:
            print(f"\nDID NOT HOLD: {row}: {problem}")
        return not failed


class Runs:
    """Runs of one configuration in one directory, to be disturbed and compared with the run that was left alone."""

    def __init__(self, directory: Path, fast: Path, table: Table, seed: int):
        self.directory, self.fast, self.table, self.seed = directory, fast, table, seed
        self.started: list[processes.Process] = []
        self.plain, self.plain_lock = None, threading.Lock()
        self.pairs: dict[str, tuple[dict[str, object], Phases]] = {}
        (directory / "gpt2.json").write_text(json.dumps(GPT2))
        (directory / "plain.json").write_text(json.dumps({**GPT2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}))
        texts = (json.dumps({"text": make_text(60 + i, i)}) + "\n" for i in range(45))
        (directory / "text.jsonl").write_text("".join(texts))
        (directory / "small.yaml").write_text("".join(f"{key}: {value}\n" for key, value in SETTINGS.items()))

    def notes(self) -> str:
        """Return the name of a new file for notes of phases."""
        return str(self.directory / f"phases-{len(self.started)}-{threading.get_ident()}-")

    def start(self, run_dir: Path, *flags: object, noted: bool = True) -> tuple[processes.Process, Phases]:
        """Start a process. Return it and a view of its phase, which stays empty without ``noted``."""
        notes = self.notes()
        launcher = ("tests/torture/phases.py", notes, "train.py") if noted else ("train.py",)
        arguments = (*launcher, "--config", "small.yaml", "--output_dir", run_dir, *flags)
        process = processes.start(*arguments, cwd=self.directory, fresh=run_dir.name == "alone")
        self.started.append(process)
        return process, Phases(notes)

    def end(self, process: processes.Process) -> int:
        try:
            return process.wait(max(1, min(TIMEOUT, self.table.left())))
        except subprocess.TimeoutExpired:
            end_all(process)
            raise

    def train(self, run_dir: Path, *flags: object, code: int = 0) -> processes.Process:
        """Train to the end, as people run it."""
        process, _ = self.start(run_dir, *flags, noted=False)
        ended = self.end(process)
        expect(ended == code, f"train.py {' '.join(map(str, flags))} ended with {ended}, not {code}\n{process.stderr}")
        return process

    def leave_alone(self) -> None:
        """Train the run that all are compared with, without notes. Train a second run and time its phases."""
        self.train(self.directory / "alone")
        self.alone = outcome(self.directory / "alone")
        process, self.usual = self.start(self.directory / "noted")
        expect(self.end(process) == 0, process.stderr)
        self.same(self.directory / "noted")
        times = (f"{self.usual.count(phase)} x {self.usual.seconds(phase) * 1000:.0f} ms {phase}" for phase in PHASES)
        print(f"a run: {', '.join(times)}", flush=True)

    def same(self, run_dir: Path, curves: bool = True, alone: dict[str, object] | None = None) -> None:
        found, alone = outcome(run_dir), alone or self.alone
        names = [name for name in alone if curves or not name.startswith("curves")]
        differ = [name for name in names if found[name] != alone[name]]
        expect(not differ, f"{', '.join(differ)} differ from the run that was left alone ({run_dir.name})")
        shutil.rmtree(run_dir)

    def draw(self, *names: object) -> random.Random:
        return random.Random(" ".join(map(str, (self.seed, *names))))

    def wait_for(
        self,
        process: processes.Process,
        phases: Phases,
        wanted: str,
        draw: random.Random,
        part: float = 1.0,
        usual: Phases | None = None,
    ) -> bool:
        """Wait for a random moment in one of the phases ``wanted``, among the first ``part`` of them in a run.

        If that phase went by unseen, wait for the same moment of a later one. Return False if the process ended before.
        """
        usual = usual or self.usual
        count = 1 + int(draw.random() * part * usual.count(wanted))
        seconds = draw.random() * usual.seconds(wanted)
        while process.returncode is None:
            expect(self.table.left() > 0, "the time was over")
            if phases.count(wanted) >= count:
                time.sleep(seconds)
                if phases.current == wanted:
                    return True
                count = phases.count(wanted) + 1
            time.sleep(0.0005)
        return False

    def trials(self, jobs: Iterable[tuple]) -> None:
        """Run two trials at once."""
        pool = ThreadPoolExecutor(2)
        try:
            list(pool.map(lambda job: self.table.trial(*job), jobs))
        except BaseException:  # Ctrl-C: the other processes end soon
            self.table.end = 0
            for process in self.started:
                end_all(process)
            raise
        finally:
            pool.shutdown()

    # -----------------------------------------------------------------------------------------------------------------

    def crashes(self, args: argparse.Namespace) -> None:
        """Crash in the process of a save, before each line of checkpoint.py, atomic.py and shutil that it runs."""
        for kind in FILE_SYSTEMS:
            lines, stride = ("each third line", 3) if kind == "overlayfs" else ("each line", 1)  # copies run many lines
            names = "names are exchanged" if kind == "exchanges" else f"a file system as {kind}"
            row, outcomes = f"crash at {lines} of a save, {names}", []

            def die(outcomes: list[str] = outcomes, stride: int = stride) -> None:
                outcomes.append("")
                directory = self.fast / f"crash-{len(outcomes)}"
                outcomes[-1] = crash_in_save(directory, stride * (len(outcomes) - 1))
                shutil.rmtree(directory)

            with file_system(kind):
                while "ended" not in outcomes and len(outcomes) < 2000 and self.table.left() > 0:
                    self.table.trial(row, die)
            self.table.trial(row, expect, "ended" in outcomes, "no save came to its end")
            counts = {f"the {kind} state {outcomes.count(kind)} times": 0.0 for kind in ("old", "new")}
            self.table.details[row] = counts

    def kills(self, args: argparse.Namespace) -> None:
        """Kill a third of the runs in training, a third in saving, and the rest in evaluation and sampling."""
        wanted = ("training", "saving", "evaluation", "training", "saving", "sampling")
        jobs = ((f"SIGKILL in {wanted[i % 6]}", self.kill, wanted[i % 6], i) for i in range(args.kills))
        self.trials(jobs)

    def kill(self, wanted: str, number: int) -> None:
        draw = self.draw("kill", number)
        for attempt in range(10):
            run_dir = self.directory / f"kill-{number}-{attempt}"
            process, phases = self.start(run_dir)
            self.wait_for(process, phases, wanted, draw)
            process.kill()
            code = self.end(process)
            if code == -signal.SIGKILL and phases.current == wanted:
                break  # else the signal came in another phase, or at the end
            shutil.rmtree(run_dir)
        expect(phases.current == wanted, f"no kill came into {wanted}")
        if number % 5:
            self.train(run_dir, "--resume")
            return self.same(run_dir)
        process, phases = self.start(run_dir, "--resume")
        wanted = draw.choice(("preparation", *LOOP))
        self.wait_for(process, phases, wanted, draw, 1.0 if wanted == "preparation" else 0.3)
        process.kill()
        again = self.end(process) == -signal.SIGKILL

        def go_on() -> None:
            self.train(run_dir, "--resume")
            self.same(run_dir)

        problem = self.table.trial("SIGKILL once more, while resuming", go_on) if again else go_on()
        expect(problem is None, str(problem))

    def damage(self, args: argparse.Namespace) -> None:
        """Stop one run in an evaluation, then damage one thing in each of many copies."""
        stopped = self.directory / "stopped"
        process, phases = self.start(stopped)
        while process.returncode is None and phases.count("evaluation") < 3:
            time.sleep(0.0005)
        process.send_signal(signal.SIGTERM)
        self.end(process)
        path = newest(stopped)
        kinds, names = ("truncate", "zero-fill", "flip a bit in", "delete"), files(path)
        pairs = [(kind, name) for kind in kinds for name in names]
        jobs = [(f"{kind} a file of the newest checkpoint", kind, name) for kind, name in pairs]
        jobs += [("delete a directory of the newest checkpoint", "delete", name) for name in ("weights", "optimizer")]
        jobs.append(("add a file of tensors to the newest checkpoint", "add", "weights/more.safetensors"))
        self.trials((row, self.damage_one, path, kind, name) for row, kind, name in jobs)
        self.table.trial("all checkpoints damaged: exit 3, nothing changed", self.damage_all, stopped)
        small = self.fast / "step-000001"
        checkpoint.save(small, {"weights": {"w": torch.arange(2.0)}}, {"step": 1}, World())
        for name in files(small):
            self.table.trial("flip each bit of each file of a small checkpoint", flip_each_bit, small, name)

    def damage_one(self, path: Path, kind: str, name: str) -> None:
        run_dir = self.directory / f"{kind}-{name.replace('/', '-')}"
        shutil.copytree(path.parent.parent, run_dir)
        spoil(run_dir / "checkpoints" / path.name / name, kind, self.draw(kind, name))
        done = self.train(run_dir, "--resume")
        named = rf"{re.escape(name)}\S*"
        if name == checkpoint.MANIFEST:
            named = r"\S+"  # a flipped bit in the name of a file makes the warning name another file
        said = rf"warning: .*{path.name}: {named} .*; trying the checkpoint before it\n"
        expect(re.fullmatch(said, done.stderr), f"stderr: {done.stderr}")
        expect("resuming from" in done.stdout and f"{path.name} at step" not in done.stdout, done.stdout[-1000:])
        self.same(run_dir)

    def damage_all(self, stopped: Path) -> None:
        for path in (stopped / "checkpoints").iterdir():
            spoil(next(path.glob("weights/*")), "truncate", self.draw("all"))
        before = content(stopped)
        lines = self.train(stopped, "--resume", code=3).stderr.splitlines()
        expect([line.partition(": ")[0] for line in lines] == ["warning", "warning", "train.py"], str(lines))
        expect(content(stopped) == before, "something was changed")

    def full_disks(self, args: argparse.Namespace) -> None:
        """Leave too little room for a while: for the next checkpoint, for the next model, for anything."""
        weights = (self.directory / "alone/model/model.safetensors").stat().st_size
        for place, room, sign in (
            ("step-000010", 3 * weights // 2, "model"),
            ("model", weights // 2, "checkpoints/step-000005"),
            ("the log", 0, "checkpoints/step-*"),
        ):
            self.table.trial(f"disk full at {place}", self.full_disk, place, room, sign)
        jobs = [("disk full at any moment, with any room", self.full_disk_anywhere, i) for i in range(20)]
        self.leave_pairs_alone()
        for strategy in self.pairs:
            for rank in (0, 1):
                row = f"2 ranks ({strategy}), disk full for rank {rank} alone: both exit with 5, --resume"
                jobs += [(row, self.full_disk_of_rank, strategy, rank, number) for number in range(2)]
        self.trials(jobs)

    def full_disk(self, place: str, room: int, sign: str) -> tuple[str, float]:
        with Disk(self.directory / f"disk-{place.split()[-1]}") as disk:
            run_dir, at_log = disk.path / "run", place == "the log"
            rare = ("--save_every", 1000, "--eval_every", 1000) if at_log else ()
            process, phases = self.start(run_dir, *rare)
            if at_log:  # no checkpoint or model is to be written for a while
                self.wait_for(process, phases, "training", self.draw(place), 0)
                process.send_signal(signal.SIGUSR1)
            while process.returncode is None and not list(run_dir.glob(sign)):
                time.sleep(0.0005)
            disk.leave(process, room, room or (run_dir / "metrics.jsonl").stat().st_size)
            message = rf"\S*run.*: {place} cannot be .*\n" if at_log else rf"\S*{place}: cannot be .* [\d,]+ bytes .*\n"
            expect(self.end(process) == 5, f"exit code {process.returncode}: {process.stderr}")
            expect(re.fullmatch(rf"train\.py: error: {message}", process.stderr), f"stderr: {process.stderr}")
            expect(not leftovers(run_dir), f"left over: {leftovers(run_dir)}")
            last = newest(run_dir)
            expect(checkpoint.verify(last) is None, f"{last} does not verify")
            if at_log and disk.mounted:  # without a mount, the limit on file size holds for stderr too
                before = (run_dir / "config.yaml").read_bytes(), content(run_dir / "checkpoints")
                process, _ = self.start(run_dir, "--resume")
                disk.leave(process, 0, 1)
                expect(self.end(process) == 5 and process.stderr.count("\n") == 1, f"again: {process.stderr}")
                after = (run_dir / "config.yaml").read_bytes(), content(run_dir / "checkpoints")
                expect(after == before, "something was lost by resuming on a full disk")
            disk.enlarge(process)
            self.train(run_dir, "--resume")
            self.same(run_dir, curves=not at_log)
            return disk.kind, 0.0

    def full_disk_anywhere(self, number: int) -> tuple[str, float]:
        draw = self.draw("disk", number)
        with Disk(self.directory / f"disk-{number}") as disk:
            run_dir = disk.path / "run"
            process, phases = self.start(run_dir)
            self.wait_for(process, phases, draw.choice(LOOP), draw)
            room = int(draw.random() * 4 * (self.directory / "alone/model/model.safetensors").stat().st_size)
            disk.leave(process, room, room)
            code, said = self.end(process), process.stderr
            disk.enlarge(process)
            if code:
                expect(code == 5 and re.fullmatch(r"train\.py: error: .*\n", said), f"exit code {code}: {said}")
                expect(not leftovers(run_dir), f"left over: {leftovers(run_dir)}")
                damaged = [path.name for path in (run_dir / "checkpoints").glob("*") if checkpoint.verify(path)]
                expect(not damaged, f"do not verify: {damaged}")
                self.train(run_dir, "--resume")
            self.same(run_dir)
            return f"exit {code}", 0.0

    def full_disk_of_rank(self, strategy: str, full: int, number: int) -> tuple[str, float]:
        """Limit the files of one rank, so that it cannot write its shard. The other rank and its messages have room."""
        wanted, draw = LOOP[number % 2], self.draw("disk of rank", strategy, full, number)
        started, _, run_dir = self.ranks_in(strategy, f"disk-{full}-{number}", wanted, draw)
        hard = resource.prlimit(started[full].pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(started[full].pid, resource.RLIMIT_FSIZE, (100_000, hard))
        codes = self.end_ranks(started)
        expect(codes == [5, 5], f"ended with {codes}: {said_by(started)}")
        said = started[0].stderr + started[1].stderr
        who = r".*\brank 1\b.*" if full else ".*"
        expect(re.fullmatch(rf"train\.py: error: \S*: cannot be saved {who}\n", said), f"said {said_by(started)}")
        expect(not leftovers(run_dir), f"left over: {leftovers(run_dir)}")
        damaged = [path.name for path in (run_dir / "checkpoints").glob("*") if checkpoint.verify(path)]
        expect(not damaged, f"do not verify: {damaged}")
        self.resume_ranks(strategy, run_dir)
        return f"in {wanted}", 0.0

    def signals(self, args: argparse.Namespace) -> None:
        names = ("SIGTERM", "SIGINT", "SIGINT twice", "SIGUSR1")
        rows = [(name, wanted) for name in names for wanted in (*EARLY, *LOOP)]
        self.trials((f"{name} in {wanted}", self.signal, name, wanted, i) for name, wanted in rows for i in range(3))

    def signal(self, name: str, wanted: str, attempt: int) -> tuple[str, float]:
        number, run_dir = signal.Signals[name.split()[0]], self.directory / f"{name}-{wanted}-{attempt}"
        draw = self.draw(name, wanted, attempt)
        for _ in range(10):  # a short phase may go by unseen
            process, phases = self.start(run_dir, "--keep_checkpoints", 99)
            if self.wait_for(process, phases, wanted, draw, 0.0 if wanted in EARLY else 0.6):
                break
            shutil.rmtree(run_dir)
        expect(process.returncode is None, f"never in {wanted}")
        since = time.monotonic()
        process.send_signal(number)
        if "twice" in name:
            time.sleep(0.02)
            process.send_signal(number)
        code, seconds, said = self.end(process), time.monotonic() - since, process.stdout[-1000:]
        expect(process.stderr == "", f"stderr: {process.stderr}")
        expect(code == (0 if name == "SIGUSR1" else 128 + number), f"exit code {code}: {said}")
        if name == "SIGUSR1" and wanted in LOOP:
            # After the last step boundary no save answers SIGUSR1. The checkpoint at the end of the run does.
            step = re.search(r"^step (\d+): saved on SIGUSR1$", process.stdout, re.MULTILINE)
            step = step or re.search(r"^held-out perplexity .*\(step (\d+)\)$", process.stdout, re.MULTILINE)
            expect(step, process.stdout)
            path = run_dir / "checkpoints" / f"step-{int(step[1]):06}"
            expect(checkpoint.verify(path) is None, f"{path} does not verify")
        if name == "SIGUSR1":
            return self.same(run_dir)
        expect(seconds < 5, f"ended only after {seconds:.1f} seconds")
        if wanted in EARLY:
            expect(not run_dir.exists(), "something was written")
        elif "twice" not in name:
            ended = "held-out perplexity" in said  # after the last step boundary: all is saved, nothing is uploaded
            expect(ended or f"stopped by {name} at step" in said, said)
        self.train(run_dir, "--resume")
        self.same(run_dir)
        return f"exit {code}", seconds

    def ranks(self, args: argparse.Namespace) -> None:
        """Kill, stop or end one of two ranks, or both, at any moment.

        A stopped rank is noticed only in the loop. Before the loop, a rank may work alone for as long as a day.
        """
        self.leave_pairs_alone()
        deeds = []
        for strategy in self.pairs:
            # Deed, target, and the phases of rank 0 in which it may happen. Under torchrun, imports are phase "start".
            pair = f"2 ranks ({strategy}),"
            for who in ("rank 0", "rank 1", "both"):
                row, moments = f"{pair} SIGKILL of {who}, torchrun --max-restarts=1", ("start", *EARLY, *LOOP)
                deeds.append((row, self.kill_under_agent, strategy, who, moments))
            deeds.append((f"{pair} SIGKILL of both, --resume", self.kill_ranks, strategy, "both", LOOP))
            for who in ("rank 0", "rank 1"):
                early = f"SIGTERM to {who} before the first step: it exits with 143, the other with 6"
                for name, work, moments in (
                    (f"SIGKILL of {who}: the other exits with 6", self.kill_ranks, (*EARLY, *LOOP)),
                    (f"SIGTERM to {who}: both exit with 143", self.end_ranks_by, LOOP),
                    (early, self.end_ranks_early, EARLY),
                    (f"SIGSTOP of {who}: the other exits with 6", self.stop_rank, LOOP),
                ):
                    deeds.append((f"{pair} {name}, --resume", work, strategy, who, moments))
        jobs = []
        for i in range(args.ranks):
            row, work, strategy, who, moments = deeds[i % len(deeds)]
            jobs.append((row, work, strategy, who, self.draw("moment", i).choice(moments), i))
        sizes = ("1 rank", "2 ranks (ddp)", "2 ranks (fsdp)")
        for first, then in zip((0, 1, 0, 2, 1), (1, 0, 2, 0, 2), strict=True):
            jobs.append((f"a checkpoint of {sizes[first]} goes on with {sizes[then]}", self.go_on_with, first, then))
        self.trials(jobs)

    def start_ranks(self, strategy: str, run_dir: Path, *flags: object) -> tuple[list[processes.Process], Phases]:
        """Start two ranks without torchrun, which ends one when the other has died. Return the phases of rank 0 too."""
        notes = self.notes()
        env = processes.meeting_place() | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        arguments = ("tests/torture/phases.py", notes, "train.py", *self.rank_flags(strategy, run_dir, *flags))
        started = []
        for rank in "01":
            rank_env = {**env, "RANK": rank, "LOCAL_RANK": rank}
            started.append(processes.start(*arguments, cwd=self.directory, env=rank_env))
            self.started.append(started[-1])
        return started, Phases(notes + "0")

    def rank_flags(self, strategy: str, run_dir: Path, *flags: object) -> list[object]:
        """Return the flags of two ranks. Each gets half of the micro-batches, so steps equal those of one process."""
        own = ["--config", "small.yaml", "--output_dir", run_dir, "--strategy", strategy]
        return [*own, "--rank_timeout", TIMEOUT, *flags]

    def end_ranks(self, started: list[processes.Process]) -> list[int]:
        try:
            return [self.end(process) for process in started]
        finally:
            for process in started:
                process.kill()

    def resume_ranks(self, strategy: str, run_dir: Path) -> None:
        """Resume two ranks. They must end like the ranks that were left alone."""
        started, _ = self.start_ranks(strategy, run_dir, "--resume")
        codes = self.end_ranks(started)
        expect(codes == [0, 0], f"--resume ended with {codes}: {said_by(started)}")
        self.same(run_dir, alone=self.pairs[strategy][0])

    def leave_pairs_alone(self) -> None:
        for strategy in ("ddp", "fsdp"):
            if strategy not in self.pairs:
                self.table.trial(f"2 ranks ({strategy}), left alone", self.leave_ranks_alone, strategy)

    def leave_ranks_alone(self, strategy: str) -> None:
        run_dir = self.directory / f"alone-{strategy}"
        started, phases = self.start_ranks(strategy, run_dir)
        codes = self.end_ranks(started)
        expect(codes == [0, 0], f"ended with {codes}: {said_by(started)}")
        expect(not any(process.stderr for process in started), f"warned: {said_by(started)}")
        expect(started[1].stdout == "", f"rank 1 said {started[1].stdout}")
        self.pairs[strategy] = outcome(run_dir), phases

    def ranks_in(
        self, strategy: str, name: str, wanted: str, draw: random.Random, *flags: object
    ) -> tuple[list[processes.Process], Phases, Path]:
        """Return two ranks that were in the phase ``wanted`` a moment ago, the phases, and their directory."""
        for attempt in range(10):
            run_dir = self.directory / f"{strategy}-{name}-{attempt}"
            started, phases = self.start_ranks(strategy, run_dir, *flags)
            part = 0.0 if wanted in EARLY else 0.6
            if self.wait_for(started[0], phases, wanted, draw, part, self.pairs[strategy][1]):
                return started, phases, run_dir
            self.end_ranks(started)
            shutil.rmtree(run_dir)
        raise AssertionError(f"never in {wanted}")

    def kill_under_agent(self, strategy: str, who: str, wanted: str, number: int) -> tuple[str, float]:
        draw, notes, run_dir = self.draw("agent", number), self.notes(), self.directory / f"agent-{number}"
        phases = Phases(notes + "0")
        script = ("--nproc_per_node=2", "--max-restarts=1", ROOT / "tests/torture/phases.py", notes, "train.py")
        flags, torchrun = self.rank_flags(strategy, run_dir, "--resume"), Path(sys.executable).with_name("torchrun")
        agent = processes.start(torchrun, "--standalone", *script, *flags, cwd=self.directory)
        self.started.append(agent)
        while agent.returncode is None and len(ranks_of(agent)) < 2:
            time.sleep(0.01)
        if wanted == "start":
            time.sleep(4 * draw.random())
        else:
            part = 0.0 if wanted in EARLY else 0.6
            self.wait_for(agent, phases, wanted, draw, part, self.pairs[strategy][1])
        pids, phase = ranks_of(agent), phases.current
        if len(pids) < 2 and self.end(agent) == 0:  # it ended before the kill
            self.same(run_dir, alone=self.pairs[strategy][0])
            return "ended first", 0.0
        for rank, pid in pids.items():
            if who in ("both", f"rank {rank}"):
                os.kill(pid, signal.SIGKILL)
        try:
            code = self.end(agent)
        except subprocess.TimeoutExpired:
            code = "none"
        expect(code == 0, f"exit code {code} after a kill in {phase}: {agent.stdout[-1000:]}{agent.stderr[-3000:]}")
        again = "resuming from" in agent.stdout or "starting over" in agent.stdout
        expect(again or phase in ("start", *EARLY), agent.stdout)
        self.same(run_dir, alone=self.pairs[strategy][0])
        return f"in {phase}", 0.0

    def kill_ranks(self, strategy: str, who: str, wanted: str, number: int) -> tuple[str, float]:
        draw, flags = self.draw("kill ranks", number), ("--rank_timeout", RANK_TIMEOUT)
        started, phases, run_dir = self.ranks_in(strategy, f"kill-{number}", wanted, draw, *flags)
        phase, since = phases.current, time.monotonic()
        for rank, process in enumerate(started):
            if who in ("both", f"rank {rank}"):
                process.kill()
        codes, seconds = self.end_ranks(started), time.monotonic() - since
        if who == "both":
            expect(codes == [-signal.SIGKILL] * 2, f"ended with {codes}")
        else:
            self.is_missed(started, codes, int(who[-1]), -signal.SIGKILL, f"after a kill in {phase}")
            expect(seconds < 5, f"ended only after {seconds:.1f} seconds")
        self.resume_ranks(strategy, run_dir)
        return f"in {phase}", 0.0

    def is_missed(self, started: list[processes.Process], codes: list[int], lost: int, code: int, when: str) -> None:
        """Check that the other rank ended with 6 and one line that says so. torch may warn before that line."""
        other = 1 - lost
        said = started[other].stderr.splitlines()[-1:] or [""]
        expect(codes[lost] == code, f"rank {lost} ended with {codes[lost]}")
        expect(codes[other] == 6, f"rank {other} ended with {codes[other]} {when}: {said_by(started)}")
        who, lines = ("", "rank 1: ")[other], started[other].stderr.count("train.py: error: ")
        line = rf"train\.py: error: {who}the connection to another rank is lost \(.*\)\. Run again with --resume; .*"
        said_so = re.fullmatch(line, said[0]) and lines == 1
        expect(said_so, f"{when} rank {other} said {started[other].stderr}")

    def end_ranks_by(self, strategy: str, who: str, wanted: str, number: int) -> tuple[str, float]:
        started, phases, run_dir = self.ranks_in(strategy, f"term-{number}", wanted, self.draw("term", number))
        phase, since = phases.current, time.monotonic()
        started[int(who[-1])].send_signal(signal.SIGTERM)
        codes, seconds = self.end_ranks(started), time.monotonic() - since
        expect(codes == [143, 143], f"ended with {codes} after SIGTERM in {phase}: {said_by(started)}")
        expect(not any(process.stderr for process in started), f"warned: {said_by(started)}")
        expect(started[1].stdout == "", f"rank 1 said {started[1].stdout}")
        step = re.search(r"^stopped by SIGTERM at step (\d+)", started[0].stdout, re.MULTILINE)
        if step:
            path = run_dir / "checkpoints" / f"step-{int(step[1]):06}"
            expect(checkpoint.verify(path) is None, f"{path} does not verify")
        expect(step or "held-out perplexity" in started[0].stdout, started[0].stdout[-1000:])
        self.resume_ranks(strategy, run_dir)
        return "ended", seconds

    def end_ranks_early(self, strategy: str, who: str, wanted: str, number: int) -> tuple[str, float]:
        draw, flags = self.draw("early", number), ("--rank_timeout", RANK_TIMEOUT)
        started, _, run_dir = self.ranks_in(strategy, f"early-{number}", wanted, draw, *flags)
        since, rank = time.monotonic(), int(who[-1])
        started[rank].send_signal(signal.SIGTERM)
        codes, seconds = self.end_ranks(started), time.monotonic() - since
        self.is_missed(started, codes, rank, 143, f"after SIGTERM in {wanted}")
        expect(seconds < 5, f"ended only after {seconds:.1f} seconds")
        expect(not run_dir.exists(), "something was written")
        self.resume_ranks(strategy, run_dir)
        return "ended", seconds

    def stop_rank(self, strategy: str, who: str, wanted: str, number: int) -> tuple[str, float]:
        flags, lost = ("--rank_timeout", RANK_TIMEOUT), int(who[-1])
        draw = self.draw("stop", number)
        started, phases, run_dir = self.ranks_in(strategy, f"stop-{number}", wanted, draw, *flags)
        phase, since = phases.current, time.monotonic()
        started[lost].send_signal(signal.SIGSTOP)
        with suppress(subprocess.TimeoutExpired):
            started[1 - lost].wait(RANK_TIMEOUT + 5)
        seconds = time.monotonic() - since
        for process in started:
            process.kill()
        codes = self.end_ranks(started)
        self.is_missed(started, codes, lost, -signal.SIGKILL, f"{seconds:.0f} s after SIGSTOP in {phase}")
        self.resume_ranks(strategy, run_dir)
        return f"--rank_timeout {RANK_TIMEOUT}: ended", seconds

    def save_again(self, run_dir: Path, size: int, *flags: object) -> None:
        """Load the last checkpoint of a copy on another number of ranks and save at once. The bits must be the same."""
        copy = run_dir.with_name(f"{run_dir.name}-again")
        shutil.copytree(run_dir, copy)
        before, step = checkpoint_bytes(newest(copy)), int(newest(copy).name[5:])
        manifest = (newest(copy) / checkpoint.MANIFEST).read_bytes()
        codes = self.end_ranks(self.start_any(size, copy, *flags, "--resume", "--max_steps", step)[0])
        expect(set(codes) == {0}, f"saving at once ended with {codes}")
        expect((newest(copy) / checkpoint.MANIFEST).read_bytes() != manifest, "the checkpoint was not saved again")
        expect(checkpoint_bytes(newest(copy)) == before, "loaded and saved at once, the tensors differ")
        shutil.rmtree(copy)

    def start_any(self, size: int, run_dir: Path, *flags: object) -> tuple[list[processes.Process], Phases]:
        """Start one process if ``size`` is 0, or two ranks: 1 is ddp, 2 is fsdp."""
        if size:
            return self.start_ranks(("", "ddp", "fsdp")[size], run_dir, *flags)
        process, phases = self.start(run_dir, *flags)
        return [process], phases

    def go_on_with(self, first: int, then: int) -> tuple[str, float]:
        """Change the number of ranks. Dropout depends on the rank; without it, the losses are those of one process."""
        flags = ("--model_config", "plain.json", "--learning_rate", 5e-5)
        with self.plain_lock:
            if self.plain is None:
                self.train(self.directory / "plain", *flags)
                self.plain = read_jsonl(self.directory / "plain/metrics.jsonl")
        run_dir = self.directory / f"sizes-{first}-{then}"
        for size, code in ((first, 143), (then, 0)):
            resume = ("--resume",) if size == then else ()
            started, phases = self.start_any(size, run_dir, *flags, *resume)
            if code:
                self.wait_for(started[0], phases, "training", self.draw("size", first, then), 0.6)
                started[0].send_signal(signal.SIGTERM)
            codes = self.end_ranks(started)
            expect(set(codes) == {code}, f"ended with {codes}: {said_by(started)}")
            if code:
                self.save_again(run_dir, then, *flags)
        found = read_jsonl(run_dir / "metrics.jsonl")
        places = [[(r["step"], r["split"], r["tokens"]) for r in records] for records in (found, self.plain)]
        expect(places[0] == places[1], f"other steps: {places}")
        far = max(abs(r["loss"] - p["loss"]) for r, p in zip(found, self.plain, strict=True))
        expect(far < 1e-6, f"losses differ by {far:.1e}")
        return "losses within 1e-6", 0.0

    def compiled(self, args: argparse.Namespace) -> None:
        """Kill a compiled run on two threads. Compiled code adds up gradients in any order unless it is told not to."""
        self.table.trial("compiled, SIGKILL in training", self.kill_compiled)

    def kill_compiled(self) -> None:
        found = []
        for name, until in (("whole", "-"), ("whole", "-"), ("cut", "step 12/")):
            run_dir = self.directory / f"compiled-{name}-{len(found)}"
            arguments = ("train.py", "--config", "small.yaml", "--compile", "on", "--output_dir", run_dir, "--resume")
            for stops in (True, False):
                process = processes.start(*arguments, cwd=self.directory, env={"OMP_NUM_THREADS": "2"})
                self.started.append(process)
                if stops and any(line.startswith(until) for line in process.lines(3 * TIMEOUT)):
                    process.kill()
                code = process.wait(3 * TIMEOUT)
                expect(code == (-signal.SIGKILL if stops and name == "cut" else 0), process.stderr)
            found.append(outcome(run_dir))
        expect(found[0] == found[1], "two runs that were left alone differ")
        expect(found[0] == found[2], "the resumed run differs from one that was left alone")

    def cuts(self, args: argparse.Namespace) -> None:
        """Run the property test with more documents: the parts of a long document have the tokens of the whole."""

        def one(seed: int) -> None:
            command = [sys.executable, "-m", "pytest", "tests/corpus/test_cuts.py", "-k", "parts_have_the_tokens"]
            env = os.environ | {"CUT_DOCUMENTS": "2000", "CUT_SEED": str(seed)}
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT)
            expect(done.returncode == 0, done.stdout[-300:])

        for i in range(10):
            self.table.trial("2,000 documents have the tokens of the whole", one, 2000 * (args.seed + i + 1))

    def inputs(self, args: argparse.Namespace) -> None:
        """Run each case of inputs.py in a process. Keep each answer for the table at the end."""
        self.answers: dict[str, str] = {}

        def one(case: Case) -> None:
            def run(script: str, argv: list[str], cwd: Path) -> tuple[int, str, str]:
                command, started = ["tests/torture/nobody.py", script] if case.as_nobody else [script], time.monotonic()
                done = processes.run(*command, *argv, cwd=cwd, env=case.env, timeout=TIMEOUT)
                message = " ".join(done.stderr.partition("error: ")[2].split())[:100].replace("|", r"\|")
                message = "".join(letter if letter.isprintable() else "?" for letter in message)
                self.answers[case.name] = f"{done.returncode} | {time.monotonic() - started:.1f} | {message}"
                return done.returncode, done.stdout, done.stderr

            problem = check(case, run)
            expect(problem is None, str(problem))

        disable_progress_bar()
        good_model()
        row = "wrong input: exit 2, one line, nothing written"
        self.trials((row, one, case) for case in CASES if not case.as_nobody)
        for case in CASES:
            if case.as_nobody:  # this process becomes nobody too while it runs
                self.table.trial(row, one, case)

    def show_answers(self) -> None:
        print("\n| wrong input | exit | seconds | message |\n| --- | ---: | ---: | --- |")
        for case in CASES:
            print(f"| {case.name} | {self.answers.get(case.name, 'not tried | | ')} |")


PARTS = {part.__name__: part for part in (Runs.crashes, Runs.kills, Runs.damage, Runs.full_disks, Runs.signals,
                                          Runs.ranks, Runs.compiled, Runs.inputs, Runs.cuts)}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------


class Disk:
    """A file system with little room for a while: a tmpfs for root, otherwise a limit on the size of a file."""

    def __init__(self, path: Path):
        path.mkdir()
        self.path = path
        command = ["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(path)]
        self.mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
        self.kind = "on a tmpfs" if self.mounted else "by RLIMIT_FSIZE"

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *error: object) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.path)], check=True)

    def leave(self, process: processes.Process, room: int, file_size: int) -> None:
        if not self.mounted:
            return self._limit(process, file_size)
        while True:
            disk = os.statvfs(self.path)
            used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
            if self._remount(used + room // disk.f_frsize * disk.f_frsize):  # fails if the process has written more
                return

    def enlarge(self, process: processes.Process) -> None:
        self._remount(1 << 30) if self.mounted else self._limit(process, resource.RLIM_INFINITY)

    def _remount(self, size: int) -> bool:
        command = ["mount", "-o", f"remount,size={size}", str(self.path)]
        return subprocess.run(command, capture_output=True).returncode == 0

    def _limit(self, process: processes.Process, size: int) -> None:
        if process.returncode is None:
            hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


def expect(holds: object, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content(directory: Path) -> dict[str, str]:
    return {str(path): sha256(path) for path in sorted(directory.rglob("*")) if path.is_file()}


def newest(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").iterdir())


def files(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def leftovers(run_dir: Path) -> list[str]:
    return [str(path.relative_to(run_dir)) for path in run_dir.rglob(".*")]


def outcome(run_dir: Path) -> dict[str, object]:
    """Return everything that must be the same, however a run was disturbed."""
    last = newest(run_dir)
    tensors = {" ".join(name): hashlib.sha256(bits).hexdigest() for name, bits in checkpoint_bytes(last).items()}
    # TensorBoard's own reader drops the events that a killed process wrote beyond its last checkpoint.
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    names = [name for name in events.Tags()["tensors"] if not name.endswith(MEASURED) and "_hparams_" not in name]
    board = {name: [(e.step, e.tensor_proto.SerializeToString()) for e in events.Tensors(name)] for name in names}
    records = read_jsonl(run_dir / "metrics.jsonl")
    return {
        **tensors,
        "model": sha256(run_dir / "model/model.safetensors"),
        "curves in metrics.jsonl": [{k: v for k, v in record.items() if k not in MEASURED} for record in records],
        "curves in TensorBoard": board,
        "names": sorted(os.listdir(run_dir)) + leftovers(run_dir) + files(last),
    }


def spoil(path: Path, kind: str, draw: random.Random) -> None:
    if kind == "delete":
        return atomic.remove(path)
    if kind == "add":
        return shutil.copyfile(next(path.parent.iterdir()), path)
    data = bytearray(path.read_bytes())
    if kind == "truncate":
        del data[draw.randrange(len(data)) :]
    elif kind == "zero-fill":
        data = bytes(len(data))
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def flip_each_bit(directory: Path, name: str) -> tuple[str, float]:
    path = directory / name
    whole, missed = path.read_bytes(), []
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        if checkpoint.verify(directory) is None:
            missed.append(bit)
    path.write_bytes(whole)
    expect(not missed, f"{name}: not noticed at bits {missed[:20]}")
    return f"{name}: {8 * len(whole):,} bits", 0.0


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


def end_all(process: processes.Process) -> None:
    """Kill a process and its children, such as the ranks of torchrun."""
    pids = children(process.pid) if process.returncode is None else []
    process.kill()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ranks_of(agent: processes.Process) -> dict[int, int]:
    """Return the process id of each rank of a torchrun."""
    found = {}
    for pid in children(agent.pid):
        with suppress(OSError):
            rank = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
            if rank:  # else it is still starting
                found[int(rank[1])] = pid
    return found


def said_by(started: list[processes.Process]) -> str:
    return "; ".join(f"rank {rank}: {process.stderr}" for rank, process in enumerate(started))


def machine() -> str:
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"torch {torch.__version__}; commit {git.stdout.strip()}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="runs to kill")
    parser.add_argument("--ranks", type=int, default=24, help="runs of two ranks to disturb")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damage")
    parser.add_argument("--minutes", type=float, default=35, help="after which nothing new is tried")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS, help="parts to try")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleared away
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it logs each event that it drops
    table = Table(args.minutes)
    print(f"{machine()}; seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="torture-") as name, Disk(Path(name) / "fast") as fast:
        runs = Runs(Path(name), fast.path, table, args.seed)
        try:
            runs.leave_alone()
            for part in args.only:
                PARTS[part](runs, args)
        finally:
            for process in runs.started:
                end_all(process)
    held = table.show()
    if "inputs" in args.only:
        runs.show_answers()
    print(f"\n{machine()}; seed {args.seed}; {(time.monotonic() - table.started) / 60:.1f} minutes")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())

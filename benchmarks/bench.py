"""Measure this project and its peers in turns, on the CPU. The table goes to benchmarks/results/.

    make bench                                          about 3 minutes on two cores
    make bench ARGS=--full                              about 30 minutes
    python -m benchmarks.bench --only step start        these measurements; prints them and writes nothing
    python -m benchmarks.bench --full --text corpus.jsonl --text_column text --tokenizer gpt2-directory

Each contender is a process of its own (`benchmarks.contenders`). Two contenders take turns. If the machine is slow for
a minute, it is slow for both. A ratio compares two adjacent turns. The table shows the median of the ratios with the
smallest and the largest. `make bench-gpu` is for GPUs.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
HEADER = "| what: against whom | ours | peer | ratio: median (min-max) | target | |\n|" + " --- |" * 6
Pairs = list[tuple[float, float]]  # seconds of ours and of the peer, round by round


@dataclass
class Row:
    """A line of the table. ``ratios`` are those of adjacent turns. ``target`` is for example (">=", 2.0)."""

    what: str
    ours: str
    peer: str
    ratios: list[float] = field(default_factory=list)
    target: tuple[str, float] | None = None

    @property
    def verdict(self) -> str:
        if not self.ratios or self.target is None:
            return ""
        (sign, value), median = self.target, statistics.median(self.ratios)
        return "met" if (median >= value if sign == ">=" else median <= value) else "**missed**"

    def __str__(self) -> str:
        ratio = spread(self.ratios, "x") if self.ratios else ""
        target = f"{self.target[0]} {self.target[1]:g}x" if self.target else ""
        return f"| {' | '.join([self.what, self.ours, self.peer, ratio, target, self.verdict])} |"


def spread(values: list[float], unit: str = "") -> str:
    """Return the median with the smallest and the largest value."""
    median = f"{short(statistics.median(values))}{unit}"
    return f"{median} ({short(min(values))}-{short(max(values))})" if len(values) > 1 else median


def short(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


class ContenderError(RuntimeError):
    """A process of a measurement has failed."""


class Contender:
    """A process that does units of work when it is told to. ``command`` is the arguments of its Python.

    If it takes longer than ``limit`` seconds, it is killed, and the next turn raises ContenderError.
    """

    def __init__(self, name: str, command: list[str], log: Path, environment: dict[str, str], limit: float = 3600):
        self.name, self._log = name, log
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with open(log, "wb") as errors:
            command = [sys.executable, *command]
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=errors, **pipes)
        self._timer = threading.Timer(limit, self._process.kill)
        self._timer.daemon = True
        self._timer.start()
        self.facts = self._answer()

    def turn(self, units: int = 1) -> float:
        """Let it do ``units`` units of work. Return the seconds of one unit. Other results are in ``facts``."""
        with suppress(BrokenPipeError):  # `_answer` reports why
            print(units, file=self._process.stdin, flush=True)
        self.facts = self._answer()
        return self.facts["seconds"] / units

    def stop(self) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # it ends at the next boundary
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._timer.cancel()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise ContenderError(f"{self.name} has ended: {content(self._log)[-1500:].strip()}")
        return json.loads(line)


def content(path: Path) -> str:
    """Return the text of a file that may not exist."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


@dataclass
class Bench:
    """The data that the measurements share."""

    settings: argparse.Namespace
    work: Path
    facts: dict[str, Any] = field(default_factory=dict)  # of the machine and the model, from the contender `prepare`

    def rounds(self, quick: int, full: int) -> int:
        return full if self.settings.full else quick

    @property
    def environment(self) -> dict[str, str]:
        cache = str(self.work / "cache")
        return os.environ | {"HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

    @contextmanager
    def contender(self, name: str, warm_up: int = 0, **options: Any) -> Iterator[Contender]:
        given = ("text", "text_column", "tokenizer", "block_size")
        options = {key: getattr(self.settings, key) for key in given} | {"work": str(self.work)} | options
        with running(name, options, self.work / f"{name}.log", self.environment) as started:
            if warm_up:
                started.turn(warm_up)
            yield started


@contextmanager
def running(
    name: str, options: dict, log: Path, environment: dict[str, str], limit: float = 3600, torchrun: bool = False
) -> Iterator[Contender]:
    """Run a contender of benchmarks.contenders in this context. With ``torchrun`` it is the only rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"] if torchrun else []
    command = [*launcher, "-m", "benchmarks.contenders", name, json.dumps(options)]
    started = Contender(name, command, log, environment, limit)
    try:
        yield started
    finally:
        started.stop()


def take_turns(ours: Contender, peer: Contender, rounds: int, units: int = 1) -> Pairs:
    """Return the seconds of a unit of both, round by round. The first of a round alternates, against drift."""
    pairs = []
    for i in range(rounds):
        order = (ours, peer) if i % 2 == 0 else (peer, ours)
        seconds = {contender: contender.turn(units) for contender in order}
        pairs.append((seconds[ours], seconds[peer]))
    return pairs


def medians(pairs: Pairs) -> tuple[float, float]:
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def speed_row(what: str, pairs: Pairs, tokens: int, target: tuple[str, float] | None = None) -> Row:
    """Return a row with the ratio of speeds: ours over the peer's."""
    rates = (f"{tokens / seconds:,.0f} tokens/s" for seconds in medians(pairs))
    return Row(what, *rates, [peer / ours for ours, peer in pairs], target)


def time_row(what: str, pairs: Pairs, target: tuple[str, float]) -> Row:
    """Return a row with the ratio of times: ours over the peer's."""
    times = (f"{seconds:.3g} s" for seconds in medians(pairs))
    return Row(what, *times, [ours / peer for ours, peer in pairs], target)


# ---------------------------------------------------------------------------------------------------------------------
# Measurements: each yields rows

BF16, BF16_OUR_ALLOCATOR = {"bf16": True}, {"bf16": True, "keeps_memory": True}


def step(bench: Bench) -> Iterator[Row]:
    """Measure training steps in eager mode. One process of ours stays for all peers."""
    peers = [
        ("Trainer, float32 (its default)", "trainer", {}, (">=", 2.8)),
        ("Trainer, bf16", "trainer", BF16, (">=", 2.0)),
        ("Trainer, bf16, with our allocator setting", "trainer", BF16_OUR_ALLOCATOR, None),
        ("nanoGPT's step, bf16 (no dropout, no biases)", "nanogpt", {}, None),
    ]
    with bench.contender("ours", warm_up=2) as ours:
        for label, name, options, target in peers:
            if target or bench.settings.full:
                with bench.contender(name, warm_up=2, **options) as peer:
                    pairs = take_turns(ours, peer, bench.rounds(3, 8), units=bench.rounds(1, 2))
                yield speed_row(f"step: {label}", pairs, 8 * bench.settings.block_size, target)
        yield matrix_limit(bench, ours, "step")


def matrix_limit(bench: Bench, ours: Contender, label: str) -> Row:
    """Compare a step with its matrix products."""
    with bench.contender("products", warm_up=1) as products:
        pairs = take_turns(ours, products, bench.rounds(4, 8))
    mine, limit = (f"{seconds:.2f} s" for seconds in medians(pairs))
    target = (">=", 0.45 if "AMX" in processor() else 0.7)
    shares = [products / ours for ours, products in pairs]
    return Row(f"{label}: share of the matrix limit", mine, f"{limit} of products", shares, target)


def overhead(bench: Bench) -> Iterator[Row]:
    """Compare the loop with the bare step. The difference is below the noise of a step, so there are many rounds."""
    with bench.contender("ours", warm_up=2) as ours, bench.contender("bare", warm_up=2) as bare:
        pairs = take_turns(ours, bare, bench.rounds(6, 20))
    yield time_row("step: the loop against the bare step", pairs, ("<=", 1.02))


def compiled(bench: Bench) -> Iterator[Row]:
    """Measure compiled steps. Compilation happens in the warm-up and is not measured."""
    trainer = ("Trainer, bf16 + torch_compile", "trainer", BF16 | {"compile": True}, (">=", 1.5))
    nanogpt = ("nanoGPT's step, bf16, compiled", "nanogpt", {"compile": True}, None)
    pairings = [
        ("ours eager", {}, trainer),
        ("ours compiled", {"compile": True}, trainer),
        ("ours compiled", {"compile": True}, nanogpt),
        ("ours compiled", {"compile": True}, ("ours eager", "ours", {}, None)),
    ]
    for how, mine, (label, name, options, target) in pairings:
        with bench.contender("ours", warm_up=3, **mine) as ours, bench.contender(name, warm_up=3, **options) as peer:
            pairs = take_turns(ours, peer, bench.rounds(3, 6))
        yield speed_row(f"step, {how}: {label}", pairs, 8 * bench.settings.block_size, target)
    with bench.contender("ours", warm_up=3, compile=True) as ours:
        yield matrix_limit(bench, ours, "step, ours compiled")


def memory(bench: Bench) -> Iterator[Row]:
    """Measure the peak memory of a process after two steps, one process after the other."""

    def peak(name: str, **options: Any) -> float:
        with bench.contender(name, block_size=1024, warm_up=2, **options) as contender:
            return contender.facts["gib"]

    rounds = range(bench.rounds(1, 2))
    peers = [peak("trainer", **BF16) for _ in rounds]
    for how, options, target in (("eager", {}, 0.6), ("compiled", {"compile": True}, 0.5)):
        peaks = [peak("ours", **options) for _ in rounds]
        shown = (f"{statistics.median(each):.1f} GiB" for each in (peaks, peers))
        ratios = [mine / other for mine, other in zip(peaks, peers, strict=True)]
        yield Row(f"peak memory, 8 x 1024, ours {how}: Trainer, bf16", *shown, ratios, ("<=", target))


def start(bench: Bench) -> Iterator[Row]:
    """Measure from the start of the process to the end of the first step, with warm caches and no compilation."""
    bf16 = bench.facts["precision"] == "bf16"
    model, settings = str(bench.work / "model"), bench.settings
    guide = ["-m", "benchmarks.guide", json.dumps(vars(settings) | {"model": model, "bf16": bf16})]
    command = ["train.py", "--model", model, "--train_files", settings.text, "--text_column", settings.text_column]
    command += ["--block_size", settings.block_size, "--max_eval_blocks", 1, "--max_steps", 1, "--compile", "off"]
    command += ["--output_dir", bench.work / "run"]
    metrics, log = bench.work / "run" / "metrics.jsonl", bench.work / "start.log"

    def ours() -> float:
        shutil.rmtree(metrics.parent, ignore_errors=True)
        return until(command, lambda: '"train"' in content(metrics), log, bench.environment)

    def peer() -> float:
        return until(guide, lambda: "first step" in content(log), log, bench.environment)

    ours(), peer()  # warms the caches
    pairs = [(ours(), peer()) for _ in range(bench.rounds(2, 6))]
    label = f"start to the end of step 1: Trainer{', bf16' * bf16} (ours evaluates a block before)"
    yield time_row(label, pairs, ("<=", 0.75))


def until(command: list, reached: Callable[[], bool], log: Path, environment: dict[str, str]) -> float:
    """Return the seconds from the start of ``python command`` until ``reached()`` is true. Then end the process.

    Raise ContenderError if it fails before.
    """
    with open(log, "wb") as out:
        started = time.perf_counter()
        command = [sys.executable, *map(str, command)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    try:
        while not reached() and process.poll() is None:
            time.sleep(0.01)
        if process.poll() and not reached():
            raise ContenderError(f"{command[1]} has ended: {content(log)[-1500:].strip()}")
        return time.perf_counter() - started
    finally:
        process.kill()
        process.wait()


def evaluation(bench: Bench) -> Iterator[Row]:
    number = bench.rounds(16, 32)
    peers = [
        ("bf16", BF16, (">=", 2.2)),
        ("float32 (its default)", {}, (">=", 2.0)),
        ("bf16, with our allocator setting", BF16_OUR_ALLOCATOR, None),
        ("bf16_full_eval, with our allocator setting", BF16_OUR_ALLOCATOR | {"bf16_full_eval": True}, None),
    ]
    with bench.contender("our_evaluation", warm_up=1, blocks=number) as ours:
        for label, options, target in peers[: bench.rounds(1, len(peers))]:
            with bench.contender("trainer_evaluation", warm_up=1, blocks=number, **options) as peer:
                pairs = take_turns(ours, peer, bench.rounds(3, 8))
                gap = abs(ours.facts["loss"] - peer.facts["loss"])
            if gap > 0.01:
                raise ContenderError(f"evaluation: the losses differ by {gap:.4f}")
            yield speed_row(f"evaluation: Trainer.evaluate, {label}", pairs, ours.facts["tokens"], target)


QUICK = (step, start, evaluation)
ALL = (step, overhead, compiled, memory, start, evaluation)


# ---------------------------------------------------------------------------------------------------------------------
# The report


def heading(module: str, device: str) -> str:
    """Return the top of a file of results. Its command names no directory of this machine."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    names = (Path(argument).name if argument.startswith("/") else argument for argument in sys.argv[1:])
    changes = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"""\
- command: `{" ".join([f"python -m benchmarks.{module}", *names])}`
- commit: {git("rev-parse", "--short", "HEAD") or "none"}{changes}
- device: {device}
- versions: Python {platform.python_version()}, {libraries}
- date: {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC
"""


def processor() -> str:
    """Return the name of the CPU, its instructions for bfloat16, and the number of its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = content(Path("/proc/cpuinfo"))
    name = re.search(r"^model name\s*: (.*)$", info, re.MULTILINE)
    name = re.sub(r"\(\w+\)|@.*|\b(CPU|Processor)\b", "", name[1] if name else platform.machine())
    flags = {"amx_bf16": " AMX", "avx512_bf16": " AVX512-BF16"}
    fastest = next((shown for flag, shown in flags.items() if re.search(rf"\b{flag}\b", info)), "")
    return f"{' '.join(name.split())}{fastest}, {cores} cores"


def results_file(device: str, suffix: str = "") -> Path:
    """Return the file of results of a device, such as results/amd-epyc-avx512-bf16-2-cores.md."""
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}{suffix}.md"


def main() -> int:
    names = {measurement.__name__: measurement for measurement in ALL}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all measurements, more rounds")
    parser.add_argument("--only", nargs="+", choices=names, help="these measurements; nothing is written")
    parser.add_argument("--text", default="quickstart/text.jsonl", help="JSON lines")
    parser.add_argument("--text_column", default="answers.text")
    parser.add_argument("--tokenizer", default="quickstart/smollm2", help="a directory; at most 50257 tokens")
    parser.add_argument("--block_size", type=int, default=128)
    settings = parser.parse_args()
    chosen = [names[name] for name in settings.only or ()] or (ALL if settings.full else QUICK)
    left_out = ", ".join(name for name in names if names[name] not in chosen)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that contenders and files do not outlive this process
    began, rows, failed = time.perf_counter(), [], False
    with tempfile.TemporaryDirectory(prefix="bench-") as work:
        bench = Bench(settings, Path(work))
        with bench.contender("prepare") as prepared:
            bench.facts = prepared.facts
        for measurement in chosen:
            started = time.perf_counter()
            try:
                for row in measurement(bench):
                    rows.append(row)
                    print(row, flush=True)
            except ContenderError as error:
                failed = True
                rows.append(Row(measurement.__name__, "failed", ""))
                print(f"{measurement.__name__}: {error}", file=sys.stderr, flush=True)
            print(f"({measurement.__name__}: {time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)

    facts, device = bench.facts, processor()
    text = f"""# Measured side by side

{heading("bench", device)}
The step is that of DistilGPT2's shape from scratch ({facts["parameters"] / 1e6:.1f} M parameters, float32): batch 8 x {settings.block_size},
dropout 0.1, clipping, a log every 10 steps; ours in {facts["precision"]}. The text has {facts["tokens"]:,} tokens. Speeds are ours
over the peer's; all other ratios are shares of the peer's.
{f"Left out: {left_out}; `--full` has them. " if left_out else ""}It took {(time.perf_counter() - began) / 60:.1f} minutes.

{HEADER}
{chr(10).join(map(str, rows))}
"""  # noqa: E501
    if not settings.only:
        results_file(device).write_text(text, encoding="utf-8")
    print(f"\n{text}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

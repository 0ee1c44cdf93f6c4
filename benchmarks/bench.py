"""Ours beside its peers, measured in turns in one run; the table goes to benchmarks/RESULTS.md.

    make bench                                          about 3 minutes on two cores
    make bench ARGS=--full                              about 30
    python -m benchmarks.bench --only blocks start      some measurements; prints them, writes nothing
    python -m benchmarks.bench --full --text corpus.jsonl --text_column text --tokenizer gpt2-directory

Each contender is a process of its own (`benchmarks.contenders`). Two are alive at a time and take turns, so that a
machine that is slow for a minute is slow for both; a ratio is that of two turns, one after the other, and the table
holds the median of the ratios with the smallest and the largest.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers")


@dataclass
class Row:
    """A line of the table. ``ratios`` are those of adjacent turns; ``target`` is such as (">=", 2.0)."""

    what: str
    ours: str
    peer: str
    ratios: list[float] = field(default_factory=list)
    target: tuple[str, float] | None = None
    unit: str = "x"

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def verdict(self) -> str:
        if not self.ratios or self.target is None:
            return ""
        sign, value = self.target
        return "met" if (self.median >= value if sign == ">=" else self.median <= value) else "**missed**"

    def __str__(self) -> str:
        ratio = ""
        if self.ratios:
            ratio = f"{short(self.median)}{self.unit}"
            if len(self.ratios) > 1:
                ratio += f" ({short(min(self.ratios))}-{short(max(self.ratios))})"
        target = f"{self.target[0]} {self.target[1]:g}{self.unit}" if self.target else ""
        return f"| {' | '.join([self.what, self.ours, self.peer, ratio, target, self.verdict])} |"


def short(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


class ContenderError(RuntimeError):
    pass


class Contender:
    """A process of benchmarks.contenders. It has prepared itself when this returns, and waits."""

    def __init__(self, name: str, options: dict[str, Any], log: Path, environment: dict[str, str]):
        self.name, self._log = name, log
        with open(log, "ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.contenders", name, json.dumps(options)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.facts = self._answer()

    def turn(self, units: int = 1) -> float:
        """Lets it do that many units of work; returns the seconds of one. What else it says is in ``facts``."""
        try:
            self._process.stdin.write(f"{units}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # why, is in its log
        self.facts = self._answer()
        return self.facts["seconds"] / units

    def stop(self) -> None:
        self._process.stdin.close()  # it ends by itself at a boundary, where it is unless something went wrong
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(errors="replace").strip().splitlines()[-12:]
            raise ContenderError(f"{self.name} has ended: " + "\n".join(said))
        return json.loads(line)


@dataclass
class Bench:
    """What the measurements share."""

    settings: argparse.Namespace
    work: Path
    facts: dict[str, Any] = field(default_factory=dict)  # of the machine and the model, from the contender `prepare`

    @property
    def full(self) -> bool:
        return self.settings.full

    def rounds(self, quick: int, full: int) -> int:
        return full if self.full else quick

    def environment(self, **more: str) -> dict[str, str]:
        return os.environ | {"HF_DATASETS_CACHE": str(self.work / "cache"), "HF_HUB_OFFLINE": "1", **more}

    @contextmanager
    def contender(self, contender: str, cache: Path | None = None, **options: Any) -> Iterator[Contender]:
        given = {
            key: getattr(self.settings, key) for key in ("text", "text_column", "tokenizer", "model", "block_size")
        }
        environment = self.environment(HF_DATASETS_CACHE=str(cache)) if cache else self.environment()
        given |= {"work": str(self.work), **options}
        started = Contender(contender, given, self.work / f"{contender}.log", environment)
        try:
            yield started
        finally:
            started.stop()


def take_turns(ours: Contender, peer: Contender, rounds: int, units: int = 1) -> list[tuple[float, float]]:
    """Seconds of a unit of ours and of the peer's, round by round; who begins changes, against what drifts."""
    found = []
    for i in range(rounds):
        if i % 2:
            second = peer.turn(units)
            found.append((ours.turn(units), second))
        else:
            found.append((ours.turn(units), peer.turn(units)))
    return found


def speeds(pairs: list[tuple[float, float]]) -> list[float]:
    """How many times as fast ours is."""
    return [peer / ours for ours, peer in pairs]


def shares(pairs: list[tuple[float, float]]) -> list[float]:
    """The part of the peer's time that ours takes."""
    return [ours / peer for ours, peer in pairs]


def medians(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def rate(tokens: float, seconds: float) -> str:
    return f"{tokens / seconds:,.0f} tokens/s"


# ---------------------------------------------------------------------------------------------------------------------
# Measurements: each yields rows


def step(bench: Bench) -> Iterator[Row]:
    """Training steps in eager mode; one process of ours stays for all peers."""
    peers = [
        ("Trainer, float32 (its default)", "trainer", {}, (">=", 2.8), True),
        ("Trainer, bf16", "trainer", {"bf16": True}, (">=", 2.0), True),
        ("Trainer, bf16, with our allocator setting", "trainer", {"bf16": True, "keeps_memory": True}, None, False),
        ("no_trainer loop, float32 (its default)", "no_trainer", {}, None, False),
        ("no_trainer loop, bf16", "no_trainer", {"bf16": True}, None, False),
        ("nanoGPT's step, bf16 (no dropout, no biases)", "nanogpt", {}, None, False),
    ]
    tokens = 8 * bench.settings.block_size
    with bench.contender("ours") as ours:
        ours.turn(2)
        for label, name, options, target, quick in peers:
            if quick or bench.full:
                with bench.contender(name, **options) as peer:
                    peer.turn(2)
                    pairs = take_turns(ours, peer, bench.rounds(3, 8), units=bench.rounds(1, 2))
                mine, other = medians(pairs)
                yield Row(f"step: {label}", rate(tokens, mine), rate(tokens, other), speeds(pairs), target)

        yield matrix_limit(bench, ours, "step")


def matrix_limit(bench: Bench, ours: Contender, label: str) -> Row:
    with bench.contender("products") as limit:
        limit.turn()
        pairs = take_turns(ours, limit, bench.rounds(4, 8))
    mine, other = (f"{seconds:.2f} s" for seconds in medians(pairs))
    return Row(f"{label}: share of the matrix limit", mine, f"{other} of products", speeds(pairs), (">=", 0.65))


def overhead(bench: Bench) -> Iterator[Row]:
    """The differences looked for are those of single steps' noise, hence the many rounds."""
    with bench.contender("ours") as ours, bench.contender("bare") as bare:
        ours.turn(2)
        bare.turn(2)
        pairs = take_turns(ours, bare, bench.rounds(6, 20))
    mine, other = medians(pairs)
    yield Row("step: the loop against the bare step", f"{mine:.3f} s", f"{other:.3f} s", shares(pairs), ("<=", 1.02))


def compiled(bench: Bench) -> Iterator[Row]:
    """Compilation is in the warm-up, and not measured here."""
    trainer = ("Trainer, bf16 + torch_compile", "trainer", {"bf16": True, "compile": True})
    nanogpt = ("nanoGPT's step, bf16, compiled", "nanogpt", {"compile": True})
    pairings = [
        ("ours eager (short runs)", {}, trainer, (">=", 1.3)),
        ("ours compiled", {"compile": True}, trainer, (">=", 1.3)),
        ("ours compiled", {"compile": True}, nanogpt, None),
        ("ours compiled", {"compile": True}, ("ours eager", "ours", {}), None),
    ]
    tokens = 8 * bench.settings.block_size
    for how, mine, (label, name, options), target in pairings:
        with bench.contender("ours", **mine) as ours, bench.contender(name, **options) as peer:
            ours.turn(3)
            peer.turn(3)
            pairs = take_turns(ours, peer, bench.rounds(3, 6))
        own, other = medians(pairs)
        yield Row(f"step, {how}: {label}", rate(tokens, own), rate(tokens, other), speeds(pairs), target)
    with bench.contender("ours", compile=True) as ours:
        ours.turn(3)
        yield matrix_limit(bench, ours, "step, ours compiled")


def memory(bench: Bench) -> Iterator[Row]:
    """The most memory of the process after two steps, one contender after the other."""
    contenders = [("trainer", {"bf16": True}), ("ours", {"precision": "bf16", "compile": True})]
    peaks, times = [], []
    for name, options in [*contenders, ("ours", {"precision": "bf16"})]:
        with bench.contender(name, block_size=1024, **options) as contender:
            contender.turn()
            times.append(contender.turn())
            peaks.append(contender.facts["gib"])
    for i, how in enumerate(("compiled", "eager"), 1):
        label = f"peak memory, 8 x 1024, ours {how}: Trainer, bf16"
        mine, other = (f"{peaks[each]:.1f} GiB, {times[each]:.0f} s" for each in (i, 0))
        yield Row(label, mine, other, [peaks[i] / peaks[0]], ("<=", 0.5))


def start(bench: Bench) -> Iterator[Row]:
    """From the start of the process to the end of the first step, with warm caches and without compilation."""
    bf16 = bench.facts["precision"] == "bf16"
    model, held_out = bench.work / "model", bench.work / "eval.jsonl"
    text, column, block = (getattr(bench.settings, key) for key in ("text", "text_column", "block_size"))
    given = {"model": str(model), "text": text, "eval_text": str(held_out), "text_column": column}
    guide = ["-m", "benchmarks.guide", json.dumps({**given, "block_size": block, "bf16": bf16})]
    flags = ["--model", model, "--train_files", text, "--eval_files", held_out, "--text_column", column]
    flags += ["--block_size", block, "--max_steps", 1, "--compile", "off", "--output_dir", bench.work / "run"]

    def ours() -> float:
        shutil.rmtree(bench.work / "run", ignore_errors=True)
        metrics = bench.work / "run" / "metrics.jsonl"
        return until(bench, ["train.py", *flags], lambda _: '"train"' in content(metrics), "start-ours")

    def peer() -> float:
        return until(bench, guide, lambda said: "first step" in said, "start-peer")

    ours(), peer()  # the caches are warm
    pairs = []
    for i in range(bench.rounds(2, 6)):
        second = peer() if i % 2 else None
        mine = ours()
        pairs.append((mine, second or peer()))
    mine, other = medians(pairs)
    label = f"start to the end of step 1: Trainer{', bf16' * bf16} (ours evaluates a block before)"
    yield Row(label, f"{mine:.1f} s", f"{other:.1f} s", shares(pairs), ("<=", 0.8))


def until(bench: Bench, command: list, reached: Callable[[str], bool], name: str) -> float:
    """Seconds from the start of the process until ``reached(its output)``; it is then ended."""
    log = bench.work / f"{name}.log"
    with open(log, "wb") as out:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, env=bench.environment(), stdout=out, stderr=out
        )
    try:
        while not reached(content(log)):
            if process.poll() is not None and not reached(content(log)):
                raise ContenderError(f"{name} has ended: {content(log)[-1500:]}")
            time.sleep(0.01)
        return time.perf_counter() - started
    finally:
        process.kill()
        process.wait()


def content(path: Path) -> str:
    """What is in the file, which may come and go."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def blocks(bench: Bench) -> Iterator[Row]:
    """Text to blocks in new processes with empty caches, imports and the tokenizer's loading left out."""

    def once(name: str, cache: Path, **options: Any) -> tuple[float, dict[str, Any]]:
        with bench.contender(name, cache, **options) as contender:
            return contender.turn(), contender.facts

    peers = [("the guide's maps", 4, False, (">=", 4.0))]
    if bench.full:
        peers += [("the same, num_proc=None", None, False, None), ("chain, num_proc=4", 4, True, None)]
        peers += [("chain, num_proc=None", None, True, None)]
    cached = []
    for label, num_proc, chained, target in peers:
        pairs = []
        for _ in range(bench.rounds(2, 3)):
            with tempfile.TemporaryDirectory(dir=bench.work) as directory:
                mine, ours = once("our_blocks", Path(directory) / "ours")
                options = {"num_proc": num_proc, "chained": chained}
                other, peer = once("guide_blocks", Path(directory) / "guide", **options)
                pairs.append((mine, other))
                if target:
                    again, _ = once("our_blocks", Path(directory) / "ours")
                    cached.append((again, mine))
        mine, other = medians(pairs)
        lost = ours["tokens"] - ours["documents"] - peer["tokens"]
        theirs = f"{other:.2f} s, {lost:,} tokens dropped"
        yield Row(f"text to blocks, cold: {label}", f"{mine:.2f} s, none dropped", theirs, speeds(pairs), target)
    mine, other = medians(cached)
    yield Row("text to blocks: cached against cold", f"{mine:.2f} s", f"{other:.2f} s", shares(cached), ("<=", 0.3))


def evaluation(bench: Bench) -> Iterator[Row]:
    number = 16 if not bench.full else 32
    with bench.contender("our_evaluation", blocks=number) as ours:
        ours.turn()
        for label, options in (("float32 (its default)", {}), ("bf16", {"bf16": True})):
            with bench.contender("trainer_evaluation", blocks=number, **options) as peer:
                peer.turn()
                pairs = take_turns(ours, peer, bench.rounds(3, 10))
                gap = abs(ours.facts["loss"] - peer.facts["loss"])
                if gap > 0.01:
                    raise ContenderError(f"evaluation: the losses differ by {gap:.4f}")
            (mine, other), tokens = medians(pairs), ours.facts["tokens"]
            label = f"evaluation: Trainer.evaluate, {label}"
            yield Row(label, rate(tokens, mine), rate(tokens, other), speeds(pairs), (">=", 2.0))


def generation(bench: Bench) -> Iterator[Row]:
    """Greedy; where both compute in float32 the texts must be the same."""
    variants = [("fp32", (">=", 1.0)), ("bf16", (">=", 1.0))]
    for batch in (1, 16):
        for precision, target in variants if bench.full else variants[:1]:
            options = {"batch": batch, "new_tokens": 48 if batch == 1 else 24, "precision": precision}
            with (
                bench.contender("our_generation", **options) as ours,
                bench.contender("pipeline_generation", **options) as peer,
            ):
                ours.turn()
                peer.turn()
                pairs = take_turns(ours, peer, bench.rounds(2, 5))
                same = ours.facts["texts"] == peer.facts["texts"]
                tokens = ours.facts["tokens"]
            if precision == "fp32" and not same:
                raise ContenderError(f"generation: other texts than the pipeline's: {ours.facts} {peer.facts}")
            (mine, other), note = medians(pairs), "the same tokens" if same else "other tokens"
            label = f"generation, batch {batch}, {precision} weights: pipeline, {note}"
            yield Row(label, rate(tokens, mine), rate(tokens, other), speeds(pairs), target)


def checkpoints(bench: Bench) -> Iterator[Row]:
    with bench.contender("our_checkpoint") as ours, bench.contender("plain_checkpoint") as plain:
        ours.turn()
        plain.turn()
        pairs = take_turns(ours, plain, bench.rounds(3, 6))
        size = plain.facts["bytes"] / 2**30
    mine, other = medians(pairs)
    label = f"a checkpoint's stall: {size:.2f} GiB written, hashed and synced"
    yield Row(label, f"{mine:.2f} s", f"{other:.2f} s", shares(pairs), ("<=", 1.2))


def trajectory(bench: Bench) -> Iterator[Row]:
    """200 steps each of a narrower model, as float32 at the full width would take a quarter of an hour."""
    shape = {"n_embd": 256, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    losses = []
    for precision in ("bf16", "fp32"):
        options = {"shape": shape, "learning_rate": 1e-3, "warmup": 20, "max_steps": 200}
        with bench.contender("ours", precision=precision, **options) as ours:
            ours.turn(200)
            losses.append(ours.facts["losses"])
    gap = statistics.mean(abs(low - exact) / exact for low, exact in zip(*losses, strict=True))
    label = "200 steps' losses, bf16 against float32: mean gap (6 x 256, whole vocabulary, no dropout)"
    last = [f"{losses[i][-1]:.4f} at the end" for i in (0, 1)]
    yield Row(label, *last, [100 * gap], ("<=", 0.5), "%")


def gpu(bench: Bench) -> Iterator[Row]:
    """What only a GPU can show: MFU by PaLM's convention, compiled, and the host syncs of steps without a log."""
    if not bench.facts["cuda"]:
        yield Row("MFU, block 1024, compiled; host syncs in a step", "no GPU at hand", "")
        return
    length = 1024
    for layers, name in ((6, "DistilGPT2"), (12, "GPT-2 124M")):
        options = {"shape": {"n_layer": layers}, "block_size": length, "compile": True}
        with bench.contender("ours", **options) as ours, bench.contender("trainer", bf16=True, **options) as peer:
            ours.turn(5)
            peer.turn(5)
            pairs = take_turns(ours, peer, bench.rounds(3, 8), units=20)
            peaks = ours.facts["gib"], peer.facts["gib"]
        (mine, other), tokens = medians(pairs), 8 * length
        label = f"{name}, 8 x 1024, compiled"
        yield Row(f"{label}: Trainer, bf16", rate(tokens, mine), rate(tokens, other), speeds(pairs), (">=", 1.5))
        yield Row(f"{label}: peak memory", *(f"{peak:.1f} GiB" for peak in peaks), [peaks[0] / peaks[1]], ("<=", 0.5))
        flops, peak = ours.facts["flops_per_token"] * tokens, ours.facts["peak_flops"]
        utilization = [100 * flops / seconds / peak for seconds, _ in pairs] if peak else []
        yield Row(
            f"{label}: MFU",
            "" if utilization else f"peak of {bench.facts['device']} unknown",
            "",
            utilization,
            (">=", 50),
            "%",
        )
    with bench.contender("ours", block_size=length, compile=True, count_syncs=True) as ours:
        ours.turn(2)
        before = ours.facts["syncs"]
        ours.turn(7)  # steps 3 to 9: the log comes at step 10
        yield Row("host syncs in 7 steps without a log", "", "", [ours.facts["syncs"] - before], ("<=", 0), "")


MEASUREMENTS: dict[Callable[[Bench], Iterator[Row]], bool] = {  # and whether the quick mode has it
    step: True,
    overhead: False,
    compiled: False,
    memory: False,
    start: True,
    blocks: True,
    evaluation: False,
    generation: False,
    checkpoints: True,
    trajectory: False,
    gpu: True,
}


# ---------------------------------------------------------------------------------------------------------------------
# The report


def heading(command: str, device: str) -> str:
    """What a table of results has to say first: command, commit, device, versions, date."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changes = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"""\
- command: `{command}`
- commit: {git("rev-parse", "--short", "HEAD") or "none"}{changes}
- device: {device}, {processor()}
- versions: Python {platform.python_version()}, {libraries}
- date: {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC
"""


def processor() -> str:
    """The CPU's name and how many of it there are."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    native = " with AVX512-BF16" if any("avx512_bf16" in line for line in lines if line.startswith("flags")) else ""
    return f"{cores} cores of {names[0] if names else platform.processor() or platform.machine()}{native}"


def table(rows: list[Row]) -> str:
    head = "| what: against whom | ours | peer | ratio: median (min-max) | target | |"
    return "\n".join([head, "| --- | --- | --- | --- | --- | --- |", *map(str, rows)])


def shown(argv: list[str], module: str = "bench") -> str:
    """The command without the directories of the machine that it ran on."""
    names = (Path(argument).name if argument.startswith("/") else argument for argument in argv)
    return " ".join([f"python -m benchmarks.{module}", *names])


def main() -> int:
    names = {measurement.__name__: measurement for measurement in MEASUREMENTS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all measurements, more rounds")
    parser.add_argument("--only", nargs="+", choices=names, help="these measurements alone; nothing is written")
    parser.add_argument("--text", default="quickstart/text.jsonl", help="JSON lines")
    parser.add_argument("--text_column", default="answers.text")
    parser.add_argument("--tokenizer", default="quickstart/smollm2", help="a directory; at most 50257 tokens")
    parser.add_argument("--model", default="quickstart/smollm2", help="a model's directory, for generation")
    parser.add_argument("--block_size", type=int, default=128)
    settings = parser.parse_args()
    chosen = [names[name] for name in settings.only or ()]
    chosen = chosen or [measurement for measurement, quick in MEASUREMENTS.items() if quick or settings.full]
    left_out = [name for name, measurement in names.items() if measurement not in chosen]

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # contenders and files do not outlive this
    began, failed = time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="bench-") as work:
        bench = Bench(settings, Path(work))
        with bench.contender("prepare") as prepared:
            bench.facts = prepared.facts
        rows = []
        for measurement in chosen:
            started = time.perf_counter()
            try:
                for row in measurement(bench):
                    rows.append(row)
                    print(row, flush=True)
            except ContenderError as error:
                failed.append(measurement.__name__)
                rows.append(Row(measurement.__name__, "failed", ""))
                print(f"{measurement.__name__}: {error}", file=sys.stderr, flush=True)
            print(f"({measurement.__name__}: {time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)

    facts, minutes = bench.facts, (time.perf_counter() - began) / 60
    left_out = f"Left out: {', '.join(left_out)}; `--full` has them. " if left_out else ""
    text = f"""# Measured side by side

{heading(shown(sys.argv[1:]), facts["device"])}
The step is that of DistilGPT2's shape from scratch ({facts["parameters"] / 1e6:.1f} M parameters, float32), batch
8 x {settings.block_size}, dropout 0.1, clipping, logging every 10 steps; ours in {facts["precision"]}. The text has {facts["tokens"]:,} tokens.
Generation is with {Path(settings.model).name}. Speeds are ours over the peer's; all other ratios are shares of the peer's.
{left_out}It took {minutes:.1f} minutes.

{table(rows)}
"""  # noqa: E501
    if not settings.only:
        RESULTS.write_text(text, encoding="utf-8")
    print(f"\n{text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

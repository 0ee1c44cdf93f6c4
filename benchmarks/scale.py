"""Many ranks: the table of formulas for GPUs, and measurements between processes of this machine.

    python -m benchmarks.scale --table --write     memory, traffic and efficiency by formula, into docs/scale.md
    python -m benchmarks.scale --write             weak scaling on 1, 2 and 4 Gloo ranks, into benchmarks/SCALE.md
    python -m benchmarks.scale --only Memory       one of its two measurements

Without --write they are printed alone. Ranks are started by torchrun, and make the steps of train.py. Those of all rows
take turns, so that a machine that is slow for a minute is slow for all.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from benchmarks.bench import ROOT, Contender, heading, short, shown
from benchmarks.formulas import DOCUMENT, gpt2, shape_of, state_bytes, table, with_table
from distributed.world import DistributedConfig, World
from modeling.precision import keep_freed_memory

RESULTS = ROOT / "benchmarks" / "SCALE.md"

# ---------------------------------------------------------------------------------------------------------------------
# A rank


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    """Weights, gradients and moments that this rank holds after a step: `state_bytes`, counted."""
    parameters = list(model.parameters())
    moments = (value for state in optimizer.state.values() for key, value in state.items() if key != "step")
    tensors = parameters, [p.grad for p in parameters if p.grad is not None], moments
    return tuple(sum(local(tensor).nbytes for tensor in kind) for kind in tensors)


def resident(peak: bool) -> int:
    """Bytes of memory that this process has, or has had at most (Linux)."""
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])


def count_waiting() -> list[float]:
    """From now on, the seconds that this process spends in FSDP2's collectives, which on CPUs nothing overlaps."""
    waited = [0.0]
    for name in ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor"):
        if (call := getattr(dist, name, None)) is not None:  # torch has renamed them

            def timed(*arguments: Any, call: Callable = call, **options: Any) -> Any:
                started = time.perf_counter()
                try:
                    return call(*arguments, **options)
                finally:
                    waited[0] += time.perf_counter() - started

            setattr(dist, name, timed)
    return waited


def work(o: dict[str, Any]) -> None:
    """A rank, which makes as many steps of a kind as rank 0 reads from its stdin, line by line."""
    import train

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    waited, facts, empty = count_waiting(), {}, 0
    if o["keeps_memory"]:
        keep_freed_memory()
    with World(DistributedConfig(o["strategy"])) as world:
        torch.manual_seed(world.rank)
        shape, device = (o["layers"], o["width"], o["width"] // 64, o["vocabulary"], o["length"]), torch.device("cpu")
        ids = torch.randint(o["vocabulary"], (o["batch"], o["length"]))
        batch = {"input_ids": ids, "labels": ids}
        empty = resident(peak=False)
        with torch.device("meta" if world.rank else device):
            model = gpt2(*shape)
        model = world.parallelize(model, device, o["precision"], o["length"])
        model.train()
        optimizer = train.make_optimizer(model, 0.01)
        scaler, sync = torch.amp.GradScaler("cpu", enabled=False), world.sync_gradients

        def ours(number: int = o["micro_batches"]) -> None:  # at a learning rate of 0, so that all steps are alike
            train.train_step(model, optimizer, scaler, [batch] * number, 0.0, 1.0, o["precision"], world)

        def unsynced() -> None:
            world.sync_gradients = lambda model, is_last: sync(model, False)
            ours()
            world.sync_gradients = sync

        steps = {"ours": ours, "unsynced": unsynced}
        while line := world.on_main(sys.stdin.readline):
            kind, number = line.split()
            if kind not in steps:
                steps[kind] = bare_step(gpt2(*shape), ids, world)
                steps[kind]()
            waited[0], started = 0.0, time.perf_counter()
            for _ in range(int(number)):
                steps[kind]()
            world.all_reduce(torch.zeros(1))  # all have made them
            elapsed = time.perf_counter() - started
            if "held" not in facts:  # before there is another model
                facts["held"] = world.on_all(lambda: held_bytes(model, optimizer))
                facts["grown"] = world.on_all(lambda: resident(peak=True) - empty)
                facts["sent"] = collectives(ours) if o["counts"] else []
            if world.is_main:
                print(json.dumps({"seconds": elapsed, "waited": waited[0], **facts}), file=answers, flush=True)


def bare_step(model: PreTrainedModel, ids: torch.Tensor, world: World) -> Callable[[], None]:
    """The bare minimum: DistributedDataParallel in its defaults, the model's own loss, clipping, fused AdamW."""
    model.train()
    spread = torch.nn.parallel.DistributedDataParallel(model) if world.size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        spread(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def collectives(step: Callable[[], None]) -> list[tuple[str, int]]:
    """Gloo's collectives of a step, by the profiler: their names and the bytes that this rank puts in."""
    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    sizes = {"c10::BFloat16": 2, "float": 4, "double": 8}
    events = [event for event in profile.profiler.kineto_results.events() if event.name().startswith("gloo:")]
    return [(e.name(), sum(size for (size,) in e.shapes()) * sizes[e.dtypes()[0]]) for e in events]


# ---------------------------------------------------------------------------------------------------------------------
# The driver

MEASURED = {"layers": 4, "width": 384, "vocabulary": 8192, "length": 128, "batch": 4, "precision": "fp32"}
MEASURED |= {"micro_batches": 1, "counts": False, "keeps_memory": True}
JOBS = ((1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp"))  # number of ranks, strategy


class Ranks(Contender):
    """A torchrun whose ranks wait for their turns, asleep."""

    def __init__(self, number: int, strategy: str, log: Path, **options: Any):
        self.name, self._log, self.number, self.strategy = f"{number} ranks, {strategy}", log, number, strategy
        self.said = strategy if number > 1 else "(none)"
        given = {**MEASURED, "strategy": strategy, **options}
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        if not given["keeps_memory"]:
            env["MALLOC_MMAP_THRESHOLD_"] = "65536"
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}", "-m"]
        with open(log, "ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *command, "benchmarks.scale", "--work", json.dumps(given)],
                cwd=ROOT,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def turn(self, units: int = 1, kind: str = "ours") -> float:
        """Seconds of a step. What else the ranks say is in ``facts``."""
        print(kind, units, file=self._process.stdin, flush=True)
        self.facts = self._answer()
        return self.facts["seconds"] / units


def spread(values: list[float], unit: str = "", scale: float = 1) -> str:
    """Median with the smallest and the largest."""
    middle, *ends = (short(scale * value) + unit for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({ends[0]}-{ends[1]})"


def speed(settings: argparse.Namespace) -> str:
    """Weak scaling: all jobs are alive, and one after the other makes its steps, round by round."""
    with tempfile.TemporaryDirectory(prefix="scale-") as directory, ExitStack() as stack:
        jobs = [Ranks(*job, Path(directory) / f"{i}.log") for i, job in enumerate(JOBS)]
        for job in jobs:
            stack.callback(job.stop)
        kinds = {job: ["ours", "bare", "unsynced"] if job.strategy == "ddp" else ["ours"] for job in jobs}
        kinds[jobs[0]].remove("unsynced")
        for job in jobs:
            for kind in kinds[job]:
                job.turn(2, kind)
        times = {(job, kind): [] for job in jobs for kind in kinds[job]}
        shares = {job: [] for job in jobs}
        for _ in range(settings.rounds):
            for job in jobs:
                for kind in kinds[job]:
                    times[job, kind].append(job.turn(settings.steps, kind))
                    if job.strategy == "fsdp":
                        shares[job].append(job.facts["waited"] / job.facts["seconds"])
                if "unsynced" in kinds[job]:
                    shares[job].append(1 - times[job, "unsynced"][-1] / times[job, "ours"][-1])
    cores, one, o = len(os.sched_getaffinity(0)), times[jobs[0], "ours"], MEASURED
    bares, rows = {job.number: times[job, "bare"] for job in jobs if job.strategy == "ddp"}, []
    for job in jobs:
        ours, bare = times[job, "ours"], bares[job.number]
        tokens = job.number * o["batch"] * o["length"] / statistics.median(ours)
        name = f"{job.number}{f' (on {cores} cores)' if job.number > cores else ''}"
        kept = spread([a / b for a, b in zip(one, ours, strict=True)], "%", 100) if job.number > 1 else ""
        against = spread([a / b for a, b in zip(ours, bare, strict=True)], "x")
        share = spread(shares[job], "%", 100) if shares[job] else ""
        row = [name, job.said, spread(ours), f"{tokens:,.0f}", kept, against, share]
        rows.append(f"| {' | '.join(row)} |")
    return f"""\
{described(o)}, {o["batch"]} x {o["length"]} tokens a rank and step, one thread a rank, Gloo on
one machine. Medians (min-max) of {settings.rounds} rounds, in each of which all rows had {settings.steps} step(s), one row after the other.

| ranks | strategy | a step, s | tokens/s | 1 rank's time / this | ours / bare DDP | exchange, of a step |
| --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

- Ranks beyond the number of cores take turns: on {cores} cores, 4 ranks can reach {100 * min(1, cores / 4):.0f}% of 1 rank's speed at best. Ranks of one
  machine share its memory bandwidth as well. Nothing here is said about a network or GPUs.
- Bare DDP is `DistributedDataParallel(model)` in its defaults: the model's own loss, backward pass, `clip_grad_norm_`, fused
  AdamW, nothing else; on 1 rank the same without DDP. fsdp is held against it too.
- The exchange of ddp is what a step takes longer than one under `no_sync`: a part of it lies behind the backward pass. That of
  fsdp is the time in all-gathers and reduce-scatters, which on CPUs nothing overlaps. Both have the waiting for slower ranks.
"""  # noqa: E501


def memory_held(settings: argparse.Namespace) -> str:
    """What ranks hold, each job alone and in new processes."""
    o, rows = {**MEASURED, "width": 768, "batch": 1, "keeps_memory": False}, []
    s = shape_of(gpt2(o["layers"], o["width"], o["width"] // 64, o["vocabulary"], o["length"]))
    with tempfile.TemporaryDirectory(prefix="scale-") as directory:
        for number, strategy in JOBS:
            job = Ranks(number, strategy, Path(directory) / "log", **o)
            try:
                job.turn(3)
            finally:
                job.stop()
            counted = max(map(sum, job.facts["held"])), sum(state_bytes(s, number, strategy)), max(job.facts["grown"])
            rows.append(f"| {number} | {job.said} | {' | '.join(f'{size / 2**20:,.0f}' for size in counted)} |")
    return f"""\
{described(o)}, {o["batch"]} x {o["length"]} tokens a rank and step. In MiB, of the rank with most:

| ranks | strategy | weights, gradients, moments | the same by formula | growth of the process at its peak |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

The growth is that of the resident memory, from before the model is made to its peak within three steps: with activations,
what FSDP gathers, what Gloo holds. glibc was told to give each larger block back at once (MALLOC_MMAP_THRESHOLD_=65536): with
its defaults, what FSDP gathers and frees leaves holes in the heap, and a rank of fsdp grew more than one of ddp.
"""  # noqa: E501


def described(o: dict[str, Any]) -> str:
    s = shape_of(gpt2(o["layers"], o["width"], o["width"] // 64, o["vocabulary"], o["length"]))
    return f"A GPT-2 of {o['layers']} layers x {o['width']} ({s.parameters / 1e6:.1f} M parameters), float32"


SECTIONS = {"Speed": speed, "Memory": memory_held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="what the formulas say, and measure nothing")
    parser.add_argument("--write", action="store_true", help="to docs/scale.md or benchmarks/SCALE.md as well")
    parser.add_argument("--only", choices=SECTIONS, help="this measurement; the other one's section stays as it is")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=1, help="of a row in a round")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.work:
        return work(settings.work)
    if settings.table:
        print(table())
        if settings.write:
            DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
        return None
    written = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    found = dict(re.findall(r"^## (\w+)\n\n(.*?)(?=\n## |\Z)", written, re.DOTALL | re.MULTILINE))
    for name in [settings.only] if settings.only else SECTIONS:
        head = heading(shown(sys.argv[1:], "scale"), "CPU (1 thread a rank)")
        found[name] = f"{head}\n{SECTIONS[name](settings)}"
        print(found[name])
    if settings.write:
        sections = (f"## {name}\n\n{found[name]}" for name in SECTIONS if name in found)
        RESULTS.write_text("# Many ranks on one machine\n\n" + "\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()

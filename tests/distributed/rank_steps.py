"""Steps of train.py on ranks that torchrun starts, with the bytes that each rank holds and sends.

job = Ranks(2, "fsdp", directory / "log", layers=3, width=64, precision="bf16", micro_batches=2)
job.turn(3)                                                         # three steps
job.facts["held"], job.facts["sent"]
job.stop()
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import train
from benchmarks.bench import Contender
from benchmarks.formulas import gpt2
from distributed.world import DistributedConfig, World

SHAPE = {"layers": 3, "width": 64, "vocabulary": 1000, "length": 64, "batch": 2}


class Ranks(Contender):
    """A torchrun with ranks that wait for their turns."""

    def __init__(self, number: int, strategy: str, log: Path, **options: Any):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}", __file__]
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": "."}
        options = json.dumps({**SHAPE, "strategy": strategy, **options})
        super().__init__(f"{number} ranks, {strategy}", [*torchrun, options], log, os.environ | environment)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, ...]:
    """Return the bytes of weights, gradients and moments that this rank holds after a step."""
    parameters = list(model.parameters())
    moments = (value for state in optimizer.state.values() for key, value in state.items() if key != "step")
    tensors = parameters, [p.grad for p in parameters if p.grad is not None], moments
    return tuple(sum(local(tensor).nbytes for tensor in kind) for kind in tensors)


def collectives(step: Callable[[], None]) -> list[tuple[str, int]]:
    """Profile a step. Return the names of Gloo's collectives, and the bytes that this rank puts into each."""
    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    sizes = {"c10::BFloat16": 2, "float": 4, "double": 8}
    events = [event for event in profile.profiler.kineto_results.events() if event.name().startswith("gloo:")]
    return [(e.name(), sum(size for (size,) in e.shapes()) * sizes[e.dtypes()[0]]) for e in events]


def work(o: dict[str, Any]) -> None:
    """Make the number of steps that rank 0 reads from each line of its stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with World(DistributedConfig(o["strategy"])) as world:
        torch.manual_seed(world.rank)
        device = torch.device("cpu")
        ids = torch.randint(o["vocabulary"], (o["batch"], o["length"]))
        with torch.device("meta" if world.rank else device):
            model = gpt2(o["layers"], o["width"], o["width"] // 64, o["vocabulary"], o["length"])
        model = world.parallelize(model, device, o["precision"], o["length"])
        model.train()
        optimizer = train.make_optimizer(model, 0.01)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        micro_batches = [{"input_ids": ids, "labels": ids}] * o["micro_batches"]

        def step() -> None:
            train.train_step(model, optimizer, scaler, micro_batches, 0.0, 1.0, o["precision"], world)

        def answer(**facts: Any) -> None:
            if world.is_main:
                print(json.dumps({"seconds": 0.0, **facts}), file=answers, flush=True)

        answer()
        while line := world.on_main(sys.stdin.readline):
            for _ in range(int(line)):
                step()
            answer(held=world.on_all(lambda: held_bytes(model, optimizer)), sent=collectives(step))


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))

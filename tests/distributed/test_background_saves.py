"""Ranks that save in the background. Each writes its part in a thread. If one fails, all end."""

import json

import pytest
from conftest import ROOT, checkpoint_bytes, start_ranks

from training.checkpoint import verify

SAVING = """
import os
import time
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from cli.errors import SaveError, run_script
from distributed.world import DistributedConfig, World
from training import checkpoint


class SlowShards(checkpoint._Shards):
    def write(self):
        time.sleep(0.5 * World.rank_here)
        if World.fails_here:
            raise OSError(28, "No space left on device")
        super().write()


def save(path, tensors, world, in_background):
    for written in checkpoint.start_save(Path(path), tensors, {}, world, in_background):
        before = world.on_all(written.done)
        world.all_reduce(torch.ones(1))  # as a step of training does
        for tensor in tensors["weights"].values():
            tensor.zero_()
        Path(f"{path}-{world.rank}.done").write_text(f"{before}")


def main():
    checkpoint._Shards = SlowShards
    with World(DistributedConfig(rank_timeout=60)) as world:
        World.rank_here, World.fails_here = world.rank, False
        mesh = init_device_mesh("cpu", (world.size,))
        for strategy in ("ddp", "fsdp"):
            for in_background in (False, True):
                full = {name: torch.arange(float(rows * 4)).view(rows, 4) for name, rows in (("a", 5), ("b", 3))}
                if strategy == "fsdp":
                    full = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in full.items()}
                tensors = {"weights": full, "optimizer": {"a:step": torch.ones(())}}
                save(f"{strategy}-{in_background}", tensors, world, in_background)
        World.fails_here = world.rank == 1
        try:
            save("failed", tensors, world, True)
        except SaveError as error:
            Path("error").write_text(str(error))
            raise


run_script(main)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("background")
    (cwd / "saving.py").write_text(SAVING)
    ranks = start_ranks(2, cwd=cwd, env={"PYTHONPATH": str(ROOT)}, script=cwd / "saving.py")
    try:
        assert [rank.wait(120) for rank in ranks] == [5, 5], [rank.stderr for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return cwd, ranks


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_write_what_they_write_in_a_synchronous_save(saved, strategy):
    cwd, _ = saved
    ours, theirs = cwd / f"{strategy}-True", cwd / f"{strategy}-False"
    files, expected = (json.loads((path / "manifest.json").read_text()) for path in (ours, theirs))
    assert files.keys() == expected.keys() and verify(ours) is None
    assert sum(name.startswith("weights/") for name in files) == 2  # one of each rank
    assert checkpoint_bytes(ours) == checkpoint_bytes(theirs)
    assert "False" in (cwd / f"{strategy}-True-0.done").read_text()


def test_a_disk_that_is_full_on_one_rank_ends_all(saved):
    cwd, ranks = saved
    (line,) = [line for rank in ranks for line in rank.stderr.splitlines()]
    assert line.startswith(f"saving.py: error: rank 1: {cwd}/failed: cannot be saved ([Errno 28] No space left")
    assert not [path for path in cwd.iterdir() if "being-written" in path.name or path.name == "failed"]

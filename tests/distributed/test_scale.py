"""The formulas of benchmarks/formulas.py against counted bytes, and the table in docs/scale.md."""

import pytest
import torch
from conftest import ROOT, start_ranks
from rank_steps import SHAPE, Ranks

from benchmarks import formulas
from modeling.architectures import recompute_activations
from modeling.compile import compile_layers
from modeling.loss import next_token_nll
from modeling.precision import autocast, set_dtypes
from modeling.trained import LoraConfig, add_lora


def test_the_document_holds_what_the_formulas_say():
    document = formulas.DOCUMENT.read_text(encoding="utf-8")
    assert document.count(formulas.BEGIN) == document.count(formulas.END) == 1
    assert formulas.with_table(document) == document


def test_shapes_are_the_published_ones():
    with torch.device("meta"):
        shapes = [formulas.shape_of(make()) for make, _ in formulas.MODELS.values()]
    counts = [124_439_808, 354_823_168, 1_557_611_200, 8_030_261_248, 13_015_864_320, 70_553_706_496]
    assert [shape.parameters for shape in shapes] == counts
    assert all(shape.root + shape.layers * shape.block == shape.parameters for shape in shapes)
    states = formulas.state_bytes(shapes[3], 8, "fsdp")
    assert sum(states) == 16 * 8_030_261_248 / 8 and states[2] == 2 * states[0]


def saved_bytes(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Return the bytes of the storages that autograd keeps. Each counts once, parameters not at all."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # keeps the address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(ids.device, "bf16"):
        nll = next_token_nll(model, ids, ids)
    assert nll.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_activations_are_what_autograd_keeps(kind, strategy, checkpointing):
    """fsdp's gathered weights are bfloat16. With checkpointing, the recomputed layer is not seen here."""
    if kind == "gpt2":
        model = formulas.gpt2(4, 128, 4, vocabulary=500, length=256)  # longer than SHORT_BLOCK: flash attention
    else:
        model = formulas.llama(500, 128, 320, 4, 4, 2)
    model.train()
    s, ids = formulas.shape_of(model), torch.randint(500, (2, 256))
    if strategy == "fsdp":
        model.to(torch.bfloat16)
    if checkpointing:
        recompute_activations(model)
    expected = formulas.kept_bytes(s, ids.numel(), strategy, checkpointing, device="cpu")
    if checkpointing:
        expected -= ids.numel() * formulas.layer_bytes(s, strategy, "cpu")
    elif strategy == "ddp":
        expected += formulas.copied_bytes(s, strategy)
    assert saved_bytes(model, ids) == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_compiled_layers_keep_more_than_their_inputs_with_selective_checkpointing():
    kept = {}
    for choice in ("off", "selective", "full"):
        model, ids = formulas.llama(500, 128, 320, 4, 4, 2).train(), torch.randint(500, (2, 256))
        if choice != "off":
            recompute_activations(model, choice)
        compile_layers(model, 256)
        kept[choice] = saved_bytes(model, ids)
    assert 1.2 * kept["full"] < kept["selective"] < 0.9 * kept["off"], kept


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_holds_and_keeps_what_the_formulas_say(checkpointing):
    for tied in (False, True):
        model = formulas.llama(500, 128, 320, 4, 4, 2, tied).train()
        s, ids = formulas.shape_of(model), torch.randint(500, (2, 256))
        add_lora(model, LoraConfig(lora_rank=8))
        set_dtypes(model, torch.bfloat16, only_frozen=True)
        frozen, trained = ([p for p in model.parameters() if p.requires_grad is kind] for kind in (False, True))
        assert sum(p.nbytes for p in frozen) == formulas.frozen_bytes(s)
        assert sum(p.numel() for p in trained) == formulas.adapter_parameters(s, 8)
        if checkpointing:
            recompute_activations(model)
        expected = formulas.lora_kept_bytes(s, ids.numel(), 8, checkpointing)
        if checkpointing:  # without the layer that is computed again
            expected -= formulas.lora_layer_bytes(s, ids.numel(), 8)
        assert saved_bytes(model, ids) == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, strategy, precision, micro_batches", [(2, "fsdp", "bf16", 2), (2, "ddp", "bf16", 2), (3, "fsdp", "fp32", 1)]
)
def test_ranks_hold_and_send_what_the_formulas_say(ranks, strategy, precision, micro_batches, tmp_path):
    job = Ranks(ranks, strategy, tmp_path / "log", precision=precision, micro_batches=micro_batches)
    try:
        job.turn(3)  # DistributedDataParallel rebuilds its buckets after the first step
    finally:
        job.stop()
    s = formulas.shape_of(formulas.gpt2(SHAPE["layers"], SHAPE["width"], 1, SHAPE["vocabulary"], SHAPE["length"]))
    expected = formulas.state_bytes(s, ranks, strategy)
    near = 0.02 if s.width % ranks == 0 else 0.1  # shards are whole rows, and each rank sends the same number of rows
    assert len(job.facts["held"]) == ranks
    for held in job.facts["held"]:
        assert held == pytest.approx(expected, rel=near)
    whole = [sum(kind) for kind in zip(*job.facts["held"], strict=True)]
    assert whole == [part * ranks for part in expected]
    # A rank puts in its share of each gather, and all gradients. Gloo turns a reduce-scatter into an all-reduce.
    gathered = sum(size for name, size in job.facts["sent"] if name == "gloo:all_gather") * (ranks - 1)
    reduced = sum(size for name, size in job.facts["sent"] if name != "gloo:all_gather") * (ranks - 1) / ranks
    sent = gathered + reduced * (2 if strategy == "ddp" else 1)
    width = 2 if precision == "bf16" else 4
    assert sent == pytest.approx(formulas.sent_bytes(s, ranks, strategy, micro_batches, width), rel=near)
    assert strategy == "fsdp" or not gathered


SAVING = """
import ctypes
import json
import re
import shutil
import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.formulas import gpt2
from cli.errors import run_script
from distributed import parallel
from distributed.world import DistributedConfig, World
from distributed import saving
from modeling.precision import keep_freed_memory
from training import checkpoint


def status(key):
    return 1024 * int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])


def grown(work):
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be used again
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts at VmRSS
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def save(rows, world, mesh):
    def tensor(rows):
        local = torch.ones(rows, 512)
        return DTensor.from_local(local, mesh, [Shard(0)]) if mesh else local

    groups = {"weights": {str(i): tensor(number) for i, number in enumerate(rows)}}
    groups["optimizer"] = {f"{i}:{name}": tensor(number) for i, number in enumerate(rows) for name in ("m", "v")}
    return grown(lambda: checkpoint.save(Path("saved"), groups, {}, world))


def save_model(world):
    saving.FILE_SIZE = "40MB"
    model = gpt2(8, 512, 8, vocabulary=4096)
    parallel.shard(model, torch.device("cpu"), "fp32")
    Path("model").mkdir(exist_ok=True)
    return grown(lambda: saving.save_sharded(model, Path("model"), parallel.full_tensor, writes=world.is_main))


def main():
    rows = json.loads(sys.argv[1])
    if rows:
        keep_freed_memory()  # as in training on a CPU
    else:
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: freed memory is given back, so that no hole counts
    with World(DistributedConfig()) as world:
        mesh = init_device_mesh("cpu", (world.size,)) if world.size > 1 else None
        save([1], world, mesh)  # what is imported and allocated once
        print(save(rows, world, mesh) if rows else save_model(world), flush=True)
        world.on_main(lambda: [shutil.rmtree(path) for path in Path().iterdir() if path.is_dir()])


run_script(main)
"""
EVEN, LARGE_LAST = [2048] * 24, [1024] * 15 + [15 << 10] + [512] * 2 + [25 << 9]  # rows of 2 KiB


def grown_by_saving(ranks, rows, cwd):
    """Return the growth of each rank's memory in bytes while it saves tensors of ``rows`` rows, or a model."""
    (cwd / "saving.py").write_text(SAVING)
    started = start_ranks(ranks, rows, cwd=cwd, env={"PYTHONPATH": str(ROOT)}, script=cwd / "saving.py")
    try:
        assert [rank.wait(120) for rank in started] == [0] * ranks, [rank.stderr for rank in started]
    finally:
        for rank in started:
            rank.kill()
    return [int(rank.stdout) for rank in started]


@pytest.mark.parametrize(
    "ranks, rows",
    [
        (1, LARGE_LAST),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, EVEN), (2, EVEN), (2, LARGE_LAST))),
    ],
)
def test_a_checkpoint_adds_the_memory_that_the_formula_says(ranks, rows, tmp_path):
    """It is at most a quarter of the shard, or twice its largest tensor."""
    shard, largest = 3 * 2048 * sum(rows), 2048 * max(rows)
    expected = formulas.checkpoint_bytes(shard * 2 // 3, largest, "cpu")
    assert expected <= max(shard / 4, 2 * largest)
    assert grown_by_saving(ranks, rows, tmp_path) == pytest.approx([expected] * ranks, rel=0.1)


@pytest.mark.slow
def test_a_sharded_model_adds_the_memory_that_the_formula_says(tmp_path):
    s = formulas.shape_of(formulas.gpt2(8, 512, 8, vocabulary=4096))
    added, _ = grown_by_saving(2, [], tmp_path)
    assert added == pytest.approx(formulas.model_bytes(s, 40e6), rel=0.1)

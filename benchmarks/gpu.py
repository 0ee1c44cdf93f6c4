"""Measure on one GPU. This is planned for 10 minutes, and no GPU has run it yet.

The table goes to benchmarks/results/<device>.md.

    make bench-gpu
    python -m benchmarks.gpu --only gpt2 head         these parts; prints them and writes nothing
    python -m benchmarks.gpu --tiny                   tiny shapes on any device, to test this file

Contenders are processes of `benchmarks.contenders`, one after the other, on random tokens in batches of 8. MFU is
`flops_per_token` over the peak of the device. If something fails, its row shows the error, and the next one follows.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from benchmarks.bench import heading, processor, results_file, running, spread
from benchmarks.contenders import BATCH, fresh_model, shape, synchronized_time
from modeling.checks import check_isolated
from modeling.linear_cross_entropy import linear_cross_entropy
from modeling.loss import next_token_nll
from modeling.precision import autocast, device_name, select_device
from training.flops import flops_per_token, peak_flops

HEADER = "| part | what | ms: median (min-max) | tokens/s | MFU | peak GiB | time / ours: median (min-max) | |"
LIMIT = 150  # seconds for a contender, with its start and its compilation
GPT2 = {"n_layer": 12, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TINY_GPT2 = GPT2 | {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 400}
LLAMA = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}
TINY_LLAMA = {"vocab_size": 400, "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2}
TINY_LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}

TRAINER, COMPILE = {"bf16": True}, {"compile": True}
PADDED = {"shape": GPT2 | {"vocab_size": 50304}}  # nanoGPT's default
# Part, row, contender, its options, and the MFU to reach. Rows are compared with our last row before them.
STEPS: list[tuple[str, str, str, dict[str, Any], float | None]] = [
    ("gpt2", "ours", "ours", {}, None),
    ("gpt2", "Trainer, bf16", "trainer", TRAINER, None),
    ("gpt2", "nanoGPT's step", "nanogpt", PADDED, None),
    ("gpt2", "ours, compiled", "ours", COMPILE, 40),
    ("gpt2", "Trainer, bf16 + torch_compile", "trainer", TRAINER | COMPILE, None),
    ("gpt2", "nanoGPT's step, compiled", "nanogpt", PADDED | COMPILE, None),
    ("flags", "ours, --deterministic off", "ours", {"deterministic": "off"}, None),
    ("flags", "--deterministic on", "ours", {"deterministic": "on"}, None),
    ("flags", "--pack documents", "ours", {"pack": "documents"}, None),
    ("flags", "host syncs", "ours", {"count_syncs": True}, None),
    ("flags", "host syncs, --pack documents", "ours", {"count_syncs": True, "pack": "documents"}, None),
    ("flags", "torchrun, --strategy ddp", "ours", {"strategy": "ddp"}, None),
    ("flags", "torchrun, --strategy fsdp", "ours", {"strategy": "fsdp"}, None),
    ("llama", "ours", "ours", {}, None),
    ("llama", "Trainer, bf16", "trainer", TRAINER, None),
    ("llama", "ours, compiled", "ours", COMPILE, 50),
    ("llama", "Trainer, bf16 + torch_compile", "trainer", TRAINER | COMPILE, None),
]


def steps(part: str, tiny: bool) -> Iterator[list[str]]:
    """Measure training steps of GPT-2 124M without dropout, or of a Llama of 1.2 B parameters."""
    family, sizes = ("llama", (LLAMA, TINY_LLAMA)) if part == "llama" else ("gpt2", (GPT2, TINY_GPT2))
    o = {"family": family, "shape": sizes[tiny], "block_size": 32 if tiny else 1024}
    with torch.device("meta"):
        flops = BATCH * o["block_size"] * flops_per_token(AutoModelForCausalLM.from_config(shape(o)), o["block_size"])
    peak, reference = peak_flops(device_name(select_device())), []
    for _, label, name, options, target in (run for run in STEPS if run[0] == part):
        options = o | options | ({"shape": sizes[tiny], "compile": False} if tiny else {})
        try:
            laps, gib, syncs = run_laps(name, options)
        except Exception as error:
            yield [label, failed(error)]
            continue
        reference = laps if label.startswith("ours") else reference
        mfu = [100 * flops / seconds / peak for seconds in laps] if peak else []
        reached = mfu and target and ("met" if statistics.median(mfu) >= target else "**missed**")
        note = f"{syncs} host syncs in 6 steps without a log" if "count_syncs" in options else ""
        note = f">= {target}%: {reached}" if reached else note
        yield [label, *compared(laps, reference, BATCH * o["block_size"], spread(mfu, "%") if mfu else "", gib), note]


def run_laps(name: str, o: dict[str, Any]) -> tuple[list[float], float, int]:
    """Return the seconds of a step in 5 laps of 10 steps, the peak of memory in GiB, and the host syncs in 6 steps."""
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as work:
        options, log = {**o, "work": work}, Path(work) / "log"
        with running(name, options, log, dict(os.environ), limit=LIMIT, torchrun="strategy" in o) as contender:
            contender.turn(3)  # compiles; the first and the 10th step are logged
            before = contender.facts.get("syncs", 0)
            contender.turn(6)
            syncs = contender.facts.get("syncs", 0) - before
            return [contender.turn(10) for _ in range(5)], contender.facts["gib"], syncs


def compared(laps: list[float], reference: list[float], tokens: int, mfu: str, gib: float) -> list[str]:
    """Return the cells of a measurement and of its time over the median of ``reference``."""
    ratios = [seconds / statistics.median(reference) for seconds in laps] if reference else []
    times, rate = spread([1e3 * seconds for seconds in laps]), f"{tokens / statistics.median(laps):,.0f}"
    return [times, rate, mfu, f"{gib:.2f}", spread(ratios, "x") if ratios else ""]


def head(part: str, tiny: bool) -> Iterator[list[str]]:
    """Compare the cross-entropy of a linear head, forward and gradients, with F.cross_entropy on whole logits."""
    device = select_device()
    for vocabulary, width in ((101, 16), (128, 16)) if tiny else ((50257, 768), (50304, 768), (128256, 2048)):
        hidden = torch.randn(64 if tiny else 8192, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(vocabulary, width, device=device).mul_(0.02).requires_grad_()
        targets = torch.randint(vocabulary, (len(hidden),), device=device)

        def ours(compiled: bool = False, operands: tuple = (hidden, weight, None, targets)) -> None:
            linear_cross_entropy(*operands, compiled=compiled, needs_grad=(True, True, False))

        def whole(inputs: tuple = (hidden, weight), targets: torch.Tensor = targets) -> None:
            torch.autograd.grad(F.cross_entropy(F.linear(*inputs), targets, reduction="sum"), inputs)

        reference = None
        for label, work in (("ours, compiled", partial(ours, True)), ("ours", ours), ("F.cross_entropy", whole)):
            try:
                seconds, gib = time_calls(work, device)
            except Exception as error:
                yield [label, failed(error)]
                continue
            reference = reference or seconds
            size = f"{len(hidden)} x {width} to {vocabulary}"
            yield [f"{label}, {size}", *compared(seconds, reference, len(hidden), "", gib)]


def time_calls(work: Callable[[], None], device: torch.device) -> tuple[list[float], float]:
    """Return the seconds of 10 calls in bf16, and the GiB that a call adds at its peak on a GPU."""
    seconds, gib = [], 0.0
    with autocast(device, "bf16"):
        for _ in range(13):
            started = synchronized_time()
            work()
            seconds.append(synchronized_time() - started)
        if device.type == "cuda":
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            work()
            gib = (torch.cuda.max_memory_allocated() - held) / 2**30
            torch.cuda.empty_cache()  # the next part is another process
    return seconds[3:], gib


def gradients(part: str, tiny: bool) -> Iterator[list[str]]:
    """Compare gradients of packed documents with each attention to sdpa's with the dense mask. eager shows rounding."""
    o, device, expected = {"family": "llama", "shape": TINY_LLAMA}, select_device(), []
    ids = torch.randint(400, (2, 64 if tiny else 512), generator=torch.Generator().manual_seed(0)).to(device)
    positions = (torch.arange(ids.shape[1], device=device) % 48).expand_as(ids)  # documents of 48 tokens
    for attention in ("sdpa", "eager", "flash_attention_2", "flex_attention"):
        try:
            model = fresh_model(o, attn_implementation=attention)
            check_isolated(model, ids.shape[1], "bf16", keep_attention=True)
            with autocast(device, "bf16"):
                next_token_nll(model, ids, ids.masked_fill(positions == 0, -100), positions).backward()
            found = [parameter.grad.double() for parameter in model.parameters()]
        except Exception as error:
            yield [attention, failed(error)]
            continue
        expected = expected or found
        gap = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))
        yield [attention, *[""] * 5, f"largest relative error of a gradient: {gap:.1e}"]


PARTS = {"gpt2": steps, "head": head, "flags": steps, "gradients": gradients, "llama": steps}


def failed(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {error}".strip().splitlines()[-1].replace("|", "/")[:300]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts; nothing is written")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, also on a CPU; nothing is written")
    settings = parser.parse_args()
    if not (settings.tiny or torch.cuda.is_available()):
        print("benchmarks.gpu: needs a GPU that PyTorch can use. Pass --tiny to try it on a CPU.", file=sys.stderr)
        return 2
    began, rows = time.perf_counter(), []
    for part in settings.only or PARTS:
        for cells in PARTS[part](part, settings.tiny):
            rows.append(f"| {' | '.join([part, *cells, *[''] * (7 - len(cells))])} |")
            print(rows[-1], flush=True)
        if not (settings.only or settings.tiny):  # after each part, because the next one may not end
            device, minutes = device_name(select_device()), (time.perf_counter() - began) / 60
            text = heading("gpu", f"{device}, beside {processor()}") + f"\nIt took {minutes:.1f} minutes.\n"
            table = "\n".join(["# On one GPU\n", text, HEADER, "|" + " --- |" * 8, *rows, ""])
            results_file(device).write_text(table, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

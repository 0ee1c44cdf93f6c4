"""The contenders: processes that prepare themselves and then work in turns. `benchmarks.bench` starts them in pairs.

    echo 3 | python -m benchmarks.contenders ours '{"text": "quickstart/text.jsonl", ...}'     # three steps

A unit of work is a step, an evaluation, or similar. Before each unit, a contender waits for a line with a number of
units. It answers with the seconds that the units took. Two contenders share neither memory, allocator, compiled code
nor random numbers, and never work at the same time.

Our side is imported from the product. A peer is the library itself, or is written here in the same way.
"""

import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

import train
from corpus.flags import DataConfig, TextConfig
from corpus.sources import read_documents
from corpus.tokenize import tokenize
from data import Blocks, group_texts, load_data, load_documents, make_loader
from distributed.world import DistributedConfig, World
from modeling.loss import next_token_nll
from modeling.precision import autocast, keep_freed_memory, prepare_device, resolve_precision, select_device
from perplexity import evaluate
from training.monitor import peak_memory_gib

BATCH, CLIP, LOG_EVERY, ENDLESS = 8, 1.0, 10, 10**6

WORDS = [f"{a}{b}" for a in ("ba", "ke", "li", "mo", "tu") for b in ("n", "r", "s", "th", "x")]
Options = dict[str, Any]


class Turns:
    """The contender's end of the connection to the driver."""

    def __init__(self):
        # Libraries may print anything. Answers go to the original stdout, and everything else to stderr.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._left, self._started = 0, 0.0
        self.facts: dict[str, Any] = {}

    def boundary(self) -> None:
        """Return when there is a unit of work to do. End the process when the driver is gone."""
        if self._left == 0:
            seconds = synchronized_time() - self._started
            answer = {"seconds": seconds, "gib": peak_memory_gib(select_device()), **self.facts}
            print(json.dumps(answer), file=self._answers, flush=True)
            line = sys.stdin.readline()
            if not line:
                os._exit(0)
            self._left, self._started = int(line), time.perf_counter()
        self._left -= 1


def synchronized_time() -> float:
    """Return the time after all work of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def shape(o: Options) -> PreTrainedConfig:
    """Return the config of DistilGPT2, with the changes of the options."""
    family, changes = o.get("family", "gpt2"), o.get("shape", {})
    defaults = {"n_layer": 6, "bos_token_id": 0, "eos_token_id": 0} if family == "gpt2" else {}
    return AutoConfig.for_model(family, **defaults | changes)


def fresh_model(o: Options, **options: Any) -> PreTrainedModel:
    transformers.set_seed(42)
    with select_device():
        return AutoModelForCausalLM.from_config(shape(o), dtype=torch.float32, **options)


def text_blocks(o: Options) -> Blocks:
    tokenizer = AutoTokenizer.from_pretrained(o["tokenizer"])
    documents = read_documents(TextConfig(text_column=o["text_column"]), "--text", [o["text"]])
    return group_texts(tokenize(documents, tokenizer), o["block_size"])


def full_blocks(o: Options, number: int) -> list[dict[str, torch.Tensor]]:
    """Return our blocks for the peers, in whole batches only, because peers would compile again for a smaller batch.

    Without a text the tokens are random.
    """
    if o.get("text"):
        blocks = text_blocks(o)
        return [blocks[i] for i in range(min(number, len(blocks) - 1) // BATCH * BATCH)]
    ids = torch.randint(shape(o).vocab_size, (number, o["block_size"]), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


# ---------------------------------------------------------------------------------------------------------------------
# Training steps


def ours(turns: Turns, o: Options) -> None:
    """Run train.py's `train`, with an evaluation of one batch before the first step."""
    directory = Path(tempfile.mkdtemp(dir=o["work"]))
    text, column, tokenizer = o.get("text"), o.get("text_column", "text"), o.get("tokenizer", "train:300")
    if not text:  # random words, in documents of 50 to 1,000
        draw, text = random.Random(0), directory / "random.jsonl"
        documents = (" ".join(draw.choices(WORDS, k=draw.randint(50, 1000))) for _ in range(1000))
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    shape(o).save_pretrained(directory)
    vocabulary = json.dumps({"vocab_size": shape(o).vocab_size})
    source = {"train_files": [str(text)], "text_column": column, "pack": o.get("pack", "stream")}
    model = {"model_config": str(directory), "model_overrides": vocabulary, "tokenizer": tokenizer}
    sizes = {"block_size": o["block_size"], "batch_size": BATCH, "micro_batch_size": BATCH, "max_eval_blocks": BATCH}
    steps = {"max_steps": ENDLESS, "eval_every": ENDLESS, "save_every": ENDLESS, "log_every": LOG_EVERY}
    compiled, output_dir = "on" if o.get("compile") else "off", str(directory / "run")
    config = train.Config(**source, **model, **sizes, **steps, compile=compiled, output_dir=output_dir)
    # `train` handles signals before each step, and once before that in its evaluation.
    calls = itertools.count()
    signals = SimpleNamespace(defer=lambda: None, handle=lambda _: next(calls) and turns.boundary())
    prepare_device(o.get("deterministic", "auto"), select_device(), "auto")
    with HostSyncs(turns.facts) if o.get("count_syncs") else nullcontext():
        train.train(config, World(DistributedConfig(o["strategy"]) if "strategy" in o else None), signals)


class HostSyncs(TorchDispatchMode):
    """Count in facts["syncs"] the operations for which the host waits for its device."""

    def __init__(self, facts: dict[str, Any]):
        super().__init__()
        self._facts = facts
        facts["syncs"] = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        self._facts["syncs"] += operation.overloadpacket in waits
        return operation(*args, **kwargs or {})


def bare(turns: Turns, o: Options) -> None:
    """Run only forward pass, backward pass, clipping and optimizer, with our settings and our loss."""
    device = select_device()
    precision = resolve_precision("auto", device)
    prepare_device("auto", device, precision)
    model = fresh_model(o)
    model.train()
    optimizer = train.make_optimizer(model, 0.01)
    batches = list(make_loader(text_blocks(o), BATCH, most=32 * BATCH))
    for batch in itertools.cycle(batches):
        turns.boundary()
        ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            loss = next_token_nll(model, ids, labels) / (BATCH * (o["block_size"] - 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()


class StopsAtSteps(transformers.TrainerCallback):
    def __init__(self, turns: Turns):
        self._turns = turns

    def on_step_begin(self, args, state, control, **kwargs):  # logging comes between a step's end and the next begin
        self._turns.boundary()


def trainer_arguments(o: Options, **more: Any) -> transformers.TrainingArguments:
    chosen = {name: o.get(name, False) for name in ("bf16", "bf16_full_eval")}
    manners = {"report_to": ["tensorboard"], "save_strategy": "no", "disable_tqdm": True}
    device = {"per_device_train_batch_size": BATCH, "use_cpu": not torch.cuda.is_available()}
    settings = {**chosen, **manners, **device, **more}
    return transformers.TrainingArguments(f"{o['work']}/trainer", torch_compile=o.get("compile", False), **settings)


def trainer(turns: Turns, o: Options) -> None:
    """Run the Trainer. With ``keeps_memory`` it gets our setting of the allocator."""
    if o.get("keeps_memory"):
        keep_freed_memory()
    settings, stops = trainer_arguments(o, max_steps=ENDLESS, logging_steps=LOG_EVERY), [StopsAtSteps(turns)]
    data = full_blocks(o, 1024)
    transformers.Trainer(model=fresh_model(o), args=settings, train_dataset=data, callbacks=stops).train()


class NanoBlock(nn.Module):
    """One layer of nanoGPT: fused query, key and value; PyTorch's attention; exact GELU."""

    def __init__(self, width: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        self.up, self.down = nn.Linear(width, 4 * width, bias=bias), nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, sequence, width)
        batch, length, width = x.shape
        parts = self.c_attn(self.ln_1(x)).split(width, dim=2)
        q, k, v = (part.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class NanoGPT(nn.Module):
    """The arithmetic of nanoGPT's model with its defaults: no dropout, no biases, a tied head."""

    def __init__(self, config: PreTrainedConfig, bias: bool = False):
        super().__init__()
        width = config.n_embd
        self.wte, self.wpe = nn.Embedding(config.vocab_size, width), nn.Embedding(config.n_positions, width)
        self.ln_f = nn.LayerNorm(width, bias=bias)
        self.h = nn.ModuleList(NanoBlock(width, config.n_head, bias) for _ in range(config.n_layer))
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def nanogpt(turns: Turns, o: Options) -> None:
    """Run nanoGPT's step, with its betas and its weight decay."""
    device = select_device()
    transformers.set_seed(42)
    model = NanoGPT(shape(o)).to(device)
    decayed, others = ([p for p in model.parameters() if (p.ndim >= 2) is kind] for kind in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    batches = itertools.cycle(torch.stack([block["input_ids"] for block in full_blocks(o, 1024)]).split(BATCH))
    step_model = torch.compile(model) if o.get("compile") else model
    for step, ids in enumerate(batches, 1):
        turns.boundary()
        ids = ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids
        with torch.autocast(device.type, torch.bfloat16):
            loss = step_model(ids, ids.roll(-1, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % LOG_EVERY == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)


def products(turns: Turns, o: Options) -> None:
    """Compute all matrix products of a step in bf16, each in its fastest layout, into allocated memory."""
    device, work = select_device(), []
    keep_freed_memory(device.type)
    layouts = list(itertools.product((False, True), repeat=2))
    for count, batch, m, k, n in step_products(shape(o), BATCH, o["block_size"]):
        candidates = [[*operands(batch, m, k, n, *layout, device)] for layout in layouts]
        multiply = torch.bmm if batch > 1 else torch.mm
        work.append((count, multiply, *min(candidates, key=lambda c: _seconds(multiply, *c))))
    while True:
        turns.boundary()
        for count, multiply, a, b, out in work:
            for _ in range(count):
                multiply(a, b, out=out)


def step_products(config: PreTrainedConfig, batch: int, length: int) -> list[tuple[int, int, int, int, int]]:
    """Return (count, batch, m, k, n) of each product in a step of GPT-2. A product is (m, k) times (k, n)."""
    tokens, width, heads, layers = batch * length, config.n_embd, config.n_head, config.n_layer
    linear = [(layers, width, outside) for outside in (3 * width, width, 4 * width)]
    linear += [(layers, 4 * width, width), (1, width, config.vocab_size)]
    found = []
    for count, inside, outside in linear:  # the output; the gradients of input and weight
        found += [(count, 1, tokens, inside, outside), (count, 1, tokens, outside, inside)]
        found += [(count, 1, inside, tokens, outside)]
    # Scores and the gradient of probabilities, then output and the gradients of query, key and value.
    head = width // heads
    found += [(2 * layers, batch * heads, length, head, length), (4 * layers, batch * heads, length, length, head)]
    return found


def operands(batch: int, m: int, k: int, n: int, a_transposed: bool, b_transposed: bool, device: torch.device):
    """Yield matrices (m, k), (k, n) and (m, n) in bfloat16. The first two may be stored transposed."""
    for rows, columns, transposed in ((m, k, a_transposed), (k, n, b_transposed), (m, n, False)):
        size = (columns, rows) if transposed else (rows, columns)
        matrix = torch.randn(batch, *size, device=device).to(torch.bfloat16)
        matrix = matrix.transpose(1, 2) if transposed else matrix
        yield matrix if batch > 1 else matrix[0]


def _seconds(multiply: Callable, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    times = []
    for _ in range(4):
        started = synchronized_time()
        multiply(a, b, out=out)
        times.append(synchronized_time() - started)
    return statistics.median(times[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation, and a whole run


def our_evaluation(turns: Turns, o: Options) -> None:
    keep_freed_memory()
    model, device = fresh_model(o), select_device()
    loader = make_loader(text_blocks(o), BATCH, most=o["blocks"])
    precision = resolve_precision("auto", device)
    while True:
        turns.boundary()
        loss, _ = evaluate(model, loader, precision)
        turns.facts |= {"loss": loss, "tokens": o["blocks"] * o["block_size"]}


def trainer_evaluation(turns: Turns, o: Options) -> None:
    if o.get("keeps_memory"):
        keep_freed_memory()
    blocks = full_blocks(o, o["blocks"])
    peer = transformers.Trainer(model=fresh_model(o), args=trainer_arguments(o, report_to=[]), eval_dataset=blocks)
    while True:
        turns.boundary()
        # The Trainer divides by all labels, also by the first label of each block, which is never predicted.
        turns.facts["loss"] = peer.evaluate()["eval_loss"] * o["block_size"] / (o["block_size"] - 1)


def fine_tuned(turns: Turns, o: Options) -> None:
    """Fine-tune with the Trainer for one epoch, on our blocks of our split. Then measure the held-out loss."""
    turns.boundary()
    config = DataConfig(train_files=[o["text"]], text_column=o["text_column"], max_documents=o["max_documents"])
    tokenizer = AutoTokenizer.from_pretrained(o["model"])
    train_data, held_out = load_data(config, *load_documents(config, 42), tokenizer, 42)
    transformers.set_seed(42)
    model = AutoModelForCausalLM.from_pretrained(o["model"], dtype=torch.float32)
    precision = resolve_precision("auto", select_device())
    limits = {"num_train_epochs": 1, "max_steps": o["max_steps"] or -1, "learning_rate": o["learning_rate"]}
    settings = trainer_arguments({**o, "bf16": precision == "bf16"}, seed=42, **limits)
    blocks = train_data.blocks
    full = [blocks[i] for i in range(len(blocks) - 1)]  # its default collator cannot take the last, short block
    peer = transformers.Trainer(model=model, args=settings, train_dataset=full)
    peer.train()
    turns.facts["steps"] = peer.state.global_step
    turns.boundary()
    turns.facts["loss"], turns.facts["tokens"] = evaluate(model, make_loader(held_out, BATCH), precision)
    turns.boundary()


def prepare(turns: Turns, o: Options) -> None:
    """Make the files that several processes need: the model's directory, and a warm cache of tokens."""
    work, model = Path(o["work"]), fresh_model(o)
    model.save_pretrained(work / "model")
    tokenizer = AutoTokenizer.from_pretrained(o["tokenizer"])
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"{o['tokenizer']}: {len(tokenizer)} tokens, and the model has {model.config.vocab_size}")
    tokenizer.save_pretrained(work / "model")
    turns.facts |= {
        "precision": resolve_precision("auto", select_device()),
        "parameters": model.num_parameters(),
        "tokens": len(text_blocks(o).stream),
    }
    turns.boundary()


if __name__ == "__main__":
    globals()[sys.argv[1]](Turns(), json.loads(sys.argv[2]))

"""The contenders, each a process of its own that works when it is told to; `benchmarks.bench` starts them in pairs.

    echo 3 | python -m benchmarks.contenders ours '{"text": "quickstart/text.jsonl", ...}'     # three steps

A contender prepares itself, and then stops at each boundary between two units of work (steps, evaluations, ...) until a
line with a number tells it to do that many. It answers with the seconds that they took, and waits asleep. Memory,
allocator, compiled code and random numbers are therefore its own, and two of them never work at the same time.

What is ours is imported from the product. What is a peer's is the peer itself, or written here in its manner.
"""

import hashlib
import json
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    get_scheduler,
    pipeline,
)

import train
from benchmarks import guide
from corpus.flags import TextConfig
from corpus.sources import read_documents
from corpus.tokenize import tokenize
from data import Blocks, TrainingData, group_texts, make_loader, rank_batches
from distributed.world import World
from generate import SamplingConfig, generate
from modeling.compile import compile_layers
from modeling.loading import load_pretrained
from modeling.loss import next_token_nll
from modeling.precision import (
    DTYPES,
    autocast,
    device_name,
    keep_freed_memory,
    make_deterministic,
    resolve_precision,
    select_device,
)
from perplexity import evaluate
from training import checkpoint
from training.flops import flops_per_token, peak_flops
from training.log import RunLog
from training.monitor import StepMonitor, Throughput, micro_batch_memory, peak_memory_gib
from training.state import TrainState, moments, seed_step, trained_weights

BATCH, PEAK_RATE, CLIP, LOG_EVERY, ENDLESS = 8, 5e-5, 1.0, 10, 10**6
PROMPTS = ["The with statement is used to", "A list comprehension", "To open a file for reading,", "In Python, a class"]

Options = dict[str, Any]


class Turns:
    """The contender's end of the line to the driver."""

    def __init__(self):
        # Libraries print what they like; answers go where stdout was.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._left, self._started = 0, 0.0
        self._device = select_device()
        self.facts: dict[str, Any] = {}
        self.between: Callable[[], None] = lambda: None  # called at the end of a turn, after the clock has stopped

    def boundary(self) -> None:
        """Returns when there is a unit of work to do; ends the process when the driver is gone."""
        if self._left == 0:
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - self._started
            self.between()
            self._say({"seconds": seconds, "gib": peak_memory_gib(self._device), **self.facts})
            line = sys.stdin.readline()
            if not line:
                os._exit(0)
            self._left, self._started = int(line), time.perf_counter()
        self._left -= 1

    def _say(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)


def shape(o: Options) -> GPT2Config:
    """DistilGPT2's, unless the options change it."""
    return GPT2Config(**{"n_layer": 6, "bos_token_id": 0, "eos_token_id": 0, **o.get("shape", {})})


def fresh_model(o: Options) -> GPT2LMHeadModel:
    transformers.set_seed(42)
    return GPT2LMHeadModel(shape(o)).to(select_device())


def text_blocks(o: Options) -> Blocks:
    tokenizer = AutoTokenizer.from_pretrained(o["tokenizer"])
    documents = read_documents(TextConfig(text_column=o["text_column"]), "--text", [o["text"]])
    return group_texts(tokenize(documents, tokenizer), o["block_size"])


def full_blocks(o: Options, number: int | None = None) -> list[dict[str, torch.Tensor]]:
    """The same blocks for the peers in whole batches: for a smaller one they would compile anew."""
    blocks = text_blocks(o)
    return [blocks[i] for i in range(min(number or ENDLESS, len(blocks) - 1) // BATCH * BATCH)]


# ---------------------------------------------------------------------------------------------------------------------
# Training steps


def ours(turns: Turns, o: Options) -> None:
    """The loop of train.py's `train` without evaluations, checkpoints and signals."""
    keep_freed_memory()
    device, world, num_steps = select_device(), World(), o.get("max_steps", ENDLESS)
    config = train.Config(block_size=o["block_size"], batch_size=BATCH, micro_batch_size=BATCH, log_every=LOG_EVERY)
    precision = resolve_precision(o.get("precision", "auto"), device)
    model = fresh_model(o)
    make_deterministic()
    model.train()
    compiled = o.get("compile", False)
    if compiled:
        compile_layers(model, config.block_size)
    optimizer = train.make_optimizer(model, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    directory = Path(o["work"]) / f"ours-{os.getpid()}"
    directory.mkdir()
    state, train_data, losses = TrainState(), TrainingData(text_blocks(o), config.seed), []
    log, peak_rate = RunLog(directory, state, num_steps), o.get("learning_rate", PEAK_RATE)
    monitor = StepMonitor(state, log, world, config.max_skipped_steps, peak_rate)
    throughput = Throughput(state, num_steps, device)

    def tell_losses() -> None:
        turns.facts["losses"] = [loss.item() for loss in losses]

    turns.between = tell_losses
    turns.facts |= {
        "flops_per_token": flops_per_token(model, config.block_size),
        "peak_flops": peak_flops(device_name(device)),
    }
    if o.get("count_syncs"):
        turns.between = count_syncs(turns)
    batches = train_data.batches(BATCH, BATCH, state.position, same_shape=compiled)
    while True:
        with throughput.paused():
            turns.boundary()
        micro_batches, position, blocks = next(batches)
        learning_rate = train.learning_rate_at(state.step, peak_rate, o.get("warmup", 0), num_steps)
        seed_step(config.seed, state.step, world.rank)
        with micro_batch_memory(config):
            result = train.train_step(model, optimizer, scaler, micro_batches, learning_rate, CLIP, precision, world)
        losses.append(result.loss)
        epoch = state.position.epoch
        state.advance(position)
        monitor.add(epoch, blocks, result)
        log.step()
        if state.step % config.log_every == 0 or state.step in (1, num_steps):
            monitor.check()
            log.training(state, result, learning_rate, train_data.epochs(position), throughput.since_last_log())


def count_syncs(turns: Turns) -> Callable[[], None]:
    """From now on each host sync is counted in the facts; the one that ends a turn is not."""
    turns.facts["syncs"] = 0

    def count(message: object, *_: object) -> None:
        turns.facts["syncs"] += "synchronizing" in str(message)

    warnings.simplefilter("always")
    warnings.showwarning = count
    torch.cuda.set_sync_debug_mode("warn")
    return lambda: None


def bare(turns: Turns, o: Options) -> None:
    """Nothing but forward, backward, clipping and optimizer, with the settings and the model call of ours."""
    keep_freed_memory()
    device = select_device()
    precision = resolve_precision("auto", device)
    model = fresh_model(o)
    make_deterministic()
    model.train()
    optimizer = train.make_optimizer(model, 0.01)
    batches = list(make_loader(text_blocks(o), BATCH, rank_batches(range(32 * BATCH), BATCH)))
    for batch in cycle(batches):
        turns.boundary()
        ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            loss = next_token_nll(model, ids, labels) / (BATCH * (o["block_size"] - 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()


class StopsAtSteps(TrainerCallback):
    def __init__(self, turns: Turns):
        self._turns = turns

    def on_step_begin(self, args, state, control, **kwargs):  # logging comes between a step's end and the next begin
        self._turns.boundary()


def trainer_arguments(o: Options, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        f"{o['work']}/trainer-{os.getpid()}",
        per_device_train_batch_size=BATCH,
        bf16=o.get("bf16", False),
        torch_compile=o.get("compile", False),
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        disable_tqdm=True,
        **more,
    )


def trainer(turns: Turns, o: Options) -> None:
    if o.get("keeps_memory"):
        keep_freed_memory()
    settings = trainer_arguments(o, max_steps=ENDLESS, logging_steps=LOG_EVERY, report_to=["tensorboard"])
    data = Dataset.from_list(full_blocks(o, 1024))
    Trainer(model=fresh_model(o), args=settings, train_dataset=data, callbacks=[StopsAtSteps(turns)]).train()


def no_trainer(turns: Turns, o: Options) -> None:
    """In the manner of transformers' run_clm_no_trainer with its defaults, and with clipping, as all others have it."""
    accelerator = Accelerator(mixed_precision="bf16" if o.get("bf16") else "no", cpu=not torch.cuda.is_available())
    data = Dataset.from_list(full_blocks(o, 1024))
    loader = DataLoader(data, shuffle=True, collate_fn=default_data_collator, batch_size=BATCH)
    model = fresh_model(o)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=ENDLESS)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    total_loss, step = 0.0, 0
    while True:
        for batch in loader:
            turns.boundary()
            loss = model(**batch).loss
            total_loss += loss.detach().float()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % LOG_EVERY == 0:
                print(f"step {step}: loss {total_loss.item() / step:.4f}", flush=True)


class NanoBlock(nn.Module):
    """One block of nanoGPT: fused query, key and value; PyTorch's attention; exact GELU."""

    def __init__(self, width: int, heads: int, dropout: float, bias: bool):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        self.up, self.down = nn.Linear(width, 4 * width, bias=bias), nn.Linear(4 * width, width, bias=bias)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, sequence, width)
        batch, length, width = x.shape
        parts = self.c_attn(self.ln_1(x)).split(width, dim=2)
        q, k, v = (part.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training, is_causal=True)
        x = x + self.drop(self.c_proj(y.transpose(1, 2).reshape(batch, length, width)))
        return x + self.drop(self.down(F.gelu(self.up(self.ln_2(x)))))


class NanoGPT(nn.Module):
    """The arithmetic of nanoGPT's model, with its defaults: no dropout, no biases; head and embedding are one."""

    def __init__(self, config: GPT2Config, dropout: float = 0.0, bias: bool = False):
        super().__init__()
        width = config.n_embd
        self.wte, self.wpe = nn.Embedding(config.vocab_size, width), nn.Embedding(config.n_positions, width)
        self.drop, self.ln_f = nn.Dropout(dropout), nn.LayerNorm(width, bias=bias)
        self.h = nn.ModuleList(NanoBlock(width, config.n_head, dropout, bias) for _ in range(config.n_layer))
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def nanogpt(turns: Turns, o: Options) -> None:
    """nanoGPT's step: targets are the next tokens, also of a block's last one; betas and decay are its own."""
    device = select_device()
    transformers.set_seed(42)
    model = NanoGPT(shape(o)).to(device)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    stream, length = text_blocks(o).stream[:], o["block_size"]
    step_model = torch.compile(model) if o.get("compile") else model
    step = 0
    while True:
        turns.boundary()
        starts = torch.randint(len(stream) - length - 1, (BATCH,)).tolist()
        ids = torch.stack([torch.from_numpy(stream[i : i + length]) for i in starts]).to(device)
        targets = torch.stack([torch.from_numpy(stream[i + 1 : i + 1 + length]) for i in starts]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = step_model(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % LOG_EVERY == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)


def products(turns: Turns, o: Options) -> None:
    """All matrix products of one step in bf16, each in its fastest layout, into memory that is already there."""
    keep_freed_memory()
    device, work = select_device(), []
    for count, batch, m, k, n in step_products(shape(o), BATCH, o["block_size"]):
        candidates = [[*operands(batch, m, k, n, *turned, device)] for turned in product((False, True), repeat=2)]
        multiply = torch.bmm if batch > 1 else torch.mm
        work.append((count, multiply, *min(candidates, key=lambda c: _seconds(multiply, *c))))
    while True:
        turns.boundary()
        for count, multiply, a, b, out in work:
            for _ in range(count):
                multiply(a, b, out=out)


def step_products(config: GPT2Config, batch: int, length: int) -> list[tuple[int, int, int, int, int]]:
    """(how often, batch, m, k, n) of each product of a GPT-2's forward and backward pass: (m, k) times (k, n)."""
    tokens, width, heads, layers = batch * length, config.n_embd, config.n_head, config.n_layer
    linear = [
        (layers, width, 3 * width),
        (layers, width, width),
        (layers, width, 4 * width),
        (layers, 4 * width, width),
    ]
    linear.append((1, width, config.vocab_size))
    found = []
    for count, inside, outside in linear:  # the output; the gradients of input and weight
        found += [(count, 1, tokens, inside, outside), (count, 1, tokens, outside, inside)]
        found += [(count, 1, inside, tokens, outside)]
    # Scores and the gradient of probabilities; output and the gradients of query, key and value.
    head = width // heads
    found += [(2 * layers, batch * heads, length, head, length), (4 * layers, batch * heads, length, length, head)]
    return found


def operands(batch: int, m: int, k: int, n: int, a_turned: bool, b_turned: bool, device: torch.device):
    for rows, columns, turned in ((m, k, a_turned), (k, n, b_turned), (m, n, False)):
        size = (columns, rows) if turned else (rows, columns)
        matrix = torch.randn(batch, *size, device=device).to(torch.bfloat16)
        matrix = matrix.transpose(1, 2) if turned else matrix
        yield matrix if batch > 1 else matrix[0]


def _seconds(multiply: Callable, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    times = []
    for _ in range(4):
        if a.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        multiply(a, b, out=out)
        if a.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Text to blocks, evaluation, generation, checkpoints


def our_blocks(turns: Turns, o: Options) -> None:
    """One unit; the driver gives each process a cache, empty or not."""
    tokenizer = AutoTokenizer.from_pretrained(o["tokenizer"])
    config = TextConfig(text_column=o["text_column"])
    turns.boundary()
    blocks = group_texts(tokenize(read_documents(config, "--text", [o["text"]]), tokenizer), o["block_size"])
    assert all(len(blocks[i]["input_ids"]) for i in (0, len(blocks) - 1))
    turns.facts |= {"tokens": len(blocks.stream), "documents": blocks.stream.num_documents}
    turns.boundary()


def guide_blocks(turns: Turns, o: Options) -> None:
    tokenizer = AutoTokenizer.from_pretrained(o["tokenizer"])
    turns.boundary()
    blocks = guide.text_to_blocks(
        o["text"], o["text_column"], tokenizer, o["block_size"], o["num_proc"], o.get("chained", False)
    )
    turns.facts["tokens"] = len(blocks) * len(blocks[0]["input_ids"])
    turns.boundary()


def our_evaluation(turns: Turns, o: Options) -> None:
    keep_freed_memory()
    model, device = fresh_model(o), select_device()
    loader = make_loader(text_blocks(o), BATCH, rank_batches(range(o["blocks"]), BATCH))
    precision = resolve_precision("auto", device)
    while True:
        turns.boundary()
        loss, _ = evaluate(model, loader, precision)
        turns.facts |= {"loss": loss, "tokens": o["blocks"] * o["block_size"]}


def trainer_evaluation(turns: Turns, o: Options) -> None:
    settings = trainer_arguments(o, report_to=["tensorboard"])
    peer = Trainer(model=fresh_model(o), args=settings, eval_dataset=Dataset.from_list(full_blocks(o, o["blocks"])))
    while True:
        turns.boundary()
        # It divides by all labels, also by each block's first one, which nothing predicts.
        turns.facts["loss"] = peer.evaluate()["eval_loss"] * o["block_size"] / (o["block_size"] - 1)


def prompts(o: Options) -> list[str]:
    return [f"{i + 1}. {PROMPTS[i % len(PROMPTS)]}" for i in range(o["batch"])]


def our_generation(turns: Turns, o: Options) -> None:
    """generate.py's function, on a model loaded as its --precision loads it."""
    keep_freed_memory()
    device, tokenizer = select_device(), AutoTokenizer.from_pretrained(o["model"])
    model = load_pretrained(o["model"], dtype=DTYPES[o["precision"]]).to(device)
    sampling = SamplingConfig(max_new_tokens=o["new_tokens"], greedy=True)
    while True:
        turns.boundary()
        texts = generate(model, tokenizer, prompts(o), sampling)
        turns.facts |= {"texts": texts, "tokens": sum(len(tokenizer(text)["input_ids"]) for text in texts)}


def pipeline_generation(turns: Turns, o: Options) -> None:
    tokenizer = AutoTokenizer.from_pretrained(o["model"], padding_side="left")  # as its documentation asks for batches
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dtype = DTYPES[o["precision"]]
    make = pipeline("text-generation", o["model"], tokenizer=tokenizer, dtype=dtype, device=select_device())
    while True:
        turns.boundary()
        made = make(
            prompts(o),
            do_sample=False,
            max_new_tokens=o["new_tokens"],
            batch_size=o["batch"],
            return_full_text=False,
            clean_up_tokenization_spaces=False,
        )
        turns.facts["texts"] = [each[0]["generated_text"] for each in made]


def trained_state(o: Options) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a checkpoint after one update."""
    model = fresh_model(o)
    optimizer = train.make_optimizer(model, 0.01)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    return {"weights": trained_weights(model), "optimizer": moments(model, optimizer)}


def our_checkpoint(turns: Turns, o: Options) -> None:
    keep_freed_memory()
    tensors, path = trained_state(o), Path(o["work"]) / "checkpoints" / "step-000001"
    turns.between = lambda: shutil.rmtree(path, ignore_errors=True)
    while True:
        turns.boundary()
        checkpoint.save(path, tensors, {"step": 1}, World())


def plain_checkpoint(turns: Turns, o: Options) -> None:
    """The same bytes into one file, hashed on the way, and on the disk at the end."""
    path = Path(o["work"]) / "plain"
    tensors = [tensor.cpu().contiguous() for group in trained_state(o).values() for tensor in group.values()]
    pieces = [tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in tensors]
    turns.facts["bytes"] = sum(len(piece) for piece in pieces)
    turns.between = lambda: path.unlink(missing_ok=True)
    while True:
        turns.boundary()
        digest = hashlib.sha256()
        with open(path, "wb") as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
            file.flush()
            os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------------------------------


def prepare(turns: Turns, o: Options) -> None:
    """Makes what several contenders need: the model's directory, a text of about a block to evaluate on."""
    work, device = Path(o["work"]), select_device()
    model = fresh_model(o)
    model.save_pretrained(work / "model")
    tokenizer = AutoTokenizer.from_pretrained(o["tokenizer"])
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"{o['tokenizer']}: {len(tokenizer)} tokens, and the model has {model.config.vocab_size}")
    tokenizer.save_pretrained(work / "model")
    document = next(iter(read_documents(TextConfig(text_column=o["text_column"]), "--text", [o["text"]])))
    value: Any = "".join(document)[: 4 * o["block_size"]]
    for key in reversed(o["text_column"].split(".")):
        value = {key: value}
    (work / "eval.jsonl").write_text(json.dumps(value) + "\n", encoding="utf-8")
    blocks = text_blocks(o)  # and the cache is warm
    turns.facts |= {
        "device": device_name(device),
        "cuda": device.type == "cuda",
        "precision": resolve_precision("auto", device),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": len(blocks.stream),
    }
    turns.boundary()


STEPS = (ours, bare, trainer, no_trainer, nanogpt, products)
OTHERS = (our_blocks, guide_blocks, our_evaluation, trainer_evaluation, our_generation, pipeline_generation)
CONTENDERS = {each.__name__: each for each in (*STEPS, *OTHERS, our_checkpoint, plain_checkpoint, prepare)}

if __name__ == "__main__":
    CONTENDERS[sys.argv[1]](Turns(), json.loads(sys.argv[2]))

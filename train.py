"""Fine-tune a causal language model, or train one from scratch. The loop is written out: read `train` top to bottom.

    python train.py --config configs/quickstart.yaml
    python train.py --model distilgpt2 --train_files 'notes/*.txt' --max_steps 500
    python train.py --model_config configs/gpt2-small.json --tokenizer train:8192 --train_files corpus.jsonl
    python train.py --config configs/quickstart.yaml --resume               # go on where it was stopped
    python train.py --config configs/quickstart.yaml --dry_run              # what would happen, and does it fit
    torchrun --nproc_per_node=8 train.py --config configs/eli5.yaml         # on many devices: docs/scale.md

Afterwards: python generate.py --prompt "..." and tensorboard --logdir runs
"""

import fcntl
import json
import math
import os
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import transformers
import yaml
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils._triton import has_triton
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cli.errors import SaveError, UserError, out_of_memory, require, run, warn
from cli.flags import Count, Range, Seed, flag, parse
from corpus.flags import DataConfig
from corpus.position import Position
from corpus.sources import load_documents
from corpus.streaming import check_flags
from corpus.streaming import load_documents as stream_documents
from corpus.tokenize import tokenizer_fingerprint
from data import in_batches, load_blocks, load_streamed_blocks, make_loader, split_batch
from distributed.world import DistributedConfig, Group, join, quiet_unless_first
from generate import SamplingConfig, generate
from model import ModelConfig, load_config, load_model, load_tokenizer
from modeling.adapters import LoraConfig, add_lora, freeze, frozen_sha256, save_merged
from modeling.architectures import flops_per_token, position_limit, recompute_activations, transformer_layers
from modeling.checks import check_model
from modeling.linear_cross_entropy import IGNORED_LABEL
from modeling.loss import SHORT_BLOCK, linear_head
from modeling.precision import Precision, autocast, keep_freed_memory, resolve_precision, select_device
from perplexity import evaluate, perplexity
from training import checkpoint
from training.log import NoLog, RunLog, evaluations, finished_step, last_step, mark_finished
from training.model_card import check_login, model_card, push, versions
from training.monitor import peak_flops, peak_memory_gib

T = TypeVar("T")

# With another value of these it would be another run.
SAME_RUN = ("block_size", "pack", "batch_size", "grad_accum_steps", "seed", "deduplicate", "freeze")
SAME_RUN += ("lora_rank", "lora_alpha", "lora_targets", "streaming", "shuffle_buffer")

RUN_CONTENT = ("checkpoints", "model", "tensorboard", "config.yaml", "metrics.jsonl")


@dataclass
class TrainConfig:
    batch_size: Count = flag(8, "blocks a micro-batch")
    grad_accum_steps: Count = flag(1, "micro-batches an update")
    max_steps: Count | None = flag(None, "updates in all; wins over --num_epochs")
    num_epochs: Annotated[float, Range(above=0, below=1e6)] = flag(3.0, "passes over the training text")
    learning_rate: Annotated[float, Range(above=0, below=1)] = flag(2e-4, "the peak, reached after the warmup")
    weight_decay: Annotated[float, Range(least=0, below=10)] = flag(
        0.01, "of AdamW, on matrices and embeddings, not on biases and norms"
    )
    warmup_steps: Annotated[int, Range(least=0)] = flag(0, "updates over which the learning rate rises from zero")
    warmup_ratio: Annotated[float, Range(least=0, below=1)] | None = flag(None, "the same as a part of all updates")
    max_grad_norm: Annotated[float, Range(least=0, below=1e9)] = flag(
        1.0, "gradients are scaled down to this norm; 0 switches clipping off"
    )
    gradient_checkpointing: bool = flag(False, "compute layers twice rather than keep what they compute: less memory")
    precision: Precision = flag(
        "auto", "of the arithmetic; weights are float32. auto: the fastest the device does well"
    )
    compile: Literal["auto", "on", "off"] = flag(
        "auto", "torch.compile; auto: where the run is long enough to pay for it"
    )
    seed: Seed = flag(42, "of initialization, order of the data, dropout, and the held-out part")
    eval_every: Count = flag(500, "updates between evaluations; there is one at the start and one at the end as well")
    save_every: Count = flag(500, "updates between checkpoints; there is one at the end as well")
    log_every: Count = flag(10, "updates between records of the training loss")
    sample_prompt: list[str] = flag([], "prompts to continue at each evaluation, to watch the model learn")
    init_from_checkpoint: str | None = flag(
        None, "a checkpoint whose weights a new run begins with, such as runs/old/checkpoints/step-000500"
    )
    output_dir: str | None = flag(None, "the run's directory (default: runs/<name of the config file>)")
    resume: bool = flag(False, "go on from the newest checkpoint in the output directory, or start if there is none")
    overwrite: bool = flag(False, "delete the run that is in the output directory; wins over --resume")
    keep_checkpoints: Count = flag(2, "newest checkpoints to keep")
    keep: Literal["best", "last"] = flag("best", "the weights in model/: of the best evaluation, or of the last")
    on_nonfinite: Literal["stop", "skip"] = flag(
        "stop", "where a loss or gradient is not finite its update is left out: then stop, or go on"
    )
    max_skips: Count = flag(10, "updates in a row that --on_nonfinite skip leaves out before it stops all the same")
    on_save_error: Literal["stop", "continue"] = flag("stop", "when the disk is full; continue warns and tries later")
    oom: Literal["stop", "halve"] = flag(
        "stop", "when memory runs out; halve makes the same update from micro-batches of half the blocks"
    )
    num_workers: Annotated[int, Range(least=0, most=256)] = flag(0, "processes that read batches ahead")
    worker_timeout: Annotated[int, Range(least=1)] = flag(300, "seconds without a batch until a worker counts as hung")
    push_to_hub: str | None = flag(
        None, "a Hub repo id to upload the model to; the login is `hf auth login`'s or HF_TOKEN"
    )
    dry_run: bool = flag(False, "print the plan, run one largest forward and backward pass, write nothing")

    def rules(self) -> list[tuple[bool, str]]:
        rule = f"--warmup_ratio {self.warmup_ratio} and --warmup_steps {self.warmup_steps} exclude each other"
        return [(self.warmup_ratio is None or self.warmup_steps == 0, rule)]


# ---------------------------------------------------------------------------------------------------------------------
# One update


def learning_rate_at(step: int, peak: float, warmup_steps: int, max_steps: int) -> float:
    """The learning rate of the update that follows ``step`` updates.

    Linear from 0 to ``peak`` over the warmup, then linear to 0 at ``max_steps``, as
    `transformers.get_linear_schedule_with_warmup` has it.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * (max_steps - step) / max(1, max_steps - warmup_steps)


def make_optimizer(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings only."""
    decayed, spared = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 else spared).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)


class Update(NamedTuple):
    """What an update has come to, over all its micro-batches and ranks; on the device, in float64 and float32."""

    loss: torch.Tensor  # in nats a predicted token
    grad_norm: torch.Tensor  # before clipping
    num_predicted: torch.Tensor  # tokens that the loss is over
    num_tokens: torch.Tensor  # and those that begin a block, which nothing predicts


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: list[dict[str, torch.Tensor]],
    learning_rate: float,
    max_grad_norm: float = 1.0,
    precision: str = "fp32",
    group: Group | None = None,
) -> Update:
    """One optimizer update on the mean loss over all predicted tokens of all ``micro_batches`` of all ranks.

    Each micro-batch is {"input_ids", "labels"}, both (batch, sequence) int64, and "position_ids" where documents are
    kept apart. Gradients are of the summed loss, until they are divided by the tokens of the whole update: so 4 x 2
    equals 1 x 8, also where blocks differ in length. All is done without waiting for the device, but in fp16.
    Where loss or norm is not finite, the weights stay as they are; so they do where there is nothing to predict.
    """
    group, device = group or Group(), next(model.parameters()).device
    first_scale = scaler.get_scale()
    while True:
        optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for number, batch in enumerate(micro_batches, 1):
            inputs = {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
            with group.last_of_update(model, number == len(micro_batches)):
                with autocast(device, precision):
                    nll = group.next_token_nll(model, **inputs)
                scaler.scale(nll * group.size).backward()  # the ranks' gradients are averaged
            known = inputs["labels"] != IGNORED_LABEL
            for i, value in enumerate((nll.detach(), known[:, 1:].sum(), known.sum())):
                sums[i] += value

        nll_sum, num_predicted, num_tokens = group.sum(sums)
        divisor = num_predicted.clamp_min(1)
        scale = scaler.get_scale()  # a host sync in fp16, and in fp16 alone
        with out_of_memory_is_final():
            scaler.unscale_(optimizer)
            loss, grad_norm = nll_sum / divisor, (group.grad_norm(model) / divisor).float()
            clipping = ((grad_norm + 1e-6) / (max_grad_norm or math.inf)).clamp_min(1)  # as clip_grad_norm_ has it
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, (divisor * clipping).float())
            for settings in optimizer.param_groups:
                settings["lr"] = learning_rate
            if not scaler.is_enabled():  # the scaler does the same where the scaled gradients of fp16 overflow
                fine = torch.isfinite(loss + grad_norm) & (num_predicted > 0)
                optimizer.found_inf = (~fine).float()  # fused AdamW then does nothing
            if not scaler.is_enabled() or num_predicted > 0:
                scaler.step(optimizer)
                scaler.update()
        # After an overflow the same blocks once more with the smaller scale: none is lost, and the learning rate does
        # not move on. What overflows without any scale is not an overflow, and no reason to change the scale.
        overflowed = scaler.get_scale() < scale
        if overflowed and scale * divisor <= 1:
            scaler.update(first_scale)
        elif overflowed:
            continue
        return Update(loss, grad_norm, num_predicted, num_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# What resuming needs


def training_state(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, group: Group
) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of a checkpoint, on rank 0: weights, and AdamW's moments under the names of their parameters."""
    group.release(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[parameter]}:{key}": group.whole(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    return {"weights": {name: group.whole(weight) for name, weight in _weights(model).items()}, "optimizer": moments}


def restore_state(
    tensors: dict[str, dict[str, torch.Tensor]], model: PreTrainedModel, optimizer: torch.optim.Optimizer, group: Group
) -> None:
    """Gives model and optimizer what `training_state` has returned on rank 0."""
    for name, weight in _weights(model).items():
        group.copy_(weight, tensors["weights"][name] if tensors else None)
    parameters = dict(model.named_parameters())
    shapes = {key: value.shape for key, value in tensors["optimizer"].items()} if tensors else {}
    for key, shape in group.share(shapes).items():
        name, _, moment = key.rpartition(":")
        like = torch.zeros_like(parameters[name])
        state = like if shape == like.shape else torch.zeros(shape, device=like.device)
        group.copy_(state, tensors["optimizer"][key] if tensors else None)
        optimizer.state[parameters[name]][moment] = state


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers, such as dropout's, depend on these alone: there is no state of them to be kept."""
    transformers.set_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters that are trained and persistent buffers, tied ones once (under the first of their names)."""
    once = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    once |= {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in once}


def _copy_weights(weights: dict[str, torch.Tensor], model: PreTrainedModel) -> None:
    with torch.no_grad():
        for name, weight in _weights(model).items():
            weight.copy_(weights[name])


@dataclass
class Progress:
    """Where a run stands between two steps; what resuming needs beside tensors."""

    micro_batch_size: int  # blocks at once; the batch size, or less of it after --oom halve
    step: int = 0  # updates made
    position: Position = field(default_factory=Position)
    tokens_seen: int = 0
    evaluated: int = -1  # the last step whose evaluation is complete
    kept_step: int | None = None  # whose weights are in model/
    kept_loss: float = 0.0  # and their evaluation loss
    skips: int = 0  # updates in a row that were left out


class Signals:
    """SIGTERM and SIGINT end a run at the next step boundary, SIGUSR1 only saves; a second SIGINT ends it at once."""

    def __init__(self):
        self.received: list[int] = []
        self.can_wait = False  # before and after the loop there is no boundary to come, and nothing to save
        self.group = Group()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if number != signal.SIGUSR1:
            if not self.can_wait:
                self.group.end_all(128 + number)
                with suppress(Exception):
                    sys.stdout.flush()
                os._exit(128 + number)  # an exception might be caught by whatever is under way
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        self.received.append(number)


class NonFiniteError(UserError):
    exit_code = 4


@contextmanager
def warns_only(enabled: bool) -> Iterator[None]:
    """Where ``enabled``, a run goes on after something could not be saved."""
    try:
        yield
    except SaveError as error:
        if not enabled:
            raise
        warn(str(error))


@contextmanager
def out_of_memory_is_final() -> Iterator[None]:
    """For what no smaller batch makes smaller, and what cannot be made again because a part of it is done."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError("out of memory with weights, gradients and AdamW's moments; take a smaller model") from error


def within_memory(work: Callable[[int], T], blocks: int, oom: str) -> tuple[T, int]:
    """Returns ``work(blocks)`` and ``blocks``, halved as often as memory demands and ``oom`` allows."""
    while True:
        try:
            return work(blocks), blocks
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if oom == "stop" or blocks == 1:
                fix = "lower --block_size or take a smaller model"
                if blocks > 1:
                    fix = "lower --batch_size and raise --grad_accum_steps by as much, give --oom halve, or " + fix
                raise UserError(f"out of memory with {blocks} blocks at once; {fix}") from error
        blocks //= 2  # out of reach of the exception, which holds the tensors of the attempt
        warn(f"out of memory; from here on {blocks} blocks at once, accumulated to the same update")


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    quiet_unless_first()
    signals = Signals()
    *configs, config_file = parse([DataConfig, ModelConfig, LoraConfig, DistributedConfig, TrainConfig], __doc__)
    with join(configs[3]) as group:
        signals.group = group
        train(*configs, config_file, signals, group)


def train(
    data_config: DataConfig,
    model_config: ModelConfig,
    lora_config: LoraConfig,
    distributed_config: DistributedConfig,
    config: TrainConfig,
    config_file: Path | None,
    signals: Signals,
    group: Group,
) -> None:
    """The run. All ranks of ``group`` go through the same lines; rank 0 alone writes and prints."""
    check_flags(data_config, model_config.tokenizer, config.max_steps, config.num_workers)
    run_dir = Path(config.output_dir or f"runs/{config_file.stem if config_file else 'train'}")
    config.output_dir = str(run_dir)
    if group.has_begun():
        config.resume, config.overwrite = True, False
    settings = vars(model_config) | vars(lora_config) | vars(data_config) | vars(distributed_config) | vars(config)
    check_same(settings, group)
    holds_run = group.first(lambda: check_run_dir(run_dir, config))
    if config.push_to_hub and not config.dry_run:
        group.first(lambda: check_login(config.push_to_hub))
    device = select_device()
    precision = group.first(lambda: resolve_precision(config.precision, device))
    group.check(precision, config.oom)
    changing = ("model_config", "model_overrides", "model_revision", "add_tokens", "init_from_checkpoint")
    others = [f"--{name}" for name in changing if settings[name]]
    is_adapter = bool(lora_config.lora_rank) and not lora_config.merge_lora
    alone = f"--lora_rank {lora_config.lora_rank}: an adapter is for --model as it is, without"
    require(not (is_adapter and others), f"{alone} {', '.join(others)}; add --merge_lora or leave it out")

    # Text -> tokens -> blocks.
    on_disk, streamed = (load_documents, load_blocks), (stream_documents, load_streamed_blocks)
    to_documents, to_blocks = streamed if data_config.streaming else on_disk
    with group.once_a_node():
        train_documents, eval_documents = to_documents(data_config, config.seed)
        tokenizer = load_tokenizer(model_config, train_documents)
        data, eval_blocks = to_blocks(data_config, train_documents, eval_documents, tokenizer, config.seed)
        architecture = load_config(model_config, tokenizer, data_config.block_size, alone if is_adapter else None)
    eval_stream = eval_blocks.stream

    # A run that is already there: finished, to be resumed, or to be replaced.
    base = Path(model_config.model or model_config.model_config)
    identity = {
        "model": base.name if base.exists() else str(base),  # a directory may have moved
        **{f"model's {key}": value for key, value in json.loads(architecture.to_json_string()).items()},
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "training text": data.identity,
        "evaluation text": eval_stream.sha256,
        **{name: settings[name] for name in SAME_RUN},
    }
    check_same(identity, group)
    resumes = config.resume and holds_run and not config.overwrite and not config.dry_run
    resumed, state, progress = None, {}, Progress(config.batch_size)
    tensors: dict[str, dict[str, torch.Tensor]] = {}  # of the checkpoint, on rank 0
    blocks_per_update = group.size * config.grad_accum_steps * config.batch_size
    if resumes:

        def find_checkpoint() -> tuple[Path | None, dict[str, Any]]:
            lock_directory(run_dir)
            for directory in (run_dir, run_dir / "checkpoints", run_dir / "model"):
                checkpoint.remove_partial_writes(directory)
            if path := checkpoint.newest(run_dir / "checkpoints"):
                found, loaded = checkpoint.load(path)
                tensors.update(loaded)
                return path, found
            return None, {}

        resumed, state = group.first(find_checkpoint)
    if resumed:
        if state.get("ranks", 1) != group.size:  # an update stays one of the same blocks, whoever computes them
            for name in ("batch_size", "grad_accum_steps"):
                state["identity"].pop(name, None)
        check_same_run(run_dir, state["identity"], identity)
        blocks_per_update = state.get("blocks_per_update", blocks_per_update)
        progress = Progress(**state["progress"])
        progress.position = Position(**state["progress"]["position"])
        if group.size > 1:
            progress.micro_batch_size = config.batch_size  # not halved, as one process may have done
        if progress.kept_step is not None and not group.first((run_dir / "model").is_dir):
            warn(f"{run_dir}/model is gone, with the weights of step {progress.kept_step}; keeping later ones")
            progress.kept_step, progress.evaluated = None, -1
    steps_per_epoch = data.steps_per_epoch(blocks_per_update)
    max_steps = config.max_steps or math.ceil(steps_per_epoch * config.num_epochs)
    warmup_steps = config.warmup_steps or math.ceil(max_steps * (config.warmup_ratio or 0))
    require(warmup_steps < max_steps, f"--warmup_steps {warmup_steps}: the run has only {max_steps} steps; lower it")
    if resumes:
        done = group.first(lambda: finished_step(run_dir))
        if resumed:
            done = progress.step if progress.evaluated >= max_steps else 0
        if done >= max_steps:
            print(
                f"{run_dir}: this run is finished ({done} of {max_steps} steps). "
                f"To train longer give a larger --max_steps; to start anew, --overwrite."
            )
            if group.rank == 0:
                mark_finished(run_dir)
                finish(run_dir, config)
            return
        if resumed:
            note_changes(state["settings"], settings)
        elif done or group.first(lambda: last_step(run_dir) > save_every_of(run_dir)):
            fix = "use its model as it is, or --overwrite the run"
            raise checkpoint.NoCheckpointError(f"{run_dir}: no checkpoint is left there to go on from; {fix}")
        else:
            print(f"{run_dir}: the run there was stopped before its first checkpoint; starting over")

    # Model. Rank 0 loads it and looks at it; `spread` brings it to the others.
    transformers.set_seed(config.seed)
    make_deterministic()
    if device.type == "cpu":
        keep_freed_memory()
    with group.first_ahead():
        model = load_model(model_config, architecture, tokenizer, empty=group.rank > 0)
        if group.rank == 0:
            model = model.to(group.home(device))
            check_model(model, tokenizer, data_config.block_size, data_config.pack == "documents", precision)
            if config.init_from_checkpoint and (not resumed or lora_config.lora_rank or lora_config.freeze):
                init_from_checkpoint(model, Path(config.init_from_checkpoint))
    freeze(model, lora_config.freeze)
    if lora_config.lora_rank:
        add_lora(model, lora_config)
    frozen = {"weights that are not trained": group.first(lambda: frozen_sha256(model))}  # which no checkpoint holds
    if resumed:
        check_same_run(run_dir, state.get("frozen", {}), frozen)
    if config.gradient_checkpointing:
        recompute_activations(model)
    model = group.spread(model, device, precision, data_config.block_size)
    limit = position_limit(model) or math.inf
    sampling = SamplingConfig(max_new_tokens=min(60, limit // 2))
    for prompt in config.sample_prompt:
        fits = len(tokenizer(prompt)["input_ids"]) + sampling.max_new_tokens <= limit
        require(fits, f"--sample_prompt {prompt[:40]}...: too long for a model of {limit} positions; shorten it")
    num_parameters = model.num_parameters()
    peak_rate = peak_flops(device_name(device)) if precision != "fp32" else None
    flops = flops_per_token(model, data_config.block_size) if peak_rate else None
    run_flops = 6 * num_parameters * blocks_per_update * data_config.block_size * max_steps / group.size
    compiled = group.first(lambda: should_compile(config.compile, model, run_flops))
    if resumed and config.compile == "auto":  # a longer run, or another PATH, must not change what is computed
        compiled = state.get("compiled", compiled)
    if compiled:
        compile_layers(model, data_config.block_size)
    # One compiled code fits all batches; Reformer's positions are those of a whole block.
    same_shape = compiled or getattr(model.config, "axial_pos_embds", False)
    optimizer = make_optimizer(model, config.weight_decay)
    # Gradients are of a sum over some blocks: with its usual scale, that of a mean, fp16 would overflow at first.
    scale = 2.0 ** (16 - round(math.log2(blocks_per_update * data_config.block_size)))
    scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=precision == "fp16")

    num_trained = model.num_parameters(only_trainable=True)
    sizes = [size for size in (group.size,) if size > 1] + [config.grad_accum_steps, config.batch_size]
    shape = " x ".join(map(str, sizes)) if math.prod(sizes) == blocks_per_update else str(blocks_per_update)
    facts = {
        "model_type": model.config.model_type,
        "parameters": num_parameters,
        "trained_parameters": num_trained,
        "training_text": str(data),
        "eval_documents": eval_stream.num_documents,
        "eval_tokens": len(eval_stream),
        "max_steps": max_steps,
        "precision": precision,
    }
    print(f"""\
model     {identity["model"]}: {facts["model_type"]}, {num_parameters / 1e6:.1f} M parameters, \
{"pretrained" if model_config.model else "from scratch"}\
{f", {num_trained / 1e6:.1f} M of them trained" if num_trained < num_parameters else ""}
training  {data}
held out  {eval_stream.num_documents:,} documents, {len(eval_stream):,} tokens, {len(eval_blocks):,} blocks
steps     {max_steps:,} of {shape} blocks\
{f" ({max_steps / steps_per_epoch:.2f} epochs)" if steps_per_epoch else ""}, \
learning rate {config.learning_rate:g}, {warmup_steps} to warm up
device    {group}{device_name(device)}, {precision}{", compiled" if compiled else ""}
output    {run_dir}""")
    sys.stdout.flush()
    if config.dry_run:
        return dry_run(model, optimizer, scaler, data, config, precision, device, group)

    # The run's directory. Until here nothing was written.
    def begin() -> RunLog:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not resumes:
            lock_directory(run_dir)
            if check_run_dir(run_dir, config) and not holds_run:
                raise UserError(f"--output_dir {run_dir}: another run was made there meanwhile; give another directory")
        if not resumed:
            remove_run(run_dir)
        goes_on = config.on_save_error == "continue"
        log = RunLog(run_dir, progress.step, progress.evaluated == progress.step, max_steps, goes_on)
        write_config(run_dir / "config.yaml", settings)
        return log

    log = begin() if group.rank == 0 else NoLog()
    group.begin()
    if resumed:
        restore_state(tensors, model, optimizer, group)
        data.restore(state.get("data", {}), group.share(tensors.get("stream", {})))
        scaler.load_state_dict(state["scaler"])
        print(f"resuming from {resumed} at step {progress.step}")
    tensors.clear()
    updates: list[tuple[int, int, list[int], Update]] = []  # with step, epoch and blocks; `settle` has not seen them

    def settle() -> None:
        """Looks whether the last updates were finite. A host waits for its device here alone."""
        group.wait_for_device()
        values = torch.stack([value.double() for *_, update in updates for value in update]).tolist() if updates else []
        for (step, epoch, blocks, _), loss, grad_norm, num_tokens in zip(
            updates, values[::4], values[1::4], values[3::4], strict=True
        ):
            progress.tokens_seen += int(num_tokens)
            if math.isfinite(loss + grad_norm):
                progress.skips = 0
                continue
            progress.skips += 1
            log.nonfinite(step, loss=str(loss), grad_norm=str(grad_norm), epoch=epoch, blocks=blocks)
            problem = (
                f"step {step}: the loss is {loss} and the gradient norm {grad_norm}, so the update was left out; its "
                f"blocks were {', '.join(map(str, blocks[:8]))}{', ...' if blocks[8:] else ''} of epoch {epoch}"
            )
            if config.on_nonfinite == "stop":
                fix = f"lower --learning_rate {config.learning_rate:g}, mend the text, or go on past it with"
                raise NonFiniteError(f"{problem}; {fix} --resume --on_nonfinite skip")
            if progress.skips > config.max_skips:
                fix = f"lower --learning_rate {config.learning_rate:g} or raise --max_skips {config.max_skips}"
                raise NonFiniteError(f"{problem}, as were the {config.max_skips} updates before it; {fix}")
            warn(problem)
        updates.clear()

    def save_checkpoint() -> bool:
        settle()
        log.sync()
        path = run_dir / "checkpoints" / f"step-{progress.step:06}"
        tensors = training_state(model, optimizer, group)
        data_states = group.collect(data.state(group.rank, group.size))

        def write() -> bool:
            data_state, stream = data.joined(data_states)
            state = {
                "progress": asdict(progress),
                "ranks": group.size,
                "blocks_per_update": blocks_per_update,
                "data": data_state,
                "scaler": scaler.state_dict(),
                "identity": identity,
                "settings": settings,
                "frozen": frozen,
                "compiled": compiled,
            }
            with warns_only(log.goes_on):
                checkpoint.save(path, tensors | stream, state)
                checkpoint.prune(path.parent, config.keep_checkpoints, path)
                return True
            return False

        return group.first(write)

    def obey_signals() -> None:
        """Called between steps, and between the batches and samples of an evaluation, which change no state."""
        for number in map(signal.Signals, group.union(signals.received)):
            log.goes_on &= number == signal.SIGUSR1
            saved = save_checkpoint()
            if number == signal.SIGUSR1:
                log.say(f"step {progress.step}: {'saved' if saved else 'not saved'}, asked by {number.name}")
            else:
                log.close()
                print(f"stopped by {number.name} at step {progress.step}; saved. Go on with --resume.")
                sys.exit(128 + number)

    def evaluate_where_due() -> None:
        step, last = progress.step, progress.step >= max_steps
        if progress.evaluated == step or (step % config.eval_every and not last):
            return
        settle()
        log.goes_on &= not last

        def measure(size: int) -> tuple[float, int]:
            batches = in_batches(range(len(eval_blocks)), size, group.rank, group.size)
            loader = make_loader(eval_blocks, size, batches, same_shape=same_shape)
            return evaluate(model, loader, precision, obey_signals)

        measured, progress.micro_batch_size = within_memory(measure, progress.micro_batch_size, config.oom)
        nll_sum, num_predicted = group.sum(torch.tensor(measured, dtype=torch.float64, device=device)).tolist()
        loss = nll_sum / num_predicted
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"step {step}: the evaluation loss is {loss}; lower --learning_rate or look at the text"
            )
        samples = []
        for prompt in config.sample_prompt:
            obey_signals()
            with autocast(device, precision), uncompiled(compiled):
                torch.manual_seed(config.seed)
                samples.append(generate(model, tokenizer, [prompt], sampling)[0])
        log.evaluation(step, loss=loss, perplexity=perplexity(loss), tokens=int(num_predicted))
        for prompt, text in zip(config.sample_prompt, samples, strict=True):
            log.sample(step, prompt, text)
        if step and (config.keep == "last" or progress.kept_step is None or loss < progress.kept_loss):
            whole = group.whole_model(model)

            def keep() -> bool:
                with warns_only(log.goes_on):
                    save_model(run_dir, whole, tokenizer, settings, facts, lora_config.merge_lora)
                    return True
                return False

            if group.first(keep):
                progress.kept_step, progress.kept_loss = step, loss
        progress.evaluated = step

    # The loop.
    signals.can_wait = True
    evaluate_where_due()
    model.train()
    batches = data.batches(
        config.batch_size,
        blocks_per_update,
        progress.position,
        group.rank,
        group.size,
        same_shape,
        config.num_workers,
        config.worker_timeout,
    )

    def update(micro_batches: list[dict[str, torch.Tensor]], learning_rate: float, size: int) -> Update:
        seed_step(config.seed, progress.step, group.rank)
        parts = [part for batch in micro_batches for part in split_batch(batch, size)]
        return train_step(model, optimizer, scaler, parts, learning_rate, config.max_grad_norm, precision, group)

    logged, tokens_logged, started = progress.step, progress.tokens_seen, time.perf_counter()
    while progress.step < max_steps:
        try:
            micro_batches, position, blocks = next(batches)
        except UserError:  # a worker was lost, or text that is streamed
            if group.size == 1:
                save_checkpoint()
            raise
        learning_rate = learning_rate_at(progress.step, config.learning_rate, warmup_steps, max_steps)
        made, progress.micro_batch_size = within_memory(
            partial(update, micro_batches, learning_rate), progress.micro_batch_size, config.oom
        )
        progress.step += 1
        updates.append((progress.step, progress.position.epoch, blocks, made))
        progress.position = position
        log.step()

        paused = time.perf_counter()
        if progress.step % config.log_every == 0 or progress.step in (1, max_steps):
            settle()
            paused = time.perf_counter()
            speed = (progress.tokens_seen - tokens_logged) / (paused - started)
            seconds_left = (max_steps - progress.step) * (paused - started) / (progress.step - logged)
            logged, tokens_logged, started = progress.step, progress.tokens_seen, paused
            if progress.skips == 0:
                log.train(
                    progress.step,
                    max_steps,
                    seconds_left=seconds_left,
                    loss=made.loss.item(),
                    tokens=int(made.num_predicted),
                    learning_rate=learning_rate,
                    grad_norm=made.grad_norm.item(),
                    tokens_per_second=speed,
                    tokens_seen=progress.tokens_seen,
                    epoch=data.epochs(position),
                    memory_gib=peak_memory_gib(device),
                    **({"mfu": speed / data.loss_fraction * flops / peak_rate / group.size} if flops else {}),
                )
        evaluate_where_due()
        if progress.step < max_steps:
            if progress.step % config.save_every == 0:
                save_checkpoint()
            obey_signals()
        started += time.perf_counter() - paused  # the speed is that of training alone

    first, kept = {}, {"loss": progress.kept_loss, "perplexity": perplexity(progress.kept_loss)}
    if group.rank == 0:
        first, *_ = evaluated = evaluations(run_dir)
        log.hyperparameters(settings, kept)
        card = model_card(settings, facts, evaluated)
        checkpoint.write_file(run_dir / "model" / "README.md", str(card))
    save_checkpoint()
    ended_by = set(group.union(signals.received)) - {signal.SIGUSR1}
    signals.can_wait = False
    if group.rank == 0:
        log.close()
        mark_finished(run_dir)
        before, after = first["perplexity"], kept["perplexity"]
        print(f"held-out perplexity {before:.2f} before, {after:.2f} after (step {progress.kept_step})")
        if kept["loss"] >= first["loss"]:
            print("warning: training did not improve on the model it started from; try another --learning_rate")
    for number in ended_by:  # all is saved; an upload may take long
        sys.exit(128 + number)
    if group.rank == 0:
        finish(run_dir, config)


# ---------------------------------------------------------------------------------------------------------------------
# Paragraphs of `main` that would hide the loop


def check_run_dir(run_dir: Path, config: TrainConfig) -> bool:
    """Whether ``run_dir`` holds a run. Raises UserError where a new one may not go there."""
    if run_dir.is_symlink():
        raise UserError(f"--output_dir {run_dir}: a symbolic link to {os.readlink(run_dir)}; give what it leads to")
    there = next(path for path in (run_dir, *run_dir.parents) if os.path.lexists(path))
    require(there.is_dir(), f"--output_dir {run_dir}: {there} is a file; give a directory")
    require(os.access(there, os.W_OK), f"--output_dir {run_dir}: {there} is read-only; give another directory")
    present = [name for name in RUN_CONTENT if os.path.lexists(run_dir / name)]
    is_run = "metrics.jsonl" in present or any((run_dir / "checkpoints").glob(f"step-*/{checkpoint.MANIFEST}"))
    if present and not is_run:  # --overwrite must never delete what no run has made
        raise UserError(f"--output_dir {run_dir}: holds {', '.join(present)}, but no run; give another directory")
    if present and not (config.resume or config.overwrite or config.dry_run):
        fix = "go on with --resume, delete it with --overwrite, or give another directory"
        raise UserError(f"--output_dir {run_dir}: holds another run; {fix}")
    return bool(present)


def lock_directory(run_dir: Path) -> None:
    """Keeps other processes out of the run for as long as this one lives."""
    try:
        fcntl.flock(os.open(run_dir, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"--output_dir {run_dir}: a run is under way there; wait for it or give another one") from error


def remove_run(run_dir: Path) -> None:
    """Deletes a run so that what a death half-way leaves is a run that has to start over."""
    checkpoint.remove(run_dir / "checkpoints")
    checkpoint.write_file(run_dir / "metrics.jsonl", "")
    for name in RUN_CONTENT:
        checkpoint.remove(run_dir / name)


def save_every_of(run_dir: Path) -> int:
    """The --save_every of the run that is there: past this step it had a checkpoint."""
    path = run_dir / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))["save_every"] if path.exists() else 0


def check_same(mine: dict[str, Any], group: Group) -> None:
    """Raises UserError where a rank has other settings than rank 0, or other files."""
    different = [name for name, value in group.share(mine).items() if mine.get(name) != value]
    fix = "give all nodes the same command and the same files"
    require(not different, f"{', '.join(different)}: not what rank 0 has; {fix}")


def check_same_run(run_dir: Path, before: dict, now: dict) -> None:
    """Raises UserError where resuming would be another run."""
    for name in [name for name in before if name in now]:  # another transformers may know other settings
        if before[name] != now[name] and name not in ("model's transformers_version", "model's dtype"):
            shown = (f"{str(value)[:60]}" for value in (before[name], now[name]))
            raise UserError(
                f"--resume: {name} was {next(shown)} and is now {next(shown)}, so this is not the run in {run_dir}; "
                f"give what it was made with (see {run_dir}/config.yaml), another --output_dir, or --overwrite"
            )


def init_from_checkpoint(model: PreTrainedModel, path: Path) -> None:
    """Gives ``model`` the weights of another run's checkpoint."""
    source = f"--init_from_checkpoint {path}"
    require((path / checkpoint.MANIFEST).is_file(), f"{source}: no checkpoint; give a run's checkpoints/step-...")
    damage = checkpoint.verify(path)
    require(damage is None, f"{source}: {damage}; give another checkpoint")
    weights, own = checkpoint.load(path)[1]["weights"], _weights(model)
    other = [name for name in weights.keys() | own.keys()
             if name not in weights or name not in own or weights[name].shape != own[name].shape]  # fmt: skip
    fix = "give the --model or --model_config that it was made with, or the run's model/ as --model"
    require(not other, f"{source}: {len(other)} weights are not this model's, as {min(other, default='')}; {fix}")
    _copy_weights(weights, model)


def note_changes(before: dict, now: dict) -> None:
    """Says what a resumed run does otherwise from here on, the learning rate's new course included."""
    shaping = {"max_steps", "num_epochs", "learning_rate", "warmup_steps", "warmup_ratio"}
    shaping |= {"weight_decay", "max_grad_norm", "precision", "compile", "keep", "gradient_checkpointing"}
    shaping |= {"attn_implementation", "lora_dropout", "merge_lora"}
    for name in sorted(shaping):
        if before.get(name, now[name]) != now[name]:
            print(f"note: --{name} was {before[name]} and is {now[name]} from here on")


def write_config(path: Path, settings: dict[str, Any]) -> None:
    """The resolved settings as YAML that --config reads."""
    once = ("resume", "overwrite", "dry_run", "push_to_hub")
    kept = {key: value for key, value in settings.items() if key not in once and value not in (None, [])}
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    checkpoint.write_file(path, f"# made with {made_with}\n{text}")


def should_compile(choice: str, model: PreTrainedModel, flops: float) -> bool:
    """Whether to use torch.compile; ``flops`` is the run's arithmetic, 6 x parameters x tokens (Kaplan et al.)."""
    on_cpu = model.device.type == "cpu"
    compilers = ("g++", "c++", "clang++") if on_cpu else ("cc", "gcc", "clang")
    python_headers = Path(sysconfig.get_path("include"), "Python.h")
    can = any(map(shutil.which, compilers)) and python_headers.exists() and (on_cpu or has_triton())
    needed = f"{compilers[0]}, {python_headers}{'' if on_cpu else ' and a GPU that Triton knows'}"
    require(choice != "on" or can, f"--compile on: needs {needed}; install it or give off")
    # The decision must not depend on a measured time, or two runs with one seed could differ.
    # On a CPU compiling takes half a minute, and steps then take 2% (DistilGPT2) to 15% (SmolLM2) less time.
    seconds, rate = (1800, torch.get_num_threads() * 2.5e11) if on_cpu else (600, 1e14)
    return choice == "on" or (choice == "auto" and can and flops > seconds * rate and model._can_compile_fullgraph)


def compile_layers(model: PreTrainedModel, block_size: int) -> None:
    """Compiles the layers of ``model`` in place. Those that are alike share one compiled code, which stays on the disk.

    To compile the whole model takes longer by the number of its layers, and makes it no faster.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):  # which does not outlive a reboot
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torch", "inductor")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    linear_head(model)  # which runs the model on a shape of its own
    blocks = transformer_layers(model)
    torch._dynamo.config.recompile_limit = 8 + 2 * len(blocks)  # where each layer is different; else it would give up
    # On a CPU compiled code makes dropout's random numbers slower than PyTorch does, and twice, so as not to keep them;
    # in long blocks, attention's are too many to keep.
    kept = model.device.type == "cpu" and block_size <= SHORT_BLOCK
    for block in blocks:
        block.compile(dynamic=False, options={"fallback_random": True} if kept else None)


def uncompiled(compiled: bool) -> AbstractContextManager:
    """For generation, whose lengths change with each token. Importing the compiler takes seconds, so only if needed."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def make_deterministic() -> None:
    """Sums in one order: compiled code and CUDA kernels would add up gradients in the order that threads come in."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as PyTorch's notes on reproducibility have it
    torch.use_deterministic_algorithms(True, warn_only=True)  # some operations of some models know no other way
    torch.utils.deterministic.fill_uninitialized_memory = False  # a help in finding mistakes, and slow


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def dry_run(model, optimizer, scaler, data, config, precision, device, group) -> None:
    """One forward and backward pass and update on a full batch of full blocks; its learning rate is zero."""
    batch = data.first(config.batch_size)
    started = time.perf_counter()
    model.train()

    def step(size: int) -> Update:
        parts = list(split_batch(batch, size)) * min(2, config.grad_accum_steps)  # what is kept between them counts
        return train_step(model, optimizer, scaler, parts, 0.0, config.max_grad_norm, precision, group)

    made, _ = within_memory(step, config.batch_size, config.oom)
    print(
        f"{'dry run':<10}loss {made.loss.item():.4f}, {time.perf_counter() - started:.1f} s for a first update, "
        f"{peak_memory_gib(device):.2f} GiB of memory at the peak; nothing was written"
    )


def save_model(
    run_dir: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict, facts: dict, merge: bool
) -> None:
    """Writes model/: weights (or an adapter), tokenizer and card, usable with `from_pretrained`."""

    def write(directory: Path) -> None:
        save_merged(model, directory) if merge else model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        model_card(settings, facts, evaluations(run_dir)).save(directory / "README.md")

    num_bytes = 4 * model.num_parameters(only_trainable=not merge)
    checkpoint.write_directory(run_dir / "model", write, num_bytes)


def finish(run_dir: Path, config: TrainConfig) -> None:
    """Uploads where asked to, and says where everything is."""
    if config.push_to_hub:
        print(f"uploaded  {push(run_dir / 'model', config.push_to_hub)}")
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else "python"
    print(f"model     {run_dir}/model")
    print(f"curves    {python} -m tensorboard.main --logdir {run_dir.parent}     (or: make tensorboard)")
    print(f'next      {python} generate.py --model {run_dir}/model --prompt "..."')


if __name__ == "__main__":
    run(main)

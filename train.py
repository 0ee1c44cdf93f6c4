"""Fine-tune a causal language model, or train one from scratch. The loop is written out: read `train` top to bottom.

    python train.py --config configs/quickstart.yaml
    python train.py --config configs/quickstart.yaml --dry_run     # look first
    python train.py --config configs/quickstart.yaml --resume      # go on
    python train.py --model distilgpt2 --train_files notes --max_steps 500
    torchrun --nproc_per_node=8 train.py --config configs/eli5.yaml

Afterwards: python generate.py --prompt "..." and tensorboard --logdir runs
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import transformers

from cli.errors import run_script
from cli.flags import Count, Range, Seed, flag, parse
from corpus.flags import DataConfig
from data import Batch, load_data, load_documents, make_loader
from distributed.parallel import total_norm
from distributed.world import DistributedConfig, World, silence_other_ranks
from generate import draw_sample, sampling_in_training
from model import ModelConfig, build_model, load_config, load_tokenizer
from modeling.architectures import Checkpointing
from modeling.compile import needs_same_shape
from modeling.linear_cross_entropy import IGNORED_LABEL
from modeling.precision import Precision, autocast, prepare_device, resolve_precision, select_device, sum_dtype
from modeling.trained import LoraConfig
from perplexity import evaluate, perplexity
from training.checkpointer import BestModel, Checkpointer
from training.monitor import StepMonitor, StepResult, memory_advice, micro_batch_memory, peak_memory_gib
from training.plan import Plan, Schedule, count_steps, identity, share_batch
from training.run import Run, RunConfig
from training.signals import Signals
from training.state import seed_step


@dataclass
class TrainingConfig:
    title = "training"

    batch_size: Count = flag(8, "blocks per step, over all ranks")
    micro_batch_size: Count | None = flag(None, "blocks that a device holds at once (default: its share of a step)")
    max_steps: Count | None = flag(None, "steps to train; wins over --num_epochs")
    num_epochs: Annotated[float, Range(above=0, below=1e6)] = flag(3.0, "passes over the training text")
    learning_rate: Annotated[float, Range(above=0, below=1)] = flag(2e-4, "the peak, reached after the warmup")
    schedule: Schedule = flag("linear", "how the learning rate falls after the warmup; wsd: in the last fifth of a run")
    min_learning_rate: Annotated[float, Range(least=0, below=1)] = flag(0.0, "the rate that the schedule falls to")
    warmup_steps: Annotated[float, Range(least=0)] = flag(0.0, "steps of warmup; below 1: a fraction of all steps")
    adam_beta2: Annotated[float, Range(least=0, below=1)] = flag(0.999, "decay of AdamW's mean of squared gradients")
    weight_decay: Annotated[float, Range(least=0, below=10)] = flag(0.01, "of matrices and embeddings alone")
    max_grad_norm: Annotated[float, Range(least=0, below=1e9)] = flag(1.0, "clip gradients to this norm; 0: never")
    gradient_checkpointing: Checkpointing = flag("off", "recompute activations; selective: keep products", bare="full")
    precision: Precision = flag("auto", "of the arithmetic, not of the weights; auto: the fastest of the device")
    compile: Literal["auto", "on", "off"] = flag("auto", "torch.compile; auto: if the run is long enough to pay for it")
    deterministic: Literal["auto", "on", "off"] = flag("auto", "the same bits in each run; auto: on a CPU alone")
    seed: Seed = flag(42, "of initialization, data order, dropout, and the held-out part")
    eval_every: Count = flag(500, "steps between evaluations; the first and the last step have one, too")
    patience: Count | None = flag(None, "stop after so many evaluations without a better loss (default: never)")
    save_every: Count = flag(500, "steps between checkpoints; the last step has one, too")
    log_every: Count = flag(10, "steps between records of the training loss")
    sample_prompt: list[str] = flag([], "prompts to continue, or in chats to answer, at each evaluation")
    max_skipped_steps: Annotated[int, Range(least=0)] = flag(0, "steps in a row that may be non-finite and are skipped")

    def rules(self) -> list[tuple[bool, str]]:
        whole = self.warmup_steps < 1 or self.warmup_steps == int(self.warmup_steps)
        keeps_best = not self.patience or self.keep == "best"  # of RunConfig
        peak = self.learning_rate if self.schedule != "constant" else 0.0
        least = f"--min_learning_rate {self.min_learning_rate}: must be at most {peak:g} in --schedule {self.schedule}"
        return [
            (whole, f"--warmup_steps {self.warmup_steps}: not a whole number. Use 10, or 0.1 for 10% of all steps."),
            (keeps_best, f"--patience {self.patience}: --keep last keeps no best loss. Remove one of them."),
            (not self.min_learning_rate or self.min_learning_rate <= peak, f"{least}. Lower it."),
        ]


@dataclass
class Config(DataConfig, ModelConfig, LoraConfig, TrainingConfig, RunConfig, DistributedConfig):
    """All flags of train.py."""

    needed_most = ("model", "train_files", "dataset", "text_column", "output_dir", "resume", "batch_size")
    needed_most += ("micro_batch_size", "num_epochs", "learning_rate")


# ---------------------------------------------------------------------------------------------------------------------
# One step


def learning_rate_at(step: int, config: TrainingConfig, warmup_steps: int, decay_step: int, num_steps: int) -> float:
    """Return the learning rate of the next step after ``step`` steps.

    It rises from 0 to the peak over the warmup. From ``decay_step`` on it falls to the minimum at ``num_steps``: along
    a line, as in `transformers.get_linear_schedule_with_warmup`, or half a cosine (Loshchilov and Hutter 2017).
    """
    peak, least = config.learning_rate, config.min_learning_rate
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step < decay_step:
        return peak
    if config.schedule == "cosine":
        return least + (peak - least) * (1 + math.cos(math.pi * (step - decay_step) / (num_steps - decay_step))) / 2
    return least + (peak - least) * (num_steps - step) / max(1, num_steps - decay_step)


def make_optimizer(model: torch.nn.Module, weight_decay: float, beta2: float = 0.999) -> torch.optim.Optimizer:
    """Return AdamW with weight decay for matrices and embeddings, and none for biases and norms."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim >= 2]
    others = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, beta2), fused=True)


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: list[Batch],
    learning_rate: float,
    max_grad_norm: float = 1.0,
    precision: str = "fp32",
    world: World | None = None,
) -> StepResult:
    """Make one optimizer step on the mean loss over all predicted tokens, of all micro-batches and all ranks.

    Each micro-batch has "input_ids" and "labels", both (batch, sequence) int64, and "position_ids" if documents are
    isolated. A step that is not finite, or has nothing to predict, changes neither weights nor moments.
    """
    world, device = world or World(), next(model.parameters()).device
    first_scale = scaler.get_scale()
    while True:
        # Gradients are of the summed loss. So 4 x 2 micro-batches equal 1 x 8, even if blocks differ in length.
        optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, dtype=sum_dtype(device), device=device)  # the loss, predicted tokens, labeled tokens
        for number, batch in enumerate(micro_batches, 1):
            inputs = {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
            with world.sync_gradients(model, number == len(micro_batches)):
                with autocast(device, precision):
                    nll = world.next_token_nll(model, **inputs, loss_scale=scaler.scale(torch.ones((), device=device)))
                scaler.scale(nll * world.size).backward()  # DDP and FSDP average the gradients of the ranks
            has_loss = inputs["labels"] != IGNORED_LABEL
            sums += torch.stack((nll.detach(), has_loss[:, 1:].sum(), has_loss.sum()))
        nll_sum, num_predicted, num_tokens = world.all_reduce(sums)

        # Divide loss and gradients by the predicted tokens of the whole step. `clip_grads_with_norm_` divides by
        # its last argument, so one call averages and clips the gradients. In fp16 `get_scale` waits for the device.
        divisor, scale = num_predicted.clamp_min(1), scaler.get_scale()
        with memory_advice("out of memory in the optimizer", "Use a smaller model, --lora_rank 8 or --strategy fsdp"):
            scaler.unscale_(optimizer)
            loss, grad_norm = nll_sum / divisor, (total_norm(model) / divisor).float()
            clipping = ((grad_norm + 1e-6) / (max_grad_norm or math.inf)).clamp_min(1)  # as in clip_grad_norm_
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, (divisor * clipping).float())
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            update_if_finite(optimizer, scaler, torch.isfinite(loss + grad_norm) & (num_predicted > 0), num_predicted)

        # After an fp16 overflow, repeat the same blocks with a smaller scale. If none helps, restore the first scale.
        overflowed = scaler.get_scale() < scale
        if overflowed and scale * divisor <= 1:
            scaler.update(first_scale)
        elif overflowed:
            continue
        return StepResult(loss, grad_norm, num_predicted, num_tokens)


def update_if_finite(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, is_finite: torch.Tensor, num_predicted: torch.Tensor
) -> None:
    """Update weights and moments, or change nothing. Only a fused optimizer can decide that without the host."""
    if scaler.is_enabled():  # fp16: the scaler itself skips gradients that overflowed
        if num_predicted > 0:
            scaler.step(optimizer)
        scaler.update(None if num_predicted > 0 else scaler.get_scale())  # ends the step, even without tokens
    elif optimizer.state and all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = (~is_finite).float()
        optimizer.step()
    elif is_finite:  # the host waits for the device: with a fused optimizer only until it has moments
        optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------
# The run


def dry_run(model, optimizer, scaler, train_data, config: Config, precision: str, world: World) -> None:
    """Make one step on full micro-batches with a learning rate of zero, and print its time and memory."""
    share = math.ceil(math.ceil(config.batch_size / world.size) / config.micro_batch_size)
    micro_batches = [train_data.first_batch(config.micro_batch_size)] * min(2, share)  # a second one adds gradients
    started = time.perf_counter()
    model.train()
    with micro_batch_memory(config):
        result = train_step(model, optimizer, scaler, micro_batches, 0.0, config.max_grad_norm, precision, world)
    seconds, memory = time.perf_counter() - started, peak_memory_gib(model.device)
    shown = f"loss {result.loss.item():.4f}, {seconds:.1f} s for a first step, {memory:.2f} GiB of memory at the peak"
    print(f"dry run   {shown}; nothing was written")


def train(config: Config, world: World, signals: Signals) -> None:
    """Train to the last step, from the start or the newest checkpoint. All ranks run this; rank 0 writes and prints."""
    run = Run(config, world)  # checks --output_dir; a new run writes nothing before run.start()
    if run.is_uploaded():
        return
    device = select_device()
    precision = world.on_main(partial(resolve_precision, config.precision, device, world.shards))

    # Text -> tokens -> blocks. The first rank of each node fills the caches, and the other ranks read them.
    with world.local_main_first():
        train_documents, eval_documents = load_documents(config, config.seed)
        tokenizer = load_tokenizer(config, train_documents)
        train_data, eval_blocks = load_data(config, train_documents, eval_documents, tokenizer, config.seed)
        model_config = load_config(config, tokenizer, config.block_size, bool(config.lora_rank))
    num_steps, warmup_steps, decay_step = count_steps(config, train_data)
    run.is_chat = train_documents.has_messages

    # Resume from the newest checkpoint, unless the run is finished.
    same_run = identity(config, model_config, tokenizer, train_data, eval_blocks)
    saved = run.find_checkpoint(same_run, (warmup_steps, decay_step, num_steps))
    state, num_steps = saved.state, max(num_steps, saved.state.step)  # a smaller --max_steps undoes no step
    if run.is_finished(saved, num_steps):
        return

    # Seed before the model is built, because new weights are random. Later, each step is seeded separately.
    transformers.set_seed(config.seed)
    model = build_model(config, model_config, tokenizer, world, device, precision, num_steps, saved.compiled)
    optimizer = make_optimizer(model, config.weight_decay, config.adam_beta2)
    run.require_same_model(saved, model.frozen_sha256, type(optimizer).__name__)
    # Gradients are of a sum over a step's tokens. The usual scale is for a mean, so fp16 would overflow at first.
    scale = 2.0 ** (16 - round(math.log2(config.batch_size * config.block_size)))
    scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=precision == "fp16")
    plan = Plan(config, world, device, precision, model, tokenizer, train_data, eval_blocks, num_steps, warmup_steps)
    sampling = sampling_in_training(model, tokenizer, config.sample_prompt, config.seed, run.is_chat)
    print(plan, flush=True)
    if config.dry_run:
        return dry_run(model, optimizer, scaler, train_data, config, precision, world)

    # The first write. From here on, signals wait for the end of a step.
    log = run.start(saved, num_steps)
    run.restore(saved, model, optimizer, scaler, train_data)
    monitor = StepMonitor(state, log, world, config.max_skipped_steps, config.learning_rate)
    checkpointer = Checkpointer(run, state, model, optimizer, scaler, train_data, log, monitor)
    best_model = BestModel(run, model, tokenizer, plan.facts)
    throughput = plan.throughput(state)
    same_shape, micro_batch_size, ranks = needs_same_shape(model), config.micro_batch_size, (world.rank, world.size)
    batches = train_data.batches(micro_batch_size, config.batch_size, state.position, *ranks, same_shape)
    eval_loader = make_loader(eval_blocks, micro_batch_size, *ranks, same_shape)
    handle_signals = partial(signals.handle, checkpointer)
    sample = partial(draw_sample, model, tokenizer, sampling, precision, handle_signals)
    signals.defer()
    model.train()
    while True:
        # Evaluation on all ranks: the first, the periodic and the last one. Signals are handled between its batches.
        is_last = state.step >= num_steps or state.is_out_of_patience(config.patience)
        with throughput.paused():
            if state.last_eval_step != state.step and (state.step % config.eval_every == 0 or is_last):
                monitor.check()
                with micro_batch_memory(config):
                    loss, tokens = evaluate(model, eval_loader, precision, handle_signals, world)
                monitor.check_evaluation(loss)
                samples = [sample(prompt) for prompt in config.sample_prompt]
                log.evaluation(state.step, loss=loss, perplexity=perplexity(loss), tokens=tokens)
                for prompt, text in zip(config.sample_prompt, samples, strict=True):
                    log.sample(state.step, prompt, text)
                best_model.save_if_better(state, loss)
                state.last_eval_step = state.step
            state.stopped_early = state.step < num_steps and state.is_out_of_patience(config.patience)
            if state.step >= num_steps or state.stopped_early:
                break

            # Between two steps: the periodic checkpoint, in the background on a GPU, and SIGTERM, SIGINT and SIGUSR1.
            if checkpointer.is_due(config.save_every):
                checkpointer.start_save()
            handle_signals()

        # One step. Blocks, learning rate and dropout depend on seed, step and rank alone, so resuming repeats them.
        with checkpointer.saving_if_text_fails():
            micro_batches, position, blocks = next(batches)
        learning_rate = learning_rate_at(state.step, config, warmup_steps, decay_step, num_steps)
        seed_step(config.seed, state.step, world.rank)
        with micro_batch_memory(config):
            result = train_step(
                model, optimizer, scaler, micro_batches, learning_rate, config.max_grad_norm, precision, world
            )
        epoch = state.position.epoch
        state.advance(position)
        monitor.add(epoch, blocks, result)  # stays on the device until the next log step
        log.step()

        # The one deliberate wait for the device. It raises NonFiniteError.
        if state.step % config.log_every == 0 or state.step in (1, num_steps):
            monitor.check()
            log.training(state, result, learning_rate, train_data.epochs(position), throughput.since_last_log())

    # The last checkpoint makes the run resumable with a larger --max_steps. The card names all evaluations.
    log.summary(run.settings, {"loss": state.best_loss, "perplexity": perplexity(state.best_loss)})
    checkpointer.save()
    if world.is_main:
        best_model.write_card()
    run.finish(state, log, signals.end())


def main() -> None:
    silence_other_ranks()
    signals = Signals()
    config, config_file = parse(Config, __doc__)
    config.output_dir = config.output_dir or f"runs/{config_file.stem if config_file else 'train'}"
    with World(config) as world:
        signals.world = world
        share_batch(config, world)
        prepare_device(config.deterministic, select_device(), config.precision)
        train(config, world, signals)


if __name__ == "__main__":
    run_script(main)

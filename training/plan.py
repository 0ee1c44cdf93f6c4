"""The plan of a run: its steps, its identity, and the lines that are printed before the first step."""

import json
import math
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cli.errors import require, warn
from corpus.preview import preview
from corpus.tokenize import tokenizer_fingerprint
from distributed.world import World
from modeling.packing import describe_isolation
from modeling.precision import device_name
from training.flops import flops_per_token, peak_flops
from training.monitor import Throughput
from training.state import TrainState

# Settings that must not change when a run resumes. With another value it would be another run.
SAME_RUN = ("block_size", "pack", "batch_size", "seed", "deduplicate", "freeze")
SAME_RUN += ("lora_rank", "lora_alpha", "lora_targets", "streaming", "shuffle_buffer", "max_eval_blocks")

Schedule = Literal["linear", "cosine", "wsd", "constant"]  # wsd: warmup, stable, decay (Hu et al. 2024, MiniCPM)
FEW_TOKENS = 32  # of the evaluation text
DECAY = 0.2  # the part of a run with wsd in which the learning rate falls


def share_batch(config: Any, world: World) -> None:
    """Set the default of --micro_batch_size: a rank's share of the step, which is also its maximum.

    Raise UserError if there are more ranks than blocks.
    """
    few = f"--batch_size {config.batch_size}: there are {world.size} ranks. Set at least {world.size}."
    require(config.batch_size >= world.size, few)
    share = math.ceil(config.batch_size / world.size)
    if (config.micro_batch_size or 0) > share:
        warn(f"--micro_batch_size {config.micro_batch_size}: a rank has {share} blocks per step, so {share} is used")
    config.micro_batch_size = min(config.micro_batch_size or share, share)


def count_steps(config: Any, train_data: Any) -> tuple[int, int, int]:
    """Return the number of steps, of warmup steps, and of steps before the learning rate begins to fall.

    Raise UserError if the warmup is not shorter than the run. A fraction of the run always is.
    """
    num_steps = config.max_steps or math.ceil(train_data.steps_per_epoch(config.batch_size) * config.num_epochs)
    share = min(math.ceil(num_steps * config.warmup_steps), num_steps - 1)
    warmup_steps = config.warmup_steps if config.warmup_steps >= 1 else share
    given = f"--warmup_steps {config.warmup_steps:.15g}"
    require(warmup_steps < num_steps, f"{given}: the run ends at step {num_steps}. Set a smaller value.")
    warmup_steps = int(warmup_steps)
    stable = {"wsd": max(warmup_steps, round((1 - DECAY) * num_steps)), "constant": num_steps}
    return num_steps, warmup_steps, stable.get(config.schedule, warmup_steps)


def identity(
    config: Any, model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, train_data: Any, eval_data: Any
) -> dict[str, Any]:
    """Return the values that identify a run: model, tokenizer, text and the settings of SAME_RUN."""
    base = Path(config.model or config.model_config)
    return {
        "model": base.name if base.exists() else str(base),  # a directory may have moved
        **{f"model's {key}": value for key, value in json.loads(model_config.to_json_string()).items()},
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **train_data.identity,
        "evaluation text": eval_data.stream.sha256,
        **{name: getattr(config, name) for name in SAME_RUN},
    }


class Plan:
    """The facts of a run: printed before its first step, and part of the model card."""

    def __init__(
        self,
        config: Any,
        world: World,
        device: torch.device,
        precision: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        train_data: Any,
        eval_blocks: Any,
        num_steps: int,
        warmup_steps: int,
    ):
        self._config, self._world, self._device, self._model, self._tokenizer = config, world, device, model, tokenizer
        self._train_data, self._warmup_steps = train_data, warmup_steps
        self.facts = {
            "model_type": model.config.model_type,
            "parameters": model.num_parameters(),
            "trained_parameters": model.num_parameters(only_trainable=True),
            "training_text": str(train_data.blocks),
            "eval_text": f"{eval_blocks.stream.counted_documents}, {len(eval_blocks.stream):,} tokens, "
            f"{len(eval_blocks):,} of {eval_blocks.total:,} blocks",
            "max_steps": num_steps,
            "precision": precision,
            "device": f"{world}{device_name(device)}",
            "ranks": world.size,
            "is_deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        few = f"held out: {len(eval_blocks.stream):,} tokens are too few for a loss that means much"
        if len(eval_blocks.stream) < FEW_TOKENS:
            warn(f"{few}. Use a larger --eval_fraction, or --eval_files.")

    def throughput(self, state: TrainState) -> Throughput:
        """Return the meter of tokens per second and, on a known GPU, of model FLOPs utilization."""
        peak = peak_flops(device_name(self._device)) if self.facts["precision"] != "fp32" else None
        flops = flops_per_token(self._model, self._config.block_size) if peak else None
        peak_seconds = flops / peak / self._world.size if flops else None
        return Throughput(state, self.facts["max_steps"], self._device, peak_seconds, self._train_data.loss_fraction)

    def __str__(self) -> str:
        config, facts = self._config, self.facts
        base = Path(config.model or config.model_config)
        total, trained, num_steps = facts["parameters"], facts["trained_parameters"], facts["max_steps"]
        part = f", {trained / 1e6:.1f} M of them trained" if trained < total else ""
        share = math.ceil(config.batch_size / self._world.size)
        at_once = f", {config.micro_batch_size} at once" if config.micro_batch_size < share else ""
        per_epoch = self._train_data.steps_per_epoch(config.batch_size)
        epochs = f" ({num_steps / per_epoch:.2f} epochs)" if per_epoch else ""
        isolation = f", documents isolated by {describe_isolation(self._model)}" if config.pack == "documents" else ""
        end = "" if config.schedule == "constant" else f" to {config.min_learning_rate:g}"
        falls = f", then {config.schedule}{end}"
        lines = {
            "model": f"{base.name if base.exists() else base}: {facts['model_type']}, {total / 1e6:.1f} M parameters, "
            f"{'pretrained' if config.model else 'from scratch'}{part}",
            "training": facts["training_text"] + isolation,
            "held out": facts["eval_text"],
            "steps": f"{num_steps:,}, each of {config.batch_size} blocks{at_once}{epochs}, "
            f"learning rate {config.learning_rate:g}, {self._warmup_steps} to warm up{falls}",
            "device": f"{facts['device']}, {facts['precision']}{', compiled' if self._model.is_compiled else ''}",
            "output": str(config.output_dir),
        }
        if config.dry_run:
            lines["text"] = preview(self._train_data, self._tokenizer, in_color=sys.stdout.isatty())
        return "\n".join(f"{name:<10}{text}" for name, text in lines.items())

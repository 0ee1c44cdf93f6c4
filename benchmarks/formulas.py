"""Formulas for the memory and the traffic of a training step of this project on many devices.

    python -m benchmarks.formulas              print the tables
    python -m benchmarks.formulas --write      write them into docs/scale.md

tests/distributed/test_scale.py compares the formulas with counted bytes. Sizes are in bytes. A GB is 10^9 bytes. P is
the number of parameters.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from distributed.saving import FILE_SIZE
from modeling.architectures import transformer_layers
from training.checkpoint import FILE_BYTES, FILES
from training.flops import flops_per_token, peak_flops

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
BEGIN, END = "<!-- python -m benchmarks.formulas --write -->", "<!-- end of the table -->"
LORA_BEGIN, LORA_END = "<!-- LoRA: python -m benchmarks.formulas --write -->", "<!-- end of LoRA -->"

# Assumptions about the devices. None was measured here.
PEAK, MFU = peak_flops("NVIDIA H100"), 0.4  # dense bfloat16 FLOP/s, and the fraction that a step reaches
NVLINK = 0.8 * 450e9  # bytes/s from each GPU to the others of its node: 80% of NVLink 4's 450 GB/s
NETWORK = 0.8 * 8 * 50e9  # bytes/s between nodes: 80% of eight 400 Gb/s adapters, all of which a ring can use
MEMORY, RESERVED = 80e9, 5e9  # of a GPU, and its part for CUDA, NCCL's buffers and fragmentation
NODE = 8  # GPUs per node
CHUNK = 1024  # tokens at once, whose logits take 8 bytes each; a compiled head has 4,096 at 2 bytes: as much


@dataclass
class Shape:
    """The numbers of a model. ``block`` is the number of parameters of a layer, ``root`` that outside of all layers."""

    parameters: int
    block: int
    layers: int
    width: int
    kv_width: int
    mlp_width: int
    heads: int
    vocabulary: int
    gated: bool  # Llama's layers, else GPT-2's

    @property
    def root(self) -> int:
        return self.parameters - self.layers * self.block


def shape_of(model: PreTrainedModel) -> Shape:
    """Return the shape of a GPT-2 or a Llama, which may be on device meta."""
    c, gated = model.config, model.config.model_type == "llama"
    blocks = transformer_layers(model)
    kv_width = c.hidden_size // c.num_attention_heads * (c.num_key_value_heads if gated else c.num_attention_heads)
    return Shape(
        parameters=model.num_parameters(),
        block=sum(parameter.numel() for parameter in blocks[0].parameters()),
        layers=len(blocks),
        width=c.hidden_size,
        kv_width=kv_width,
        mlp_width=c.intermediate_size if gated else c.n_inner or 4 * c.n_embd,
        heads=c.num_attention_heads,
        vocabulary=c.vocab_size,
        gated=gated,
    )


def state_bytes(s: Shape, devices: int, strategy: str) -> tuple[float, float, float]:
    """Return weights, gradients and AdamW's two moments on a device, all float32: 4 P, 4 P and 8 P.

    They are the 16 bytes of Rajbhandari et al. 2020 (ZeRO, section 3.1) without the fp16 copies. ddp holds them on each
    device, and the gradients are views of its buckets. fsdp divides them among the devices, as ZeRO stage 3 does.
    """
    share = s.parameters / (devices if strategy == "fsdp" else 1)
    return 4 * share, 4 * share, 8 * share


def copied_bytes(s: Shape, strategy: str) -> float:
    """Return the bytes of the bfloat16 weights beside the float32 ones.

    ddp: autocast's copies of the layers' weights, kept for the backward pass. fsdp: the root, which stays gathered, and
    three layers. These are the current one, the next one, and a flat buffer into which the next one is gathered
    (_fsdp_param_group.py in torch.distributed.fsdp).
    """
    return 2 * (s.root + 3 * s.block) if strategy == "fsdp" else 2 * s.layers * s.block


def unsharded_gradient_bytes(s: Shape, strategy: str, micro_batches: int = 1) -> float:
    """Return fsdp's gradients before they are sharded: bfloat16, and float32 while they are reduced. ddp has 0.

    The peak is a layer's gradients beside the root's bfloat16 ones, or the root's at the end. If a step has several
    micro-batches, all 4 P stay on each device until the last one (`to_accumulated_grad_if_needed` in _fsdp_param.py).
    """
    if strategy != "fsdp":
        return 0
    return max(2 * s.root + 6 * s.block, 6 * s.root) + (4 * s.parameters if micro_batches > 1 else 0)


def layer_bytes(s: Shape, strategy: str, device: str = "cuda") -> float:
    """Return the bytes per token that a layer keeps for backward: bf16, flash attention, no dropout, not compiled.

    Korthikanti et al. 2022 (section 4.1) count 34 width + 5 heads x length for 16-bit activations. Flash attention
    keeps one float32 per head instead of the second term. The layers of transformers keep more than the first term.
    They keep float32 inputs of norms and five results of tanh-GELU; on CUDA autocast makes three of these float32.
    Llama under autocast also keeps a bfloat16 copy for each matrix that reads the same input.
    """
    residual = 2 if strategy == "fsdp" else 4  # bytes of a value between layers; fsdp's embeddings are bfloat16
    attention = 2 * (s.width + 2 * s.kv_width) + 2 * s.width + 4 * s.heads  # query, key, value; output; log-sum-exp
    if s.gated:
        norms = 2 * (4 + residual) * s.width  # float32 input, normalized values
        inputs = (2 if strategy == "fsdp" else 5) * 2 * s.width
        return norms + inputs + attention + 4 * 2 * s.mlp_width  # gate, silu(gate), up, their product
    wide = 4 if device == "cuda" else 2  # bytes of the values that only CUDA's autocast makes float32
    mlp = (3 * wide + 2 * 2) * s.mlp_width
    return 2 * (max(residual, wide) + 2) * s.width + attention + mlp


def kept_bytes(s: Shape, tokens: int, strategy: str, checkpointing: bool, device: str = "cuda") -> float:
    """Return all bytes kept for backward beside `copied_bytes`: layers, last norm, gradients of the head.

    With gradient checkpointing each layer keeps its input. One layer at a time keeps the rest. The head computes the
    gradients of hidden states and weights in the forward pass (linear_cross_entropy).
    """
    residual = 2 if strategy == "fsdp" else 4
    states = 4 if device == "cuda" and not s.gated else residual  # LayerNorm gives float32 there
    layer = layer_bytes(s, strategy, device)
    layers = s.layers * residual * s.width + layer if checkpointing else s.layers * layer
    last_norm = (4 + residual if s.gated else states) * s.width
    return tokens * (layers + last_norm + states * s.width) + residual * s.vocabulary * s.width


def head_bytes(s: Shape, tokens: int, strategy: str) -> float:
    """Return the bytes that exist only during the head: logits and softmaxes of a chunk, and two matrices.

    The matrices have the shape of the head's weights. One is a product. The other is the bfloat16 copy of the weights
    with ddp, and the float32 sum of the gradient with fsdp.
    """
    matrices = 3 if strategy == "fsdp" else 2
    return 8 * s.vocabulary * min(CHUNK, tokens) + matrices * 2 * s.vocabulary * s.width


def adapter_parameters(s: Shape, rank: int) -> int:
    """Return the parameters of LoRA on the seven matrices of each Llama layer: rank x (inputs + outputs) each."""
    return s.layers * rank * (9 * s.width + 2 * s.kv_width + 3 * s.mlp_width)


def frozen_bytes(s: Shape) -> int:
    """Return the frozen bytes under bf16. Linear layers are bfloat16; embeddings, a tied head and norms are float32."""
    norms, table = (2 * s.layers + 1) * s.width, s.vocabulary * s.width
    return 2 * (s.parameters - norms - table) + 4 * (norms + table)


def lora_layer_bytes(s: Shape, tokens: int, rank: int) -> float:
    """Return the bytes that a Llama layer keeps for its backward pass with LoRA, on one device.

    Frozen norms keep no normalized values. Each of the seven adapters keeps ``rank`` bfloat16 numbers per token, and a
    bfloat16 copy of itself.
    """
    copies = 2 * adapter_parameters(s, rank) / s.layers
    return tokens * (layer_bytes(s, "ddp") - 2 * 4 * s.width + 7 * 2 * rank) + copies


def lora_kept_bytes(s: Shape, tokens: int, rank: int, checkpointing: bool) -> float:
    """Return all bytes that LoRA keeps: layers, the last norm, and the gradient of the head's input."""
    layer = lora_layer_bytes(s, tokens, rank)
    layers = s.layers * 4 * s.width * tokens + layer if checkpointing else s.layers * layer
    return layers + tokens * 2 * 4 * s.width


def lora_memory(s: Shape, tokens: int, rank: int, devices: int = 1) -> list[float]:
    """Return frozen weights, adapters with gradients and moments, and checkpointed activations. Many devices use fsdp.

    The head's part of the activations is the logits of a chunk and a bfloat16 copy of a tied matrix.
    """
    weights, adapters = frozen_bytes(s) / devices, 16 * adapter_parameters(s, rank) / devices
    gathered = (
        copied_bytes(s, "fsdp") if devices > 1 else 2 * s.vocabulary * s.width * (s.root < 2 * s.vocabulary * s.width)
    )
    head = 8 * s.vocabulary * min(CHUNK, tokens) + gathered
    return [weights, adapters, lora_kept_bytes(s, tokens, rank, True) + head]


def sent_bytes(s: Shape, devices: int, strategy: str, micro_batches: int = 1, width: int = 2) -> float:
    """Return the bytes that a device sends in a step.

    In a ring an all-reduce sends 2 (n - 1) / n of the data, and a gather or a reduce half of that.
    ddp: float32 gradients once. fsdp: float32 gradients once, and weights of ``width`` bytes for each micro-batch. The
    root is sent once, the layers for the forward and for the backward pass (Rajbhandari et al. 2020, section 7.2).
    """
    part = (devices - 1) / devices
    if strategy == "ddp":
        return 2 * part * 4 * s.parameters
    return part * (4 * s.parameters + micro_batches * width * (s.root + 2 * s.layers * s.block))


def checkpoint_bytes(group: int, largest: int, device: str = "cuda") -> int:
    """Return the host memory that saving a checkpoint adds to a rank: copies of its largest file.

    ``group`` is the larger part of the rank's shard. With AdamW this is its moments, two thirds. ``largest`` is its
    largest tensor. safetensors builds a file as two copies. On a GPU the tensors are first copied to the host.
    """
    return (2 if device == "cpu" else 3) * max(group // FILES, largest, FILE_BYTES)


def model_bytes(s: Shape, file_size: float = 1e9 * int(FILE_SIZE.removesuffix("GB"))) -> float:
    """Return the host memory that writing model/ adds to rank 0 with fsdp: a file, and a layer or the embeddings."""
    return min(file_size, 4 * s.parameters) + 4 * max(s.block, s.vocabulary * s.width)


def seconds(s: Shape, flops: float, devices: int, strategy: str, checkpointing: bool) -> tuple[float, float, float]:
    """Return the seconds of computing, of exchanging, and of the exchange that computing can hide.

    ``flops`` are those of `flops_per_token` for all tokens. Checkpointing adds a forward pass, a third. ddp can
    exchange during the backward pass, two thirds of the computing, and fsdp during both passes.
    """
    computing = flops / (PEAK * MFU) * (4 / 3 if checkpointing else 1)
    exchanging = sent_bytes(s, devices, strategy) / (NVLINK if devices <= NODE else min(NVLINK, NETWORK))
    return computing, exchanging, min(exchanging, computing * (2 / 3 if strategy == "ddp" else 1))


# ---------------------------------------------------------------------------------------------------------------------
# The table

MODELS: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {  # and the block size
    "GPT-2, 124M": (lambda: gpt2(12, 768, 12), 1024),
    "GPT-2 medium, 350M": (lambda: gpt2(24, 1024, 16), 1024),
    "GPT-2 XL, 1.5B": (lambda: gpt2(48, 1600, 25), 1024),
    "Llama 3, 8B": (lambda: llama(128256, 4096, 14336, 32, 32, 8), 4096),
    "Llama 2, 13B": (lambda: llama(32000, 5120, 13824, 40, 40, 40), 4096),
    "Llama 3, 70B": (lambda: llama(128256, 8192, 28672, 80, 64, 8), 4096),
}
TOKENS = 8192  # per device and step
DEVICES = (1, 8, 16, 64)


def gpt2(layers: int, width: int, heads: int, vocabulary: int = 50257, length: int = 1024) -> GPT2LMHeadModel:
    ends = {"bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocabulary, "n_positions": length}
    return GPT2LMHeadModel(GPT2Config(**shape, **ends))


def llama(
    vocabulary: int, width: int, mlp_width: int, layers: int, heads: int, kv_heads: int, tied: bool = False
) -> LlamaForCausalLM:
    shape = {"hidden_size": width, "intermediate_size": mlp_width, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary}
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=tied, max_position_embeddings=4096))


def memory(s: Shape, devices: int, strategy: str, checkpointing: bool) -> list[float]:
    """Return weights, gradients, moments, bfloat16 weights and activations, each at its own peak."""
    weights, gradients, moments = state_bytes(s, devices, strategy)
    gradients += unsharded_gradient_bytes(s, strategy)
    activations = kept_bytes(s, TOKENS, strategy, checkpointing) + head_bytes(s, TOKENS, strategy)
    return [weights, gradients, moments, copied_bytes(s, strategy), activations]


def table() -> str:
    lines = [
        "| model | GPUs | strategy | weights | gradients | moments | bf16 weights | activations | sum | fits in 80 GB |"
        " sent | computing | exchanging | efficiency |",
        "|" + " --- |" * 14,
    ]
    for name, (make, length) in MODELS.items():
        with torch.device("meta"):
            model = make()
        s, flops = shape_of(model), flops_per_token(model, length) * TOKENS
        for devices in DEVICES:
            for strategy in ("ddp", "fsdp") if devices > 1 else ("ddp",):
                checkpointing = RESERVED + sum(memory(s, devices, strategy, False)) > MEMORY
                parts = memory(s, devices, strategy, checkpointing)
                fits = RESERVED + sum(parts) <= MEMORY
                said = ("checkpointed" if checkpointing else "yes") if fits else "**no**"
                row = [name, str(devices), strategy if devices > 1 else "(none)"]
                row += [*(f"{part / 1e9:.1f}" for part in parts), f"{sum(parts) / 1e9:.1f} GB", said]
                computing, exchanging, hidden = seconds(s, flops, devices, strategy, checkpointing)
                shares = (computing / (computing + exchanging - behind) for behind in (0, hidden))
                speed = [f"{sent_bytes(s, devices, strategy) / 1e9:.1f} GB", f"{computing * 1e3:.0f} ms"]
                speed += [f"{exchanging * 1e3:.0f} ms", " to ".join(f"{100 * share:.0f}%" for share in shares)]
                row += speed if fits and devices > 1 else ["", speed[1] if fits else "", "", ""]
                if fits or strategy == "fsdp" or devices == 1:  # with ddp more devices do not help
                    lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


LORA_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "Llama 3.2, 1B": lambda: llama(128256, 2048, 8192, 16, 32, 8, tied=True),
    "Llama 3.2, 3B": lambda: llama(128256, 3072, 8192, 28, 24, 8, tied=True),
} | {name: make for name, (make, _) in MODELS.items() if name.startswith("Llama")}
LORA_RANK, LORA_TOKENS, CARDS = 16, 4096, (24, 48, 80)  # one block of 4,096 tokens at once; GB


def lora_table() -> str:
    fits = [f"fits in {gb} GB" for gb in CARDS]
    lines = [f"| model | frozen weights | adapters | activations | sum | {' | '.join(fits)} | of 8 GPUs, fsdp |"]
    lines.append("|" + " --- |" * (6 + len(CARDS)))
    for name, make in LORA_MODELS.items():
        with torch.device("meta"):
            s = shape_of(make())
        parts, shared = lora_memory(s, LORA_TOKENS, LORA_RANK), lora_memory(s, LORA_TOKENS, LORA_RANK, NODE)
        said = ["yes" if sum(parts) <= gb * 1e9 * (1 - RESERVED / MEMORY) else "**no**" for gb in CARDS]
        row = [name, *(f"{part / 1e9:.1f}" for part in parts), f"{sum(parts) / 1e9:.1f} GB", *said]
        lines.append(f"| {' | '.join(row)} | {sum(shared) / 1e9:.1f} GB |")
    return "\n".join(lines)


def with_table(document: str) -> str:
    """Return the document with new tables between their marks."""
    for begin, end, make in ((BEGIN, END, table), (LORA_BEGIN, LORA_END, lora_table)):
        document = re.sub(f"(?<={begin}\n).*(?={end})", f"\n{make()}\n\n", document, flags=re.DOTALL)
    return document


if __name__ == "__main__":
    print(f"{table()}\n\n{lora_table()}")
    if "--write" in sys.argv:
        DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")

"""The device, and the precision and order of its arithmetic."""

import ctypes
import functools
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cli.errors import UserError, root_cause, warn

Precision = Literal["auto", "fp32", "bf16", "fp16"]
NVIDIA_DEVICE = Path("/dev/nvidia0")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@functools.cache  # warns only once
def select_device() -> torch.device:
    """Return the accelerator, such as CUDA, XPU or MPS. If there is none, return the CPU.

    Warn if there is an NVIDIA GPU that PyTorch cannot use.
    """
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    if NVIDIA_DEVICE.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        problem = "this PyTorch is built without CUDA"
        if torch.version.cuda:
            try:
                torch.cuda.init()
                problem = "CUDA finds no device"
            except (RuntimeError, AssertionError) as error:
                problem = root_cause(error)
        warn(f"THE GPU IS NOT USED: {problem}. Install a driver and a PyTorch that fit it. This runs on the CPU.")
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """Return the name of the accelerator. For a CPU, return its number of threads."""
    if device.type == "cpu":
        return f"CPU ({torch.get_num_threads()} threads)"
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type.upper()


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for sums of losses: float64, or float32 on Apple's MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def keep_freed_memory(device_type: str = "cpu") -> None:
    """Make a CPU faster by keeping freed memory in the process until it ends. On other devices do nothing.

    By default each tensor of megabytes is mapped from the system and unmapped again. The page faults of a new mapping
    take longer than most operations.
    """
    if device_type == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets its own mapping
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the end of the heap is never given back


def prepare_device(deterministic: str, device: torch.device, precision: str) -> None:
    """Set up memory and arithmetic, before text or a model is loaded.

    Sums have a fixed order if ``deterministic`` is on, or if it is auto and the device is a CPU. Otherwise compiled
    code and CUDA kernels add up gradients in thread order. If an operation has no deterministic version, it raises
    RuntimeError. In bf16 and fp16, float32 products outside of autocast use TF32 on a GPU. On a CPU, attention with
    dropout computes its scores in bfloat16 under autocast, as a model's own eager attention does. This halves the
    memory of its activations.
    """
    keep_freed_memory(device.type)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(device.type == "cpu")
    if device.type == "cuda" and precision != "fp32":
        torch.set_float32_matmul_precision("high")
    if deterministic == "on" or (deterministic == "auto" and device.type == "cpu"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # from PyTorch's notes on reproducibility
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a slow debugging aid


def resolve_precision(precision: Precision, device: torch.device, shards: bool = False) -> str:
    """Return fp32, bf16 or fp16; ``auto`` becomes the fastest one that the device computes natively.

    Raise UserError for fp16 on a CPU, or if the model is sharded.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16: a CPU has no fast float16. Use bf16, fp32 or auto.")
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "auto" and device.type != "cpu":
        precision = "bf16" if device.type == "xpu" else "fp32"
    if precision == "fp16" and shards:
        raise UserError("--strategy fsdp: it does not scale the gradients of float16. Use --precision bf16 or fp32.")
    if precision != "auto":
        return precision
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the context for forward passes in ``precision``. Master weights stay float32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=DTYPES[precision])


@torch.no_grad()
def set_dtypes(model: PreTrainedModel, linear: torch.dtype, only_frozen: bool = False) -> None:
    """Cast the weights of linear layers to ``linear``, and all other weights and buffers to float32.

    With ``only_frozen``, trained linear weights become float32, too. Autocast casts linear weights to bfloat16 in each
    forward pass. If they hold bfloat16 numbers already, loss and gradients have the same bits without that cast. A
    tied weight stays float32, because the embedding is not cast.
    """
    kinds: dict[torch.nn.Parameter, set[tuple[type, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kinds.setdefault(parameter, set()).add((type(module), name))
    casts = {(torch.nn.Linear, "weight"), (Conv1D, "weight")}
    for parameter, held in kinds.items():
        is_kept = held <= casts and not (only_frozen and parameter.requires_grad)
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(linear if is_kept else torch.float32)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    model.config.dtype = torch.float32

"""The device and the precision of the arithmetic."""

import ctypes
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from cli.errors import UserError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def select_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def keep_freed_memory() -> None:
    """Makes a CPU's work faster, at the price of memory that is not given back before the process ends."""
    # Tensors of megabytes are taken from the system and given back with each operation, and to have their pages
    # mapped anew takes longer than most operations.
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the end of the heap is never given back


def resolve_precision(precision: Precision, device: torch.device) -> str:
    """Turns ``auto`` into the fastest precision that the device computes natively: fp32, bf16 or fp16."""
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16: a CPU has no fast float16; give bf16, fp32 or auto")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which forward passes run; master weights stay float32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=DTYPES[precision])

"""Peak FLOP/s and peak memory."""

import resource
import sys

import torch

# Dense bfloat16 FLOP/s, from the datasheets, by the words in a device's name; the first that fits.
PEAK_FLOPS = {
    "H200 NVL": 836e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "A30": 165e12, "A10": 125e12, "L40S": 362e12, "L4": 121e12,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """The dense bfloat16 FLOP/s of a device, by PyTorch's name for it, or None where it is not known."""
    words = set(device_name.replace("-", " ").split())
    fitting = (peak for name, peak in PEAK_FLOPS.items() if words.issuperset(name.split()) and "MIG" not in words)
    return next(fitting, None)  # of a part of a GPU (MIG) it is not known


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far: allocated on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)

"""torch.compile: decide whether it pays, and compile the layers."""

import os
import shutil
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.utils._triton import has_triton
from transformers import PreTrainedModel

from cli.errors import require
from modeling.architectures import transformer_layers
from modeling.loss import SHORT_BLOCK, linear_head


def should_compile(choice: str, model: PreTrainedModel, flops: float) -> bool:
    """Return whether to use torch.compile.

    ``choice`` is --compile: auto, on or off. ``flops`` is the arithmetic of the run: 6 x parameters x tokens
    (Kaplan et al. 2020). Raise UserError if it is "on" and no compiler is installed.
    """
    on_cpu = model.device.type == "cpu"
    compilers = ("g++", "c++", "clang++") if on_cpu else ("cc", "gcc", "clang")
    python_headers = Path(sysconfig.get_path("include"), "Python.h")
    can_compile = any(map(shutil.which, compilers)) and python_headers.exists() and (on_cpu or has_triton())
    needed = f"{compilers[0]}, {python_headers}{'' if on_cpu else ' and a GPU that Triton supports'}"
    require(choice != "on" or can_compile, f"--compile on: needs {needed}. Use --compile off, or install them.")
    # The decision must not depend on a measured time, or two runs with one seed could differ.
    # On a CPU, compiling takes half a minute. Steps then take 2% (DistilGPT2) to 15% (SmolLM2) less time.
    seconds, rate = (1800, torch.get_num_threads() * 2.5e11) if on_cpu else (600, 1e14)
    is_long = flops > seconds * rate
    return choice == "on" or (
        choice == "auto" and can_compile and is_long and getattr(model, "_can_compile_fullgraph", False)
    )


def compile_layers(model: PreTrainedModel, block_size: int) -> None:
    """Compile the layers of ``model`` in place. Equal layers share compiled code, which is cached on disk.

    Compiling the whole model would take longer in proportion to its layers, and would make it no faster.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # the compiler takes a second to import

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):  # /tmp, which a reboot empties
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torch", "inductor")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    linear_head(model)  # runs the model once, on a shape that must not be compiled
    layers = transformer_layers(model)
    torch._dynamo.config.recompile_limit = 8 + 2 * len(layers)  # for models in which all layers differ
    torch._dynamo.config.optimize_ddp = False  # would split each layer; DDP's hooks run between the layers anyway
    # On a CPU, Inductor draws dropout's random numbers slower than eager mode, and again in the backward pass. For
    # long blocks it still draws them, because the dropout masks of attention are too large to keep.
    use_eager_random = model.device.type == "cpu" and block_size <= SHORT_BLOCK
    for layer in layers:
        layer.compile(dynamic=False, options={"fallback_random": True} if use_eager_random else None)


def uncompiled(compiled: bool) -> AbstractContextManager:
    """Return a context in which a compiled model runs eagerly.

    Generation needs it: its lengths change with each token. If ``compiled`` is false, the compiler is not imported,
    which saves seconds.
    """
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def needs_same_shape(model: PreTrainedModel) -> bool:
    """Return whether all batches must have one shape: for compiled code, and for Reformer's axial positions."""
    return model.is_compiled or bool(getattr(model.config, "axial_pos_embds", False))

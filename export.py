"""Export a model: merge its adapter into its weights, and choose their dtype.

    python export.py --model runs/lora/model --out merged                # an adapter becomes a plain model
    python export.py --model runs/x/model --out small --dtype bf16       # half the bytes

The directory loads with from_pretrained and holds the tokenizer too. It is written completely or not at all.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cli.errors import require, run_script
from cli.flags import AnyPath, flag, parse
from modeling.adapters import merge_adapters
from modeling.loading import load_pretrained, load_tokenizer_by_name
from modeling.precision import DTYPES
from training.atomic import write_directory


@dataclass
class ExportConfig:
    title = "export"

    model: AnyPath | None = flag(None, "Hub id[@revision] or directory of a model or an adapter")
    out: AnyPath | None = flag(None, "a new directory")
    dtype: Literal["fp32", "bf16", "fp16"] = flag("fp32", "dtype of the saved weights")

    def rules(self) -> list[tuple[bool, str]]:
        """Return (holds, message) for each rule that these flags must keep."""
        return [
            (bool(self.model), "--model: missing. Pass a Hub id or a directory."),
            (bool(self.out), "--out: missing. Pass a new directory."),
            (not (self.out and os.path.lexists(self.out)), f"--out {self.out}: exists already. Pass a new one."),
        ]


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: str = "fp32") -> None:
    """Save ``model`` and ``tokenizer`` in ``directory``, with an adapter merged in float32 and then cast.

    ``model`` is float32, and is cast in place if it has no adapter. ``dtype`` is fp32, bf16 or fp16. Raise UserError if
    a weight is too large for it, and SaveError if ``directory`` cannot be written.
    """
    plain = merge_adapters(model) if model._hf_peft_config_loaded else model
    plain = plain.to(DTYPES[dtype])
    for name, weight in plain.named_parameters():
        is_finite = bool(torch.isfinite(weight).all())
        require(is_finite, f"--dtype {dtype}: {name} is not finite in it. Use bf16 or fp32.")

    def write(temporary: Path) -> None:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)

    write_directory(directory, write, sum(weight.nbytes for weight in plain.parameters()))


def main() -> None:
    config, _ = parse(ExportConfig, __doc__)
    tokenizer = load_tokenizer_by_name(config.model, "--model")
    model = load_pretrained(config.model)
    export(model, tokenizer, Path(config.out), config.dtype)
    merged = ", adapter merged" if model._hf_peft_config_loaded else ""
    print(f"{config.out}: {config.model} in {config.dtype}{merged}")


if __name__ == "__main__":
    run_script(main)

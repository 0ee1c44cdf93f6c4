"""Export a model: merge its adapter into its weights, and choose their dtype.

    python export.py --model runs/lora/model --out merged --dtype bf16

bf16 takes half the bytes of float32."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cli.errors import require, run_script
from cli.flags import AnyPath, flag, parse
from data import make_loader
from modeling.adapters import adapter_of, merge_adapter
from modeling.architectures import position_limit
from modeling.checks import check_model
from modeling.loading import load_pretrained, load_tokenizer_by_name, stored_dtype
from modeling.precision import DTYPES, select_device
from perplexity import PerplexityConfig, evaluate, load_blocks
from training.atomic import write_directory
from training.model_card import stored_card


@dataclass
class ExportConfig:
    title = "export"

    model: AnyPath | None = flag(None, "Hub id[@revision] or directory of a model or an adapter")
    out: AnyPath | None = flag(None, "a new directory, also for tokenizer, generation config and card")
    dtype: Literal["fp32", "bf16", "fp16"] = flag("fp32", "dtype of the saved weights")
    files: list[AnyPath] = flag([], "text on which to print the loss before and after")
    text_column: str = flag("text", "the column of --files with the text, or a template")

    def rules(self) -> list[tuple[bool, str]]:
        return [
            (bool(self.model), "--model: missing. Pass a Hub id or a directory."),
            (bool(self.out), "--out: missing. Pass a new directory."),
            (not (self.out and Path(self.out).exists()), f"--out {self.out}: exists already. Pass a new one."),
        ]


def export(model, tokenizer, directory: Path, dtype: str = "fp32", card=None) -> None:
    """Merge the adapter of ``model`` in float32, cast and save the model. This changes ``model`` in place."""
    merge_adapter(model, DTYPES[dtype])
    too_large = next((name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()), None)
    require(not too_large, f"--dtype {dtype}: {too_large} is not finite in it. Use bf16, fp32 or another model.")

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if card:
            card.save(temporary / "README.md")

    write_directory(directory, write, sum(weight.nbytes for weight in model.parameters()))


def loss_of(name: str, config: ExportConfig, tokenizer) -> float:
    """Return the mean loss of a model in float32, in nats per predicted token of --files."""
    model = load_pretrained(name).to(select_device())
    text = PerplexityConfig(files=config.files, text_column=config.text_column)
    text.block_size = min(text.block_size, position_limit(model) or text.block_size)
    check_model(model, tokenizer, text.block_size)
    return evaluate(model, make_loader(load_blocks(text, tokenizer), 8))[0]


def main() -> None:
    config, _ = parse(ExportConfig, __doc__)
    tokenizer = load_tokenizer_by_name(config.model, "--model")
    before = config.files and loss_of(config.model, config, tokenizer)
    model = load_pretrained(config.model, linear=stored_dtype(config.model))
    merged = ", adapter merged" if adapter_of(model) else ""
    export(model, tokenizer, Path(config.out), config.dtype, stored_card(config.model))
    megabytes = sum(path.stat().st_size for path in Path(config.out).iterdir()) / 1e6
    print(f"{config.out}: {config.model} in {config.dtype}{merged}, {megabytes:,.1f} MB")
    if config.files:
        print(f"loss: {before:.6f} before, {loss_of(config.out, config, tokenizer):.6f} after")


if __name__ == "__main__":
    run_script(main)

"""Perplexity of any causal language model on any text.

    python perplexity.py --model runs/quickstart/model --files notes.txt
    python perplexity.py --model distilgpt2 --files test.txt --stride 64

It prints, one a line: `tokens` (the predicted ones), `loss` (their mean negative log-likelihood in nats), `perplexity`
(its exponential) and `bits_per_byte`. The last is the summed loss in bits, divided by the UTF-8 bytes of these tokens;
end-of-text has none. Text is cut into blocks of --block_size tokens. The first token of each is not predicted. With
--stride N a window slides by N tokens: each token is predicted once, with at least block_size - N tokens before it.
In conversations, and with prompts and completions, answers alone have a loss.
"""

import math
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from cli.errors import run_script
from cli.flags import AnyPath, Count, flag, parse
from corpus.flags import TextConfig
from corpus.readers import FILES_HELP
from corpus.sources import read_documents
from corpus.tokenize import begin_of_text_ids, drop_long, tokenize
from data import Blocks, group_texts, make_loader, require_predictions
from distributed.world import World
from modeling.checks import check_model
from modeling.loading import load_pretrained, load_tokenizer_by_name
from modeling.loss import count_predicted, evaluating, next_token_nll
from modeling.precision import Precision, autocast, keep_freed_memory, resolve_precision, select_device, sum_dtype


@dataclass
class PerplexityConfig(TextConfig):
    title = "perplexity"

    model: AnyPath | None = flag(None, "Hub id, with @REVISION if wanted, or directory of the model to measure")
    files: list[AnyPath] = flag([], FILES_HELP)
    stride: Count | None = flag(None, "slide a window of --block_size tokens by N tokens instead of cutting blocks")
    batch_size: Count = flag(8, "blocks per forward pass; does not change the result")
    precision: Precision = flag("fp32", "fp32 is exact; auto is the fastest that the device does well")

    def rules(self) -> list[tuple[bool, str]]:
        skips = f"--stride {self.stride}: must be at most --block_size {self.block_size}, or tokens would be skipped"
        return [
            (self.model is not None, "--model: missing. Pass a Hub id or a directory."),
            (bool(self.files) != bool(self.dataset), "--files: one source is needed. Pass --files or --dataset."),
            ((self.stride or 1) <= self.block_size, f"{skips}. Lower it."),
        ]


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    loader: DataLoader,
    precision: str = "fp32",
    between_batches: Callable[[], None] = lambda: None,
    world: World | None = None,
) -> tuple[float, int]:
    """Return the mean loss in nats per predicted token over all batches of all ranks, and the number of these tokens.

    ``loader`` yields {"input_ids", "labels"}, both (batch, sequence) int64; the batch size does not change the result.
    ``between_batches`` is called before each batch; it may raise. The model keeps its mode and its random state.
    """
    device = next(model.parameters()).device
    nll_sum, num_tokens = torch.zeros((), dtype=sum_dtype(device), device=device), 0
    bar = tqdm(loader, "evaluating", leave=False, file=sys.stdout, disable=not sys.stdout.isatty())
    with evaluating(model), autocast(device, precision):  # over all batches, so that weights are cast once
        for batch in bar:
            between_batches()
            num_tokens += count_predicted(batch["labels"])
            inputs = {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
            # Token by token, so that the sum is taken in float64.
            nll_sum += next_token_nll(model, **inputs, reduction="none").to(nll_sum.dtype).sum()
            if not bar.disable:  # the host waits for the device only if someone looks
                loss, speed = nll_sum.item() / max(1, num_tokens), num_tokens / bar.format_dict["elapsed"]
                bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s")
    sums = torch.stack([nll_sum, nll_sum.new_tensor(num_tokens)])
    total, count = (world or World()).all_reduce(sums).tolist()
    return total / count, int(count)


def perplexity(loss: float) -> float:
    """Return exp(loss in nats per token): infinity, and no OverflowError, if it exceeds a float."""
    return torch.tensor(loss, dtype=torch.float64).exp().item()


def load_blocks(config: PerplexityConfig, tokenizer: PreTrainedTokenizerBase) -> Blocks:
    """Return the blocks of the text that ``config`` names. Raise UserError if none of its tokens is predicted."""
    with redirect_stdout(sys.stderr):  # remarks on the text are no result
        stream = drop_long(config, tokenize(read_documents(config, "--files", config.files), tokenizer), "text")
    shape = config.block_size, config.stride, config.pack == "documents"
    blocks = group_texts(stream, *shape, begin_of_text_ids(tokenizer))
    require_predictions(blocks)
    return blocks


def main() -> None:
    config, _ = parse(PerplexityConfig, __doc__)
    keep_freed_memory((device := select_device()).type)
    precision = resolve_precision(config.precision, device)
    tokenizer = load_tokenizer_by_name(config.model, "--model")
    blocks = load_blocks(config, tokenizer)
    model = load_pretrained(config.model).to(device)
    check_model(model, tokenizer, config.block_size, blocks.isolate_documents, precision)

    loss, num_tokens = evaluate(model, make_loader(blocks, config.batch_size), precision)
    print(f"tokens: {num_tokens}")
    print(f"loss: {loss:.6f}")
    print(f"perplexity: {perplexity(loss):.4f}")
    print(f"bits_per_byte: {loss * num_tokens / math.log(2) / (blocks.num_predicted_bytes(tokenizer) or math.nan):.6f}")


if __name__ == "__main__":
    run_script(main)

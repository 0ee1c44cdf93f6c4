r"""Perplexity of any causal language model on any text.

    python perplexity.py --model runs/quickstart/model --files notes.txt
    python perplexity.py --model distilgpt2 --dataset Salesforce/wikitext --dataset_config wikitext-2-raw-v1 \
                         --dataset_split test --block_size 1024 --stride 512

Prints, one a line: `tokens` that were predicted, `loss` (their mean negative log-likelihood in nats), `perplexity`
(exp of it) and `bits_per_byte` (the summed loss in bits over the UTF-8 bytes of the text). By default the text is cut
into blocks of --block_size tokens, as in training, and the first token of a block is not predicted. With --stride N a
window slides on by N tokens, so that each token is predicted once with at least block_size - N tokens before it; only
then does `bits_per_byte` count every token but the first. Of conversations, and of prompts with completions, the
answers alone are scored, as in training.
"""

import math
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from cli.errors import run
from cli.flags import Count, flag, parse
from corpus.flags import TextConfig
from corpus.sources import read_documents
from corpus.tokenize import load_stream
from data import group_texts, make_loader, need_text
from modeling.checks import check_model
from modeling.loading import load_pretrained, load_tokenizer_by_name
from modeling.loss import count_predicted, evaluating, next_token_nll
from modeling.precision import Precision, autocast, keep_freed_memory, resolve_precision, select_device


@dataclass
class PerplexityConfig(TextConfig):
    model: str | None = flag(None, "Hub id or local directory of the model to measure")
    model_revision: str | None = flag(None, "a branch, tag or commit of the Hub model")
    files: list[str] = flag([], "paths or globs of the text: .txt .jsonl .json .csv .parquet .arrow, also .gz")
    stride: Count | None = flag(None, "slide a window of --block_size tokens on by N tokens instead of cutting blocks")
    batch_size: Count = flag(8, "blocks a forward pass; does not change the result")
    precision: Precision = flag("fp32", "fp32 is exact; auto is the fastest that the device does well")

    def rules(self) -> list[tuple[bool, str]]:
        return [
            *super().rules(),
            (self.model is not None, "no model: give --model, a Hub id or a directory"),
            (bool(self.files) != bool(self.dataset), "give the text with either --files or --dataset"),
            (
                (self.stride or 1) <= self.block_size,
                f"--stride {self.stride}: must be at most --block_size {self.block_size}, or tokens would be skipped",
            ),
        ]


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    loader: DataLoader,
    precision: str = "fp32",
    between_batches: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """Returns (nll_sum in nats, num_tokens) over everything that ``loader`` yields.

    ``loader`` yields what `train_step` takes: {"input_ids", "labels"}, both (batch, sequence) int64. Perplexity is
    exp(nll_sum / num_tokens): sums over tokens do not depend on how blocks were batched. The model keeps its mode and
    its random state.
    ``between_batches`` is called before each batch; it may raise.
    """
    device = next(model.parameters()).device
    nll_sum = torch.zeros((), dtype=torch.float64, device=device)
    num_tokens = 0
    bar = tqdm(loader, "evaluating", leave=False, file=sys.stdout, disable=not sys.stdout.isatty())
    with evaluating(model), autocast(device, precision):  # over all batches, so that the layers' weights are cast once
        for batch in bar:
            between_batches()
            num_tokens += count_predicted(batch["labels"])
            inputs = {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
            # Token by token, so that the sum is taken in float64 in any order.
            nll_sum += next_token_nll(model, **inputs, reduction="none").double().sum()
            if not bar.disable:  # the sum comes to the host only where someone looks at it
                loss, speed = nll_sum.item() / max(1, num_tokens), num_tokens / bar.format_dict["elapsed"]
                bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s")
    return nll_sum.item(), num_tokens


def perplexity(loss: float) -> float:
    """exp(loss in nats a token); infinite, and no OverflowError, where a diverged model's loss is beyond a float."""
    return torch.tensor(loss, dtype=torch.float64).exp().item()


def main() -> None:
    config, _ = parse([PerplexityConfig], __doc__)
    device = select_device()
    if device.type == "cpu":
        keep_freed_memory()
    precision = resolve_precision(config.precision, device)
    with redirect_stdout(sys.stderr):  # what is said about the text is no result
        documents = read_documents(config, "--files", config.files)
        tokenizer = load_tokenizer_by_name(config.model, "--model", config.model_revision)
        stream = load_stream(config, documents, tokenizer, "text")
    isolate_documents = config.pack == "documents"
    blocks = group_texts(stream, config.block_size, config.stride, isolate_documents)
    need_text(blocks)
    model = load_pretrained(config.model, revision=config.model_revision).to(device)
    check_model(model, tokenizer, config.block_size, isolate_documents)

    nll_sum, num_tokens = evaluate(model, make_loader(blocks, config.batch_size), precision)
    print(f"tokens: {num_tokens}")
    print(f"loss: {nll_sum / num_tokens:.6f}")
    print(f"perplexity: {perplexity(nll_sum / num_tokens):.4f}")
    print(f"bits_per_byte: {nll_sum / math.log(2) / stream.num_bytes:.6f}")


if __name__ == "__main__":
    run(main)

"""Prompt -> text.

    python generate.py --prompt "The with statement is used"            # the newest finished run under runs/
    python generate.py --model distilgpt2 --prompt "One" "Two" --greedy --max_new_tokens 40
    python generate.py --prompts_file prompts.txt --num_samples 3       # one prompt a line; also from stdin
    python generate.py                                                  # interactive, in a terminal
    python generate.py --chat                                           # talk with a model of conversations

The texts go to stdout, everything else to stderr. A single text is streamed; several are generated in batches.
"""

import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from cli.errors import UserError, require, run_script
from cli.flags import AnyPath, Count, Range, Seed, flag, parse
from corpus.chat import RenderError, render
from corpus.tokenize import begin_of_text_ids
from modeling.architectures import position_limit
from modeling.checks import check_model
from modeling.loading import load_pretrained, load_tokenizer_by_name
from modeling.loss import evaluating
from modeling.precision import DTYPES, Precision, keep_freed_memory, resolve_precision, select_device
from training.log import finished_step


@dataclass
class SamplingConfig:
    title = "sampling"

    max_new_tokens: Count = flag(100, "most tokens to generate a text; an end-of-text token ends it earlier")
    temperature: Annotated[float, Range(above=0, below=100)] = flag(0.8, "below 1 prefers likely tokens")
    top_k: Annotated[int, Range(least=0)] = flag(50, "sample from the K most likely tokens; 0 for all")
    top_p: Annotated[float, Range(above=0, most=1)] = flag(0.95, "sample from the likeliest tokens that sum up to P")
    greedy: bool = flag(False, "always take the most likely token; temperature, top_k and top_p do not count")


@dataclass
class GenerateConfig(SamplingConfig):
    title = "generation"

    model: AnyPath | None = flag(None, "Hub id[@revision] or directory; default: the newest finished run under runs/")
    prompt: list[str] = flag([], "one or more texts to continue")
    prompts_file: AnyPath | None = flag(None, "a file with one prompt a line")
    chat: bool = flag(False, "a conversation: each prompt is a turn of the user, answered with all turns before it")
    seed: Seed = flag(42, "seed of the sampling")
    num_samples: Count = flag(1, "texts a prompt")
    batch_size: Count = flag(16, "texts generated at once")
    precision: Precision = flag("fp32", "of weights and arithmetic; fp32 is exact, auto is the fastest")

    def rules(self) -> list[tuple[bool, str]]:
        """Return (holds, message) for each rule that these flags must keep."""
        samples = f"--num_samples {self.num_samples}"
        return [
            (not (self.greedy and self.num_samples > 1), f"{samples}: --greedy makes equal texts. Remove --greedy."),
            (not (self.prompt and self.prompts_file), "--prompt: excludes --prompts_file. Remove one of them."),
            (not (self.chat and self.num_samples > 1), f"{samples}: --chat gives one answer a turn. Remove {samples}."),
        ]


class Printer(BaseStreamer):
    """Print a text while it is generated."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer, self._ids, self._num_printed = tokenizer, [], 0  # the prompt counts as printed

    def put(self, value: torch.Tensor) -> None:
        is_prompt = not self._ids  # transformers sends the prompt first, and then each token
        self._ids += value.flatten().tolist()
        if is_prompt:
            self._num_printed = len(self._ids)
        elif not (text := self._decode_new()).endswith("\N{REPLACEMENT CHARACTER}"):  # wait for whole characters
            self._print(text)

    def end(self) -> None:
        self._print(self._decode_new() + "\n")

    def _decode_new(self) -> str:
        """Return the text that is not printed yet. Some tokenizers drop a leading space, so decode 16 tokens more."""
        start = max(0, self._num_printed - 16)
        before = _decode(self._tokenizer, self._ids[start : self._num_printed])
        return _decode(self._tokenizer, self._ids[start:])[len(before) :]

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)
        self._num_printed = len(self._ids)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str] | list[list[int]],
    sampling: SamplingConfig,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """Return a continuation of each prompt, text or ids, in the order of the prompts and without them.

    Prompts are padded on the left and masked, so that greedy decoding gives each the text it would get alone. If an
    architecture does not ignore its padding, only prompts of one length share a batch. The model keeps its mode.
    Raise UserError if a prompt and its new tokens exceed the positions of the model.
    """
    encoded = [_encode(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    limit, longest = position_limit(model), max(map(len, encoded), default=0)
    held = f"the model holds {limit} positions and the longest prompt takes {longest}"
    too_long = f"--max_new_tokens {sampling.max_new_tokens}: {held}. Lower it or use a shorter prompt."
    require(limit is None or longest + sampling.max_new_tokens <= limit, too_long)
    options = {"forced_bos_token_id": None, "forced_eos_token_id": None}  # translation models force these
    for name in ("temperature", "top_k", "top_p"):
        options[name] = None if sampling.greedy else getattr(sampling, name)
    ends = model.generation_config.eos_token_id
    if ends in (None, []):  # BERT's family ends a document with its separator
        ends = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    texts = []
    with evaluating(model):
        for batch in _make_batches(encoded, model):
            width = max(map(len, batch))
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch])  # (batch, width)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
            generated = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=pad,
                eos_token_id=ends,
                do_sample=not sampling.greedy,
                streamer=streamer,
                **options,
            )
            for prompt, row in zip(batch, generated.tolist(), strict=True):
                before, whole = (_decode(tokenizer, tokens) for tokens in (prompt, prompt + row[width:]))
                texts.append(whole[len(before) :])
    return texts


def _make_batches(encoded: list[list[int]], model: PreTrainedModel) -> list[list[list[int]]]:
    """Return one batch of all prompts, or batches of neighbors of one length if the model does not ignore padding."""
    if len({len(row) for row in encoded}) == 1 or _ignores_padding(model):
        return [encoded]
    return [list(same_length) for _, same_length in groupby(encoded, len)]


def _ignores_padding(model: PreTrainedModel) -> bool:
    """Return whether masked tokens on the left leave the next token's logits unchanged. A model is probed once."""
    if "ignores_padding" in vars(model):
        return model.ignores_padding
    rows = model.get_input_embeddings().num_embeddings
    ids = torch.randint(rows, (1, 4), generator=torch.Generator().manual_seed(0)).to(model.device)
    mask = torch.ones_like(ids)
    padded = torch.nn.functional.pad(ids, (3, 0)), torch.nn.functional.pad(mask, (3, 0))
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "pad_token_id": 0}
    alone, with_padding = (
        model.generate(tokens, attention_mask=visible, return_dict_in_generate=True, **options).logits[0]
        for tokens, visible in ((ids, mask), padded)
    )
    tolerance = max(1e-3, 4 * torch.finfo(model.dtype).eps)
    model.ignores_padding = bool((alone - with_padding).abs().max() <= tolerance * alone.abs().max())
    return model.ignores_padding


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the ids of a prompt, with the special tokens that the tokenizer puts before it, but none after it."""
    ids, begin = tokenizer(prompt, add_special_tokens=False)["input_ids"], begin_of_text_ids(tokenizer)
    ids = ids if ids[: len(begin)] == begin else begin + ids  # a chat template may have written them
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    require(bool(ids) or start is not None, "--prompt: empty, and the tokenizer has no end-of-text token. Use a text.")
    return ids or [start]  # an empty prompt is the start of a document


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def end_with_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make generation stop at the token that ends an answer in the chat template, and at end-of-text."""
    turns, ends = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], []
    with suppress(RenderError):  # if the template has no place for these turns, end-of-text alone ends an answer
        ends = [text.rpartition("!")[2].strip() for text, has_loss in render(turns, tokenizer) if has_loss]
    ends, vocabulary = [tokenizer.eos_token or tokenizer.sep_token, *ends], tokenizer.get_vocab()
    own = torch.tensor(model.generation_config.eos_token_id or []).long().flatten().tolist()
    model.generation_config.eos_token_id = [*own, *(vocabulary[end] for end in ends if end in vocabulary)]


def newest_finished_run(runs: Path) -> Path:
    """Return the model directory of the run under ``runs`` that finished last. Raise UserError if there is none."""
    finished = [path.parent for path in runs.glob("*/metrics.jsonl") if finished_step(path.parent)]
    require(bool(finished), f"--model: no finished run under {runs}/. Run `make train` first or pass --model.")
    return max(finished, key=lambda run: (run / "metrics.jsonl").stat().st_mtime) / "model"


def read_prompts(config: GenerateConfig) -> list[str]:
    """Return the prompts of --prompt, --prompts_file or stdin. Raise UserError if there is none."""
    if config.prompt:
        return config.prompt
    source = f"--prompts_file {config.prompts_file}" if config.prompts_file else "stdin"
    try:
        text = Path(config.prompts_file).read_text(encoding="utf-8") if config.prompts_file else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read ({error}). Use a UTF-8 text file.") from error
    prompts = [line for line in text.splitlines() if line.strip()]
    require(bool(prompts), "--prompt: no prompt. Pass --prompt, --prompts_file, or one prompt a line on stdin.")
    return prompts


def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    config: GenerateConfig,
    messages: list[dict],
    stream: bool,
) -> list[dict]:
    """Print each prompt with its continuation, and return ``messages``. With ``stream`` there is one prompt.

    With --chat print the answer to the one prompt, and return the conversation with both. If the model cannot hold the
    conversation, its oldest turns are dropped, a question and its answer at a time.
    """
    if not config.chat:
        if stream:
            print(prompts[0], end="", flush=True)
        texts = generate(model, tokenizer, prompts, config, Printer(tokenizer) if stream else None)
        for prompt, text in [] if stream else zip(prompts, texts, strict=True):
            print(prompt + text + "\n", flush=True)
        return messages
    messages, limit = [*messages, {"role": "user", "content": prompts[0]}], position_limit(model) or math.inf
    while True:
        ids = _encode(tokenizer, tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        if len(messages) == 1 or len(ids) + config.max_new_tokens <= limit:
            break
        print(f"(forgotten: {messages[0]['content'][:40]}...; the model holds {limit} positions)", file=sys.stderr)
        messages = messages[2:]
    (text,) = generate(model, tokenizer, [ids], config, Printer(tokenizer))
    return [*messages, {"role": "assistant", "content": text}]


def main() -> None:
    config, _ = parse(GenerateConfig, __doc__)
    is_interactive = not config.prompt and not config.prompts_file and sys.stdin.isatty()
    prompts = [] if is_interactive else [text for text in read_prompts(config) for _ in range(config.num_samples)]
    device = select_device()
    keep_freed_memory(device.type)
    precision = resolve_precision(config.precision, device)
    name = config.model or str(newest_finished_run(Path("runs")))
    if not config.model:
        print(f"model: {name}", file=sys.stderr)
    tokenizer = load_tokenizer_by_name(name, "--model")
    no_template = f"--chat: the tokenizer of {name} has no chat template. Use a model of conversations."
    require(not config.chat or bool(tokenizer.chat_template), no_template)
    model = load_pretrained(name, dtype=DTYPES[precision]).to(device)
    check_model(model, tokenizer, block_size=2)
    torch.manual_seed(config.seed)
    messages: list[dict[str, str]] = []  # so far, in a conversation
    if config.chat:
        end_with_turns(model, tokenizer)
    at_once = 1 if config.chat else config.batch_size  # a turn is answered before the next one
    for start in range(0, len(prompts), at_once):
        messages = respond(model, tokenizer, prompts[start : start + at_once], config, messages, len(prompts) == 1)
    while is_interactive:
        try:
            batch = [input("\nprompt> ")] * config.num_samples
            messages = respond(model, tokenizer, batch, config, messages, config.num_samples == 1)
        except UserError as error:  # such as a prompt that is too long: the next one may fit
            print(f"\n{error}")
        except (EOFError, KeyboardInterrupt):
            print()
            break


if __name__ == "__main__":
    run_script(main)

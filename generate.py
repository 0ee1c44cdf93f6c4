"""Prompt -> text.

    python generate.py --prompt "The with statement is used"            # the newest finished run under runs/
    python generate.py --model distilgpt2 --prompt "One" "Two" --greedy --max_new_tokens 40
    python generate.py --prompts_file prompts.txt --num_samples 3       # one prompt a line; also from stdin
    python generate.py                                                  # interactive, in a terminal
    python generate.py --model runs/lora/model --merge merged           # an adapter becomes a plain model
    python generate.py --chat                                           # talk with a model of conversations

The texts go to stdout, everything else to stderr. One prompt is streamed as it is made; several are batched.
"""

import math
import os
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from cli.errors import UserError, require, run
from cli.flags import Count, Range, Seed, flag, parse
from corpus.chat import render
from modeling.adapters import save_merged
from modeling.architectures import position_limit
from modeling.checks import check_model
from modeling.loading import load_pretrained, load_tokenizer_by_name
from modeling.loss import evaluating
from modeling.precision import DTYPES, Precision, keep_freed_memory, resolve_precision, select_device
from training.checkpoint import write_directory
from training.log import finished_step


@dataclass
class SamplingConfig:
    max_new_tokens: Count = flag(100, "tokens to make at most; an end-of-text token ends a text sooner")
    temperature: Annotated[float, Range(above=0, below=100)] = flag(0.8, "below 1 prefers likely tokens")
    top_k: Annotated[int, Range(least=0)] = flag(50, "choose among the K likeliest tokens; 0 for all")
    top_p: Annotated[float, Range(above=0, most=1)] = flag(0.95, "among the likeliest that have probability P together")
    greedy: bool = flag(False, "always take the likeliest token")


@dataclass
class GenerateConfig(SamplingConfig):
    model: str | None = flag(None, "Hub id or directory of a model; default: the newest finished run under runs/")
    model_revision: str | None = flag(None, "a branch, tag or commit of the Hub model")
    prompt: list[str] = flag([], "one or more texts to continue")
    prompts_file: str | None = flag(None, "a file with one prompt a line")
    num_samples: Count = flag(1, "texts a prompt")
    batch_size: Count = flag(16, "texts made at once")
    merge: str | None = flag(None, "a new directory to save the model in, an adapter merged into its weights; no text")
    chat: bool = flag(False, "a conversation: prompts are the user's turns, each answered with all before it in view")
    seed: Seed = flag(42, "of the sampling")
    precision: Precision = flag("fp32", "of weights and arithmetic; fp32 is exact; auto: the fastest")

    def rules(self) -> list[tuple[bool, str]]:
        same = f"--num_samples {self.num_samples}: --greedy makes the same text each time; drop one of them"
        both = "--prompt and --prompts_file exclude each other; give one of them"
        chat = f"--chat: a turn has one answer; leave out --num_samples {self.num_samples}"
        return [
            (not (self.greedy and self.num_samples > 1), same),
            (not (self.prompt and self.prompts_file), both),
            (not (self.chat and self.num_samples > 1), chat),
        ]


class Printer(BaseStreamer):
    """Prints a text while it is made."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer, self._ids, self._shown = tokenizer, [], 0  # how many of the ids are printed, or the prompt's

    def put(self, value: torch.Tensor) -> None:
        first = not self._ids
        self._ids += value.flatten().tolist()
        if first:  # transformers sends the prompt, and then each token
            self._shown = len(self._ids)
        elif not (text := self._new()).endswith("\N{REPLACEMENT CHARACTER}"):  # else a character is not whole yet
            self._show(text)

    def end(self) -> None:
        self._show(self._new() + "\n")

    def _new(self) -> str:
        """What is not printed yet. Decoded together with a few tokens before: some tokenizers drop the first space."""
        start = max(0, self._shown - 16)
        before = _decode(self._tokenizer, self._ids[start : self._shown])
        return _decode(self._tokenizer, self._ids[start:])[len(before) :]

    def _show(self, text: str) -> None:
        print(text, end="", flush=True)
        self._shown = len(self._ids)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str] | list[list[int]],
    sampling: SamplingConfig,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """Returns a continuation for each prompt, text or ids, in the order of the prompts, without the prompts.

    Prompts are padded on the left and masked, so that under greedy decoding each gets what it would get
    alone; where an architecture cannot overlook its pads only prompts of one length share a batch. Raises
    UserError where prompt and new tokens exceed the model's positions. The model is left in its mode.
    """
    encoded = [_encode(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    limit, longest = position_limit(model), max(map(len, encoded), default=0)
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise UserError(
            f"--max_new_tokens {sampling.max_new_tokens}: the model holds {limit} positions and the longest prompt "
            f"takes {longest}; lower it or shorten the prompt"
        )
    options = {"forced_bos_token_id": None, "forced_eos_token_id": None}  # what translators begin and end with
    for name in ("temperature", "top_k", "top_p"):
        options[name] = None if sampling.greedy else getattr(sampling, name)
    ends = model.generation_config.eos_token_id
    if ends in (None, []):  # BERT's family ends a document with its separator
        ends = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    texts = []
    with evaluating(model):
        for batch in _batches(encoded, model):
            width = max(map(len, batch))
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch])  # (batch, width)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
            made = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=pad,
                eos_token_id=ends,
                do_sample=not sampling.greedy,
                streamer=streamer,
                **options,
            )
            for prompt, row in zip(batch, made.tolist(), strict=True):
                before, whole = (_decode(tokenizer, tokens) for tokens in (prompt, prompt + row[width:]))
                texts.append(whole[len(before) :])
    return texts


def _batches(encoded: list[list[int]], model: PreTrainedModel) -> list[list[list[int]]]:
    """All prompts together, or runs of neighbours of one length where lengths cannot be mixed."""
    if len({len(row) for row in encoded}) == 1 or _overlooks_pads(model):
        return [encoded]
    return [list(run) for _, run in groupby(encoded, len)]


def _overlooks_pads(model: PreTrainedModel) -> bool:
    """Whether masked tokens on the left leave the next token's logits as they are. Looked at once a model."""
    if "overlooks_pads" in vars(model):
        return model.overlooks_pads
    rows = model.get_input_embeddings().num_embeddings
    ids = torch.randint(rows, (1, 4), generator=torch.Generator().manual_seed(0)).to(model.device)
    mask = torch.ones_like(ids)
    padded = torch.nn.functional.pad(ids, (3, 0)), torch.nn.functional.pad(mask, (3, 0))
    alone, beside = (
        model.generate(
            tokens,
            attention_mask=visible,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        ).logits[0]
        for tokens, visible in ((ids, mask), padded)
    )
    tolerance = max(1e-3, 4 * torch.finfo(model.dtype).eps)
    model.overlooks_pads = bool((alone - beside).abs().max() <= tolerance * alone.abs().max())
    return model.overlooks_pads


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt's ids with the tokenizer's own special tokens before it, but none after it."""
    plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt)["input_ids"]
    while len(ids) > len(plain) and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        ids.pop()
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    require(bool(ids) or start is not None, "--prompt: an empty prompt needs a tokenizer with an end-of-text token")
    return ids or [start]  # an empty prompt: the beginning of a document


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def end_with_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Texts of ``model`` end with the token that ends an answer in the chat template as well as with end-of-text."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    ends = [text.rpartition("!")[2].strip() for text, has_loss in render(turns, tokenizer) or [] if has_loss]
    ids = tokenizer.convert_tokens_to_ids(
        [token for token in (tokenizer.eos_token or tokenizer.sep_token, *ends) if token]
    )
    own = model.generation_config.eos_token_id or []
    model.generation_config.eos_token_id = [*([own] if isinstance(own, int) else own), *ids]


def newest_finished_run(runs: Path) -> Path:
    """The model directory of the run under ``runs`` that finished last. Raises UserError where there is none."""
    finished = []
    for metrics in runs.glob("*/metrics.jsonl"):
        if finished_step(metrics.parent) and (metrics.parent / "model").is_dir():
            finished.append((metrics.stat().st_mtime, metrics.parent / "model"))
    if not finished:
        raise UserError(f"no finished run under {runs}/; run `make train` first or give --model")
    return max(finished)[1]


def _read_prompts(config: GenerateConfig) -> list[str]:
    if config.prompt:
        return config.prompt
    if config.prompts_file:
        try:
            text = Path(config.prompts_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts_file {config.prompts_file}: cannot be read ({error})") from error
    else:
        text = sys.stdin.read()
    prompts = [line for line in text.splitlines() if line.strip()]
    require(bool(prompts), "no prompt: give --prompt, --prompts_file, or one prompt a line on stdin")
    return prompts


def merge(config: GenerateConfig) -> None:
    """Saves the model of an adapter as a plain one."""
    name, out = config.model or str(newest_finished_run(Path("runs"))), Path(config.merge)
    require(not os.path.lexists(out), f"--merge {out}: is there already; give a new directory")
    tokenizer = load_tokenizer_by_name(name, "--model", config.model_revision)
    model = load_pretrained(name, revision=config.model_revision)
    require(
        model._hf_peft_config_loaded, f"--merge {out}: {name} is no adapter, there is nothing to merge; leave it out"
    )

    def write(directory: Path) -> None:
        save_merged(model, directory)
        tokenizer.save_pretrained(directory)

    write_directory(out, write, 4 * model.num_parameters())
    print(f"{out}: {name}, merged")


def main() -> None:
    config, _ = parse([GenerateConfig], __doc__)
    if config.merge:
        return merge(config)
    interactive = not config.prompt and not config.prompts_file and sys.stdin.isatty()
    prompts = [] if interactive else _read_prompts(config)
    device = select_device()
    if device.type == "cpu":
        keep_freed_memory()
    precision = resolve_precision(config.precision, device)
    name = config.model or str(newest_finished_run(Path("runs")))
    if not config.model:
        print(f"model: {name}", file=sys.stderr)
    tokenizer = load_tokenizer_by_name(name, "--model", config.model_revision)
    untaught = f"--chat: the tokenizer of {name} has no chat template; train on messages, or leave --chat out"
    require(not config.chat or bool(tokenizer.chat_template), untaught)
    model = load_pretrained(name, revision=config.model_revision, dtype=DTYPES[precision]).to(device)
    check_model(model, tokenizer, block_size=2)
    torch.manual_seed(config.seed)

    messages: list[dict[str, str]] = []  # of a chat, so far
    if config.chat:
        end_with_turns(model, tokenizer)

    def answer(prompts: list[str], streamed: bool) -> None:
        if config.chat:
            asked, room = [*messages, {"role": "user", "content": prompts[0]}], position_limit(model) or math.inf
            while True:
                ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
                if len(asked) == 1 or len(ids) + config.max_new_tokens <= room:
                    break
                print(f"(forgotten: {asked[0]['content'][:40]}...; the model holds {room} positions)", file=sys.stderr)
                asked = asked[2:]
            (text,) = generate(model, tokenizer, [ids], config, Printer(tokenizer))
            messages[:] = [*asked, {"role": "assistant", "content": text}]
            return
        if streamed:
            print(prompts[0], end="", flush=True)
        texts = generate(model, tokenizer, prompts, config, Printer(tokenizer) if streamed else None)
        for prompt, text in [] if streamed else zip(prompts, texts, strict=True):
            print(prompt + text + "\n", flush=True)

    prompts = [prompt for prompt in prompts for _ in range(config.num_samples)]
    at_once = 1 if config.chat else config.batch_size
    for start in range(0, len(prompts), at_once):
        answer(prompts[start : start + at_once], streamed=len(prompts) == 1)
    while interactive:
        try:
            prompt = input("\nprompt> ")
            answer([prompt] * config.num_samples, streamed=config.num_samples == 1)
        except UserError as error:  # such as a prompt that is too long: the next one may fit
            print(f"\n{error}")
        except (EOFError, KeyboardInterrupt):
            print()
            break


if __name__ == "__main__":
    run(main)

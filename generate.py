"""Prompt -> text.

    python generate.py --prompt "The with statement"  # the newest finished run
    python generate.py --model distilgpt2 --prompt "One" "Two" --greedy
    python generate.py --prompts_file prompts.txt     # one a line; also stdin
    python generate.py                                # interactive
    python generate.py --chat                         # talk with a chat model

The texts go to stdout, everything else to stderr. A single text is streamed; several are generated in batches.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from cli.errors import UserError, require, run_script
from cli.flags import AnyPath, Count, Range, Seed, flag, parse
from cli.printer import Printer, cut, decode
from corpus.chat import end_of_turn, render_prompt
from corpus.tokenize import begin_of_text_ids, end_ids
from modeling.architectures import position_limit
from modeling.checks import check_model
from modeling.compile import uncompiled
from modeling.generation import generate_ids, ignores_padding
from modeling.loading import load_pretrained, load_tokenizer_by_name
from modeling.loss import evaluating
from modeling.packing import plain_attention
from modeling.precision import DTYPES, Precision, autocast, keep_freed_memory, resolve_precision, select_device
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
    precision: Precision | None = flag(None, "of weights and arithmetic (default: fp32 on a CPU, auto on a GPU)")

    def rules(self) -> list[tuple[bool, str]]:
        """Return (holds, message) for each rule that these flags must keep."""
        samples = f"--num_samples {self.num_samples}"
        return [
            (not (self.greedy and self.num_samples > 1), f"{samples}: --greedy makes equal texts. Remove --greedy."),
            (not (self.prompt and self.prompts_file), "--prompt: excludes --prompts_file. Remove one of them."),
            (not (self.chat and self.num_samples > 1), f"{samples}: --chat gives one answer a turn. Remove {samples}."),
        ]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str] | list[list[int]],
    sampling: SamplingConfig,
    streamer: BaseStreamer | None = None,
    stops: Sequence[str] = (),
) -> list[str]:
    """Return a continuation of each prompt, text or ids, in the order of the prompts and without them.

    Prompts are padded on the left and masked, so that greedy decoding gives each the same text as alone. If an
    architecture does not ignore its padding, only prompts of one length share a batch. The model keeps its mode.
    A text ends at an end-of-text token of model or tokenizer, or at an end of turn of the chat template. It also ends
    before one of the texts ``stops``. Raise UserError if a prompt and its new tokens exceed the model's positions.
    """
    encoded = [_encode(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    limit, longest = position_limit(model), max(map(len, encoded), default=0)
    held = f"the model holds {limit} positions and the longest prompt takes {longest}"
    too_long = f"--max_new_tokens {sampling.max_new_tokens}: {held}. Lower it or use a shorter prompt."
    require(limit is None or longest + sampling.max_new_tokens <= limit, too_long)
    own, ends = model.generation_config.eos_token_id, end_ids(tokenizer)
    ends += [own] if isinstance(own, int) else own or []
    pad = next((id for id in (tokenizer.pad_token_id, *ends) if id is not None), 0)
    settings = {"max_new_tokens": sampling.max_new_tokens, "pad_token_id": pad, "eos_token_id": ends or None}
    names = () if sampling.greedy else ("temperature", "top_k", "top_p")
    settings |= {"do_sample": not sampling.greedy} | {name: getattr(sampling, name) for name in names}

    # The stop strings of transformers read the whole vocabulary and fail for some tokenizers.
    def is_stopped(ids: torch.Tensor, _: Any) -> torch.Tensor:
        texts = (decode(tokenizer, row[width:]) for row in ids.tolist())
        return torch.tensor([cut(text, stops) != text for text in texts], device=ids.device)

    texts, options = [], {"streamer": streamer, "stopping_criteria": [is_stopped] if stops else []}
    with evaluating(model), plain_attention(model):
        is_one = len({*map(len, encoded)}) == 1 or ignores_padding(model)
        for batch in [encoded] if is_one else (list(same_length) for _, same_length in groupby(encoded, len)):
            width = max(map(len, batch))
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch])  # (batch, width)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
            generated = generate_ids(model, ids, mask, settings, **options)  # (batch, length)
            for prompt, row in zip(batch, generated.tolist(), strict=True):
                before, whole = (decode(tokenizer, tokens) for tokens in (prompt, prompt + row[width:]))
                texts.append(cut(whole[len(before) :], stops))
    return texts


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], flag_name: str = "--prompt") -> list[int]:
    """Return the ids of a text or of messages, with the special tokens that belong before it, but none after it.

    Raise UserError, which begins with ``flag_name``, if messages do not fit the chat template or there are no ids.
    """
    if not isinstance(prompt, str):
        prompt = render_prompt(prompt, tokenizer, flag_name)
    ids, begin = tokenizer(prompt, add_special_tokens=False)["input_ids"], begin_of_text_ids(tokenizer)
    ids = ids if ids[: len(begin)] == begin else begin + ids  # a chat template may have written them
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    empty = f"{flag_name}: empty, and the tokenizer has no end-of-text token. Use a text."
    require(bool(ids) or start is not None, empty)
    return ids or [start]  # an empty prompt is the start of a document


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
        # Split at "\n" and "\r\n" alone, because a prompt may hold other characters that end lines.
        with open(config.prompts_file or 0, encoding="utf-8", newline="", closefd=bool(config.prompts_file)) as file:
            prompts = [line for line in file.read().replace("\r\n", "\n").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read ({error}). Use a UTF-8 text file.") from error
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
    conversation, drop its oldest turns, a question and its answer at a time.
    """
    if not config.chat:
        print(prompts[0] if stream else "", end="", flush=True)
        texts = generate(model, tokenizer, prompts, config, Printer(tokenizer) if stream else None)
        for prompt, text in [] if stream else zip(prompts, texts, strict=True):
            print(prompt + text + "\n", flush=True)
        return messages
    messages, limit = [*messages, *_question(prompts[0])], position_limit(model) or math.inf
    while True:
        ids = _encode(tokenizer, messages)
        if len(messages) == 1 or len(ids) + config.max_new_tokens <= limit:
            break
        print(f"(forgotten: {messages[0]['content'][:40]}...; the model holds {limit} positions)", file=sys.stderr)
        messages = messages[2:]
    _, stops = end_of_turn(tokenizer)
    (text,) = generate(model, tokenizer, [ids], config, Printer(tokenizer, stops), stops)
    return [*messages, {"role": "assistant", "content": text}]


def sampling_in_training(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], seed: int, chat: bool
) -> GenerateConfig:
    """Return the settings with which a model in training draws samples. Raise UserError if a prompt is too long."""
    limit = position_limit(model)
    config = GenerateConfig(max_new_tokens=min(60, limit // 2) if limit else 60, seed=seed, chat=chat)
    for prompt in prompts:
        ids = _encode(tokenizer, _question(prompt) if chat else prompt, "--sample_prompt")
        long = f"--sample_prompt {prompt[:40]}...: too long for a model of {limit} positions"
        require(not limit or len(ids) + config.max_new_tokens <= limit, f"{long}. Use a shorter one.")
    return config


def draw_sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerateConfig,
    precision: str,
    handle_signals: Callable[[], None],
    prompt: str,
) -> str:
    """Handle signals. Then return ``prompt`` with its continuation, or in a chat with its answer."""
    handle_signals()
    torch.manual_seed(config.seed)
    ids = _encode(tokenizer, _question(prompt) if config.chat else prompt)
    separator, stops = ("\n", end_of_turn(tokenizer)[1]) if config.chat else ("", ())
    with autocast(model.device, precision), uncompiled(model.is_compiled):
        return prompt + separator + generate(model, tokenizer, [ids], config, stops=stops)[0]


def _question(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]


def main() -> None:
    config, _ = parse(GenerateConfig, __doc__)
    is_interactive = not config.prompt and not config.prompts_file and sys.stdin.isatty()
    prompts = [] if is_interactive else [text for text in read_prompts(config) for _ in range(config.num_samples)]
    device = select_device()
    keep_freed_memory(device.type)
    precision = resolve_precision(config.precision or ("fp32" if device.type == "cpu" else "auto"), device)
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

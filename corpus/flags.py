"""The flags of the text."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from cli.flags import AnyPath, Count, Range, flag
from corpus.readers import FILES_HELP
from corpus.templates import parse_filter, parse_source, parse_template


@dataclass
class TextConfig:
    """The source of the text and the length of a block; shared by train.py and perplexity.py."""

    title = "text"

    dataset: AnyPath | None = flag(None, "a Hub dataset id, also ID@REVISION, or a directory made by save_to_disk")
    dataset_config: str | None = flag(None, "the dataset's configuration, if it has several")
    dataset_split: str = flag("train", "the split to read, or a slice such as train[:5000]")
    text_column: str = flag(
        "text", r"dotted column of text or messages (lists are joined), or a template: '{title}\n{answers.text}'"
    )
    text_separator: str = flag(" ", "text between the joined items of a list")
    prompt_column: str | None = flag(None, r"column of the prompts, or a template such as '{title}\n'")
    completion_column: str | None = flag(None, "column or template of the completions; each follows its prompt")
    loss_on: Literal["completion", "all"] = flag(
        "completion", "tokens of conversations and prompts that carry loss: the answers, or all"
    )
    filter: list[str] = flag([], "keep the records that pass all of these: column=value, column!=value")
    long_documents: Literal["split", "drop"] = flag("split", "split or drop the documents longer than a block")
    max_documents: Count | None = flag(None, "read only the first N documents")
    block_size: Annotated[int, Range(least=2)] = flag(128, "tokens per block")
    pack: Literal["stream", "documents"] = flag(
        "stream", "documents: no attention across documents, and no loss on a document's first token"
    )

    def rules(self) -> list[tuple[bool, str]]:
        values = {"dataset_config": self.dataset_config, "dataset_split": self.dataset_split}
        unused = [f"--{name} {value}" for name, value in values.items() if value != getattr(TextConfig, name)]
        columns = self.changed_columns()
        partner = "completion_column" if self.prompt_column else "prompt_column"
        single = f"--prompt_column {self.prompt_column}" if self.prompt_column else ""
        single = single or f"--completion_column {self.completion_column}"
        templates = {name: getattr(self, name) for name in ("text_column", "prompt_column", "completion_column")}
        malformed = [
            f"--{name} {value}" for name, value in templates.items() if value is not None and not parse_template(value)
        ]
        wrong_filter = next((rule for rule in self.filter if not parse_filter(rule)), None)
        example = "Use columns in braces, such as '{title}: {text}'."
        return [
            (bool(self.dataset) or not unused, f"{' '.join(unused)}: needs --dataset. Remove it."),
            (len(columns) < 2, f"{' and '.join(columns)}: exclude each other. Pass one of them."),
            (bool(self.prompt_column) == bool(self.completion_column), f"{single}: needs --{partner}. Pass both."),
            (not malformed, f"{' '.join(malformed)}: not a valid template. {example}"),
            (wrong_filter is None, f"--filter {wrong_filter}: not a filter. Use column=value or column!=value."),
        ]

    def changed_columns(self) -> list[str]:
        """Return the flags that select the text of a record, with values, if these differ from their defaults."""
        names = ("text_column", "prompt_column")
        return [f"--{name} {getattr(self, name)}" for name in names if getattr(self, name) != getattr(TextConfig, name)]


@dataclass
class DataConfig(TextConfig):
    train_files: list[AnyPath] = flag([], FILES_HELP)
    mix: list[AnyPath] = flag(
        [], "several sources as name:weight; a name is a path, a glob or a dataset, a weight counts documents"
    )
    eval_files: list[AnyPath] = flag(
        [], "files of the evaluation text (default: a part of the training text is held out)"
    )
    dataset_eval_split: str | None = flag(None, "split to evaluate on (default: a part of the training text)")
    eval_fraction: Annotated[float, Range(above=0, below=1)] = flag(
        0.1, "part of the documents to hold out, chosen by the seed, if there is no evaluation text"
    )
    max_eval_blocks: Annotated[int, Range(least=0)] = flag(
        2000, "evaluate on at most N blocks, always the same ones, chosen by the seed; 0: on all"
    )
    deduplicate: bool = flag(False, "drop repeated training documents, and evaluation text that is also trained on")
    streaming: bool = flag(False, "read the training text during training, also from URLs, and keep none on disk")
    shuffle_buffer: Count = flag(1000, "blocks that are read and shuffled at once, with --streaming")

    def rules(self) -> list[tuple[bool, str]]:
        names = [name for name in ("dataset", "train_files", "mix") if getattr(self, name)]
        sources = " and ".join(f"--{name} {' '.join(np.atleast_1d(getattr(self, name)))}" for name in names)
        has_weights = all(name and 0 < weight < math.inf for name, weight in map(parse_source, self.mix))
        split = f"--dataset_eval_split {self.dataset_eval_split}"
        buffer = f"--shuffle_buffer {self.shuffle_buffer}: needs --streaming. Remove it."
        return [
            *(self._streaming_rules() if self.streaming else []),
            (self.streaming or self.shuffle_buffer == DataConfig.shuffle_buffer, buffer),
            (len(names) < 2, f"{sources}: exclude each other. Pass one of them."),
            (bool(names), "--train_files: there is no training text. Pass --train_files, --dataset or --mix."),
            (has_weights, f"--mix {' '.join(self.mix)}: a weight is missing. Use name:weight with a weight above 0."),
            (not self.dataset_eval_split or bool(self.dataset), f"{split}: needs --dataset. Use --eval_files."),
            (
                not (self.dataset_eval_split and self.eval_files),
                f"{split} and --eval_files {' '.join(self.eval_files)}: exclude each other. Pass one of them.",
            ),
            (self.dataset_eval_split != self.dataset_split, f"{split}: is also the training split. Use another one."),
        ]

    def _streaming_rules(self) -> list[tuple[bool, str]]:
        """Return the rules of --streaming. ``max_steps`` and ``tokenizer`` belong to other groups of train.py."""
        slices = "--streaming reads whole splits"
        has_evaluation = bool(self.eval_files or self.dataset_eval_split)
        held_out = "--streaming: cannot hold out evaluation text. Pass --eval_files or --dataset_eval_split."
        mix = f"--mix {' '.join(self.mix)}: --streaming reads one source. Remove --mix or --streaming."
        part = f"--dataset_split {self.dataset_split}: {slices}. Use --max_documents."
        own_tokenizer = f"--tokenizer {self.tokenizer}: needs text that is not streamed. Use another tokenizer."
        eval_part = f"--dataset_eval_split {self.dataset_eval_split}: {slices}. Use --eval_files."
        return [
            (bool(self.max_steps), "--streaming: the length of the text is unknown. Set --max_steps."),
            (not (self.tokenizer or "").startswith("train:"), own_tokenizer),
            (has_evaluation, held_out),
            (not self.mix, mix),
            (not self.deduplicate, "--deduplicate: needs the whole text. Remove --deduplicate or --streaming."),
            (not {"[", "+"} & set(self.dataset_split), part),
            (not {"[", "+"} & set(self.dataset_eval_split or ""), eval_part),
        ]

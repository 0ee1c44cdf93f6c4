"""The flags that describe the text."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from cli.flags import Count, Range, flag
from corpus.templates import parse_filter, parse_source, parse_template


@dataclass
class TextConfig:
    """Where text comes from and how long a block is; shared by train.py and perplexity.py."""

    dataset: str | None = flag(None, "a Hub dataset id, or a directory made by save_to_disk")
    dataset_config: str | None = flag(None, "the dataset's configuration, where it has several")
    dataset_split: str = flag("train", "the split to read; slices such as train[:5000] are understood")
    dataset_revision: str | None = flag(None, "a branch, tag or commit of the Hub dataset")
    text_column: str = flag("text", "column of the text or of messages; dotted, as answers.text, and lists are joined")
    text_separator: str = flag(" ", "what stands between the joined items of a list")
    text_template: str | None = flag(None, r"text from several columns instead: '{title}\n{answers.text}'")
    prompt_column: str | None = flag(None, r"instead of text: column of the prompts, or a template such as '{title}\n'")
    completion_column: str | None = flag(None, "the same for the completions, which stand right behind the prompts")
    loss_on: Literal["completion", "all"] = flag(
        "completion", "of messages and prompts: the answers alone, or all; other text is learnt as a whole"
    )
    filter: list[str] = flag([], "keep the records for which all of these hold: column=value, column!=value")
    long_documents: Literal["split", "drop"] = flag("split", "what becomes of those longer than a block")
    max_documents: Count | None = flag(None, "take the first N documents only")
    block_size: Annotated[int, Range(least=2)] = flag(128, "tokens a block")
    pack: Literal["stream", "documents"] = flag(
        "stream", "documents: none sees the one before it in its block, and its first token is not predicted"
    )

    def rules(self) -> list[tuple[bool, str]]:
        unused = self.dataset_config is None and self.dataset_revision is None and self.dataset_split == "train"
        columns = self.columns()
        pair = bool(self.prompt_column) == bool(self.completion_column)
        names = ("text_column", "text_template", "prompt_column", "completion_column")
        given = ((name, getattr(self, name)) for name in names)
        wrong = [f"--{name} {value}" for name, value in given if value and not parse_template(value)]
        no_rule = next((rule for rule in self.filter if not parse_filter(rule)), None)
        return [
            (bool(self.dataset) or unused, "--dataset_config, _split and _revision need --dataset; leave them out"),
            (len(columns) < 2, f"{' and '.join(columns)} exclude each other; give one of them"),
            (pair, "--prompt_column and --completion_column need each other; give both"),
            (not wrong, f"{' '.join(wrong)}: a template must name columns in braces, such as '{{title}}: {{text}}'"),
            (no_rule is None, f"--filter {no_rule}: must be column=value or column!=value"),
        ]

    def columns(self) -> list[str]:
        """The flags that say where in a record its text is, so far as they were given."""
        names = ("text_column", "text_template", "prompt_column")
        return [f"--{name} {getattr(self, name)}" for name in names if getattr(self, name) != getattr(TextConfig, name)]


@dataclass
class DataConfig(TextConfig):
    train_files: list[str] = flag([], "paths or globs: .txt .jsonl .json .csv .parquet .arrow, also .gz")
    mix: list[str] = flag([], "several sources as name:weight, weights of documents; names are paths, globs, datasets")
    eval_files: list[str] = flag([], "the same for evaluation text; without it a part is held out")
    dataset_eval_split: str | None = flag(None, "the dataset's split to evaluate on; without it a part is held out")
    eval_fraction: Annotated[float, Range(above=0, below=1)] = flag(
        0.1, "held out by document when no evaluation text is given, chosen by the seed"
    )
    deduplicate: bool = flag(False, "drop training documents that stand twice, and evaluation text that is trained on")
    streaming: bool = flag(False, "read the training text as it is needed, also from URLs, and keep none of it on disk")
    shuffle_buffer: Count = flag(1000, "blocks to choose the next one from, where the text is streamed")

    def rules(self) -> list[tuple[bool, str]]:
        names = [name for name in ("dataset", "train_files", "mix") if getattr(self, name)]
        given = " and ".join(f"--{name} {' '.join(np.atleast_1d(getattr(self, name)))}" for name in names)
        weights = all(name and 0 < weight < math.inf for name, weight in map(parse_source, self.mix))
        split = f"--dataset_eval_split {self.dataset_eval_split}"
        buffer = f"--shuffle_buffer {self.shuffle_buffer}: needs --streaming; leave it out"
        return [
            *super().rules(),
            *(self._streaming_rules() if self.streaming else []),
            (self.streaming or self.shuffle_buffer == DataConfig.shuffle_buffer, buffer),
            (len(names) < 2, f"{given} exclude each other; give one of them"),
            (bool(names), "no training text: give --dataset, --train_files or --mix"),
            (weights, f"--mix {' '.join(self.mix)}: each must be name:weight, the weight above 0"),
            (not self.dataset_eval_split or bool(self.dataset), f"{split}: needs --dataset; use --eval_files instead"),
            (not (self.dataset_eval_split and self.eval_files), f"{split} and --eval_files exclude each other"),
            (self.dataset_eval_split != self.dataset_split, f"{split}: is the split that is trained on; give another"),
        ]

    def _streaming_rules(self) -> list[tuple[bool, str]]:
        held_out = "nothing can be held out of text that is streamed; give --eval_files or --dataset_eval_split"
        mix = f"--streaming reads one source, not --mix {' '.join(self.mix)}; leave one of them out"
        slices = (
            f"--dataset_eval_split {self.dataset_eval_split}: --streaming reads whole splits; give --eval_files instead"
        )
        part = f"--dataset_split {self.dataset_split}: --streaming reads whole splits; give --max_documents instead"
        return [
            (bool(self.eval_files or self.dataset_eval_split), f"--streaming: {held_out}"),
            (not self.mix, mix),
            (not self.deduplicate, "--streaming and --deduplicate, which needs the whole text, exclude each other"),
            (not {"[", "+"} & set(self.dataset_split), part),
            (not {"[", "+"} & set(self.dataset_eval_split or ""), slices),
        ]

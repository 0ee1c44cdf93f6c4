"""What the Trainer's users write: the script of the guide "Causal language modeling" of transformers.

    python -m benchmarks.guide '{"model": "quickstart/smollm2", "text": "a.jsonl", "eval_text": "b.jsonl",
                                 "text_column": "answers.text", "block_size": 128, "bf16": true}'

It reads the text, makes blocks with the guide's two maps, and trains. It imports nothing of this project: its start is
timed. `text_to_blocks` is timed alone as well.
"""

import json
import sys
import tempfile
from itertools import chain

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


def text_to_blocks(
    text: str,
    text_column: str,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    num_proc: int | None = 4,
    chained: bool = False,
) -> Dataset:
    """The guide's `preprocess_function` and `group_texts`, or with ``chained`` the variant of run_clm.

    What is left of each batch of a thousand records is dropped, as the guide does.
    """
    table = load_dataset("json", data_files=text, split="train").flatten()

    def preprocess(examples):
        return tokenizer([value if isinstance(value, str) else " ".join(value) for value in examples[text_column]])

    def group_texts(examples):
        joined = {key: list(chain(*rows)) if chained else sum(rows, []) for key, rows in examples.items()}  # noqa: RUF017
        total = len(joined["input_ids"])
        if total >= block_size:
            total = total // block_size * block_size
        blocks = {key: [row[i : i + block_size] for i in range(0, total, block_size)] for key, row in joined.items()}
        blocks["labels"] = blocks["input_ids"].copy()
        return blocks

    tokenized = table.map(preprocess, batched=True, num_proc=num_proc, remove_columns=table.column_names)
    return tokenized.map(group_texts, batched=True, num_proc=num_proc)


class SaysFirstStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("first step", file=sys.__stdout__, flush=True)


def main() -> None:
    options = json.loads(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    train, held_out = (
        text_to_blocks(options[key], options["text_column"], tokenizer, options["block_size"])
        for key in ("text", "eval_text")
    )
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32)
    with tempfile.TemporaryDirectory() as directory:
        settings = TrainingArguments(
            directory, max_steps=1, logging_steps=1, bf16=options["bf16"], use_cpu=not torch.cuda.is_available()
        )
        Trainer(
            model=model,
            args=settings,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            callbacks=[SaysFirstStep()],
        ).train()


if __name__ == "__main__":
    main()

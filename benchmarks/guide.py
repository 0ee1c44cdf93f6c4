"""The script that the Trainer's users write: the guide "Causal language modeling" of transformers.

    python -m benchmarks.guide '{"model": "quickstart/smollm2", "text": "a.jsonl", "text_column": "answers.text",
                                 "block_size": 128, "bf16": true}'

It reads the text, makes blocks with the guide's two maps, and trains one step. It imports nothing of this project,
because its start is timed.
"""

import json
import sys
import tempfile

import torch
import transformers
from datasets import Dataset, load_dataset


def text_to_blocks(o: dict, tokenizer: transformers.PreTrainedTokenizerBase, num_proc: int | None = 4) -> Dataset:
    """Apply the guide's `preprocess_function` and `group_texts`. They drop the remainder of each 1,000 records."""
    table = load_dataset("json", data_files=o["text"], split="train").flatten()

    def preprocess(examples):
        return tokenizer([value if isinstance(value, str) else " ".join(value) for value in examples[o["text_column"]]])

    def group_texts(examples):
        joined, size = {key: sum(rows, []) for key, rows in examples.items()}, o["block_size"]  # noqa: RUF017
        total = len(joined["input_ids"]) // size * size
        blocks = {key: [row[i : i + size] for i in range(0, total, size)] for key, row in joined.items()}
        blocks["labels"] = blocks["input_ids"].copy()
        return blocks

    tokenized = table.map(preprocess, batched=True, num_proc=num_proc, remove_columns=table.column_names)
    return tokenized.map(group_texts, batched=True, num_proc=num_proc)


class PrintFirstStep(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("first step", file=sys.__stdout__, flush=True)


def main() -> None:
    o = json.loads(sys.argv[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(o["model"])
    blocks = text_to_blocks(o, tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(o["model"], dtype=torch.float32)
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with tempfile.TemporaryDirectory() as directory:
        device = {"bf16": o["bf16"], "use_cpu": not torch.cuda.is_available()}
        settings = transformers.TrainingArguments(directory, max_steps=1, logging_steps=1, **device)
        data = {"train_dataset": blocks, "data_collator": collator}
        transformers.Trainer(model=model, args=settings, callbacks=[PrintFirstStep()], **data).train()


if __name__ == "__main__":
    main()

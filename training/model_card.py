"""The model card."""

import functools
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers.utils.hub import cached_file

from cli.hub import MODEL_NAME, split_revision

PIPELINE = f"""from transformers import pipeline

generator = pipeline("text-generation", model="{MODEL_NAME}")
print(generator("Once upon a time")[0]["generated_text"])"""
ADAPTER_WITH_TOKENS = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{MODEL_NAME}")
model = AutoModelForCausalLM.from_pretrained("{{base}}")
if len(tokenizer) > model.get_input_embeddings().num_embeddings:
    model.resize_token_embeddings(len(tokenizer))
model = PeftModel.from_pretrained(model, "{MODEL_NAME}")"""


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the numbers."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "datasets": version("datasets")}


@functools.cache
def stored_card(name: str) -> ModelCard | None:
    """Return the model card of a Hub id (with an optional @revision) or a directory, or None.

    The card of an adapter is changed to that of the whole model.
    """
    repo_id, revision = split_revision(name)
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        file = cached_file(repo_id, "README.md", revision=revision, **missing)
        text = Path(file).read_text(encoding="utf-8") if file else ""
        text = re.sub(r"from peft import PeftModel.*?(?=\n```)", PIPELINE, text, flags=re.DOTALL)
        card = ModelCard(text) if text else None
    except (OSError, ValueError, yaml.YAMLError):  # its metadata cannot be read
        return None
    if card:
        card.data.library_name = "transformers"
    return card


def model_card(settings: dict[str, Any], facts: dict[str, Any], evaluations: list[dict[str, Any]]) -> ModelCard:
    """Return the README.md of a trained model: data, hyperparameters, metrics, how to use it."""
    base = settings["model"]
    base_card = stored_card(base) if base else None
    inherited = base_card.data.to_dict() if base_card else {}
    source = settings["dataset"] or ", ".join(settings["train_files"] or settings["mix"])
    hub_base = split_revision(base)[0] if base and not Path(base).exists() else None
    data = settings["dataset"]
    hub_data = split_revision(data)[0] if data and not Path(data).exists() else None
    metadata = ModelCardData(
        library_name="peft" if settings["lora_rank"] else "transformers",
        pipeline_tag="text-generation",
        base_model=hub_base or inherited.get("base_model"),
        datasets=[hub_data] if hub_data else None,
        tags=["causal-lm", facts["model_type"]],
        **{key: inherited[key] for key in ("license", "license_name", "license_link") if key in inherited},
    )
    use = PIPELINE
    if settings["lora_rank"] and settings["add_tokens"]:
        use = ADAPTER_WITH_TOKENS.format(base='", revision="'.join(filter(None, split_revision(base))))
    rows = "\n".join(f"| {e['step']} | {e['loss']:.4f} | {e['perplexity']:.2f} |" for e in evaluations)
    given = {key: value for key, value in settings.items() if value not in (None, [])}
    hyperparameters = "\n".join(f"| `{key}` | `{json.dumps(value)}` |" for key, value in given.items())
    origin = f"fine-tuned from `{base}`" if base else f"a `{facts['model_type']}` trained from scratch"
    return ModelCard(f"""---
{metadata.to_yaml()}
---

# {Path(settings["output_dir"]).name}

A causal language model, {origin}, on `{source}`.

## Use

```python
{use}
```

## Data

Trained on: {facts["training_text"]}. Evaluated on: {facts["eval_text"]}.

## Metrics

Mean negative log-likelihood in nats per predicted token on the held-out text, and its exponential.

| step | loss | perplexity |
| ---: | ---: | ---: |
{rows}

## Hyperparameters

{facts["max_steps"]} steps, precision {facts["precision"]}.

| flag | value |
| --- | --- |
{hyperparameters}

Made with {", ".join(f"{name} {version}" for name, version in versions().items())}.
""")

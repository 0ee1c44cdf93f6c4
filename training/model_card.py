"""The model card."""

import json
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from cli.hub import MODEL_NAME, split_revision


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the numbers."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "datasets": datasets.__version__}


def model_card(settings: dict[str, Any], facts: dict[str, Any], evaluations: list[dict[str, Any]]) -> ModelCard:
    """Return the README.md of a trained model: data, hyperparameters, metrics, how to use it."""
    base = settings["model"]
    source = settings["dataset"] or ", ".join(settings["train_files"] or settings["mix"])
    hub_base = split_revision(base)[0] if base and not Path(base).exists() else None
    data = settings["dataset"]
    hub_data = split_revision(data)[0] if data and not Path(data).exists() else None
    metadata = ModelCardData(
        library_name="peft" if settings["lora_rank"] else "transformers",
        pipeline_tag="text-generation",
        base_model=hub_base,
        datasets=[hub_data] if hub_data else None,
        tags=["causal-lm", facts["model_type"]],
    )
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
from transformers import pipeline

generator = pipeline("text-generation", model="{MODEL_NAME}")
print(generator("Once upon a time")[0]["generated_text"])
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

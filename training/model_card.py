"""The model card, and the upload to the Hub."""

import json
import shlex
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from cli.errors import UserError, root_cause
from cli.hub import split_revision
from training.checkpoint import write_file


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the numbers."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "datasets": datasets.__version__}


NAME = "PATH_OR_ID"  # in the card, until the model is uploaded somewhere


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

generator = pipeline("text-generation", model="{NAME}")
print(generator("Once upon a time")[0]["generated_text"])
```

## Data

Trained on: {facts["training_text"]} tokens. Held out: {facts["eval_documents"]:,} documents,
{facts["eval_tokens"]:,} tokens.

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


def check_login(repo_id: str) -> None:
    """Raise UserError if ``push`` could not work, before hours are spent on training."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {repo_id}: is no Hub id ({root_cause(error)}). Use user/name.") from error
    try:
        HfApi().whoami()
    except Exception as error:  # no login, no network: which ones, depends on the HTTP library of the Hub's client
        raise UserError(
            f"--push_to_hub {repo_id}: not logged in to the Hub ({root_cause(error)}). "
            f"Run `hf auth login`, set HF_TOKEN, or remove the flag and upload later."
        ) from error


def push(model_dir: Path, repo_id: str) -> str:
    """Upload model, tokenizer and card to a private repository. Return its address.

    The token is that of the environment or of the saved login.
    """
    card = model_dir / "README.md"
    write_file(card, card.read_text(encoding="utf-8").replace(NAME, repo_id))
    try:
        api = HfApi()
        repo_id = api.create_repo(repo_id, private=True, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo_id, folder_path=model_dir, commit_message="Upload model, tokenizer and card")
        return f"{api.endpoint}/{repo_id}"
    except Exception as error:
        raise UserError(
            f"--push_to_hub {repo_id}: the upload failed ({root_cause(error)}). The model is safe in {model_dir}. "
            f"Run `hf upload {repo_id} {shlex.quote(str(model_dir))}`."
        ) from error

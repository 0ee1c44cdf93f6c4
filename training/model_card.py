"""The model card."""

import functools
import json
import re
import shlex
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers.utils.hub import cached_file

from cli.hub import MODEL_NAME, split_revision
from training.checkpoint import sha256
from training.directory import local_paths

PIPELINE = f"""from transformers import pipeline

generator = pipeline("text-generation", model="{MODEL_NAME}")
print(generator("Once upon a time")[0]["generated_text"])"""
REPETITION = "## Repeat it"
PATHS = ("model", "model_config", "tokenizer", "dataset", "train_files", "eval_files", "mix")  # settings
MAX_FILES, MAX_BYTES = 20, 10**9  # larger files, and files after these, get no SHA-256: it would take minutes
ADAPTER_WITH_TOKENS = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{MODEL_NAME}")
model = AutoModelForCausalLM.from_pretrained("{{base}}")
if len(tokenizer) > model.get_input_embeddings().num_embeddings:
    model.resize_token_embeddings(len(tokenizer))
model = PeftModel.from_pretrained(model, "{MODEL_NAME}")"""


def versions() -> dict[str, str]:
    """Return the versions of the libraries that influence the numbers."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "datasets": version("datasets")}


@functools.cache
def stored_card(name: str) -> ModelCard | None:
    """Return the model card of a Hub id (with an optional @revision) or a directory, or None.

    Turn an adapter's card into the card of the whole model, without the section about the adapter's weights.
    """
    repo_id, revision = split_revision(name)
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        file = cached_file(repo_id, "README.md", revision=revision, **missing)
        text = Path(file).read_text(encoding="utf-8") if file else ""
        text = re.sub(r"from peft import PeftModel.*?(?=\n```)", PIPELINE, text, flags=re.DOTALL)
        text = text.partition(f"\n{REPETITION}\n")[0]
        card = ModelCard(text) if text else None
    except (OSError, ValueError, yaml.YAMLError):  # its metadata cannot be read
        return None
    if card:
        card.data.library_name = "transformers"
    return card


def model_card(
    settings: dict[str, Any],
    changed: dict[str, Any],
    facts: dict[str, Any],
    evaluations: list[dict[str, Any]],
    weights: dict[str, str],
    is_one_command: bool,
) -> ModelCard:
    """Return the README.md of a trained model: how to use it, data, metrics, and how to repeat the run.

    ``changed`` are the settings that differ from the defaults, ``weights`` the SHA-256 of the files in model/. The card
    may be published, so it names no local path. Files are hashed only if ``weights`` are given, at the end of a run.
    """
    base, data = settings["model"], settings["dataset"]
    use = PIPELINE
    if settings["lora_rank"] and settings["add_tokens"]:
        use = ADAPTER_WITH_TOKENS.format(base='", revision="'.join(filter(None, split_revision(base))))
    rows = "\n".join(f"| {e['step']} | {e['loss']:.4f} | {e['perplexity']:.2f} |" for e in evaluations)
    shown = {key: _without_paths(key, value) for key, value in changed.items() if key != "output_dir"}
    table = "\n".join(f"| `{key}` | `{json.dumps(value)}` |" for key, value in shown.items())
    origin = f"fine-tuned from `{_without_paths('model', base)}`" if base else "trained from scratch"
    text = re.sub(r"(?<!\S)/\S*/(?=\S)", "", facts["training_text"])  # streamed text names its files
    source = " ".join(_without_paths("mix", [data] if data else settings["train_files"] or settings["mix"]))
    return ModelCard(f"""---
{_metadata(settings, facts["model_type"]).to_yaml()}
---

# {Path(settings["output_dir"]).name}

A causal language model (`{facts["model_type"]}`), {origin}, on `{source}`.

## Use

```python
{use}
```

## Data

Trained on: {text}. Evaluated on: {facts["eval_text"]}.
{_table(_digests(settings)) if weights else ""}
## Metrics

Mean negative log-likelihood in nats per predicted token on the held-out text, and its exponential.

| step | loss | perplexity |
| ---: | ---: | ---: |
{rows}

## Hyperparameters

{facts["max_steps"]} steps, precision {facts["precision"]}. The flags of train.py that differ from their defaults:

| flag | value |
| --- | --- |
{table}

{_repetition(shown, facts, weights) if is_one_command else ""}""")


def _metadata(settings: dict[str, Any], model_type: str) -> ModelCardData:
    """Return the metadata that the Hub reads, with base model and license."""
    base = settings["model"]
    base_card = stored_card(base) if base else None
    inherited = base_card.data.to_dict() if base_card else {}
    hub_base = split_revision(base)[0] if base and not Path(base).exists() else None
    data = settings["dataset"]
    hub_data = split_revision(data)[0] if data and not Path(data).exists() else None
    return ModelCardData(
        library_name="peft" if settings["lora_rank"] else "transformers",
        pipeline_tag="text-generation",
        base_model=hub_base or inherited.get("base_model"),
        datasets=[hub_data] if hub_data else None,
        tags=["causal-lm", model_type],
        **{key: inherited[key] for key in ("license", "license_name", "license_link") if key in inherited},
    )


def _repetition(shown: dict[str, Any], facts: dict[str, Any], weights: dict[str, str]) -> str:
    """Return the section with the command that makes the same weights."""
    command = ["python", "train.py"]
    if facts["ranks"] > 1:
        command = ["torchrun", f"--nproc_per_node={facts['ranks']}", "train.py"]
    for key, value in (shown | {"deterministic": "on"}).items():
        command += [f"--{key}", *map(str, value if isinstance(value, list) else [] if value is True else [value])]
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
    exactly = ", bit for bit" if facts["is_deterministic"] else " within rounding"
    return f"""{REPETITION}

On {facts["device"]}, with {made_with}, this command makes the same weights{exactly}. It needs the model and
the text under the names that it has, beside train.py.

```bash
{shlex.join(command)}
```
{_table(weights.items())}"""


def _without_paths(key: str, value: Any) -> Any:
    """Return a setting with the last part of each local path."""
    if key not in PATHS or value is None:
        return value
    if isinstance(value, list):
        return [_without_paths(key, item) for item in value]
    is_local = local_paths(value, has_weight=key == "mix") or Path(value).is_absolute()
    return Path(value).name if is_local else value


def _digests(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Return name and SHA-256 of the first local files of the text and of the initial model."""
    values = [(key, item) for key in PATHS for item in np.atleast_1d(settings[key] or []).tolist()]
    paths = [path for key, value in values for path in local_paths(value, has_weight=key == "mix")]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    files = [file for file in files if file.is_file()]
    hashed = [file for file in files if file.stat().st_size <= MAX_BYTES][:MAX_FILES]
    more = [(f"and {len(files) - len(hashed):,} more", "")] if len(files) > len(hashed) else []
    return [(file.name, sha256(file)) for file in hashed] + more


def _table(digests: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"| `{name}` | `{digest}` |\n" for name, digest in digests)
    return f"\n| file | SHA-256 |\n| --- | --- |\n{rows}" if rows else ""

"""What a run tells: metrics.jsonl, TensorBoard and the terminal; the model card and the upload to the Hub."""

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from checkpoint import write_file
from config import SaveError, UserError, drop_output, one_line, warn

# Dense bfloat16 FLOP/s, from the datasheets, by the words in a device's name; the first that fits.
PEAK_FLOPS = {
    "H200 NVL": 836e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "A30": 165e12, "A10": 125e12, "L40S": 362e12, "L4": 121e12,
}  # fmt: skip

NO_CURVES = ("tokens", "tokens_seen", "epoch", "final")  # in metrics.jsonl, but flat or straight lines in TensorBoard


class RunLog:
    """Writes each record to metrics.jsonl, TensorBoard and stdout: a bar on a terminal, else plain lines.

    Records that an interrupted run left behind are removed, after ``step`` and, unless ``evaluated``, that step's
    evaluation: a resumed run shows one curve. Where the disk is full it raises SaveError or, where ``goes_on``, warns
    and writes the record to metrics.jsonl later.
    """

    def __init__(self, run_dir: Path, step: int, evaluated: bool, max_steps: int, goes_on: bool = False):
        records = [record for record in read_metrics(run_dir) if record["step"] <= step]
        records = [r for r in records if r["step"] < step or r["split"] != "eval" or evaluated]
        _rewrite(run_dir, records)
        self._file = open(run_dir / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115 open as long as the run
        self._unwritten = b""
        # TensorBoard drops what older files have from this step on, so a part of it may have to be drawn once more.
        self._purge_step = step + evaluated
        self._recent = [record for record in records if record["step"] == step and not evaluated]
        self._board: SummaryWriter | None = None
        self._run_dir, self.goes_on = run_dir, goes_on
        self.terminal = sys.stdout.isatty()
        self._bar = tqdm(total=max_steps, initial=step, unit="step", file=sys.stdout, disable=not self.terminal)

    def step(self) -> None:
        self._bar.update()

    def train(self, step: int, max_steps: int, seconds_left: float, **values: Any) -> None:
        self._write(step, "train", values)
        if self.terminal:
            self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['tokens_per_second']:,.0f} tokens/s")
        else:
            mfu = f"mfu {values['mfu']:.1%}  " if "mfu" in values else ""
            self.say(
                f"step {step}/{max_steps}  loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
                f"grad_norm {values['grad_norm']:.2f}  {values['tokens_per_second']:,.0f} tokens/s  {mfu}"
                f"{duration(seconds_left)} left"
            )

    def evaluation(self, step: int, **values: Any) -> None:
        self._write(step, "eval", values)
        self.say(f"step {step}: evaluation loss {values['loss']:.4f}, perplexity {values['perplexity']:.2f}")

    def nonfinite(self, step: int, **values: Any) -> None:
        """An update that was left out; ``loss`` and ``grad_norm`` are texts, as JSON and curves have no NaN."""
        self._write(step, "nonfinite", values)

    def sample(self, step: int, prompt: str, text: str) -> None:
        # TensorBoard renders Markdown; an indented block shows the text as it is.
        lines = "\n".join("    " + line for line in (prompt + text).splitlines())
        with self._saving():
            self._draw(lambda board: board.add_text(f"sample: {prompt}", lines, step))
        self.say(f"sample: {prompt}{text}")

    def hyperparameters(self, values: dict[str, Any], final: dict[str, float]) -> None:
        """Hyperparameters with the final metrics, under the tags of the curves that they end."""
        given = {key: value for key, value in values.items() if value not in (None, [], False)}
        plain = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in given.items()}
        summaries = hparams(plain, {f"eval/{key}": value for key, value in final.items()})
        with self._saving():
            self._draw(lambda board: [board.file_writer.add_summary(summary) for summary in summaries])

    def say(self, text: str) -> None:
        with self._saving():
            try:
                if self.terminal:
                    tqdm.write(text, file=sys.stdout)
                else:
                    print(text, flush=True)
            except BrokenPipeError:  # a long run does not end because nobody reads on
                drop_output(sys.stdout)

    def sync(self) -> None:
        """Brings all records to the disk before a checkpoint, which is not to be ahead of them."""
        with self._saving():
            self._write_lines()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        if self._board:
            self._board.close()

    def _write(self, step: int, split: str, values: dict[str, Any]) -> None:
        record = {"step": step, "split": split, **values}
        self._unwritten += (json.dumps(record) + "\n").encode()
        with self._saving():
            self._write_lines()
            self._draw(lambda board: _add_scalars(board, **record))
            self._purge_step = step
            self._recent = [record for record in self._recent if record["step"] == step]
        self._recent.append(record)

    def _write_lines(self) -> None:
        while self._unwritten:  # a full disk takes a part of a line: what is left follows when there is room again
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def _draw(self, add: Callable[[SummaryWriter], Any]) -> None:
        if self._board is None:
            self._board = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=self._purge_step)
            for record in self._recent:
                _add_scalars(self._board, **record)
        add(self._board)
        self._board.flush()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._board = None  # its writing thread may have ended; the next record opens another file
            problem = f"{self._run_dir}: the log cannot be written ({one_line(error)}); make room"
            if not self.goes_on:
                raise SaveError(f"{problem} and go on with --resume") from error
            warn(problem)


class NoLog:
    """The log of ranks other than 0: whatever it is told, it does nothing."""

    goes_on = False

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values, **named: None


def _add_scalars(board: SummaryWriter, step: int, split: str, **values: Any) -> None:
    for key, value in values.items():
        if key not in NO_CURVES and split != "nonfinite":
            board.add_scalar(f"{split}/{key}", value, step)


def peak_flops(device_name: str) -> float | None:
    """The dense bfloat16 FLOP/s of a device, by PyTorch's name for it, or None where it is not known."""
    words = set(device_name.replace("-", " ").split())
    fitting = (peak for name, peak in PEAK_FLOPS.items() if words.issuperset(name.split()) and "MIG" not in words)
    return next(fitting, None)  # of a part of a GPU (MIG) it is not known


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line that was being written when the run died is left out."""
    path, records = run_dir / "metrics.jsonl", []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append({"step": int(record["step"]), "split": str(record["split"]), **record})
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                warn(f"{path}: line {number} is damaged and left out")
    return records


def _rewrite(run_dir: Path, records: list[dict[str, Any]]) -> None:
    write_file(run_dir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def mark_finished(run_dir: Path) -> None:
    """Adds ``"final": true`` to the last evaluation, once all that belongs to the run is written."""
    records = read_metrics(run_dir)
    if records and records[-1]["split"] == "eval" and not records[-1].get("final"):  # its date tells the newest run
        _rewrite(run_dir, [*records[:-1], {**records[-1], "final": True}])


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run_dir) if record["split"] == "eval"]


def finished_step(run_dir: Path) -> int:
    """The last step of a run that came to its end and has its model, 0 for any other."""
    records = read_metrics(run_dir)
    return records[-1]["step"] if records and records[-1].get("final") and (run_dir / "model").is_dir() else 0


def last_step(run_dir: Path) -> int:
    return max((record["step"] for record in read_metrics(run_dir)), default=0)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far: allocated on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__, "datasets": datasets.__version__}


# ---------------------------------------------------------------------------------------------------------------------
# Sharing


NAME = "PATH_OR_ID"  # in the card, until the model is uploaded somewhere


def model_card(settings: dict[str, Any], facts: dict[str, Any], evaluations: list[dict[str, Any]]) -> ModelCard:
    """The README.md of a trained model: data, hyperparameters, metrics, how to use it."""
    base = settings["model"]
    source = settings["dataset"] or ", ".join(settings["train_files"] or settings["mix"])
    hub_base = base if base and not Path(base).exists() else None
    hub_data = settings["dataset"] if settings["dataset"] and not Path(settings["dataset"]).exists() else None
    metadata = ModelCardData(
        library_name="peft" if settings["lora_rank"] and not settings["merge_lora"] else "transformers",
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

Mean negative log-likelihood in nats a predicted token on the held-out text, and its exponential.

| step | loss | perplexity |
| ---: | ---: | ---: |
{rows}

## Hyperparameters

AdamW, linear warmup and linear decay, {facts["max_steps"]} steps, precision {facts["precision"]}.

| flag | value |
| --- | --- |
{hyperparameters}

Made with {", ".join(f"{name} {version}" for name, version in versions().items())}.
""")


def check_login(repo_id: str) -> None:
    """Raises UserError where ``push`` could not work, before hours are spent on training."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {repo_id}: not a repo id ({one_line(error)}); give user/name") from error
    try:
        HfApi().whoami()
    except Exception as error:  # no login, no network: which ones, depends on the HTTP library of the Hub's client
        raise UserError(
            f"--push_to_hub {repo_id}: not logged in to the Hub ({one_line(error)}); "
            f"run `hf auth login` or set HF_TOKEN, or leave the flag out and upload later"
        ) from error


def push(model_dir: Path, repo_id: str) -> str:
    """Uploads model, tokenizer and card; returns the address. The token is the environment's or the saved login's."""
    card = model_dir / "README.md"
    write_file(card, card.read_text(encoding="utf-8").replace(NAME, repo_id))
    try:
        api = HfApi()
        repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo_id, folder_path=model_dir, commit_message="Upload model, tokenizer and card")
        return f"{api.endpoint}/{repo_id}"
    except Exception as error:
        raise UserError(
            f"--push_to_hub {repo_id}: the upload failed ({one_line(error)}); the model is safe in {model_dir}, "
            f"upload it with `hf upload {repo_id} {model_dir}`"
        ) from error

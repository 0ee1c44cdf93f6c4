"""The log of a run: metrics.jsonl, trackers such as TensorBoard, and the terminal.

Another tracker is a class with the methods of `TensorBoard` and an entry in TRACKERS.
"""

import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from cli.errors import SaveError, drop_output, root_cause, save_advice, warn
from modeling.loading import stored_tensors
from training.atomic import write_file
from training.state import TrainState

NO_CURVES = ("tokens", "tokens_seen", "epoch", "final")  # in metrics.jsonl, but flat or straight lines in TensorBoard
EVALUATION = "evaluation.json"  # in model/: the step and the loss of its weights


class TensorBoard:
    """Write scalars, samples and hyperparameters for TensorBoard. Older files do not count from ``first_step`` on."""

    def __init__(self, run_dir: Path, first_step: int):
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def log(self, step: int, split: str, values: dict[str, float]) -> None:
        """Draw ``values`` of the split "train" or "eval"."""
        for key, value in values.items():
            if key not in NO_CURVES:
                self._writer.add_scalar(f"{split}/{key}", value, step)
        self._writer.flush()

    def text(self, step: int, tag: str, text: str) -> None:
        # TensorBoard renders Markdown; an indented block shows the text as it is.
        self._writer.add_text(tag, "\n".join("    " + line for line in text.splitlines()), step)
        self._writer.flush()

    def summary(self, hyperparameters: dict[str, Any], metrics: dict[str, float]) -> None:
        """Add the hyperparameters with the final metrics, under the tags of the curves."""
        for summary in hparams(hyperparameters, {f"eval/{key}": value for key, value in metrics.items()}):
            self._writer.file_writer.add_summary(summary)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


TRACKERS = {"tensorboard": TensorBoard}


class RunLog:
    """Write each record to metrics.jsonl, the trackers and stdout: a bar on a terminal, else plain lines.

    Remove records that an interrupted run wrote after ``state``, so that a resumed run shows one curve. Raise
    SaveError if the disk is full.
    """

    def __init__(self, run_dir: Path, state: TrainState, num_steps: int):
        step, evaluated = state.step, state.last_eval_step == state.step
        records = [record for record in read_metrics(run_dir) if record["step"] <= step]
        records = [r for r in records if r["step"] < step or r["split"] != "eval" or evaluated]
        for record in records:  # a finished run that continues is not finished
            record.pop("final", None)
        _rewrite(run_dir, records)
        self._run_dir, self._num_steps = run_dir, num_steps
        self._file = open(run_dir / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115 open as long as the run
        with self._saving():
            self._trackers = [tracker(run_dir, step + evaluated) for tracker in TRACKERS.values()]
            for record in records:
                if record["step"] == step and not evaluated:  # void in the older files, and not evaluated again
                    self._track(**record)
        self._is_read, self._terminal = True, sys.stdout.isatty()
        self._bar = tqdm(total=num_steps, initial=step, unit="step", file=sys.stdout, disable=not self._terminal)

    def step(self) -> None:
        self._bar.update()

    def training(
        self, state: TrainState, result: Any, learning_rate: float, epoch: float, speed: dict[str, float]
    ) -> None:
        """Log the `StepResult` of the last step. ``speed`` comes from `Throughput.since_last_log`."""
        if state.skipped_in_a_row:  # `nonfinite` has logged this step
            return
        speed, seconds_left = dict(speed), speed["seconds_left"]
        del speed["seconds_left"]
        values = {
            "loss": result.loss.item(),
            "tokens": int(result.num_predicted),
            "learning_rate": learning_rate,
            "grad_norm": result.grad_norm.item(),
            "tokens_seen": state.tokens_seen,
            "epoch": epoch,
            **speed,
        }
        step = state.step
        self._write(step, "train", values)
        if self._terminal:
            self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['tokens_per_second']:,.0f} tokens/s")
            return
        mfu = f"mfu {values['mfu']:.1%}  " if "mfu" in values else ""
        self.say(
            f"step {step}/{self._num_steps}  loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
            f"grad_norm {values['grad_norm']:.2f}  {values['tokens_per_second']:,.0f} tokens/s  {mfu}"
            f"{duration(seconds_left)} left"
        )

    def evaluation(self, step: int, **values: float) -> None:
        self._write(step, "eval", values)
        self.say(f"step {step}: evaluation loss {values['loss']:.4f}, perplexity {values['perplexity']:.2f}")

    def nonfinite(self, step: int, **values: Any) -> None:
        """Log a step that changed nothing. ``loss`` and ``grad_norm`` are text, because JSON and curves have no NaN."""
        self._write(step, "nonfinite", values)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Log a sample. ``text`` begins with its prompt."""
        with self._saving():
            for tracker in self._trackers:
                tracker.text(step, f"sample: {prompt}", text)
        self.say(f"sample: {text}")

    def summary(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        given = {key: value for key, value in settings.items() if value not in (None, [], False)}
        plain = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in given.items()}
        with self._saving():
            for tracker in self._trackers:
                tracker.summary(plain, metrics)

    def say(self, text: str, is_last: bool = False) -> None:
        """Print a line. If nobody reads stdout any more, print only the last line of a run, on stderr."""
        with self._saving():
            try:
                if self._terminal:
                    tqdm.write(text, file=sys.stdout)
                else:
                    print(text, flush=True)
            except BrokenPipeError:  # must not end a long run
                drop_output(sys.stdout)
                self._is_read = False
        if is_last and not self._is_read:
            with suppress(OSError):
                print(text, file=sys.stderr)

    def sync(self) -> None:
        """Flush all records to the disk before a checkpoint, which must not be ahead of them."""
        with self._saving():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _write(self, step: int, split: str, values: dict[str, Any]) -> None:
        line = (json.dumps({"step": step, "split": split, **values}) + "\n").encode()
        with self._saving():
            while line:  # a nearly full disk takes part of a line, and then raises
                line = line[self._file.write(line) :]
            self._track(step, split, **values)

    def _track(self, step: int, split: str, **values: Any) -> None:
        if split != "nonfinite":
            for tracker in self._trackers:
                tracker.log(step, split, values)

    @contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = f"{self._run_dir}: the log cannot be written ({root_cause(error)})"
            raise SaveError(f"{problem}. {save_advice(error)}") from error


class NoLog:
    """The log of ranks other than 0. Its methods do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values, **named: None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, without a last line that was cut when the run died."""
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


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of all evaluations."""
    return [record for record in read_metrics(run_dir) if record["split"] == "eval"]


def mark_finished(run_dir: Path) -> None:
    """Add ``"final": true`` to the last evaluation, after all files of the run are written."""
    records = read_metrics(run_dir)
    if records and records[-1]["split"] == "eval" and not records[-1].get("final"):  # the file dates the run
        _rewrite(run_dir, [*records[:-1], {**records[-1], "final": True}])


def finished_step(run_dir: Path) -> int:
    """Return the last step of a finished run that has its model, or 0 for any other run."""
    records = read_metrics(run_dir)
    return records[-1]["step"] if records and records[-1].get("final") and (run_dir / "model").is_dir() else 0


def model_step(run_dir: Path) -> int | None:
    """Return the step of the weights in model/, or None if there are none."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return json.loads((run_dir / "model" / EVALUATION).read_text(encoding="utf-8"))["step"]


def last_step(run_dir: Path) -> int:
    """Return the last step that was logged, or 0."""
    return max((record["step"] for record in read_metrics(run_dir)), default=0)


def duration(seconds: float) -> str:
    """Return minutes:seconds, or hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _rewrite(run_dir: Path, records: list[dict[str, Any]]) -> None:
    write_file(run_dir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def print_paths(directory: Path, is_chat: bool) -> None:
    """Print the paths of a run's model and curves, and the commands that use them, with --chat if ``is_chat``."""
    python, model = Path(sys.executable), directory / "model"
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else "python"
    python, logs, quoted = (shlex.quote(str(path)) for path in (python, directory.parent, model))
    num_bytes = sum(path.stat().st_size for path in model.iterdir())
    shapes = [shape for _, shape, _ in stored_tensors(str(model)).values()]
    in_bf16 = f"--dtype bf16     ({2 * sum(map(math.prod, shapes)) / 1e6:,.1f} MB)"
    print(f"model     {model} ({num_bytes / 1e6:,.1f} MB{'' if shapes else ', an adapter'})")
    print(f"export    {python} export.py --model {quoted} --out DIR {in_bf16 if shapes else '    (a plain model)'}")
    print(f"curves    {python} -m tensorboard.main --logdir {logs}     (or: make tensorboard)")
    print(f'next      {python} generate.py --model {quoted} {"--chat " if is_chat else ""}--prompt "..."')

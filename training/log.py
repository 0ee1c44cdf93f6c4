"""The log of a run: metrics.jsonl, TensorBoard and the terminal."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from cli.errors import SaveError, drop_output, root_cause, warn
from training.checkpoint import write_file

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
            problem = f"{self._run_dir}: the log cannot be written ({root_cause(error)}); make room"
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


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

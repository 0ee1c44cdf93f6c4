"""Measure the time until our run is as good as the Trainer's best. The table goes to benchmarks/results/.

    python -m benchmarks.quality --text tuning.jsonl --recipe '--num_epochs 1 --learning_rate 4e-4' '...'     # hours
    python -m benchmarks.quality --text first.jsonl second.jsonl --recipe '...'
    python -m benchmarks.quality --text tuning.jsonl --learning_rates 2e-4 --max_steps 2      # a test; writes nothing

A recipe is flags of train.py. Choose it on one text and report it on two others. On each text the Trainer fine-tunes
the model for one epoch with bf16 (batch 8, blocks of 128, linear decay), once for each learning rate. It uses our
blocks of our split. Our `evaluate` measures its held-out loss. Then `python train.py` runs with each recipe until
metrics.jsonl shows the Trainer's best loss. All times begin with the start of the process, and the tokens are in the
cache. The Trainer's time ends with its training, before any evaluation. Ours includes all its evaluations. Each run is
made once.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bench import ROOT, content, heading, processor, results_file, running, until

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def measure_trainer(settings: argparse.Namespace, text: str, learning_rate: float, work: Path) -> dict[str, Any]:
    """Return seconds, steps and held-out loss of the Trainer with this learning rate."""
    options = vars(settings) | {"text": text, "learning_rate": learning_rate, "work": str(work)}
    started = time.perf_counter()
    with running("fine_tuned", options, work / "trainer.log", ENVIRONMENT, limit=1e6) as process:
        process.turn()
        seconds = time.perf_counter() - started
        process.turn()
    return process.facts | {"run": f"Trainer, learning rate {learning_rate:g}", "seconds": seconds}


def measure_ours(settings: argparse.Namespace, text: str, recipe: str, target: float, work: Path) -> dict[str, Any]:
    """Return seconds, steps and loss of the first evaluation that reaches ``target``, or else of the best one."""

    def evaluations() -> list[dict[str, Any]]:
        lines = content(work / "run" / "metrics.jsonl").splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record for record in records if record["split"] == "eval"]

    def reached() -> bool:
        return any(record["loss"] <= target for record in evaluations())

    shutil.rmtree(work / "run", ignore_errors=True)
    command = our_command(settings, text, work / "run", *shlex.split(recipe))
    seconds = until(command, reached, work / "ours.log", ENVIRONMENT)
    best = min(evaluations(), key=lambda record: record["loss"])
    return {"run": f"ours, {recipe}", "seconds": seconds, "steps": best["step"], "loss": best["loss"]}


def our_command(settings: argparse.Namespace, text: str, run_dir: Path, *flags: str) -> list[Any]:
    command = ["train.py", "--model", settings.model, "--train_files", text, "--text_column", settings.text_column]
    limits = {"--max_steps": settings.max_steps, "--max_documents": settings.max_documents}
    command += [part for flag, value in limits.items() if value for part in (flag, value)]
    return [*command, "--output_dir", run_dir, *flags]


def compare(settings: argparse.Namespace, text: str, work: Path) -> str:
    """Return the table of one text."""
    command = [sys.executable, *map(str, our_command(settings, text, work / "run", "--dry_run"))]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)  # fills the cache
    peers, rows = [], []
    for rate in settings.learning_rates:
        peers.append(measure_trainer(settings, text, rate, work))
        print(json.dumps(peers[-1]), flush=True)
    best = min(peers, key=lambda peer: peer["loss"])
    ours = [measure_ours(settings, text, recipe, best["loss"], work) for recipe in settings.recipe]
    for run in (*peers, *ours):
        ratio, verdict = run["seconds"] / best["seconds"], ""
        if run in ours:
            verdict = "**not reached**" if run["loss"] > best["loss"] else "met" if ratio <= 0.5 else "**missed**"
        values = f"{run['seconds'] / 60:.1f} min | {run['loss']:.4f} | {math.exp(run['loss']):.2f}"
        rows.append(f"| {run['run']} | {run['steps']} | {values} | {ratio:.2f}x | {verdict} |")
    return f"""## {Path(text).name}

{best["tokens"]:,} held-out tokens.

| run | steps | from the start of the process | held-out loss | perplexity | time / the Trainer's best | <= 0.5x |
| --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart/smollm2", help="a model's directory")
    parser.add_argument("--text", nargs="+", required=True, help="JSON lines; one table each")
    parser.add_argument("--text_column", default="answers.text")
    rates, recipes = [5e-5, 1e-4, 2e-4, 4e-4], ["--num_epochs 1 --eval_every 40"]
    parser.add_argument("--learning_rates", type=float, nargs="+", default=rates, help="of the Trainer")
    parser.add_argument("--recipe", nargs="+", default=recipes, help="flags of train.py, quoted; one run each")
    parser.add_argument("--max_documents", type=int, help="use only the first documents of each text")
    parser.add_argument("--max_steps", type=int, help="of all runs, for a test: nothing is written")
    settings = parser.parse_args()
    report = f"# Until the same perplexity\n\n{heading('quality', processor())}\n"
    report += f"{Path(settings.model).name}, one run each.\n"
    for text in settings.text:
        with tempfile.TemporaryDirectory(prefix="quality-") as work:
            report += f"\n{compare(settings, text, Path(work))}"
    if not settings.max_steps:
        results_file(processor(), "-quality").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()

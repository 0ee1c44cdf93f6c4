"""The number that a user feels: how long until our run is as good as the Trainer's.

    python -m benchmarks.quality --text questions.jsonl --text_column answers.text     # hours; writes QUALITY.md
    python -m benchmarks.quality --text ... --max_steps 2 --learning_rates 2e-5        # does it work? writes nothing

The Trainer fine-tunes the model for one epoch in its defaults with bf16 (batch 8, blocks of 128, linear decay), once
for each learning rate, on our blocks of our split; its held-out perplexity is measured by our `evaluate`. Then
`python train.py` with its defaults runs until its metrics.jsonl shows the Trainer's best loss, which is measured in
the same precision: for half an epoch, and for one epoch with an evaluation now and then. Times are from the start of
the process, with tokens in the cache; the Trainer's ends with its training, before anything is evaluated, and ours has
all its evaluations. Each runs once.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bench import ROOT, content, heading, shown

RESULTS = ROOT / "benchmarks" / "QUALITY.md"


def fine_tune_with_trainer(settings: argparse.Namespace) -> None:
    """The peer's process, for ``settings.trainer``, its learning rate; says when it has trained, then its loss."""
    import torch
    import transformers

    from corpus.flags import DataConfig
    from data import load_data, load_documents, make_loader
    from modeling.precision import device_name, resolve_precision
    from perplexity import evaluate

    config = DataConfig(train_files=[settings.text], text_column=settings.text_column)
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model)
    train_data, held_out = load_data(config, *load_documents(config, 42), tokenizer, 42)
    train = train_data.blocks
    transformers.set_seed(42)
    model = transformers.AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # our allocator setting is not theirs
    with tempfile.TemporaryDirectory() as directory:
        arguments = transformers.TrainingArguments(
            directory,
            per_device_train_batch_size=8,
            num_train_epochs=1,
            max_steps=settings.max_steps or -1,
            learning_rate=settings.trainer,
            bf16=resolve_precision("auto", device) == "bf16",
            report_to=[],
            save_strategy="no",
            logging_steps=20,
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            seed=42,
        )
        full = [train[i] for i in range(len(train) - 1)]  # its default collator cannot take the last, short block
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=full)
        trainer.train()
    print("RESULT " + json.dumps({"steps": trainer.state.global_step}), flush=True)
    loss, tokens = evaluate(model, make_loader(held_out, 8), resolve_precision("auto", device))  # as train.py does
    print("RESULT " + json.dumps({"loss": loss, "tokens": tokens, "device": device_name(device)}), flush=True)


def measure_trainer(settings: argparse.Namespace, learning_rate: float, log: Path) -> dict:
    flags = ["--trainer", learning_rate, "--model", settings.model, "--text", settings.text]
    flags += ["--text_column", settings.text_column]
    flags += ["--max_steps", settings.max_steps] if settings.max_steps else []
    found: dict = {"learning_rate": learning_rate}
    started = time.perf_counter()
    with (
        open(log, "wb") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.quality", *map(str, flags)],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        for line in process.stdout:
            if line.startswith("RESULT "):
                found.setdefault("seconds", time.perf_counter() - started)
                found |= json.loads(line.removeprefix("RESULT "))
    if "loss" not in found:
        raise SystemExit(f"the Trainer has ended: {content(log)[-1500:]}")
    return found


def our_command(settings: argparse.Namespace, run_dir: Path, *flags: Any) -> list[str]:
    flags += ("--model", settings.model, "--train_files", settings.text, "--text_column", settings.text_column)
    flags += ("--output_dir", run_dir, "--overwrite")
    flags += ("--max_steps", settings.max_steps) if settings.max_steps else ()
    return [sys.executable, "train.py", *map(str, flags)]


def measure_ours(settings: argparse.Namespace, target: float, work: Path, *flags: Any) -> tuple[float, dict]:
    """Seconds until an evaluation reaches ``target``, and its record; the best one where the run ends before."""
    run_dir, log = work / "run", work / "ours.log"
    shutil.rmtree(run_dir, ignore_errors=True)
    command = our_command(settings, run_dir, *flags)
    started = time.perf_counter()
    with open(log, "wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=out, stderr=out)
    try:
        while True:
            running = process.poll() is None
            lines = content(run_dir / "metrics.jsonl").splitlines(keepends=True)
            records = [json.loads(line) for line in lines if line.endswith("\n")]
            evaluations = [record for record in records if record["split"] == "eval"]
            reached = [record for record in evaluations if record["loss"] <= target]
            if reached or not running:
                if not evaluations:
                    raise SystemExit(f"train.py has ended: {content(log)[-1500:]}")
                best = min(evaluations, key=lambda record: record["loss"])
                return time.perf_counter() - started, reached[0] if reached else best
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart/smollm2", help="a model's directory")
    parser.add_argument("--text", required=True, help="JSON lines; our defaults were chosen on quickstart/text.jsonl")
    parser.add_argument("--text_column", default="answers.text")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-5, 5e-5, 1e-4], help="of the Trainer")
    parser.add_argument(
        "--eval_every", type=int, default=40, help="of our run of one epoch; evaluations are in its time"
    )
    parser.add_argument("--max_steps", type=int, help="of both, to see whether it works; writes nothing")
    parser.add_argument("--trainer", type=float, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.trainer:
        return fine_tune_with_trainer(settings)

    with tempfile.TemporaryDirectory(prefix="quality-") as work:
        # The tokens are in the cache of `datasets` before any clock runs.
        subprocess.run([*our_command(settings, Path(work) / "run"), "--dry_run"], cwd=ROOT, check=True)
        peers = []
        for learning_rate in settings.learning_rates:
            peers.append(measure_trainer(settings, learning_rate, Path(work) / "trainer.log"))
            print(json.dumps(peers[-1]), flush=True)
        best = min(peers, key=lambda peer: peer["loss"])
        lengths = [("--num_epochs", 0.5), ("--num_epochs", 1, "--eval_every", settings.eval_every)]
        ours = [(flags, *measure_ours(settings, best["loss"], Path(work), *flags)) for flags in lengths]
    command = shown(sys.argv[1:], "quality")
    rows = [
        f"| Trainer, learning rate {peer['learning_rate']:g} | {peer['steps']} | {minutes(peer['seconds'])} | "
        f"{peer['loss']:.4f} | {math.exp(peer['loss']):.2f} | |"
        for peer in peers
    ]
    for flags, seconds, record in ours:
        ratio = seconds / best["seconds"]
        verdict = f"{ratio:.2f}x, {'met' if ratio <= 0.5 else '**missed**'}"
        rows.append(
            f"| ours, its defaults and {' '.join(map(str, flags))} | {record['step']} | {minutes(seconds)} | "
            f"{record['loss']:.4f} | {math.exp(record['loss']):.2f} | "
            f"{verdict if record['loss'] <= best['loss'] else '**not reached**'} |"
        )
    text = f"""# Until the same perplexity

{heading(command, best["device"])}
{Path(settings.model).name} on {Path(settings.text).name}, one epoch, {best["tokens"]:,} held-out tokens. The target is <= 0.5x the time of the Trainer's best. One run each;
our default learning rate, 2e-4, is none of the Trainer's.

| run | steps | from the start of the process | held-out loss | perplexity | |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}
"""  # noqa: E501
    if not settings.max_steps:
        RESULTS.write_text(text, encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    main()

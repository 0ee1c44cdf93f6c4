"""Faults during a run: signals, no room on disk or in memory, a loss that is not finite."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
from conftest import ROOT, checkpoint_bytes, load_shards, make_text, read_jsonl, write_jsonl
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig, LlamaForCausalLM

from cli.errors import SaveError, UserError
from train import TrainingConfig
from training import atomic
from training.checkpoint import verify
from training.checkpointer import Checkpointer
from training.log import RunLog, finished_step, read_metrics
from training.monitor import micro_batch_memory
from training.signals import Signals
from training.state import TrainState

STEPS = 12

GO_ON = "Use --resume, not --overwrite, to go on."


@pytest.fixture(scope="module")
def directory(model_dir, tmp_path_factory):
    """Make a working directory with the settings of a run. Its evaluations are long enough to be interrupted."""
    cwd = tmp_path_factory.mktemp("faults")
    write_jsonl(cwd / "train.jsonl", 12)
    write_jsonl(cwd / "eval.jsonl", 150, seed=1000)
    settings = {
        "model": str(model_dir),
        "train_files": "train.jsonl",
        "eval_files": "eval.jsonl",
        "text_column": "answers.text",
        "block_size": 32,
        "batch_size": 8,
        "micro_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "eval_every": 6,
        "save_every": 4,
        "log_every": 1,
        "precision": "fp32",
        "sample_prompt": ["the model", "a text"],
    }
    (cwd / "run.yaml").write_text(json.dumps(settings))
    return cwd


def start(cwd, name, *flags, until=None):
    """Start a run in ``name``. Return it when it has printed a line that begins with ``until``."""
    process = processes.start("train.py", "--config", "run.yaml", "--output_dir", name, *flags, cwd=cwd)
    if until:
        assert any(line.startswith(until) for line in process.lines()), process.stderr
    return process


def run(cwd, name, *flags):
    process = start(cwd, name, *flags)
    process.wait(60)
    return process


def result(run_dir):
    """Return everything that interruptions must not change: last weights and optimizer, best model, all records."""
    last = run_dir / "checkpoints" / f"step-{STEPS:06}"
    assert verify(last) is None
    records = [
        {key: value for key, value in record.items() if key not in ("tokens_per_second", "memory_gib")}
        for record in read_jsonl(run_dir / "metrics.jsonl")
    ]
    return checkpoint_bytes(last), (run_dir / "model/model.safetensors").read_bytes(), records


def curve(run_dir, name):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(name)]


@pytest.fixture(scope="module")
def undisturbed(directory):
    process = run(directory, "undisturbed")
    assert process.returncode == 0, process.stderr
    return result(directory / "undisturbed")


@pytest.mark.parametrize(
    ("step", "number", "code"), [(0, signal.SIGINT, 130), (6, signal.SIGTERM, 143), (STEPS, signal.SIGINT, 130)]
)
def test_a_stop_inside_an_evaluation_saves_and_the_evaluation_is_made_again(
    directory, undisturbed, tmp_path, step, number, code
):
    cut = tmp_path / "cut"
    process = start(directory, cut, until=f"step {step}/" if step else "output")
    while step == 0 and not (cut / "config.yaml").exists():  # written right before the first evaluation
        time.sleep(0.001)
    time.sleep(0.03)
    process.send_signal(number)
    assert process.wait(20) == code, process.stderr
    assert process.stdout.splitlines()[-1] == f"stopped by {number.name} at step {step}, saved. {GO_ON}"
    assert f"step {step}: evaluation" not in process.stdout
    assert os.listdir(cut / "checkpoints")[-1:] and verify(cut / f"checkpoints/step-{step:06}") is None
    again = run(directory, cut, "--resume")
    assert again.returncode == 0, again.stderr
    assert f"at step {step}\nstep {step}: evaluation loss" in again.stdout
    assert result(cut) == undisturbed


def test_sigusr1_saves_inside_an_evaluation_and_the_run_goes_on(directory, undisturbed, tmp_path):
    process = start(directory, tmp_path / "run", until="step 6/")
    process.send_signal(signal.SIGUSR1)
    assert any(line.startswith("step 6: saved on SIGUSR1") for line in process.lines())
    saved = json.loads((tmp_path / "run/checkpoints/step-000006/state.json").read_text())
    assert saved["train_state"]["last_eval_step"] == 0
    assert any(line.startswith("step 7/") for line in process.lines())
    process.kill()
    # It was killed before the next checkpoint. The evaluation of step 6 is in the records only.
    process.wait(10)
    if not (tmp_path / "run/checkpoints/step-000008").exists():
        assert [r["step"] for r in read_jsonl(tmp_path / "run/metrics.jsonl") if r["split"] == "eval"] == [0, 6]
    again = run(directory, tmp_path / "run", "--resume")
    assert again.returncode == 0, again.stderr
    assert result(tmp_path / "run") == undisturbed
    assert curve(tmp_path / "run", "eval/loss") == [0, 6, 12]
    assert curve(tmp_path / "run", "train/loss") == list(range(1, STEPS + 1))


def test_a_second_sigint_leaves_at_once_and_harms_nothing(directory, undisturbed, tmp_path):
    process = start(directory, tmp_path / "run", until="step 5/")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130 and "Traceback" not in process.stderr
    again = run(directory, tmp_path / "run", "--resume")
    assert again.returncode == 0, again.stderr
    assert result(tmp_path / "run") == undisturbed


def test_signals_before_the_run_begins(directory, tmp_path):
    """There is nothing to save yet. SIGTERM ends the run, SIGUSR1 does not."""
    for number, code in ((signal.SIGTERM, 143), (signal.SIGUSR1, 0)):
        process = start(directory, tmp_path / number.name, "--max_steps", 1)
        while not handled_signals(process.pid) >> signal.SIGUSR1 - 1 & 1:
            time.sleep(0.001)
        process.send_signal(number)
        assert process.wait(20) == code, process.stderr
        assert (tmp_path / number.name).exists() == (code == 0) and process.stderr == ""


def test_a_full_disk_ends_the_run_with_a_line_and_loses_nothing(directory, undisturbed, tmp_path):
    """A limit on the size of the process's files stands for a full disk."""
    name = tmp_path / "run"
    process = start(directory, name, until="step 5/")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (40_000, 40_000))
    assert process.wait(20) == 5
    assert process.stderr.count("\n") == 1, process.stderr
    assert re.match(
        rf"train\.py: error: {name}/(model|checkpoints/step-00000.): cannot be saved \(.*File too large.*\); "
        r"it needs \d+,\d+ bytes and [\d,]+ are free\. Run again after making room; train\.py "
        r"goes on with --resume\.\n",
        process.stderr,
    )
    assert os.listdir(name / "checkpoints") == ["step-000004"] and verify(name / "checkpoints/step-000004") is None
    assert sorted(os.listdir(name)) == ["checkpoints", "config.yaml", "metrics.jsonl", "tensorboard"]
    again = run(directory, name, "--resume")
    assert again.returncode == 0, again.stderr
    assert result(name) == undisturbed


def test_a_log_that_cannot_be_written_is_one_line_and_the_cut_record_is_left_out(tmp_path, capfd):
    log = RunLog(tmp_path, TrainState(), 9)
    log.evaluation(0, loss=1.0, perplexity=math.e)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with capfd.disabled():  # pytest writes captured output to a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
        try:
            with pytest.raises(SaveError, match=f"{tmp_path}: the log cannot be written"):
                log.evaluation(2, loss=1.0, perplexity=math.e)
            assert (tmp_path / "metrics.jsonl").stat().st_size == size + 20  # a part of the line
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [0]


def test_signals_wait_for_a_boundary_and_a_second_sigint_does_not():
    child = os.fork()
    if child == 0:
        signals = Signals()
        signals.defer()
        for number in (signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        if signals._received == [signal.SIGUSR1, signal.SIGINT]:
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory, tokenizer):
    """Save a model that is not finite for one word only, and the evaluation text."""
    cwd = tmp_path_factory.mktemp("poisoned")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    (poison,) = tokenizer("Q")["input_ids"]
    model.model.embed_tokens.weight.data[poison] = math.nan
    model.save_pretrained(cwd / "model")
    tokenizer.save_pretrained(cwd / "model")
    (cwd / "eval.txt").write_text(make_text(60))
    return cwd


def train_poisoned(cwd, places, *flags):
    words = make_text(1500).split(" ")
    for place in places:
        words[place] = "Q"
    (cwd / "train.txt").write_text(" ".join(words))
    arguments = ["--model", "model", "--train_files", "train.txt", "--eval_files", "eval.txt", "--block_size", 32]
    arguments += ["--batch_size", 2, "--num_epochs", 1, "--precision", "fp32", "--learning_rate", 1e-3]
    done = processes.run("train.py", *arguments, "--overwrite", *flags, cwd=cwd)
    records = read_jsonl(cwd / "runs/train/metrics.jsonl")
    return done, [record for record in records if record["split"] == "nonfinite"], records


def test_an_update_that_is_not_finite_is_named_with_its_blocks(poisoned, tokenizer):
    done, (record,), records = train_poisoned(poisoned, [700], "--log_every", 7)
    assert done.returncode == 4 and done.stderr.count("\n") == 1, done.stderr
    ids = np.array(tokenizer((poisoned / "train.txt").read_text())["input_ids"])
    (place,) = np.flatnonzero(ids == tokenizer("Q")["input_ids"][0])
    assert place // 32 in record["blocks"] and len(record["blocks"]) == 2
    assert record["loss"] == record["grad_norm"] == "nan" and record["epoch"] == 0
    assert f"step {record['step']}: the loss is nan" in done.stderr and str(place // 32) in done.stderr
    assert all(r["step"] < record["step"] for r in records if r["split"] == "train")


def test_updates_that_are_not_finite_are_skipped_up_to_a_number_in_a_row(poisoned):
    done, skipped, records = train_poisoned(poisoned, [100, 700, 1200], "--log_every", 1, "--max_skipped_steps", 10)
    assert done.returncode == 0, done.stderr
    assert 2 <= len(skipped) <= 3 and done.stderr.count("warning: step") == len(skipped)
    steps = {record["step"] for record in records if record["split"] == "train"}
    assert not steps & {record["step"] for record in skipped} and all("NaN" not in json.dumps(r) for r in records)
    weights = load_file(poisoned / "runs/train/model/model.safetensors")
    bad = [name for name, weight in weights.items() if not weight.isfinite().all()]
    assert bad == ["model.embed_tokens.weight"]  # unchanged since the start; all trained weights are finite
    flags = ("--max_skipped_steps", 3, "--log_every", 2)
    done, skipped, _ = train_poisoned(poisoned, range(0, 1500, 5), *flags)
    assert done.returncode == 4 and len(skipped) == 4 and "--max_skipped_steps 10" in done.stderr


def handled_signals(pid):
    return int(re.search(r"SigCgt:\s*(\w+)", (ROOT / f"/proc/{pid}/status").read_text())[1], 16)


def test_when_memory_runs_out(directory, tmp_path):
    """The address space is limited before the first step. A micro-batch of all blocks does not fit, others do."""
    flags = ["--batch_size", 256, "--block_size", 64, "--max_steps", 2, "--eval_every", 99]
    flags += ["--train_files", "eval.jsonl", "--eval_files", "train.jsonl", "--log_every", 1]
    size = 256
    while True:
        process = start(directory, tmp_path / str(size), *flags, "--micro_batch_size", size, until="step 0:")
        pages = int((ROOT / f"/proc/{process.pid}/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + (60 << 20)
        resource.prlimit(process.pid, resource.RLIMIT_AS, (room, room))
        if process.wait(60) == 0:
            break
        said = re.fullmatch(
            rf"train\.py: error: --micro_batch_size {size}: out of memory\. Pass --micro_batch_size (\d+), .*\n",
            process.stderr,
        )
        assert process.returncode == 2 and said, process.stderr
        size = int(said[1])
    assert size < 256


def test_what_a_killed_overwrite_leaves_starts_over(directory, undisturbed, tmp_path):
    run(directory, tmp_path / "run")
    atomic.remove(tmp_path / "run/checkpoints")  # the first two steps of `remove_run`
    atomic.write_file(tmp_path / "run/metrics.jsonl", "")
    again = run(directory, tmp_path / "run", "--resume")
    assert again.returncode == 0 and "starting over" in again.stdout, again.stderr
    assert result(tmp_path / "run") == undisturbed


def test_a_model_that_is_gone_is_made_again(directory, tmp_path):
    """Files that another process is writing into the run directory stay, such as those of `export.py --out`."""
    name = tmp_path / "a run"
    assert run(directory, name).returncode == 0
    shutil.rmtree(name / "model")
    for other in (".merged.being-written", ".model.being-written", "checkpoints/.merged.being-written"):
        (name / other).mkdir()
    again = run(directory, name, "--resume")
    assert again.returncode == 0 and "warning" in again.stderr and f"after (step {STEPS})" in again.stdout
    assert f"generate.py --model '{name}/model' --prompt" in again.stdout and f"--logdir {tmp_path} " in again.stdout
    assert sorted(str(path.relative_to(name)) for path in name.rglob(".*")) == [
        ".merged.being-written",
        "checkpoints/.merged.being-written",
    ]
    kept, last = (
        load_shards(path)["transformer.wte.weight"]
        for path in (name / "model", name / f"checkpoints/step-{STEPS:06}/weights")
    )
    assert torch.equal(kept, last)
    assert curve(name, "eval/loss") == [0, 6, 12]


def test_weights_from_after_the_checkpoint_are_replaced(directory, undisturbed, tmp_path):
    """This is the state after a kill between the last evaluation and its checkpoint. The new rate ruins the model."""
    name = tmp_path / "run"
    shutil.copytree(directory / "undisturbed", name)
    kept = json.loads((name / "model/evaluation.json").read_text())
    last = read_jsonl(name / "metrics.jsonl")[-1]
    assert kept == {"step": last["step"], "loss": last["loss"]} and kept["step"] == STEPS
    shutil.rmtree(name / f"checkpoints/step-{STEPS:06}")
    again = run(directory, name, "--resume", "--learning_rate", 0.9)
    assert again.returncode == 0 and f"(step {STEPS})" in again.stdout, again.stderr
    assert f"warning: {name}/model: its weights are of step {STEPS}, and the best" in again.stderr
    last = read_jsonl(name / "metrics.jsonl")[-1]
    assert last["loss"] > kept["loss"]
    assert json.loads((name / "model/evaluation.json").read_text()) == {"step": STEPS, "loss": last["loss"]}
    weights, saved = (
        load_shards(path)["transformer.wte.weight"]
        for path in (name / "model", name / f"checkpoints/step-{STEPS:06}/weights")
    )
    assert torch.equal(weights, saved)


def test_a_run_that_has_more_steps_than_it_needs_ends_with_those_that_it_has(directory, tmp_path):
    name = tmp_path / "run"
    process = start(directory, name, "--max_steps", 1000, "--keep", "last", until="step 7/")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143, process.stderr
    step = int(re.search(r"stopped by SIGTERM at step (\d+)", process.stdout)[1])
    assert 6 < step < 12 and read_jsonl(name / "metrics.jsonl")[-1]["split"] == "train" and not finished_step(name)
    flags = ("--resume", "--max_steps", 5, "--keep", "last")
    again = run(directory, name, *flags)
    assert again.returncode == 0 and again.stderr == "", again.stderr
    assert f"step {step}: evaluation loss" in again.stdout and f"after (step {step})" in again.stdout
    assert finished_step(name) == step == json.loads((name / "model/evaluation.json").read_text())["step"]
    assert f"\n{step} steps, precision fp32" in (name / "model/README.md").read_text()
    assert f"this run is finished ({step} of {step} steps)" in run(directory, name, *flags).stdout


def test_a_run_that_was_made_meanwhile_is_not_deleted(directory, tmp_path):
    name = tmp_path / "run"
    late = start(directory, name)
    while not handled_signals(late.pid) >> signal.SIGUSR1 - 1 & 1:
        time.sleep(0.001)
    late.send_signal(signal.SIGSTOP)
    assert not name.exists()
    assert run(directory, name).returncode == 0
    late.send_signal(signal.SIGCONT)
    assert late.wait(30) == 2 and "holds another run" in late.stderr
    assert (name / f"checkpoints/step-{STEPS:06}").exists()


def test_a_run_whose_output_nobody_reads_goes_on_and_its_errors_are_still_said(poisoned):
    """This is as after ``| head``: the pipe is closed before the run writes to it."""
    (poisoned / "train.txt").write_text(" ".join([*make_text(700).split(" "), *["Q"] * 50]))
    arguments = ["--model", "model", "--train_files", "train.txt", "--eval_files", "eval.txt", "--block_size", 32]
    arguments += ["--batch_size", 2, "--precision", "fp32", "--overwrite", "--output_dir", "unread", "--log_every", 1]
    reader, writer = os.pipe()
    process = processes.start("train.py", *arguments, cwd=poisoned, stdout=writer)
    with open(reader) as lines:
        assert any(line.startswith("output") for line in lines)  # reads the lines before the log
    assert process.wait(60) == 4 and "the loss is nan" in process.stderr


@pytest.mark.parametrize("both", [False, True])
def test_a_ctrl_c_that_ends_the_reader_of_the_output_too_saves_and_says_so(directory, tmp_path, both):
    """This is as in ``train.py | tee log``, or with ``both`` as in ``train.py 2>&1 | tee log``."""
    reader, writer = os.pipe()
    stderr = os.dup(writer) if both else None
    process = processes.start(
        "train.py", "--config", "run.yaml", "--output_dir", tmp_path, cwd=directory, stdout=writer, stderr=stderr
    )
    with open(reader) as lines:
        assert any(line.startswith("step 3/") for line in lines)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    (*_, last) = sorted(os.listdir(tmp_path / "checkpoints"))
    assert verify(tmp_path / "checkpoints" / last) is None
    step = int(last[5:])
    assert both or process.stderr == f"stopped by SIGINT at step {step}, saved. {GO_ON}\n"


def test_a_closed_stdout_is_no_fault(directory, tmp_path):
    """A shell starts the run, because a fork of the tests' server always has all streams."""
    train = ["train.py", "--config", "run.yaml", "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    command = ["sh", "-c", 'exec "$@" >&- <&-', "sh", sys.executable, str(ROOT / train[0]), *train[1:]]
    done = subprocess.run(command, cwd=directory, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    assert verify(tmp_path / "run/checkpoints/step-000001") is None


def test_no_memory_for_a_save_is_not_the_evaluations(directory):
    """The save is inside an evaluation, on a signal. A smaller --micro_batch_size would not help."""

    def fail():
        raise MemoryError

    checkpointer = Checkpointer.__new__(Checkpointer)
    checkpointer._monitor = SimpleNamespace(check=fail)
    with (
        pytest.raises(UserError, match="out of memory in a save"),
        micro_batch_memory(TrainingConfig(micro_batch_size=4)),
    ):
        checkpointer.save()

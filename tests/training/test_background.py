"""Saves in the background: the tensors of their step, one save after the other, the errors of a synchronous save."""

import math
import os
import re
import resource
import signal
import threading
from types import SimpleNamespace

import processes
import pytest
import torch
from conftest import ROOT, checkpoint_bytes, in_child, read_jsonl, tiny_gpt2, write_jsonl

from cli.errors import SaveError
from distributed.world import World
from train import make_optimizer, train_step
from training import checkpoint
from training.atomic import remove_partial_writes
from training.checkpoint import load, newest, save, start_save, verify
from training.checkpointer import Checkpointer
from training.log import NoLog
from training.monitor import NonFiniteError, StepMonitor, StepResult
from training.state import TrainState

STEPS = 12


@pytest.fixture
def gate(monkeypatch):
    """Return an event. Threads wait for it before they write."""
    event, write = threading.Event(), checkpoint._Shards.write
    monkeypatch.setattr(checkpoint._Shards, "write", lambda shards: event.wait(60) and write(shards))
    return event


def make_tensors(size=6):
    return {"weights": {"a": torch.arange(float(size)), "b": torch.tensor(1)}, "optimizer": {"a:step": torch.ones(())}}


def names(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_the_checkpoint_is_that_of_the_step_whatever_training_changes_meanwhile(tmp_path, gate):
    tensors, state = make_tensors(), {"step": 1, "shards": [1]}
    steps = start_save(tmp_path / "background", tensors, state, World(), in_background=True)
    assert not next(steps).done() and os.listdir(tmp_path) == [".background.being-written"]
    for content in tensors.values():
        for tensor in content.values():
            tensor.add_(1)
    state["shards"].append(2)
    gate.set()
    assert next(steps, None) is None
    save(tmp_path / "synchronous", make_tensors(), {"step": 1, "shards": [1]}, World())
    ours, theirs = tmp_path / "background", tmp_path / "synchronous"
    assert names(ours) == names(theirs) and verify(ours) is None
    assert load(ours) == load(theirs) == {"step": 1, "shards": [1]}
    assert checkpoint_bytes(ours) == checkpoint_bytes(theirs)


def test_a_full_disk_has_the_message_of_a_synchronous_save(tmp_path):
    save(tmp_path / "step-000001", make_tensors(), {}, World())
    limits, said = resource.getrlimit(resource.RLIMIT_FSIZE), []
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        for in_background in (False, True):
            with pytest.raises(SaveError) as error:
                for _ in start_save(tmp_path / "step-000002", make_tensors(100_000), {}, World(), in_background):
                    pass
            said.append(re.sub(r"[\d,]+ are free", "", str(error.value)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said[0] == said[1] and "File too large" in said[0] and os.listdir(tmp_path) == ["step-000001"]


def test_a_kill_while_the_thread_writes_leaves_the_checkpoint_before_it(tmp_path, gate):
    gate.set()
    save(tmp_path / "step-000001", make_tensors(), {"step": 1}, World())
    gate.clear()

    def work():
        steps = start_save(tmp_path / "step-000002", make_tensors(), {"step": 2}, World(), in_background=True)
        next(steps)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == -signal.SIGKILL and len(os.listdir(tmp_path)) == 2
    assert newest(tmp_path, World()) == tmp_path / "step-000001"
    remove_partial_writes(tmp_path, "step-*")
    assert os.listdir(tmp_path) == ["step-000001"]


@pytest.fixture
def training(tmp_path):
    """Return a checkpointer that saves in the background, and a function that makes a step."""
    model, state, world = tiny_gpt2(64), TrainState(), World()
    model.is_compiled = False
    optimizer, scaler = make_optimizer(model, 0.1), torch.amp.GradScaler("cpu", enabled=False)
    monitor = StepMonitor(state, NoLog(), world, 0, 1e-3)
    run = SimpleNamespace(world=world, directory=tmp_path, identity={}, settings={}, is_one_command=True)
    run.config, run.phases, run.machine = SimpleNamespace(keep_checkpoints=1, schedule="linear"), [0, 0, 9], "CPU"
    data = SimpleNamespace(state=lambda *_: {})
    checkpointer = Checkpointer(run, state, model, optimizer, scaler, data, NoLog(), monitor)
    assert not checkpointer.in_background  # on a CPU
    checkpointer.in_background = True
    batch = {name: torch.arange(64).view(4, 16) for name in ("input_ids", "labels")}

    def step():
        train_step(model, optimizer, scaler, [batch], 1e-2)
        state.advance(state.position)

    return checkpointer, step


def saved(tmp_path):
    return sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))


def test_a_save_is_completed_between_steps_and_a_second_one_waits_for_it(tmp_path, training, gate):
    checkpointer, step = training
    step()
    checkpointer.start_save()
    step()
    checkpointer.complete_if_written()
    assert saved(tmp_path) == []
    threading.Timer(0.3, gate.set).start()
    checkpointer.start_save()  # returns after the first save
    assert saved(tmp_path) == ["step-000001"]
    checkpointer._written.result(60)
    checkpointer.complete_if_written()
    assert saved(tmp_path) == ["step-000002"]
    step()
    checkpointer.save()
    assert saved(tmp_path) == ["step-000003"]


@pytest.mark.parametrize("of", ["step", "evaluation"])
def test_a_loss_that_is_not_finite_ends_the_run_after_the_save(tmp_path, training, gate, of):
    checkpointer, step = training
    step()
    checkpointer.start_save()
    threading.Timer(0.3, gate.set).start()
    monitor = checkpointer._monitor
    with pytest.raises(NonFiniteError):
        monitor.add(0, [1], StepResult(*torch.tensor([math.nan, 1.0, 1.0, 1.0])))
        monitor.check() if of == "step" else monitor.check_evaluation(math.nan)
    assert saved(tmp_path) == ["step-000001"] and verify(tmp_path / "checkpoints/step-000001") is None


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def directory(model_dir, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("background")
    write_jsonl(cwd / "train.jsonl", 12)
    write_jsonl(cwd / "eval.jsonl", 4, seed=1000)
    return cwd


@pytest.fixture(scope="module")
def start(directory, model_dir):
    flags = ["--model", model_dir, "--train_files", "train.jsonl", "--eval_files", "eval.jsonl", "--log_every", 1]
    flags += ["--text_column", "answers.text", "--block_size", 32, "--batch_size", 4, "--max_steps", STEPS]
    flags += ["--eval_every", 6, "--save_every", 4, "--precision", "fp32", "--keep", "last"]

    def start(script, name, *arguments):
        return processes.start(script, *arguments, *flags, "--output_dir", name, cwd=directory, env=env)

    env = {"PYTHONPATH": str(ROOT)}
    return start


def result(run_dir):
    last = run_dir / f"checkpoints/step-{STEPS:06}"
    assert verify(last) is None
    records = [(r["step"], r["split"], r["loss"]) for r in read_jsonl(run_dir / "metrics.jsonl")]
    return checkpoint_bytes(last), (run_dir / "model/model.safetensors").read_bytes(), records


def kill(process):
    process.kill()
    assert process.wait(60) == -signal.SIGKILL


def stop(process):
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143 and "stopped by SIGTERM at step " in process.stdout, process.stderr


def fill_the_disk(process):
    assert process.wait(60) == 5
    wrong = (
        r"background\.py: error: \S+/full/checkpoints/step-000008: cannot be saved \(.*File too large.*\); it needs "
    )
    assert re.fullmatch(wrong + r"[\d,]+ bytes and [\d,]+ are free\. Run again after making room; .*\n", process.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seconds", "end", "left"),
    [("killed", 60, kill, [4]), ("stopped", 1, stop, [8, 9]), ("full", 0, fill_the_disk, [4])],
)
def test_a_run_that_ends_while_it_saves_loses_nothing(directory, start, name, seconds, end, left):
    undisturbed = start("train.py", f"undisturbed-{name}")
    process = start(ROOT / "tests/training/background.py", name, seconds)
    for line in process.lines():
        if name == "full" and line.startswith("step 7/"):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (40_000, 40_000))
        if line.startswith("step 9/"):  # the save of step 8 is under way
            break
    checkpoints = directory / name / "checkpoints"
    assert verify(checkpoints / "step-000004") is None and not (checkpoints / "step-000008").exists()
    end(process)
    steps = [int(path.name[5:]) for path in sorted(checkpoints.glob("step-*"))]
    assert steps[0] == left[0] and len(steps) == len(left)
    assert all(verify(path) is None for path in checkpoints.glob("step-*"))
    again = start("train.py", name, "--resume")
    assert again.wait(60) == 0 and f"at step {steps[-1]}\n" in again.stdout, again.stderr
    assert undisturbed.wait(60) == 0 and result(directory / name) == result(directory / f"undisturbed-{name}")

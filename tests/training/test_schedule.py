"""Schedules of the learning rate, patience, and the command in the model card, in runs as people make them."""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil

import pytest
import torch
from conftest import checkpoint_bytes, read_jsonl, run_script
from test_run import flags

from cli.errors import UserError
from cli.flags import parse
from cli.replaced import REMOVED, TRAINER
from train import Config, TrainingConfig, make_optimizer


@pytest.fixture
def run(model_dir, jsonl_file, tmp_path):
    """Return a function that runs train.py in runs/NAME with these settings and returns the finished process."""

    def run(name, *more, **changes):
        settings = {"eval_every": 100, "save_every": 3, "keep_checkpoints": 1, "log_every": 1, "warmup_steps": 2}
        arguments = flags(model_dir, jsonl_file, **settings | changes)
        return run_script("train.py", *arguments, "--output_dir", name, *more, cwd=tmp_path)

    return run


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_longer_run_with_wsd_goes_on_before_the_decay_as_if_it_had_been_longer_from_the_start(run, tmp_path):
    first = run("run", schedule="wsd", max_steps=10)
    assert first.returncode == 0 and "2 to warm up, then wsd to 0\n" in first.stdout, first.stderr
    assert checkpoints(tmp_path / "run") == ["step-000008", "step-000010"]  # only wsd makes step 8 due
    longer = run("run", "--resume", schedule="wsd", max_steps=20)
    assert longer.returncode == 0 and "resuming from run/checkpoints/step-000008 at step 8" in longer.stdout
    assert "jumps" not in longer.stderr and checkpoints(tmp_path / "run") == ["step-000016", "step-000020"]
    assert run("whole", schedule="wsd", max_steps=20).returncode == 0
    ends = [checkpoint_bytes(tmp_path / name / "checkpoints/step-000020") for name in ("run", "whole")]
    assert ends[0] == ends[1]
    rates = [[r["learning_rate"] for r in read_jsonl(tmp_path / name / "metrics.jsonl") if r["split"] == "train"]
             for name in ("run", "whole")]  # fmt: skip
    assert rates[0] == rates[1] == pytest.approx([0, 5e-4, *[1e-3] * 15, 7.5e-4, 5e-4, 2.5e-4])


def test_with_another_schedule_a_longer_run_warns_that_the_rate_jumps(run):
    assert run("run", schedule="cosine", max_steps=6).returncode == 0
    longer = run("run", "--resume", schedule="cosine", max_steps=9)
    assert longer.returncode == 0 and "resuming from run/checkpoints/step-000006" in longer.stdout
    assert (
        "warning: --max_steps 9: it was 6, so the learning rate jumps at this step. Use --schedule wsd" in longer.stderr
    )


def test_a_run_that_cannot_go_back_goes_on_and_warns(run, tmp_path):
    assert run("run", schedule="linear", max_steps=6).returncode == 0
    changed = run("run", "--resume", schedule="wsd", max_steps=10)  # there was no stable part to go back to
    assert "resuming from run/checkpoints/step-000006" in changed.stdout and "jumps at this step" in changed.stderr
    assert run("wsd", schedule="wsd", max_steps=10).returncode == 0
    for file in (tmp_path / "wsd/checkpoints/step-000008/weights").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    longer = run("wsd", "--resume", schedule="wsd", max_steps=20)
    assert longer.returncode == 0 and "resuming from wsd/checkpoints/step-000010" in longer.stdout, longer.stderr
    assert "step-000008: " in longer.stderr and "jumps at this step" in longer.stderr
    assert run("part", schedule="wsd", warmup_steps=0.2, max_steps=10).returncode == 0
    assert "jumps at this step" in run("part", "--resume", schedule="wsd", warmup_steps=0.5, max_steps=20).stderr


def test_patience_ends_a_run_until_it_is_raised(run, tmp_path):
    worse = {"learning_rate": 0.5, "warmup_steps": 0, "eval_every": 2, "max_steps": 60}  # the loss only grows
    first = run("run", patience=2, **worse)
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    step = last["step"]
    assert first.returncode == 0 and last["final"] and step < 60, first.stderr
    assert f"; stopped early at step {step}" in first.stdout
    state = json.loads((tmp_path / f"run/checkpoints/step-{step:06}/state.json").read_text())["train_state"]
    assert state["stopped_early"] and state["evaluations_since_best"] == 2 and state["best_step"] == step - 4
    shutil.rmtree(tmp_path / "run/model")  # a new evaluation makes it again, and counts anew
    again = run("run", "--resume", patience=2, **worse | {"max_steps": step})
    assert again.returncode == 0 and f"step {step}: evaluation loss" in again.stdout, again.stderr
    again = run("run", "--overwrite", patience=2, **worse)
    assert again.returncode == 0 and f"; stopped early at step {step}" in again.stdout
    again = run("run", "--resume", patience=2, **worse)
    assert again.returncode == 0 and "this run is finished" in again.stdout and "larger --patience" in again.stdout
    made = run_script("generate.py", "--prompt", "the", "--max_new_tokens", 2, "--model", "run/model", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    more = run("run", "--resume", patience=3, **worse)
    assert more.returncode == 0 and f"resuming from run/checkpoints/step-{step:06} at step" in more.stdout, more.stderr
    end = read_jsonl(tmp_path / "run/metrics.jsonl")[-1]["step"]
    assert step < end < 60 and f"; stopped early at step {end}" in more.stdout
    dropped = run("run", "--resume", **worse | {"max_steps": end + 5})
    assert dropped.returncode == 0 and "stopped early" not in dropped.stdout, dropped.stderr
    assert read_jsonl(tmp_path / "run/metrics.jsonl")[-1]["step"] == end + 5


def test_rules_and_betas():
    def broken(**settings):
        config = Config(**settings)
        return [message for holds, message in TrainingConfig.rules(config) if not holds]

    assert not broken(patience=3) and not broken(schedule="cosine", min_learning_rate=1e-5)
    assert broken(patience=3, keep="last") == ["--patience 3: --keep last keeps no best loss. Remove one of them."]
    for schedule, peak in (("linear", "0.0002"), ("constant", "0")):
        (message,) = broken(schedule=schedule, min_learning_rate=0.1)
        assert message == f"--min_learning_rate 0.1: must be at most {peak} in --schedule {schedule}. Lower it."
    optimizer = make_optimizer(torch.nn.Linear(2, 2), 0.1, 0.95)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.95)] * 2


def test_the_card_names_no_path_and_its_command_makes_the_same_weights(run, model_dir, jsonl_file, tmp_path):
    done = run("runs/first", max_steps=4)
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "runs/first/model/README.md").read_text()
    assert str(tmp_path) not in card and str(model_dir.parent) not in card and "`batch_size`" not in card
    for file in (jsonl_file, model_dir / "model.safetensors", tmp_path / "runs/first/model/model.safetensors"):
        assert f"| `{file.name}` | `{hashlib.sha256(file.read_bytes()).hexdigest()}` |" in card
    for path in (model_dir, jsonl_file):
        os.symlink(path, tmp_path / path.name)
    (command,) = re.findall("```bash\npython (train.py .*)\n```", card)
    again = run_script(*shlex.split(command), "--output_dir", "runs/again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    weights = [(tmp_path / f"runs/{name}/model/model.safetensors").read_bytes() for name in ("first", "again")]
    assert weights[0] == weights[1]
    assert run("runs/first", "--resume", max_steps=6).returncode == 0  # no single command repeats this run
    assert "Repeat it" not in (tmp_path / "runs/first/model/README.md").read_text()


def test_flags_of_the_trainer_are_answered():
    with pytest.raises(UserError) as error:
        parse(Config, "", ["--model", "m", "--train_files", "x", "--bf16", "--per_device_train_batch_size", "4",
                           "--resume_from_checkpoint", "x", "--lr_scheduler_type=cosine"])  # fmt: skip
    lines = str(error.value).splitlines()
    assert lines[0] == "--bf16: a flag of the Trainer. Use --precision bf16, or fp32 to switch it off."
    assert lines[1].startswith("--per_device_train_batch_size: a flag of the Trainer. Use --batch_size")
    assert lines[2].startswith("--resume_from_checkpoint: a flag of the Trainer. Use --resume: it goes on")
    assert lines[3].startswith("--lr_scheduler_type: a flag of the Trainer. Use --schedule") and len(lines) == 4


def test_every_answer_names_flags_that_exist():
    ours = {field.name for field in dataclasses.fields(Config)}
    assert not ours & (REMOVED.keys() | TRAINER.keys()) and not REMOVED.keys() & TRAINER.keys()
    named = set(re.findall(r"--([a-z_]\w+)", " ".join([*TRAINER.values(), *REMOVED.values()])))
    assert named <= ours | {"out"}, named - ours

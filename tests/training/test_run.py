"""train.py as people run it: a process, a run directory, TensorBoard, interruption and resumption."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import processes
import pytest
import torch
import yaml
from conftest import checkpoint_bytes, load_shards, read_jsonl, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel, pipeline

import train
from cli.errors import UserError
from training.atomic import lock_directory

STEPS = 24


def flags(model_dir, jsonl_file, **changes):
    """Return flags that make resuming hard: dropout, accumulation, several epochs and a short last block."""
    settings = {
        "model": model_dir,
        "train_files": jsonl_file,
        "text_column": "answers.text",
        "block_size": 32,
        "batch_size": 8,
        "micro_batch_size": 4,
        "max_documents": 6,
        "eval_fraction": 0.3,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "warmup_steps": 0.1,
        "eval_every": 8,
        "save_every": 6,
        "log_every": 1,
        "precision": "fp32",
        "sample_prompt": "the model",
    } | changes
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def bits_of(run_dir):
    return checkpoint_bytes(run_dir / "checkpoints" / f"step-{STEPS:06}")


@pytest.fixture(scope="module")
def finished(model_dir, jsonl_file, tmp_path_factory):
    """Run to the end with the default output directory. Return the working directory and the finished process."""
    cwd = tmp_path_factory.mktemp("runs")
    settings = dict(zip(*[iter(flags(model_dir, jsonl_file))] * 2, strict=True))
    text = "".join(f"{key[2:]}: {value}\n" for key, value in settings.items())
    (cwd / "small.yaml").write_text(text)
    done = run_script("train.py", "--config", "small.yaml", cwd=cwd, fresh=True)
    assert done.returncode == 0, done.stderr
    return cwd, done


def test_what_is_printed(finished):
    _, done = finished
    for pattern in (
        r"model +.*tiny-gpt2: gpt2, 0\.0 M parameters, pretrained",
        r"training +4 documents, \d+ blocks of 32, learnt: ([\d,]+) of \1 tokens",
        r"held out +2 documents",
        r"steps +24, each of 8 blocks, 4 at once",
        r"device +CPU \(\d+ threads\), fp32",
        r"output +runs/small",
        r"step 0: evaluation loss \d+\.\d+, perplexity \d+\.\d+",
        r"step 24/24  loss \d\.\d{4}  lr .*  grad_norm .*  [\d,]+ tokens/s  0:00 left",
        r"held-out perplexity \d+\.\d+ before, \d+\.\d+ after",
        r"model +runs/small/model",
        r"curves +.*tensorboard",
        r"next +.*generate\.py --model runs/small/model",
    ):
        assert re.search(rf"^{pattern}", done.stdout, re.MULTILINE), pattern
    assert done.stderr == "" and "\r" not in done.stdout  # without a terminal there are no progress bars


def test_metrics(finished):
    cwd, _ = finished
    records = read_jsonl(cwd / "runs/small/metrics.jsonl")
    train = [record for record in records if record["split"] == "train"]
    evals = [record for record in records if record["split"] == "eval"]
    assert [record["step"] for record in train] == list(range(1, STEPS + 1))
    assert [record["step"] for record in evals] == [0, 8, 16, 24]
    assert train[0]["learning_rate"] == 0 and max(r["learning_rate"] for r in train) == pytest.approx(1e-3)
    names = {
        "step",
        "split",
        "loss",
        "tokens",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "tokens_seen",
        "epoch",
    }
    assert names <= train[0].keys()
    for record in evals:
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]), rel=1e-9)
        assert record["tokens"] == evals[0]["tokens"]
    assert evals[-1]["loss"] < evals[0]["loss"] and evals[-1]["final"] is True
    assert train[-1]["loss"] < train[0]["loss"]


def test_tensorboard(finished):
    cwd, _ = finished
    events = EventAccumulator(str(cwd / "runs/small/tensorboard"))
    events.Reload()
    records = read_jsonl(cwd / "runs/small/metrics.jsonl")
    for split, key in (
        ("train", "loss"),
        ("train", "learning_rate"),
        ("train", "grad_norm"),
        ("train", "tokens_per_second"),
        ("train", "memory_gib"),
        ("eval", "loss"),
        ("eval", "perplexity"),
    ):
        curve = [(event.step, event.value) for event in events.Scalars(f"{split}/{key}")]
        assert curve == [(r["step"], pytest.approx(r[key], rel=1e-5)) for r in records if r["split"] == split]
    (sample,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("sample")]
    assert [event.step for event in events.Tensors(sample)] == [0, 8, 16, 24]
    assert b"the model" in events.Tensors(sample)[0].tensor_proto.string_val[0]
    hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"learning_rate" in hparams and b"tiny-gpt2" in hparams


def test_the_tensorboard_server_shows_the_run(finished):
    cwd, _ = finished
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--port", str(port), "--host", "127.0.0.1"],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline, tags = time.time() + 60, {}
        while time.time() < deadline and not tags:
            time.sleep(0.3)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/scalars/tags", timeout=5) as answer:
                    tags = json.load(answer)
            except OSError:
                assert server.poll() is None
        assert {"train/loss", "eval/perplexity"} <= tags["small/tensorboard"].keys()
    finally:
        server.terminate()
        server.wait(timeout=20)


def test_the_model_is_usable_everywhere(finished, tokenizer):
    cwd, _ = finished
    path = cwd / "runs/small/model"
    model, loaded = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert loaded("the model")["input_ids"] == tokenizer("the model")["input_ids"]
    text = pipeline("text-generation", model=str(path), device="cpu")("the model", max_new_tokens=8, do_sample=False)
    done = run_script("generate.py", "--prompt", "the model", "--greedy", "--max_new_tokens", 8, cwd=cwd)
    assert done.stdout == text[0]["generated_text"] + "\n" and done.stderr == "model: runs/small/model\n"
    card = (path / "README.md").read_text()
    final = read_jsonl(cwd / "runs/small/metrics.jsonl")[-1]
    for words in (
        "pipeline_tag: text-generation",
        "answers.text",
        "`learning_rate` | `0.001`",
        f"{final['perplexity']:.2f}",
    ):
        assert words in card
    assert (path / "model.safetensors").exists() and not list(path.glob("*.bin"))
    best = load_shards(cwd / f"runs/small/checkpoints/step-{STEPS:06}/weights")
    assert torch.equal(model.transformer.wte.weight, best["transformer.wte.weight"])  # the last evaluation was the best


def test_checkpoints_are_kept_as_asked(finished):
    cwd, _ = finished
    assert sorted(os.listdir(cwd / "runs/small/checkpoints")) == ["step-000018", "step-000024"]
    files = (cwd / "runs/small/checkpoints/step-000024").rglob("*")
    assert {path.suffix for path in files if path.is_file()} == {".safetensors", ".json"}  # nothing that unpickles


def test_a_finished_run_is_neither_lost_nor_a_riddle(finished):
    cwd, _ = finished
    metrics = cwd / "runs/small/metrics.jsonl"  # generate.py finds the newest run by the date of this file
    before = bits_of(cwd / "runs/small"), metrics.read_bytes(), metrics.stat().st_mtime_ns
    refused = run_script("train.py", "--config", "small.yaml", cwd=cwd)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "runs/small: holds another run" in refused.stderr and "--overwrite" in refused.stderr
    again = run_script("train.py", "--config", "small.yaml", "--resume", cwd=cwd)
    assert again.returncode == 0 and "this run is finished (24 of 24 steps" in again.stdout
    assert "generate.py --model runs/small/model" in again.stdout
    assert (bits_of(cwd / "runs/small"), metrics.read_bytes(), metrics.stat().st_mtime_ns) == before


def test_the_written_config_repeats_the_run_bit_for_bit(finished):
    cwd, _ = finished
    written = yaml.safe_load((cwd / "runs/small/config.yaml").read_text())
    assert written["learning_rate"] == 1e-3 and written["seed"] == 42 and written["output_dir"] == "runs/small"
    done = run_script("train.py", "--config", "runs/small/config.yaml", "--output_dir", "again", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert bits_of(cwd / "again") == bits_of(cwd / "runs/small")
    before, after = (
        [{k: v for k, v in r.items() if k not in ("tokens_per_second", "memory_gib")} for r in read_jsonl(path)]
        for path in (cwd / "runs/small/metrics.jsonl", cwd / "again/metrics.jsonl")
    )
    assert before == after


def start_until(step, arguments, cwd):
    """Start train.py and return the process once it has logged ``step``."""
    process = processes.start("train.py", *arguments, cwd=cwd)
    for line in process.lines():
        if line.startswith(f"step {step}/"):
            return process
    raise AssertionError(process.stderr)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_ends_with_the_very_same_weights(finished, number, code, tmp_path):
    cwd, _ = finished
    arguments = ["--config", "small.yaml", "--output_dir", str(tmp_path / "cut")]
    process = start_until(9, arguments, cwd)
    with pytest.raises(UserError, match="a run is under way there"):
        lock_directory(tmp_path / "cut")
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    if number != signal.SIGKILL:
        assert f"stopped by {signal.Signals(number).name} at step" in process.stdout
    # A run that dies while it writes leaves half a record.
    with open(tmp_path / "cut/metrics.jsonl", "a") as file:
        file.write('{"step": 99, "split": "train", "loss"')
    done = run_script("train.py", *arguments, "--resume", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert bits_of(tmp_path / "cut") == bits_of(cwd / "runs/small")
    # The curve is clean, in metrics.jsonl and in TensorBoard: no gap, no step twice.
    expected = [(r["step"], r["split"], r["loss"]) for r in read_jsonl(cwd / "runs/small/metrics.jsonl")]
    assert [(r["step"], r["split"], r["loss"]) for r in read_jsonl(tmp_path / "cut/metrics.jsonl")] == expected
    events = EventAccumulator(str(tmp_path / "cut/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 8, 16, 24]


def test_resuming_another_run_is_refused_and_a_longer_one_is_not(finished, tmp_path):
    cwd, _ = finished
    shutil.copytree(cwd / "runs/small", tmp_path / "copy")
    arguments = ("train.py", "--config", "small.yaml", "--output_dir", tmp_path / "copy", "--resume")

    def resume(*change):
        done = run_script(*arguments, *change, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refusal(*change):
        done = run_script(*arguments, *change, cwd=cwd)
        assert done.stderr.splitlines()[-1].startswith("train.py: error: ")
        return done.returncode, done.stderr

    code, words = refusal("--batch_size", 2)
    assert code == 2 and "batch_size was 8 and is now 2" in words
    code, words = refusal("--text_separator", "\n")
    assert code == 2 and "training text has changed" in words
    code, words = refusal("--model_overrides", '{"resid_pdrop": 0.2}')
    assert code == 2 and "model's resid_pdrop was 0.1 and is now 0.2" in words
    longer = resume("--max_steps", STEPS + 2, "--weight_decay", 0.2)
    assert "note: --weight_decay was 0.01 and is 0.2 from here on" in longer
    assert "note: --max_steps was 24 and is 26 from here on" in longer
    steps = [r["step"] for r in read_jsonl(tmp_path / "copy/metrics.jsonl") if r["split"] == "train"]
    assert steps == list(range(1, STEPS + 3))
    # If every checkpoint is broken, the run never starts over silently.
    for path in (tmp_path / "copy/checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    code, words = refusal("--max_steps", STEPS + 4)
    assert code == 3 and "no checkpoint there is intact" in words
    # The checkpoints were deleted to save space. The finished run stays finished, and a longer one cannot go on.
    shutil.rmtree(tmp_path / "copy/checkpoints")
    model = (tmp_path / "copy/model/model.safetensors").read_bytes()
    assert "this run is finished (26 of 26 steps" in resume("--max_steps", STEPS + 2)
    code, words = refusal("--max_steps", STEPS + 4)
    assert code == 3 and "has no checkpoint left" in words
    assert (tmp_path / "copy/model/model.safetensors").read_bytes() == model
    # The run is not finished but past its first checkpoint at step 6, so it has something to lose.
    lines = (tmp_path / "copy/metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "copy/metrics.jsonl").write_text("".join(lines[:12]))
    code, words = refusal("--max_steps", STEPS)
    assert code == 3 and "has no checkpoint left" in words
    assert (tmp_path / "copy/model/model.safetensors").read_bytes() == model
    # The run stopped before its first checkpoint, so there is nothing to lose.
    (tmp_path / "copy/metrics.jsonl").write_text("".join(lines[:6]))
    done = run_script(*arguments, "--max_steps", 3, cwd=cwd)
    assert done.returncode == 0 and "stopped before its first checkpoint; starting over" in done.stdout, done.stderr
    steps = [(r["step"], r["split"]) for r in read_jsonl(tmp_path / "copy/metrics.jsonl")]
    assert steps == [(0, "eval"), (1, "train"), (2, "train"), (3, "train"), (3, "eval")]


def test_a_held_out_text_that_is_too_small_is_said(model_dir, jsonl_file, tmp_path):
    (tmp_path / "few.txt").write_text("a text of loss")
    done = run_script("train.py", *flags(model_dir, jsonl_file, eval_files="few.txt"), "--dry_run", cwd=tmp_path)
    assert done.returncode == 0 and re.search(r"warning: held out: \d+ tokens are too few", done.stderr), done.stderr


def test_dry_run_writes_nothing(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(finished[0])
    arguments = ["--config", "small.yaml", "--output_dir", str(tmp_path / "dry"), "--dry_run", "--max_eval_blocks", "3"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    train.main()
    assert torch.are_deterministic_algorithms_enabled()  # else compiled gradients of embeddings differ: make torture
    shown = capsys.readouterr().out
    assert re.search(r"dry run +loss \d\.\d+, .* GiB of memory at the peak; nothing was written", shown)
    assert re.search(r"text +as the model sees it .*\ndocument 1: \[\[.*\|", shown) and "\nblock 0: [[" in shown
    assert re.search(r"held out +\d+ documents, [\d,]+ tokens, 3 of [\d,]+ blocks", shown)
    assert not (tmp_path / "dry").exists()


def test_a_resumed_run_stays_compiled_or_not(finished, tmp_path, monkeypatch, capsys):
    """Otherwise a longer run, or a run on another machine, would change its arithmetic in the middle."""
    monkeypatch.chdir(finished[0])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("training.atomic.lock_directory", lambda run_dir: None)
    monkeypatch.setattr("model.compile_layers", lambda *_: None)
    for decision in (True, False):
        for max_steps in (2, 3):
            monkeypatch.setattr("model.should_compile", lambda *_, first=max_steps == 2: first == decision)  # noqa: B023
            arguments = ["--config", "small.yaml", "--output_dir", str(tmp_path / str(decision)), "--resume"]
            monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--max_steps", str(max_steps)])
            train.main()
            assert ("fp32, compiled\n" in capsys.readouterr().out) == decision


def test_from_scratch_with_bf16_and_a_loss_that_explodes(tmp_path, text_file):
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "llama.json").write_text(json.dumps(config | {"intermediate_size": 64, "max_position_embeddings": 64}))
    arguments = ["--model_config", "llama.json", "--tokenizer", "train:300", "--train_files", str(text_file)]
    arguments += ["--block_size", "64", "--max_steps", "6", "--precision", "bf16", "--save_every", "2"]
    done = run_script("train.py", *arguments, "--learning_rate", 1e-2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "llama.json: llama" in done.stdout and "from scratch" in done.stdout and "bf16" in done.stdout
    # A decay of more than the whole weight flips and grows every weight at each step.
    arguments += ["--overwrite", "--learning_rate", "0.9", "--weight_decay", "9", "--max_steps", "200"]
    done = run_script("train.py", *arguments, cwd=tmp_path)
    assert done.returncode == 4 and done.stderr.count("\n") == 1, done.stderr
    assert re.match(
        r"train\.py: error: step \d+: the loss is .*, so the step changed nothing; its blocks were \d+, ", done.stderr
    )


def test_a_bert_becomes_a_decoder_or_is_refused(tokenizer, text_file, tmp_path):
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    flags = ["--model", "bert", "--train_files", text_file, "--max_steps", 1]
    done = run_script("train.py", *flags, "--model_overrides", '{"is_decoder": false}', cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "not causal" in done.stderr and "is_decoder" in done.stderr and not (tmp_path / "runs").exists()
    done = run_script("train.py", *flags, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "warning: bert is made causal with is_decoder=True\n", done.stderr


def test_wrong_input_to_a_process_is_refused_in_one_line_and_nothing_is_written(model_dir, tmp_path):
    """A process adds one fault to the table of inputs.py: libraries that write to stderr on their own."""
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text":\n')
    done = run_script("train.py", "--model", model_dir, "--train_files", "x.jsonl", cwd=tmp_path)
    line = "--train_files x.jsonl: cannot be read (line 2: Expecting value). Pass a valid file."
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"train.py: error: {line}\n")
    assert os.listdir(tmp_path) == ["x.jsonl"]


def test_the_best_weights_are_kept_or_the_last(finished, tmp_path):
    """The learning rate ruins the model after its first evaluation."""
    cwd, _ = finished
    flags = ["--config", "small.yaml", "--learning_rate", 0.9, "--eval_every", 1, "--max_steps", 6, "--save_every", 1]
    for keep in ("best", "last"):
        run_dir = tmp_path / keep
        done = run_script("train.py", *flags, "--warmup_steps", 0.5, "--keep", keep, "--output_dir", run_dir, cwd=cwd)
        assert done.returncode == 0, done.stderr
        losses = [r["loss"] for r in read_jsonl(run_dir / "metrics.jsonl") if r["split"] == "eval"]
        best = min(range(1, 7), key=lambda step, losses=losses: losses[step])
        assert best < 5
        step = {"best": best, "last": 6}[keep]
        assert f"(step {step})" in done.stdout
        kept, last = (
            load_shards(path)["transformer.wte.weight"]
            for path in (run_dir / "model", run_dir / "checkpoints/step-000006/weights")
        )
        assert torch.equal(kept, last) == (keep == "last")

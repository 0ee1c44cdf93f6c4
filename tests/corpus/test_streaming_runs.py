"""train.py --streaming: interruptions, the Hub and errors."""

import json
import signal
import subprocess
import sys

import processes
import pytest
from conftest import ROOT, checkpoint_bytes, make_text, read_jsonl, run_script, write_jsonl
from hub_server import HubServer
from test_run import bits_of, start_until
from test_run import flags as run_flags

import train
from cli.errors import UserError
from corpus import tokenize as tokenize_module


def flags(model_dir, corpus, **changes):
    settings = {"train_files": corpus["train_files"][0], "eval_files": corpus["eval_files"][0], "text_column": "text"}
    settings |= {"shuffle_buffer": 20, "max_documents": 12, "log_every": 1, "save_every": 5}
    found = run_flags(model_dir, "", **settings | changes)
    place = found.index("--eval_fraction")
    del found[place : place + 2]
    return [*found, "--streaming"]


def losses(run_dir):
    return [(r["step"], r["split"], r["loss"], r.get("epoch")) for r in read_jsonl(run_dir / "metrics.jsonl")]


def test_an_interrupted_run_ends_with_the_same_weights(model_dir, corpus, tmp_path):
    arguments = [*flags(model_dir, corpus), "--output_dir"]
    done = run_script("train.py", *arguments, tmp_path / "whole", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert f"training  streamed text of --train_files {tmp_path}/0.jsonl" in done.stdout
    assert losses(tmp_path / "whole")[-1][0] == 24 and losses(tmp_path / "whole")[-2][3] >= 2  # several epochs
    for step, number, code in ((9, signal.SIGTERM, 143), (12, signal.SIGKILL, -9)):
        run_dir = tmp_path / f"cut-{step}"
        process = start_until(step, [*arguments, str(run_dir)], tmp_path)
        process.send_signal(number)
        assert process.wait(timeout=60) == code
        done = run_script("train.py", *arguments, run_dir, "--resume", cwd=tmp_path)
        assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr
        assert bits_of(run_dir) == bits_of(tmp_path / "whole")
        assert losses(run_dir) == losses(tmp_path / "whole")
    refused = run_script("train.py", *arguments, run_dir, "--resume", "--shuffle_buffer", 21, cwd=tmp_path)
    assert refused.returncode == 2 and "shuffle_buffer was 20 and is now 21" in refused.stderr
    refused = run_script("train.py", *arguments, run_dir, "--resume", "--max_documents", 13, cwd=tmp_path)
    assert refused.returncode == 2 and "text settings was" in refused.stderr


@pytest.mark.slow
def test_an_interrupted_run_on_two_ranks_ends_with_the_same_weights(model_dir, corpus, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    command += [
        *flags(model_dir, corpus, max_documents=25, max_steps=300, eval_every=100, save_every=90),
        "--output_dir",
    ]
    for name, stopped, said in (
        ("whole", "never", "held-out"),
        ("cut", "step 20/", "stopped by SIGTERM"),
        ("cut", "", "resuming"),
    ):
        arguments = list(map(str, [*command, tmp_path / name, *(["--resume"] if not stopped else [])]))
        with subprocess.Popen(
            arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as run:
            lines = []
            for line in run.stdout:
                lines.append(line)
                if stopped and line.startswith(stopped):
                    run.send_signal(signal.SIGTERM)
        assert any(said in line for line in lines) and (run.returncode == 0) == ("SIGTERM" not in said), "".join(lines)
    assert_same_end(*(tmp_path / run / "checkpoints/step-000300" for run in ("whole", "cut")))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_run_saves_before_a_broken_record_stops_it(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("training.atomic.lock_directory", lambda run_dir: None)
    monkeypatch.setattr(tokenize_module, "BATCH_CHARACTERS", 300)
    rows = [json.dumps({"text": make_text(9, i)}) + "\n" for i in range(300)]
    arguments = ["--model", str(model_dir), "--train_files", "rows.jsonl", "--eval_files", "rows.jsonl", "--streaming"]
    arguments += ["--block_size", "32", "--batch_size", "2", "--max_steps", "40", "--shuffle_buffer", "5", "--resume"]
    for name, wrong in (("whole", False), ("cut", True), ("cut", False)):
        (tmp_path / "rows.jsonl").write_text("".join(rows))
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--output_dir", name])
        if not wrong:
            train.main()
            continue
        (tmp_path / "good.jsonl").write_text("".join(rows))
        (tmp_path / "rows.jsonl").write_text("".join(rows[:100]) + '{"text": null}\n' + "".join(rows[101:]))
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--eval_files", "good.jsonl"])
        with pytest.raises(UserError, match=r"rows.jsonl, --text_column text: record 101 contains None, not text"):
            train.main()
    assert "resuming from cut/checkpoints/step-0000" in capsys.readouterr().out
    assert_same_end(*(tmp_path / name / "checkpoints/step-000040" for name in ("whole", "cut")))


def assert_same_end(one, other):
    assert checkpoint_bytes(one) == checkpoint_bytes(other)
    shards = [json.loads((path / "state.json").read_text())["shards"] for path in (one, other)]
    assert shards[0] == shards[1] and shards[0]


def test_a_dataset_of_the_hub_is_streamed(model_dir, tmp_path):
    """Neither the text nor its tokens are stored on disk."""
    for name, count in (("train", 30), ("test", 5)):
        (tmp_path / "data").mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"data/{name}.jsonl", count)
    with HubServer(tmp_path / "hub") as hub:
        commit = hub.add_repo("someone/answers", tmp_path / "data", repo_type="dataset")
        env = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        arguments = [
            "--model",
            model_dir,
            "--dataset",
            "someone/answers",
            "--text_column",
            "answers.text",
            "--streaming",
        ]
        arguments += ["--dataset_eval_split", "test", "--block_size", 32, "--max_steps", 3]
        with processes.prepare(env):
            done = run_script("train.py", *arguments, cwd=tmp_path, env=env)
            assert done.returncode == 0 and done.stderr == "", done.stderr
            assert "training  streamed text of --dataset someone/answers" in done.stdout
            assert "held out  5 documents" in done.stdout
            card = (tmp_path / "runs/train/model/README.md").read_text()
            assert "Trained on: streamed text of --dataset someone" in card
            arrow = [path for path in (tmp_path / "home").rglob("*.arrow") if "generator" not in str(path)]
            assert not arrow and not list((tmp_path / "home").rglob("*.jsonl"))
            (tmp_path / "data/train.jsonl").write_text((tmp_path / "data/test.jsonl").read_text())
            hub.add_repo("someone/answers", tmp_path / "data", repo_type="dataset")
            arguments += ["--resume", "--max_steps", 5]
            other = run_script("train.py", *arguments, cwd=tmp_path, env=env)
            assert other.returncode == 2 and f"training text was {commit}" in other.stderr
            done = run_script("train.py", *arguments, "--dataset", f"someone/answers@{commit}", cwd=tmp_path, env=env)
            assert done.returncode == 0 and "at step 3" in done.stdout, done.stderr


def test_the_password_of_a_url_is_written_nowhere(model_dir, corpus, site, tmp_path):
    pytest.importorskip("aiohttp")
    url = f"{site}/0.jsonl".replace("://", "://me:pa55word@")
    arguments = flags(model_dir, corpus | {"train_files": [url]}, max_steps=2)
    done = run_script("train.py", *arguments, "--output_dir", "run", cwd=tmp_path)
    assert done.returncode == 0 and f"streamed text of --train_files {site}/0.jsonl" in done.stdout, done.stderr
    written = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    names = [path.name for path, content in written.items() if f"{site}/0.jsonl".encode() in content]
    assert {"config.yaml", "README.md", "state.json"} < set(names) and any("tfevents" in name for name in names)
    assert not [path for path, content in written.items() if b"pa55word" in content]
    assert "pa55word" not in done.stdout + done.stderr
    (tmp_path / "0.jsonl").unlink()
    lost = run_script("train.py", *arguments, "--output_dir", "other", cwd=tmp_path)
    assert lost.returncode == 2 and f"{site}/0.jsonl" in lost.stderr and "pa55word" not in lost.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_steps": ""}, "--streaming: the length of the text is unknown. Set --max_steps."),
        ({"eval_files": ""}, "--streaming: cannot hold out evaluation text. Pass --eval_files or"),
        ({"deduplicate": "true"}, "--deduplicate: needs the whole text. Remove --deduplicate or"),
        ({"mix": "good.txt:1", "train_files": ""}, "--mix good.txt:1: --streaming reads one source. Remove --mix"),
        ({"tokenizer": "train:300"}, "--tokenizer train:300: needs text that is not streamed"),
        (
            {"dataset": "x", "train_files": "", "dataset_split": "train[:9]"},
            "--streaming reads whole splits. Use --max_documents.",
        ),
        ({"streaming": "false", "shuffle_buffer": 7}, "--shuffle_buffer 7: needs --streaming. Remove it."),
        ({"text_column": "texts"}, "column texts does not exist. The record has n, name, text, said."),
        ({"filter": "m=1"}, "--filter m=1: column m does not exist"),
        ({"max_documents": 1}, "and 32 or more are needed"),
        ({"train_files": "broken.jsonl"}, "broken.jsonl"),
        ({"train_files": "odd.jsonl"}, "odd.jsonl, --text_column text: record 150 contains"),
        ({"train_files": "none.jsonl"}, "no such file"),
        ({"train_files": "http://me:p@ss@127.0.0.1:9/a.txt"}, "http://127.0.0.1:9/a.txt: "),
    ],
    ids=lambda value: str(value)[:50],
)
def test_errors_of_streaming_are_one_line(changes, words, model_dir, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": make_text(9, i)}) + "\n" for i in range(300)]
    (tmp_path / "broken.jsonl").write_text("".join(rows[:150]) + '{"text": \n' + "".join(rows[150:]))
    (tmp_path / "odd.jsonl").write_text("".join(rows[:149]) + '{"text": null}\n' + "".join(rows[150:]))
    settings = {"model": model_dir, "train_files": corpus["train_files"][0], "eval_files": corpus["eval_files"][0]}
    settings |= {"streaming": "true", "max_steps": 2, "block_size": 32} | changes
    arguments = [f"--{name}={value}" for name, value in settings.items() if value != ""]
    before = sorted(tmp_path.iterdir())
    done = run_script("train.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr and sorted(tmp_path.iterdir()) == before

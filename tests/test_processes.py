"""The forked processes of the other tests. They behave like those of `python SCRIPT` and hide no failure."""

import hashlib
import os
import re
import signal
import subprocess
from pathlib import Path

import processes
import pytest


def is_forked(process):
    return not isinstance(process._spawned, subprocess.Popen)


def flags(model_dir, jsonl_file):
    """Return flags of a training that lasts until it is stopped, or for 10 steps with --max_steps 10."""
    names = ["--model", model_dir, "--train_files", jsonl_file, "--text_column", "answers.text", "--block_size", 32]
    return [*names, "--log_every", 1, "--learning_rate", 1e-3, "--precision", "fp32", "--max_steps", 100_000]


def state(process):
    """Return the system's view of a process: its signals, and its open files without their numbers."""
    path = Path("/proc") / str(process.pid)
    if not path.exists():
        pytest.skip("needs /proc")
    signals = re.findall(r"^(Sig(?:Blk|Ign|Cgt)):\s+(\w+)", (path / "status").read_text(), re.MULTILINE)
    cwd = os.readlink(path / "cwd")
    files = [os.readlink(file).replace(cwd, "CWD") for file in (path / "fd").iterdir()]
    return signals, sorted(re.sub(r"\d+", "N", name) for name in files)


@pytest.mark.slow
def test_a_forked_run_is_that_of_an_interpreter_of_its_own(model_dir, jsonl_file, tmp_path):
    seen = {}
    for kind in ("fresh", "forked"):
        cwd = tmp_path / kind
        cwd.mkdir()
        arguments = [*flags(model_dir, jsonl_file), "--max_steps", 10]
        process = processes.start("train.py", *arguments, cwd=cwd, fresh=kind == "fresh")
        assert is_forked(process) == (kind == "forked")
        known = next(state(process) for line in process.lines() if line.startswith("step 1/"))
        assert "CWD/runs/train/metrics.jsonl" in known[1]
        assert process.wait(timeout=60) == 0
        assert process.stdout.endswith('runs/train/model --prompt "..."\n')
        weights = hashlib.sha256((cwd / "runs/train/model/model.safetensors").read_bytes()).hexdigest()
        seen[kind] = known, weights, process.stderr
    assert seen["fresh"] == seen["forked"]


def test_exit_codes_and_streams(tmp_path, monkeypatch):
    wrong = processes.run("train.py", "--train_files", "no.txt", "--model", "none", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "train.py: error: --train_files no.txt: no such file. Pass an existing one.\n"
    monkeypatch.chdir(tmp_path)  # a relative directory is the caller's; unread input stops nothing
    helped = processes.run("perplexity.py", "--help", cwd=".", stdin="x" * 200_000)
    assert helped.returncode == 0 and "--stride" in helped.stdout and helped.stderr == ""
    (tmp_path / "train.yaml").write_bytes(b"\xff")
    broken = processes.run("train.py", "--config", "train.yaml", cwd=tmp_path)
    assert broken.returncode == 2 and "train.yaml: not valid YAML" in broken.stderr


def test_a_running_process(model_dir, jsonl_file, tmp_path):
    arguments = flags(model_dir, jsonl_file)
    process = processes.start("train.py", *arguments, cwd=tmp_path, stdout=tmp_path / "out")
    assert any(line.startswith("step 3/") for line in process.lines())
    assert process.returncode is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == process.returncode == -9
    process.send_signal(signal.SIGKILL)  # the process has ended
    assert (tmp_path / "out").read_text() == process.stdout == "".join(process.lines())
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run("train.py", *arguments, "--overwrite", cwd=tmp_path, timeout=2)
    done = processes.run("train.py", *arguments, "--max_steps", 1, "--overwrite", cwd=tmp_path)
    assert done.returncode == 0, done.stderr  # the killed process has released the lock of the directory


def test_an_environment_that_imports_may_read_gets_an_interpreter_of_its_own(tmp_path, monkeypatch):
    def forked(**options):
        process = processes.start("train.py", "--help", cwd=tmp_path, **options)
        process.kill()
        process.wait(timeout=20)
        return is_forked(process)

    assert forked() and forked(env={"HF_HUB_OFFLINE": os.environ["HF_HUB_OFFLINE"]})
    assert not forked(env={"HF_HUB_OFFLINE": "0"}) and not forked(fresh=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert not forked()


@pytest.mark.slow
def test_a_server_for_another_environment(tmp_path):
    env = {"HF_HUB_OFFLINE": "0"}
    with processes.prepare(env) as server:
        process = processes.start("perplexity.py", "--help", cwd=tmp_path, env=env)
        assert is_forked(process) and process.wait(timeout=60) == 0 and "--stride" in process.stdout
        with open(tmp_path / "said", "w+b") as file, pytest.raises(RuntimeError):
            server.fork(["train.py"], str(tmp_path), dict(os.environ), [file.fileno()] * 3)
        assert (tmp_path / "said").read_text() == "HF_HUB_OFFLINE is not what the imports have read\n"
    process = processes.start("perplexity.py", "--help", cwd=tmp_path, env=env)
    assert not is_forked(process)
    process.kill()


def test_a_server_that_has_ended_is_named():
    server = processes.Server(os.environ, processes.ROOT)
    server.process.kill()
    with open(os.devnull) as file, pytest.raises(RuntimeError, match=r"the server of tests/processes\.py has ended"):
        server.fork(["train.py"], "/", {}, [file.fileno()] * 3)
    server.stop()

"""docs/after.md: its blocks run as written, in order, with the real tools in an environment of their own."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run_script, write_jsonl

INTRODUCTION, *_sections = re.split(r"^## ", (ROOT / "docs/after.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
SECTIONS = {text.partition("\n")[0]: text for text in _sections}


def blocks_of(text):
    """Return the kind and the content of each block of code."""
    return re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def project(speaker, tmp_path_factory):
    """Make the two runs of the page and install its tools. Return the directory and the environment of processes."""
    root = tmp_path_factory.mktemp("after")
    for name in ("configs", "requirements.txt"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, root / name)
    shutil.copytree(speaker / "model", root / "quickstart/smollm2")
    shutil.copy(speaker / "chats.jsonl", root)
    write_jsonl(root / "quickstart/text.jsonl", 20, words=40)
    (_, chat), (_, install) = blocks_of(INTRODUCTION)
    python, script, *flags = shlex.split(chat)
    assert (python, script) == (".venv/bin/python", "train.py")
    short = ("--max_steps", 2, "--learning_rate", 1e-9)
    for command in (["--config", "configs/quickstart.yaml"], flags):
        done = run_script("train.py", *command, *short, cwd=root)
        assert done.returncode == 0, done.stderr
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/python").symlink_to(sys.executable)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    own = {"HOME": root, "TRACKIO_DIR": root / "trackio", "PYTHONPATH": ROOT}
    environment |= {name: str(path) for name, path in own.items()}
    done = subprocess.run(install, shell=True, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root, environment


def run_blocks(text, project):
    """Run the blocks of a part of the page. Return what they print."""
    root, environment = project
    options = {"cwd": root, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    printed = ""
    for kind, block in blocks_of(text):
        if kind == "yaml":
            (root / re.match(r"# (\S+)", block).group(1)).write_text(block)
            continue
        command = ["bash", "-e", "-c", block] if kind == "bash" else ["tools/bin/python", "-c", block]
        done = subprocess.run(command, **options)
        assert done.returncode == 0, f"{block}\n{done.stdout[-9000:]}"
        printed += done.stdout
    return printed


def test_what_is_not_tried_is_said():
    names = ["transformers", "lm-evaluation-harness", "llama.cpp", "Preferences with TRL", "Other trackers"]
    assert [*SECTIONS] == names
    assert "on tiny models, except `transformers serve` and llama.cpp" in INTRODUCTION


@pytest.mark.slow
def test_transformers_gives_the_answer_and_stops(project):
    pipeline, *_ = SECTIONS["transformers"].partition("A server")
    assert run_blocks(pipeline, project).splitlines()[-1] == "Hi"


@pytest.mark.slow
def test_lm_eval_and_our_evaluation_agree(project):
    printed = run_blocks(SECTIONS["lm-evaluation-harness"], project)
    (theirs,) = re.findall(r"\|bits_per_byte *\|\S* *\|([\d. ]+)\|", printed)
    (ours,) = re.findall(r"^bits_per_byte: (\S+)$", printed, re.MULTILINE)
    assert float(theirs) == float(ours) > 0


@pytest.mark.slow
def test_dpo_starts_from_the_chat_model_and_its_result_talks(project):
    root, _ = project
    run_blocks(SECTIONS["Preferences with TRL"], project)
    done = run_script("generate.py", "--model", "tools/dpo/model", "--chat", "--greedy", "--prompt", "a", cwd=root)
    assert done.stdout == "Hi\n", done.stderr


@pytest.mark.slow
def test_trackers_import_the_curves(project):
    root, _ = project
    printed = run_blocks(SECTIONS["Other trackers"], project)
    for name in ("train/loss", "train/grad_norm", "eval/perplexity"):
        assert f"- {name}\n" in printed and re.search(rf"wandb: +{name} ", printed), printed
    assert list(root.glob("tools/wandb/offline-run-*/*.wandb"))

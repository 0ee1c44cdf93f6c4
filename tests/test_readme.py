"""The README's commands run as written in a copy of the project, with a Hub of our own. The docs match the code."""

import doctest
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request

import processes
import pytest
from conftest import ROOT, make_text, tiny_gpt2, write_jsonl
from hub_server import HubServer

import train
from cli.flags import parse
from cli.replaced import REMOVED

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + "".join((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("data",))
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGES, re.DOTALL) for line in block.splitlines() if line]
# The flags that make a command short. All other flags stay as written.
SHORTER = {
    "make train": ' ARGS="--max_steps 2"',
    "make train CONFIG=configs/scratch.yaml": ' ARGS="--max_steps 3"',
    "train.py": " --max_steps 2",
    "generate.py": " --max_new_tokens 5",
}
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))


def test_flags_md_is_what_the_script_prints(capsys):
    runpy.run_path(str(ROOT / "docs/flags.py"), run_name="__main__")
    assert capsys.readouterr().out == (ROOT / "docs/flags.md").read_text(encoding="utf-8"), "run `make docs`"


def test_the_commands_for_many_gpus_are_read_without_fault():
    """They need a cluster, so their flags are parsed and their shell is checked."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/scale.md").read_text(encoding="utf-8"), re.DOTALL)
    commands = "".join(blocks).replace("\\\n", " ")
    subprocess.run(["bash", "-n"], input=commands, text=True, check=True)
    lines = [line.partition("train.py ")[2] for line in commands.splitlines() if "train.py " in line]
    assert len(lines) == 5
    for line in lines:
        parse(
            train.Config, "", [str(ROOT / word) if word.startswith("configs/") else word for word in shlex.split(line)]
        )


@pytest.mark.parametrize("path", ["README.md", "Makefile", "docs/*.md", "configs/*.yaml"])
def test_no_removed_flag_is_named(path):
    for file in ROOT.glob(path):
        named = re.findall(r"--(\w+)|^(\w+):", file.read_text(encoding="utf-8"), re.MULTILINE)  # a flag, a line of YAML
        assert not {flag or key for flag, key in named} & REMOVED.keys(), file


def test_the_anatomy_of_a_step_is_what_the_functions_compute():
    failed, tried = doctest.testfile(str(ROOT / "docs/anatomy.md"), module_relative=False)
    assert tried > 30 and not failed


def test_readme_is_short():
    assert len(README.splitlines()) <= 160


def test_make_uses_uv_if_it_is_there(tmp_path):
    (tmp_path / "uv").write_text("#!/bin/sh\n")
    (tmp_path / "uv").chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ROOT.glob("requirements*.txt"):
        shutil.copy(name, tmp_path)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for there, wanted in ((True, "uv pip install --quiet"), (False, "-m pip install --quiet")):
        env = os.environ | {"PATH": path if there else os.environ["PATH"]}
        shown = subprocess.run(["make", "-n", "install"], cwd=tmp_path, env=env, capture_output=True, text=True).stdout
        assert wanted in shown and ("uv venv" in shown) == there, shown


def test_the_file_tree_names_every_file_and_package():
    assert PACKAGES == ["cli", "corpus", "distributed", "modeling", "training"]
    folders = [*PACKAGES, "tests", "benchmarks", "docs"]
    for name in [*(path.name for path in ROOT.glob("*.py")), *(f"{name}/" for name in folders), "Makefile"]:
        assert len(re.findall(rf"^{re.escape(name)} ", README, re.MULTILINE)) == 1, name


@pytest.fixture(scope="module")
def project(tmp_path_factory, tokenizer):
    """Copy the project with a tiny model as its quickstart. Return the copy, its Hub and options of subprocesses."""
    root = tmp_path_factory.mktemp("project")
    for name in ("configs", *PACKAGES):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "quickstart", root / "quickstart", ignore=shutil.ignore_patterns("smollm2", "*.jsonl"))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt"), ROOT / "Makefile"]:
        shutil.copy2(path, root)
    # The interpreter of the tests replaces the installed .venv: make must not install anything here.
    python = root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    for name in ("installed", "installed-dev", "installed-quickstart"):
        (root / ".venv" / name).touch()
    tiny = root / "quickstart/smollm2"
    tiny_gpt2(len(tokenizer), n_positions=256).save_pretrained(tiny)
    tokenizer.save_pretrained(tiny)
    write_jsonl(root / "quickstart/text.jsonl", 60)
    chat = [{"role": role, "content": make_text(9)} for role in ("user", "assistant")]
    (root / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 20)
    (root / "notes").mkdir()
    for i, suffix in enumerate(("txt", "md", "md")):
        (root / f"notes/{i}.{suffix}").write_text(make_text(500, i), encoding="utf-8")
    data = tmp_path_factory.mktemp("data")
    write_jsonl(data / "train.jsonl", 40)
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        hub.add_repo("distilbert/distilgpt2", tiny)
        hub.add_repo("dany0407/eli5_category", data, repo_type="dataset")
        env = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_test",
            "HF_HOME": str(root / "hub-cache"),
        }
        with processes.prepare(env, root) as server:
            python.write_text(processes.stand_in(server))
            python.chmod(0o755)
            torchrun = python.with_name("torchrun")
            torchrun.write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
            torchrun.chmod(0o755)
            yield root, hub, {"env": os.environ | env, "pass_fds": [server.control.fileno()], "cwd": root}


def test_commands_run_as_written(project):
    root, hub, options = project
    run = []
    for command in (line.partition("  #")[0].rstrip() for line in COMMANDS):
        if command == "make tensorboard" or "pip install" in command:
            continue
        script = re.search(r"(train|generate)\.py|make train( CONFIG=configs/scratch.yaml)?", command)
        extra = SHORTER.get(script.group(), "") if script else ""
        if 'ARGS="' in command:
            command = command.removesuffix('"') + extra.replace('ARGS="', "")  # of a repeated flag, the last counts
        else:
            command += extra
        done = subprocess.run(command, shell=True, **options, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "pip install" not in done.stdout and "prepare_" not in done.stdout
        assert "notes.yaml" not in command or "warning" not in done.stderr
        run.append(command)
    assert len(run) == len(COMMANDS) - 2 >= 9
    made = {"quickstart", "notes", "eli5", "scratch", "lora", "titles", "mix", "answers", "chat", "stream", "two"}
    assert made == {path.name for path in (root / "runs").iterdir()}
    assert "model.safetensors" in hub.files("user/notes")
    again = subprocess.run(["make", "train", "ARGS=--max_steps 2"], capture_output=True, text=True, **options)
    assert again.returncode == 0 and "this run is finished (2 of 2 steps)" in again.stdout, again.stderr


def test_make_tensorboard(project):
    _, _, options = project
    assert "make tensorboard" in COMMANDS
    server = subprocess.Popen(
        ["make", "tensorboard", "ARGS=--port 0"],
        **options,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        address = next(match.group() for line in server.stderr if (match := re.search(r"http://\S+:\d+/", line)))
        deadline = time.time() + 60
        while time.time() < deadline:
            with urllib.request.urlopen(f"{address}data/environment", timeout=20) as answer:
                if answer.status == 200:
                    break
        assert "localhost" in address or "127.0.0.1" in address
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=20)

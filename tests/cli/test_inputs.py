"""Wrong and hostile input: the table of inputs.py in this process, canaries that must not run, and a secret token."""

import json
import pickle
import re
import shutil
import sys
import time

import datasets
import hub_server
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest
from hub_server import HubError, HubServer
from inputs import CASES, CODE, FIRED, Canary, canary, check, good_model, model, rows

import export
import generate
import perplexity
import train
from cli import errors, hub

MAIN = {"train.py": train.main, "perplexity.py": perplexity.main, "generate.py": generate.main}
MAIN |= {"export.py": export.main}
TOKEN = "hf_canaryTHATNOBODYMAYREPEAT"


@pytest.fixture
def run(monkeypatch, capfd):
    """Return a function that runs a script's main as the script does, without the seconds of new imports."""

    def run(script, argv, cwd):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", [script, *argv])
            capfd.readouterr()
            errors.run_script(MAIN[script])
        return exit.value.code, *capfd.readouterr()

    good_model()
    return run


@pytest.fixture
def online(monkeypatch):
    """Return a function that applies HF_ENDPOINT and HF_HUB_OFFLINE=0 as if they were set before the imports."""

    def online(endpoint):
        for settings, name, value in (
            (huggingface_hub.constants, "ENDPOINT", endpoint),
            (huggingface_hub.constants, "HF_HUB_OFFLINE", False),
            (datasets.config, "HF_ENDPOINT", endpoint),
            (datasets.config, "HF_HUB_OFFLINE", False),
        ):
            monkeypatch.setattr(settings, name, value)
        hub.find_hub.cache_clear()

    return online


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_input_is_refused_in_one_line_and_nothing_is_written(case, run, online):
    if case.env:
        online(case.env["HF_ENDPOINT"])
    started = time.monotonic()
    assert (problem := check(case, run)) is None, problem
    assert time.monotonic() - started < 10  # the Hub's client would try for 25 seconds


def test_the_table_is_a_table():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 45


# ---------------------------------------------------------------------------------------------------------------------
# Code that must never run


@pytest.fixture
def trapped(tmp_path):
    """Make a working directory with a model. Pickles and code are in all places that libraries search."""
    model()(tmp_path)
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth",
                 "state.pkl", "tokenizer.pkl", "vocab.pkl"):  # fmt: skip
        canary(name)(tmp_path / "model")
    for name in ("modeling_own.py", "tokenization_own.py", "setup.py", "conftest.py", "sitecustomize.py"):
        (tmp_path / "model" / name).write_text(CODE)
    (tmp_path / "model/custom_generate").mkdir()
    (tmp_path / "model/custom_generate/generate.py").write_text(CODE)
    # transformers has these architectures. So the model loads without the code that it names.
    for name, classes in (
        ("config.json", {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_own.T", "tokenization_own.T"]}),
    ):
        path = tmp_path / "model" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": classes}))
    rows("text.jsonl", *["some text to read"] * 40)(tmp_path)
    return tmp_path


TRAIN = ["--model", "model", "--train_files", "text.jsonl", "--block_size", "16", "--precision", "fp32"]


def test_no_pickle_and_no_code_is_run_wherever_it_lies(trapped, run, monkeypatch):
    code, out, err = run("train.py", [*TRAIN, "--max_steps", "2", "--output_dir", "first"], trapped)
    assert (code, err) == (0, ""), err
    shutil.copytree(trapped / "first", trapped / "runs/train")  # this process keeps the first one locked
    checkpoint = trapped / "runs/train/checkpoints/step-000002"
    for name in ("optimizer.pt", "state.pkl", "scheduler.pt", "weights.bin", "random.pkl"):
        canary(name)(checkpoint)
    (checkpoint / "state.py").write_text(CODE)
    code, out, err = run("train.py", [*TRAIN, "--max_steps", "3", "--resume"], trapped)
    assert code == 0 and "resuming from" in out, err
    canary("pytorch_model.bin")(trapped / "runs/train/model")
    code, out, err = run("generate.py", ["--prompt", "some", "--max_new_tokens", "3"], trapped)
    assert code == 0, err
    files = ["--model", "model", "--files", "text.jsonl", "--block_size", "16"]
    code, out, err = run("perplexity.py", files, trapped)
    assert code == 0, err
    assert not list(trapped.rglob(FIRED))
    monkeypatch.chdir(trapped)
    pickle.loads((trapped / "model/state.pkl").read_bytes())
    assert (trapped / FIRED).exists()  # the canary does make its file when it is unpickled


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_a_table_that_wants_its_type_unpickled(kind, run, tmp_path):
    held = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Canary())}
    schema = pa.schema([pa.field("text", pa.string(), metadata=held)], metadata={b"pandas": b"{}"})
    table = pa.table({"text": ["some text to read"] * 40}, schema=schema)
    flags = ["--train_files", f"x.{kind}"]
    if kind == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    else:
        with pa.ipc.new_stream(tmp_path / "x.arrow", schema) as writer:
            writer.write_table(table)
    if kind == "saved":
        flags = ["--dataset", "."]
        (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "x.arrow"}], "_fingerprint": "a", '
                                             '"_format_type": null, "_format_columns": null, "_format_kwargs": {}, '
                                             '"_output_all_columns": false, "_split": null}')  # fmt: skip
        (tmp_path / "dataset_info.json").write_text("{}")
    argv = ["--model", str(good_model()), *flags, "--block_size", "16", "--max_steps", "1"]
    code, _, err = run("train.py", argv, tmp_path)
    assert code in (0, 2) and "Traceback" not in err, err
    assert not list(tmp_path.rglob(FIRED))


def test_overwriting_does_not_follow_links(run, tmp_path):
    rows("text.jsonl", *["some text to read"] * 40)(tmp_path)
    model()(tmp_path)
    for name in ("metrics.jsonl", "model/weights"):
        (tmp_path / "precious" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "precious" / name).write_text("")
    (tmp_path / "runs/train").mkdir(parents=True)
    for name in ("metrics.jsonl", "model"):
        (tmp_path / "runs/train" / name).symlink_to(tmp_path / "precious" / name)
    (tmp_path / "runs/train/checkpoints").symlink_to("nowhere")
    code, _, err = run("train.py", [*TRAIN, "--max_steps", "1", "--overwrite"], tmp_path)
    assert code == 0, err
    assert not any(path.is_symlink() for path in (tmp_path / "runs/train").iterdir())
    assert (tmp_path / "precious/metrics.jsonl").read_text() == (tmp_path / "precious/model/weights").read_text() == ""


# ---------------------------------------------------------------------------------------------------------------------
# Secrets that must never be shown


def test_the_token_is_nowhere(tmp_path, monkeypatch, run, online):
    """One upload fails after a run, and one Hub does not know the token."""
    rows("text.jsonl", *["some text to read"] * 40)(tmp_path)
    model()(tmp_path)

    def refuse(handler):
        raise HubError(403, "You are not welcome here")

    create = ("POST", re.compile("/api/repos/create"), True, refuse)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub_server, "ROUTES", [create, *hub_server.ROUTES])
    for known, words in ((TOKEN, "Pass --resume --push_to_hub user/name to try again."), ("hf_other", "not logged in")):
        with HubServer(tmp_path / "hub", token=known) as hub:
            online(hub.endpoint)
            argv = [*TRAIN, "--max_steps", "2", "--push_to_hub", "user/name", "--sample_prompt", "some"]
            code, out, err = run("train.py", [*argv, "--output_dir", "a run", "--overwrite"], tmp_path)
            assert ("GET", "/api/whoami-v2") in hub.requests
        assert code == 2 and words in err and err.count("\n") == 1, err
        assert TOKEN not in out + err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "state.json", "model.safetensors"} <= {path.name for path in written}
    assert any("tfevents" in path.name for path in written)
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]

"""Runs with the Hub: the real client libraries, and a server on loopback that speaks the Hub's protocol."""

import processes
import pytest
from conftest import read_jsonl, run_script, write_jsonl
from hub_server import HubServer


@pytest.fixture(scope="module")
def hub(tmp_path_factory, model_dir):
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        hub.add_repo("someone/tiny-gpt2", model_dir)
        data = tmp_path_factory.mktemp("data")
        write_jsonl(data / "train.jsonl", 20)
        write_jsonl(data / "test.jsonl", 5, seed=100)
        hub.add_repo("someone/answers", data, repo_type="dataset")
        yield hub


def client(hub, home, **changes):
    """Return the environment of a machine that sees only this Hub, with an empty cache."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    } | changes


FLAGS = ["--model", "someone/tiny-gpt2", "--dataset", "someone/answers", "--text_column", "answers.text"]
FLAGS += ["--block_size", "32", "--max_steps", "3", "--log_every", "1", "--learning_rate", "1e-3"]


def test_train_from_ids_push_and_load_back(hub, tmp_path):
    env = client(hub, tmp_path / "home", HF_TOKEN="hf_test")
    done = run_script(
        "train.py", *FLAGS, "--dataset_eval_split", "test", "--push_to_hub", "user/tuned", cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr
    publish = "(private; to publish it: hf repos settings user/tuned --public)"
    assert f"uploaded  {hub.endpoint}/user/tuned {publish}\n" in done.stdout
    assert "training  20 documents" in done.stdout and "held out  5 documents" in done.stdout
    pushed = hub.files("user/tuned")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= pushed.keys()
    assert pushed["model.safetensors"] == (tmp_path / "runs/train/model/model.safetensors").read_bytes()
    card = pushed["README.md"].decode()
    assert "base_model: someone/tiny-gpt2" in card and "- someone/answers" in card
    for path in (tmp_path / "runs").rglob("*"):  # no file holds the token
        assert not path.is_file() or b"hf_test" not in path.read_bytes(), path

    fresh = client(hub, tmp_path / "other-home", HF_TOKEN="hf_test")  # pushed repositories are private
    with processes.prepare(fresh):
        flags = ("generate.py", "--prompt", "the model", "--greedy", "--max_new_tokens", 30)
        made = run_script(*flags, "--model", "user/tuned", cwd=tmp_path, env=fresh)
        assert made.returncode == 0, made.stderr
        local = run_script(*flags, cwd=tmp_path, env=fresh)
        assert made.stdout == local.stdout and len(made.stdout) > 20
        measured = run_script(
            *("perplexity.py", "--model", "user/tuned", "--dataset", "someone/answers", "--dataset_split", "test"),
            *("--text_column", "answers.text", "--block_size", 32, "--precision", "auto"),
            cwd=tmp_path,
            env=fresh,
        )
    assert measured.returncode == 0, measured.stderr
    loss = float(measured.stdout.split("loss: ")[1].split()[0])
    assert loss == pytest.approx(read_jsonl(tmp_path / "runs/train/metrics.jsonl")[-1]["loss"], abs=1e-5)

    # Content of the cache needs no network. The run does not wait for it.
    env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    done = run_script("train.py", *FLAGS, "--output_dir", "again", cwd=tmp_path, env=env, timeout=20)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_a_finished_run_is_uploaded_without_its_text_and_under_the_name_that_it_has_there(hub, model_dir, tmp_path):
    """The first name belongs to another user. The Hub completes the second name."""
    env, text = client(hub, tmp_path / "home", HF_TOKEN="hf_test"), write_jsonl(tmp_path / "notes.jsonl", 9)
    flags = ["--model", model_dir, "--train_files", text.name, *FLAGS[4:], "--output_dir", "notes"]
    resume = ("train.py", "--config", "notes/config.yaml", "--resume", "--push_to_hub")
    with processes.prepare(env):
        done = run_script("train.py", *flags, "--push_to_hub", "typo/name", cwd=tmp_path, env=env)
        assert done.returncode == 2 and "Pass --resume --push_to_hub typo/name to try again" in done.stderr, done.stderr
        text.unlink()
        before = {path: path.read_bytes() for path in (tmp_path / "notes").rglob("*") if path.is_file()}
        done = run_script(*resume, "notes", cwd=tmp_path, env=env)
        assert done.returncode == 0 and f"uploaded  {hub.endpoint}/user/notes" in done.stdout, done.stderr
        pushed = hub.files("user/notes")
        assert b'model="user/notes"' in pushed["README.md"] and b"typo" not in pushed["README.md"]
        assert pushed.keys() == {path.name for path in before if path.parent.name == "model"}
        assert before == {path: path.read_bytes() for path in before}
        # A run that is to go on needs the text. So does a run that went on and was killed.
        longer = run_script(*resume, "notes", "--max_steps", 5, cwd=tmp_path, env=env)
        assert longer.returncode == 2 and "notes.jsonl: no such file" in longer.stderr
        write_jsonl(text, 9)
        process = processes.start(*resume, "notes", "--max_steps", 900, cwd=tmp_path, env=env)
        assert any(line.startswith("step 4/") for line in process.lines())
        process.kill()
        process.wait(10)
        assert not any(record.get("final") for record in read_jsonl(tmp_path / "notes/metrics.jsonl"))


def test_what_the_hub_refuses_is_said_before_training(hub, tmp_path):
    env = client(hub, tmp_path / "home")
    refusals = (
        (["--push_to_hub", "user/other"], "not logged in to the Hub"),
        (["--dataset", "someone/nothing"], "--dataset someone/nothing"),
        (["--model", "someone/nothing"], "not a valid model identifier"),
        (["--dataset", "someone/answers@nowhere"], "Revision 'nowhere' doesn't exist"),
        (["--model", "someone/tiny-gpt2@nowhere"], "nowhere is not a valid git identifier"),
    )
    with processes.prepare(env):
        for change, words in refusals:
            done = run_script("train.py", *FLAGS, *change, cwd=tmp_path, env=env)
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
            assert words in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_dataset_that_is_a_script_and_no_network(hub, tmp_path):
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "eli5.py").write_text("import datasets\n")
    hub.add_repo("someone/eli5", folder, repo_type="dataset")
    done = run_script("train.py", *FLAGS, "--dataset", "someone/eli5", cwd=tmp_path, env=client(hub, tmp_path / "home"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "script" in done.stderr and "dany0407/eli5_category" in done.stderr
    away = client(hub, tmp_path / "empty", HF_HUB_OFFLINE="1")
    done = run_script("train.py", *FLAGS, cwd=tmp_path, env=away)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "network" in done.stderr and "local files" in done.stderr

"""Text that is streamed: the same blocks as when it is read as a whole, a shuffle buffer, exact resumption."""

import copy
import dataclasses
import json
import signal
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, islice

import datasets
import processes
import pytest
import torch
from conftest import ROOT, make_text, read_jsonl, run_script, write_jsonl
from hub_server import HubServer
from test_run import flags as run_flags
from test_run import start_until, weights_sha256

import data
import train
from cli.errors import UserError
from corpus import sources, streaming
from corpus import tokenize as tokenize_module
from corpus.flags import DataConfig
from corpus.position import Position
from corpus.tokenize import tokenize
from data import collate
from modeling.linear_cross_entropy import IGNORED_LABEL
from training import checkpoint


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def corpus(tmp_path):
    """Three files of records, some filtered out and one long, and the evaluation text."""
    for file in range(3):
        rows = [{"n": i % 5, "name": f"{i}é", "text": make_text(4 + 7 * i, 20 * file + i)} for i in range(9)]
        rows[4]["text"] = make_text(700, file)
        rows = [row | {"said": talk(row["name"], row["text"])} for row in rows]
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval.jsonl").write_text(
        "".join(json.dumps(row | {"text": make_text(8), "said": talk("a", "b")}) + "\n" for row in rows[:5])
    )
    return {"train_files": [f"{tmp_path}/[0-9].jsonl"], "eval_files": [f"{tmp_path}/eval.jsonl"], "block_size": 32}


def stored(config, tokenizer):
    """The blocks of the text as a whole, in its order."""
    blocks = data.load_data(config, *sources.load_documents(config, 0), tokenizer, 0)[0].blocks
    return [blocks[i] for i in range(len(blocks))]


def streamed(config, tokenizer, seed=0):
    return data.load_data(config, *streaming.load_documents(config, seed), tokenizer, seed)[0]


def epoch(training, position=None):
    """The updates from ``position`` to the end of its epoch: (micro-batches, position, numbers of the blocks)."""
    position, found = position or Position(), []
    for update in training.batches(4, 8, position):
        found.append(update)
        if update[1].epoch > position.epoch:
            return found


def saved(*trainings):
    """What a checkpoint holds of the ranks."""
    states = [training.state(rank, len(trainings)) for rank, training in enumerate(trainings)]
    return data.StreamedData.joined(states)


def same(some, others):
    return len(some) == len(others) and all(
        one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        for one, other in zip(some, others, strict=True)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"filter": ["n!=3"], "max_documents": 11},
        {"pack": "documents"},
        {"pack": "documents", "long_documents": "drop"},
        {"prompt_column": "{name}: ", "completion_column": "text", "text_column": "text"},
        {"text_column": "said"},
    ],
    ids=str,
)
@pytest.mark.parametrize("characters", [1 << 20, 300])
def test_the_blocks_are_those_of_the_whole_text(settings, characters, corpus, tokenizer, monkeypatch):
    """In the same order without a buffer; in another one, each once, with a buffer."""
    tokenizer = copy.deepcopy(tokenizer)  # which is given a chat template
    expected = stored(DataConfig(**corpus, **settings), tokenizer)
    monkeypatch.setattr(tokenize_module, "ROW_CHARACTERS", characters)
    monkeypatch.setattr(tokenize_module, "WINDOW_CHARACTERS", 2500)
    training = streamed(DataConfig(**corpus, **settings, streaming=True, shuffle_buffer=1), tokenizer)
    updates = epoch(training)
    assert same([batch for batches, *_ in updates for batch in batches], list(map(collate, grouped(expected, 4))))
    assert [number for *_, numbers in updates for number in numbers] == list(range(len(expected)))
    assert updates[-1][1] == Position(1)
    assert same([training.first_batch(3)], [collate(expected[:3])])
    shuffled = streamed(DataConfig(**corpus, **settings, streaming=True, shuffle_buffer=10), tokenizer)
    orders = [[n for *_, numbers in epoch(shuffled, Position(number)) for n in numbers] for number in (0, 1)]
    assert orders[0] != orders[1]
    for numbers in orders:
        assert sorted(numbers) == list(range(len(expected))) != numbers
        assert all(n < place + 10 for place, n in enumerate(numbers))  # no more is read than the buffer holds


def grouped(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def test_the_seed_decides_the_order(corpus, tokenizer):
    config = DataConfig(**corpus, streaming=True, shuffle_buffer=8)
    orders = [[n for *_, numbers in epoch(streamed(config, tokenizer, seed)) for n in numbers] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_the_place_moves_on_behind_long_documents(pack, corpus, tokenizer, tmp_path, monkeypatch):
    """Where no piece of tokens ends with a document; else ever more of the text would be read again."""
    monkeypatch.setattr(tokenize_module, "ROW_CHARACTERS", 500)
    monkeypatch.setattr(tokenize_module, "WINDOW_CHARACTERS", 500)
    monkeypatch.setattr(tokenize_module, "OVERLAP_CHARACTERS", 100)
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(make_text(250, i))
    corpus |= {"train_files": [f"{tmp_path}/*.txt"], "eval_files": [f"{tmp_path}/0.txt"]}
    config = DataConfig(**corpus, pack=pack, streaming=True, shuffle_buffer=1)
    training, updates, states = streamed(config, tokenizer), [], []
    for update in training.batches(4, 4, Position()):
        if update[1].epoch:
            break
        updates.append(update)
        states.append(saved(training))
    num_started = training._documents.state["documents"]
    newest = states[-1][0]["shards"][0]["resume_at"]["documents"]["documents"]
    assert num_started == 9 and newest >= num_started - 2
    for i in range(0, len(states) - 1, 3):
        again = streamed(config, tokenizer)
        again.restore(states[i][0], states[i][1]["stream"])
        following = next(again.batches(4, 4, updates[i][1]))
        assert following[2] == updates[i + 1][2]
        assert all(torch.equal(x[k], y[k]) for x, y in zip(following[0], updates[i + 1][0], strict=True) for k in x)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "txt", "saved"])
@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_it_goes_on_exactly_from_any_update(kind, pack, corpus, tokenizer, tmp_path, monkeypatch):
    """Also behind the end of an epoch, and where a piece of tokens ends within a document."""
    monkeypatch.setattr(tokenize_module, "ROW_CHARACTERS", 700)
    monkeypatch.setattr(tokenize_module, "WINDOW_CHARACTERS", 2500)
    settings = {"filter": ["n!=3"], "max_documents": 14}
    table = datasets.Dataset.from_json(sorted(map(str, tmp_path.glob("[0-9].jsonl"))), cache_dir=str(tmp_path))
    if kind == "parquet":
        table.to_parquet(tmp_path / "rows.parquet", batch_size=4)
    elif kind == "csv":
        table.to_csv(tmp_path / "rows.csv")
    elif kind == "txt":
        settings = {"max_documents": 20}
        for i, row in enumerate(table["text"]):
            (tmp_path / f"{i}.txt").write_text(row)
        corpus["eval_files"] = [str(tmp_path / "0.txt")]
    if kind == "saved":
        table.save_to_disk(tmp_path / "saved")
        corpus |= {"dataset": str(tmp_path / "saved"), "train_files": []}
    elif kind != "jsonl":
        corpus["train_files"] = [f"{tmp_path}/*.{kind}"]
    config = DataConfig(**corpus | settings, pack=pack, streaming=True, shuffle_buffer=7)
    training, states, updates = streamed(config, tokenizer), [], []
    states.append((Position(), *saved(training)))
    for update in training.batches(4, 8, Position()):
        updates.append(update)
        states.append((update[1], *saved(training)))
        if update[1].epoch == 2:
            break
    assert len(updates) > 10
    for i, (position, state, tensors) in enumerate(states[:-1]):
        checkpoint.save(tmp_path / "step", tensors, json.loads(json.dumps(state)))
        other = streamed(config, tokenizer)
        state, tensors = checkpoint.load(tmp_path / "step")
        other.restore(state, tensors["stream"])
        assert same([tensors["stream"]], [saved(other)[1]["stream"]])
        rest = [update for update, _ in zip(other.batches(4, 8, position), updates[i:], strict=False)]
        assert [update[1:] for update in rest] == [update[1:] for update in updates[i:]]
        assert all(same(update[0], true[0]) for update, true in zip(rest, updates[i:], strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks, each an object of this process


@pytest.fixture(params=["jsonl", "parquet", "txt"])
def files(request, corpus, tmp_path, monkeypatch):
    """Four files: two or four ranks read whole ones, three (but of .txt files) every third record."""
    monkeypatch.setattr(tokenize_module, "ROW_CHARACTERS", 150)  # so that shards are read by turns
    for i in range(4):
        part = datasets.Dataset.from_list([{"text": make_text(5 + 9 * (j % 4), 8 * i + j)} for j in range(8 + i)])
        if request.param == "parquet":
            part.to_parquet(tmp_path / f"part{i}.parquet", batch_size=3)
        elif request.param == "jsonl":
            part.to_json(tmp_path / f"part{i}.jsonl")
        else:
            (tmp_path / f"part{i}.txt").write_text(" ".join(part["text"]))
    changes = {"train_files": [f"{tmp_path}/part*.{request.param}"], "streaming": True, "shuffle_buffer": 5}
    return DataConfig(**corpus | changes | {"block_size": 16})


def on_ranks(config, tokenizer, ranks, at=None):
    """The ranks' data, restored from ``at``, and without end what they give for the same update."""
    trainings = [streamed(config, tokenizer) for _ in range(ranks)]
    position, state, tensors = at or (Position(), None, None)
    for training in trainings if at else []:
        training.restore(json.loads(json.dumps(state)), tensors["stream"])
    updates = (training.batches(2, 9, position, rank, ranks) for rank, training in enumerate(trainings))
    return trainings, zip(*updates, strict=True)


def tokens(update):
    """Of each block that a rank, or that all of them got, without what it was filled up with."""
    rows = (row for batch in update[0] for row in zip(batch["input_ids"], batch["labels"], strict=True))
    found = [ids[labels != IGNORED_LABEL].tolist() for ids, labels in rows]
    return [block for block in found if block]


def documents_of(blocks, tokenizer):
    return sorted(filter(None, tokenizer.decode(list(chain(*blocks))).split(tokenizer.eos_token)))


@pytest.mark.parametrize("limit", [None, 17])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_the_shards_are_the_text(shards, limit, files, tokenizer):
    """Each document is in one of them, and once in its epoch."""
    whole = sources.read_documents(files, "--train_files", files.train_files)
    config, found, orders = dataclasses.replace(files, max_documents=limit), [], set()
    for rank in range(shards):
        blocks, numbers = [], []
        for update in streamed(config, tokenizer).batches(2, 9, Position(), rank, shards):
            blocks, numbers = blocks + tokens(update), numbers + update[2]
            if update[1].epoch:
                break
        assert sorted(numbers) == list(range(rank, shards * len(numbers), shards))
        orders.add(tuple(number // shards for number in numbers[:6]))
        found += documents_of([blocks[i] for i in sorted(range(len(blocks)), key=numbers.__getitem__)], tokenizer)
    assert len(orders) == shards
    expected = documents_of(tokenize(whole, tokenizer)[:][None].tolist(), tokenizer)
    count = min(limit or len(expected), len(expected))
    assert len(found) == count and (sorted(found) == expected if not limit else set(found) <= set(expected))


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_a_run_goes_on_with_the_same_updates_on_any_ranks(shards, files, tokenizer):
    expected, (first, updates) = [], on_ranks(files, tokenizer, shards)
    for ranks_updates in islice(updates, 40):
        expected.append((ranks_updates[0][1], sorted(block for update in ranks_updates for block in tokens(update))))
    assert all(update[1].epoch > 1 for update in ranks_updates)
    at, place = None, 0
    for ranks in (shards, 3, 1, 8, 4, 2, shards):
        trainings, updates = on_ranks(files, tokenizer, ranks, at)
        if at:
            assert same([saved(*trainings)[1]["stream"]], [at[2]["stream"]])  # nothing was drawn yet
        for ranks_updates in islice(updates, 5):
            blocks = sorted(block for update in ranks_updates for block in tokens(update))
            assert (ranks_updates[0][1], blocks) == expected[place]
            assert len({len(micro_batches) for micro_batches, *_ in ranks_updates}) == 1
            place += 1
        at = ranks_updates[0][1], *saved(*trainings)
        assert len(at[1]["shards"]) == shards
    assert place == 35 and [len(t._shard_states) for t in first] == [1] * shards


def test_a_rank_needs_no_files_but_its_own(files, tokenizer, tmp_path):
    for rank in (0, 1):
        updates = streamed(files, tokenizer).batches(2, 9, Position(), rank, 2)
        expected = [tokens(update) for update in islice(updates, 30)]
        training = streamed(files, tokenizer)
        others = sorted(tmp_path.glob("part*"))[1 - rank :: 2]
        for path in others:
            path.rename(tmp_path / f"gone-{path.name}")
        updates = training.batches(2, 9, Position(), rank, 2)
        assert [tokens(update) for update in islice(updates, 30)] == expected
        for path in others:
            (tmp_path / f"gone-{path.name}").rename(path)


def test_shards_that_cannot_be_read_are_named(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_module, "ROW_CHARACTERS", 100)
    rows = [{"text": make_text(30, i)} for i in range(9)]
    rows[7] = {"text": None}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(**corpus | {"train_files": [f"{tmp_path}/rows.jsonl"]}, streaming=True)
    with pytest.raises(UserError, match=r"rows.jsonl, shard 1 of 2, --text_column text: record 4 contains None"):
        next(on_ranks(config, tokenizer, 2)[1])
    few = r"shard 0 of 4: the training text has [1-9]\d* tokens, and 64 or more are needed"
    with pytest.raises(UserError, match=few):
        config = dataclasses.replace(config, max_documents=4, block_size=64)
        next(on_ranks(config, tokenizer, 8)[1])


# ---------------------------------------------------------------------------------------------------------------------
# train.py


def flags(model_dir, corpus, **changes):
    settings = {"train_files": corpus["train_files"][0], "eval_files": corpus["eval_files"][0], "text_column": "text"}
    settings |= {"shuffle_buffer": 20, "max_documents": 12, "log_every": 1, "save_every": 5}
    found = run_flags(model_dir, "", **settings | changes)
    del found[found.index("--eval_fraction") :][:2]
    return [*found, "--streaming"]


def losses(run_dir):
    return [(r["step"], r["split"], r["loss"], r.get("epoch")) for r in read_jsonl(run_dir / "metrics.jsonl")]


def test_an_interrupted_run_ends_with_the_very_same_weights(model_dir, corpus, tmp_path):
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
        assert weights_sha256(run_dir) == weights_sha256(tmp_path / "whole")
        assert losses(run_dir) == losses(tmp_path / "whole")
    refused = run_script("train.py", *arguments, run_dir, "--resume", "--shuffle_buffer", 21, cwd=tmp_path)
    assert refused.returncode == 2 and "shuffle_buffer was 20 and is now 21" in refused.stderr
    refused = run_script("train.py", *arguments, run_dir, "--resume", "--max_documents", 13, cwd=tmp_path)
    assert refused.returncode == 2 and "training text was" in refused.stderr


@pytest.mark.slow
def test_an_interrupted_run_on_two_ranks_ends_with_the_very_same_weights(model_dir, corpus, tmp_path):
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
    for name in ("weights", "optimizer", "stream"):
        one, other = (tmp_path / run / f"checkpoints/step-000300/{name}.safetensors" for run in ("whole", "cut"))
        assert one.read_bytes() == other.read_bytes(), name
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.fixture
def site(tmp_path):
    """The address of the test's directory by HTTP."""
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("remote", [False, True], ids=["local", "http"])
def test_what_is_lost_on_the_way_is_named_and_gone_on_with(
    remote, kind, site, corpus, tokenizer, tmp_path, monkeypatch
):
    if remote:
        pytest.importorskip("aiohttp")
    monkeypatch.setattr(tokenize_module, "ROW_CHARACTERS", 300)
    monkeypatch.setattr(datasets.config, "STREAMING_OPEN_MAX_RETRIES", 1)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(make_text(400, i))
    corpus["train_files"] = [f"{site if remote else tmp_path}/{i}.{kind}" for i in range(3)]
    config = DataConfig(**corpus, streaming=True, shuffle_buffer=1)
    expected = epoch(streamed(config, tokenizer))
    training, seen = streamed(config, tokenizer), []
    lost = tmp_path / f"2.{kind}"
    with pytest.raises(UserError, match=rf"/2\.{kind}: cannot be read|: record 19 or one soon after it cannot be read"):
        for update in training.batches(4, 8, Position()):
            seen.append(update)
            if len(seen) == 1:
                lost.rename(tmp_path / "lost")
    state, tensors = saved(training)
    (tmp_path / "lost").rename(lost)
    other = streamed(config, tokenizer)
    other.restore(state, tensors["stream"])
    updates = seen + epoch(other, seen[-1][1])
    assert 1 < len(seen) < len(expected) and [u[1:] for u in updates] == [u[1:] for u in expected]
    assert all(same(one[0], two[0]) for one, two in zip(updates, expected, strict=True))


def test_a_run_saves_before_a_record_ends_it(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("training.run.lock_directory", lambda run_dir: None)
    monkeypatch.setattr(tokenize_module, "ROW_CHARACTERS", 300)
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
    ends = [tmp_path / name / "checkpoints/step-000040" for name in ("whole", "cut")]
    for name in ("weights", "optimizer", "stream"):
        one, other = ((end / f"{name}.safetensors").read_bytes() for end in ends)
        assert one == other, name


def test_a_dataset_of_the_hub_is_streamed(model_dir, tmp_path):
    """Neither the text nor its tokens are on the disk, and of the evaluation split nothing else is read."""
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
        ({"text_column": "texts"}, "column texts does not exist. Use one of n, name, text, said"),
        ({"filter": "m=1"}, "--filter m=1: column m does not exist"),
        ({"max_documents": 1}, "and 32 or more are needed"),
        ({"train_files": "broken.jsonl"}, "broken.jsonl"),
        ({"train_files": "odd.jsonl"}, "odd.jsonl, --text_column text: record 150 contains"),
        ({"train_files": "none.jsonl"}, "no such file"),
        ({"train_files": "http://127.0.0.1:9/a.txt"}, "http://127.0.0.1:9/a.txt: "),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_streamed_is_refused_in_one_line(changes, words, model_dir, corpus, tmp_path, monkeypatch):
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

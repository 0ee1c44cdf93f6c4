"""Two ranks against one process: the same numbers, output on rank 0 only, and lost ranks."""

import json
import resource
import shutil
import signal
import socket
import time
from collections import Counter
from unittest.mock import ANY

import processes
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, load_shards, make_text, read_jsonl, run_script, start_ranks, tiny_gpt2
from safetensors.torch import load_file

from cli.errors import UserError
from corpus.position import Position
from corpus.tokenize import tokenize
from data import TrainingData, collate, group_texts, rank_batches
from distributed.world import DistributedConfig, World
from modeling.precision import resolve_precision
from train import make_optimizer, train_step
from training.checkpoint import verify

MODEL = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
STEPS = 20


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    rows = [{"text": make_text(40 + 7 * i, i)} for i in range(12)]
    (path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "gpt2.json").write_text(json.dumps(MODEL))
    (path / "plain.json").write_text(json.dumps(MODEL | NO_DROPOUT))
    return path


def flags(out, model="plain.json", **changed):
    """Return the flags of a run. 23 blocks in steps of 8: the last step of an epoch has 7, one of them short."""
    settings = {"model_config": model, "tokenizer": "train:300", "train_files": "text.jsonl", "eval_fraction": 0.3}
    settings |= {"block_size": 32, "batch_size": 8, "micro_batch_size": 2, "max_steps": STEPS, "max_grad_norm": 0.5}
    settings |= {"learning_rate": 5e-5, "precision": "fp32", "log_every": 1, "eval_every": 8, "save_every": 5}
    settings |= {"keep_checkpoints": 9, "output_dir": out, "rank_timeout": 60} | changed
    return [argument for name, value in settings.items() for argument in (f"--{name}", value) if value is not None]


def run_ranks(cwd, *args, size=2, codes=(0, 0), **options):
    """Run ranks to their end. When one has failed, end the other ranks, as torchrun does."""
    ranks = start_ranks(size, *args, cwd=cwd, **options)
    try:
        ended = [None] * size
        while None in ended:
            time.sleep(0.02)
            ended = [rank.returncode for rank in ranks]
            if any(ended):
                for rank in ranks:
                    rank.send_signal(signal.SIGTERM)
                ended = [rank.wait(60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ended == list(codes), [rank.stderr for rank in ranks]
    return ranks


def state_of(run_dir, step=STEPS):
    path = run_dir / "checkpoints" / f"step-{step:06}"
    return {(group, k): v for group in ("weights", "optimizer") for k, v in load_shards(path / group).items()}


def assert_same(run_dir, reference, tolerance):
    """Compare metrics, and the weights of model/ and the last checkpoint, within ``tolerance``; 0 means bit for bit."""
    ours, theirs = (read_jsonl(path / "metrics.jsonl") for path in (run_dir, reference))
    assert [(r["step"], r["split"], r["tokens"]) for r in ours] == [
        (r["step"], r["split"], r["tokens"]) for r in theirs
    ]
    for mine, other in zip(ours, theirs, strict=True):
        for key in mine.keys() & {"loss", "grad_norm", "learning_rate", "tokens_seen", "epoch"}:
            assert mine[key] == pytest.approx(other[key], abs=tolerance, rel=0), (mine["step"], key)
    ours, theirs = state_of(run_dir), state_of(reference)
    assert ours.keys() == theirs.keys()
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) <= tolerance
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (run_dir, reference))
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours | theirs) <= tolerance


@pytest.fixture(scope="module")
def one(cwd):
    """Train one process with the batches of two ranks together."""
    done = run_script("train.py", *flags("one", micro_batch_size=4, sample_prompt="the"), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_equal_one_process(cwd, one, strategy):
    """Batches differ in size, with accumulation, clipping and evaluation. Everything is printed once."""
    ranks = run_ranks(cwd, *flags(strategy, strategy=strategy, sample_prompt="the"))
    assert_same(cwd / strategy, cwd / "one", 1e-6)
    metrics = read_jsonl(cwd / strategy / "metrics.jsonl")
    assert any(r["grad_norm"] > 0.5 for r in metrics if r["split"] == "train")  # so clipping was at work
    assert len({r["tokens"] for r in metrics if r["split"] == "train"}) > 1  # steps differ in size
    files = {path.name for path in (cwd / strategy / "model").iterdir()}
    assert files == {path.name for path in (cwd / "one" / "model").iterdir()}
    same = [[line for line in text.splitlines() if line.startswith(("held out", "sample", "steps"))]
            for text in (ranks[0].stdout, one.stdout)]  # fmt: skip
    assert same[0][0] == same[1][0] and same[0][2:] == same[1][2:] and len(same[0]) > 3
    assert f"2 ranks ({strategy}), each on CPU" in ranks[0].stdout
    assert (ranks[0].stderr, ranks[1].stdout, ranks[1].stderr) == ("", "", "")


def test_any_rank_stops_all_and_another_number_of_ranks_goes_on(cwd, one):
    """SIGTERM goes to rank 1. Then one process resumes from two ranks, and two ranks resume from one process."""
    ranks = start_ranks(2, *flags("moved", strategy="fsdp", sample_prompt="the"), cwd=cwd)
    try:
        for line in ranks[0].lines():
            if line.startswith("step 9/"):
                ranks[1].send_signal(signal.SIGTERM)
        assert [rank.wait(60) for rank in ranks] == [143, 143]
    finally:
        for rank in ranks:
            rank.kill()
    assert "stopped by SIGTERM at step" in ranks[0].stdout and not ranks[1].stdout + ranks[1].stderr
    done = run_script("train.py", *flags("moved", sample_prompt="the"), "--resume", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert " of 8 blocks" in done.stdout  # a step has as many blocks as before
    assert_same(cwd / "moved", cwd / "one", 1e-6)

    shutil.copytree(cwd / "one", cwd / "spread")
    for step in (15, 20):
        shutil.rmtree(cwd / "spread" / "checkpoints" / f"step-{step:06}")
    run_ranks(cwd, *flags("spread", sample_prompt="the"), "--resume")
    assert_same(cwd / "spread", cwd / "one", 1e-6)


@pytest.fixture(scope="module")
def undisturbed(cwd):
    """Train two ranks, with dropout."""
    run_ranks(cwd, *flags("undisturbed", "gpt2.json"))
    metrics = read_jsonl(cwd / "undisturbed" / "metrics.jsonl")
    assert metrics[0]["loss"] != read_jsonl(cwd / "one" / "metrics.jsonl")[1]["loss"]
    return cwd / "undisturbed"


@pytest.mark.parametrize("lost", [0, 1])
def test_who_is_left_says_who_is_lost_and_the_group_goes_on_to_the_bit(cwd, one, undisturbed, lost):
    ranks = start_ranks(2, *flags(f"lost-{lost}", "gpt2.json"), cwd=cwd)
    try:
        for line in ranks[0].lines():
            if line.startswith("step 12/"):
                ranks[lost].kill()
        assert [rank.wait(60) for rank in ranks] == ([-9, 6], [6, -9])[lost]
    finally:
        for rank in ranks:
            rank.kill()
    (line,) = ranks[1 - lost].stderr.splitlines()[-1:]
    prefix = "" if lost else "rank 1: "
    assert line.startswith(f"train.py: error: {prefix}the connection to another rank is lost (")
    assert "--resume" in line
    shutil.copytree(cwd / f"lost-{lost}", cwd / f"restarted-{lost}")
    ranks = run_ranks(cwd, *flags(f"restarted-{lost}", "gpt2.json"), "--resume")
    assert "resuming from" in ranks[0].stdout
    assert_same(cwd / f"restarted-{lost}", undisturbed, 0)


def test_a_full_disk_of_one_rank_ends_all_with_a_line_that_names_it(cwd):
    """A limit on the size of rank 1's files stands for its full disk."""
    ranks = start_ranks(2, *flags("full", max_steps=200), cwd=cwd)
    try:
        assert any(line.startswith("step 6/") for line in ranks[0].lines())
        resource.prlimit(ranks[1].pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
        assert [rank.wait(60) for rank in ranks] == [5, 5]
    finally:
        for rank in ranks:
            rank.kill()
    (line,) = [line for rank in ranks for line in rank.stderr.splitlines()]
    assert line.startswith(f"train.py: error: rank 1: {cwd}/full/checkpoints/step-0000"), line
    saved = sorted((cwd / "full/checkpoints").iterdir())
    assert saved and saved[0].name == "step-000005" and all(verify(path) is None for path in saved)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"train_files": "nothing.jsonl"}, "nothing.jsonl"),
        ({"block_size": 4096}, "smaller --block_size"),
        ({"learning_rate": 7}, "--learning_rate 7"),
    ],
)
def test_wrong_input_is_told_once(cwd, changed, named):
    ranks = run_ranks(cwd, *flags("wrong", **changed), codes=(2, ANY))
    said = [line for rank in ranks for line in rank.stderr.splitlines() if "train.py" in line or "arning" in line]
    assert len(said) == 1 and named in said[0] and "rank 1" not in said[0]
    assert not (cwd / "wrong").exists()


def test_a_rank_that_does_not_see_the_directory_is_named(cwd, tmp_path):
    shutil.copytree(cwd, tmp_path / "other", ignore=shutil.ignore_patterns("*-*", "one", "ddp", "fsdp"))
    group = processes.meeting_place() | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = []
    for rank, directory in enumerate((cwd, tmp_path / "other")):
        env = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(processes.start("train.py", *flags("unseen"), cwd=directory, env=env))
    try:
        assert [rank.wait(60) for rank in ranks] == [2, 2]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[0].stderr == (
        "train.py: error: --output_dir unseen: rank 1 does not see it. Use a shared file system.\n"
    )
    assert not (cwd / "unseen").exists() and not [*cwd.glob(".probe*"), *tmp_path.rglob(".probe*")]


def test_fsdp_refuses_float16():
    assert resolve_precision("bf16", torch.device("cpu"), True) == "bf16"
    with pytest.raises(UserError, match=r"^--strategy fsdp: .*float16\. Use --precision bf16 or fp32\.$"):
        resolve_precision("fp16", torch.device("cuda"), shards=True)


def test_blocks_fall_to_one_rank_each_whatever_their_number(rows, tokenizer):
    blocks = group_texts(tokenize(rows, tokenizer), 32)
    one = TrainingData(blocks, 3).batches(8, 16, Position())
    epochs = [next(one) for _ in range(5)]
    for ranks in (2, 3, 5, 16):
        shares = [TrainingData(blocks, 3).batches(3, 16, Position(), rank, ranks) for rank in range(ranks)]
        for micro_batches, position, numbers in epochs:
            parts = [next(share) for share in shares]
            assert all(part[1:] == (position, numbers) for part in parts)
            assert len({len(part[0]) for part in parts}) == 1  # the same number of collectives on all ranks
            labels = [batch["labels"][batch["labels"] != -100] for part, *_ in parts for batch in part]
            wanted = [batch["labels"][batch["labels"] != -100] for batch in micro_batches]
            assert torch.cat(labels).sort().values.equal(torch.cat(wanted).sort().values)
    assert [len(batch) for batch in rank_batches(range(9), 2, 1, 2)] == [2, 2, 0]


def test_what_has_no_blocks_scores_nothing(tokenizer):
    for isolate_documents in (False, True):
        nothing = collate([], 2, 8, isolate_documents)
        assert nothing["input_ids"].shape == (2, 8) and (nothing["labels"] == -100).all()
        assert ("position_ids" in nothing) == isolate_documents


@pytest.fixture
def world_of_one(monkeypatch, tmp_path):
    """Return torchrun's world with this process as its only rank."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    world = World(DistributedConfig())
    yield world
    time.sleep(0.2)  # Gloo's threads must finish their last work
    dist.destroy_process_group()


def test_gradients_travel_once_an_update_and_sums_in_one_collective(world_of_one, tokenizer, monkeypatch):
    model = world_of_one.parallelize(tiny_gpt2(len(tokenizer)), torch.device("cpu"), "fp32", 8)
    sent = Counter()

    def count(state, bucket):
        sent["gradients"] += bucket.buffer().numel()
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    def all_reduce(self, values):
        sent["sums"] += values.numel()
        return values

    world_of_one._ddp.register_comm_hook(None, count)
    monkeypatch.setattr(World, "all_reduce", all_reduce)
    batch = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "labels": torch.ones(2, 8, dtype=torch.int64)}
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    made = train_step(model, make_optimizer(model, 0), scaler, [batch] * 4, 1e-3, world=world_of_one)
    assert sent == {"gradients": model.num_parameters(), "sums": 3}
    assert made.num_predicted == 56 and made.num_tokens == 64


def test_a_model_that_leaves_weights_unused_is_trained(world_of_one, tokenizer):
    model = tiny_gpt2(len(tokenizer))
    model.transformer.idle = torch.nn.Linear(2, 2)
    model = world_of_one.parallelize(model, torch.device("cpu"), "fp32", 8)
    batch = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "labels": torch.ones(2, 8, dtype=torch.int64)}
    optimizer, scaler = make_optimizer(model, 0), torch.amp.GradScaler("cpu", enabled=False)
    losses = [train_step(model, optimizer, scaler, [batch], 1e-2, world=world_of_one).loss for _ in range(3)]
    assert losses[2] < losses[0]


def copy_tree(directory, **changes):
    """Copy the project and replace one text in each named file. Return the copy's train.py."""
    for part in [*ROOT.glob("*.py"), *(path.parent for path in ROOT.glob("*/__init__.py"))]:
        (shutil.copytree if part.is_dir() else shutil.copy2)(part, directory / part.name)
    for name, (old, new) in changes.items():
        text = (directory / f"{name}.py").read_text()
        assert text.count(old) == 1
        (directory / f"{name}.py").write_text(text.replace(old, new))
    return directory / "train.py"


ADAMW = 'torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, beta2), fused=True)'


@pytest.mark.slow
def test_an_optimizer_that_does_not_know_shards_is_one_line(cwd, tmp_path):
    """Adafactor changes tensors in place, with a result of another placement. The failure is DTensor's, not ours."""
    script = copy_tree(tmp_path, train=(ADAMW, "torch.optim.Adafactor(groups)"))
    settings, env = flags(tmp_path / "run", strategy="fsdp"), {"TORCHELASTIC_RUN_ID": "x"}
    (rank,) = start_ranks(1, *settings, cwd=cwd, env=env, script=script)
    assert rank.wait(60) == 2 and rank.stderr.count("\n") == 1, rank.stderr
    assert "--strategy fsdp: an operation does not support sharded tensors" in rank.stderr

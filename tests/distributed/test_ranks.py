"""Slow tests of several ranks: four ranks, two nodes, lost ranks, adapters, the compiler, architectures."""

import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import ANY

import processes
import pytest
import torch
from architectures import GUIDE, TODAY
from conftest import ROOT, load_shards, make_text, read_jsonl, run_script, start_ranks, tiny_gpt2
from safetensors.torch import load_file
from test_distributed import ADAMW, MODEL, NO_DROPOUT, assert_same, copy_tree, flags, run_ranks
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
TIMEOUT = 300
TORCHRUN = Path(sys.executable).with_name("torchrun")
NAMES = {**GUIDE, **TODAY}


@pytest.fixture(scope="module")
def cwd(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("many-ranks")
    rows = [{"text": make_text(40 + 7 * i, i)} for i in range(12)]
    (path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "eval.jsonl").write_text("".join(json.dumps({"text": make_text(50, 100 + i)}) + "\n" for i in range(4)))
    (path / "gpt2.json").write_text(json.dumps(MODEL))
    (path / "plain.json").write_text(json.dumps(MODEL | NO_DROPOUT))
    tiny_gpt2(len(tokenizer)).save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    return path


def run_one(cwd, *args):
    done = run_script("train.py", *args, cwd=cwd, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def one(cwd):
    """Train one process with the same steps as four ranks that each take a quarter of its batch."""
    run_one(cwd, *flags("one", micro_batch_size=4))
    return cwd / "one"


@pytest.fixture(scope="module")
def undisturbed(cwd):
    """Train two ranks, with dropout, for each strategy."""
    for strategy in ("ddp", "fsdp"):
        run_ranks(cwd, *flags(f"undisturbed-{strategy}", "gpt2.json", strategy=strategy))
    return {strategy: cwd / f"undisturbed-{strategy}" for strategy in ("ddp", "fsdp")}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_four_ranks_equal_one_process(cwd, one, strategy):
    """An epoch has 23 blocks, so in its last step one rank has one block less, or none."""
    out = f"four-{strategy}"
    ranks = run_ranks(cwd, *flags(out, micro_batch_size=1, strategy=strategy), size=4, codes=(0,) * 4)
    assert_same(cwd / out, one, 1e-6)
    metrics = [record for record in read_jsonl(one / "metrics.jsonl") if record["split"] == "train"]
    assert any(record["grad_norm"] > 0.5 for record in metrics)  # so clipping was at work
    assert not any(rank.stderr for rank in ranks) and not any(rank.stdout for rank in ranks[1:])


# ---------------------------------------------------------------------------------------------------------------------
# torchrun, on one node and on two


class Agents:
    """Processes of torchrun that are always ended together with their ranks."""

    def __init__(self):
        self.started: list[processes.Process] = []

    def __enter__(self) -> "Agents":
        return self

    def __exit__(self, *error: object) -> None:
        for agent in self.started:
            if agent.returncode is None:
                agent.send_signal(signal.SIGTERM)  # torchrun then ends its ranks
                with suppress(Exception):
                    agent.wait(60)
                agent.kill()

    def start(self, cwd: Path, *args: object) -> processes.Process:
        env = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # torchrun would set it to 1
        self.started.append(processes.start(TORCHRUN, *args, cwd=cwd, env=env))
        return self.started[-1]

    def node(self, cwd: Path, endpoint: str, restarts: int, *args: object) -> processes.Process:
        options = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", endpoint, "--rdzv_id=nodes")
        return self.start(cwd, *options, f"--max-restarts={restarts}", ROOT / "train.py", *args)

    @staticmethod
    def endpoint() -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return f"--rdzv_endpoint=localhost:{free.getsockname()[1]}"

    def rank(self, number: int) -> int | None:
        """Return the process id of a rank, or None if it has not started."""
        for agent in self.started:
            with suppress(OSError):
                for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
                    if f"RANK={number}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
                        return int(child)
        return None

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        """Wait for the record of a step, on whichever node rank 0 runs."""
        deadline = time.monotonic() + TIMEOUT
        while not _has_step(run_dir / "metrics.jsonl", step):
            assert time.monotonic() < deadline and all(agent.returncode is None for agent in self.started), [
                agent.stderr for agent in self.started
            ]
            time.sleep(0.005)


def _has_step(path: Path, step: int) -> bool:
    return path.exists() and f'"step": {step},' in path.read_text()


def two_nodes(agents: Agents, cwd: Path, restarts: int, *args: object) -> list[processes.Process]:
    endpoint = agents.endpoint()
    return [agents.node(cwd, endpoint, restarts, *args) for _ in range(2)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_nodes_equal_one_node(cwd, undisturbed, strategy):
    out = f"nodes-{strategy}"
    with Agents() as agents:
        nodes = two_nodes(agents, cwd, 0, *flags(out, "gpt2.json", strategy=strategy))
        assert [node.wait(TIMEOUT) for node in nodes] == [0, 0], [node.stderr for node in nodes]
    assert_same(cwd / out, undisturbed[strategy], 0)
    said = sorted((node.stdout for node in nodes), key=len)
    assert said[0] == "" and f"2 ranks ({strategy})" in said[1]


def test_two_nodes_come_back_after_one_has_lost_its_rank(cwd, undisturbed):
    with Agents() as agents:
        nodes = two_nodes(agents, cwd, 1, *flags("nodes-back", "gpt2.json"), "--resume")
        agents.wait_for_step(cwd / "nodes-back", 12)
        os.kill(agents.rank(1), signal.SIGKILL)
        assert [node.wait(TIMEOUT) for node in nodes] == [0, 0], [node.stderr for node in nodes]
    assert "resuming from" in "".join(node.stdout for node in nodes)
    assert_same(cwd / "nodes-back", undisturbed["ddp"], 0)


def test_nodes_that_were_told_different_things_do_not_train(cwd):
    with Agents() as agents:
        endpoint = agents.endpoint()
        nodes = [agents.node(cwd, endpoint, 0, *flags("different", learning_rate=rate)) for rate in (1e-4, 2e-4)]
        assert [node.wait(TIMEOUT) for node in nodes] == [1, 1], [node.stderr for node in nodes]
    said = [line for node in nodes for line in node.stderr.splitlines() if line.startswith("train.py: error")]
    assert len(said) == 1 and "rank 1: learning_rate: differs from rank 0" in said[0]
    assert not (cwd / "different").exists()


@pytest.mark.parametrize("flag", [[], ["--resume", "--overwrite"]])
def test_a_command_that_torchrun_may_start_again_needs_resume(cwd, undisturbed, flag):
    before = (undisturbed["ddp"] / "metrics.jsonl").read_bytes()
    with Agents() as agents:
        options = ("--standalone", "--nproc_per_node=2", "--max-restarts=1", ROOT / "train.py")
        agent = agents.start(cwd, *options, *flags("undisturbed-ddp", "gpt2.json", max_steps=30), *flag)
        assert agent.wait(TIMEOUT) == 1
    assert agent.stderr.count("Pass --resume, not --overwrite") == 2  # it tries twice
    assert (undisturbed["ddp"] / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("strategy", "lost"), [("ddp", [0]), ("fsdp", [1]), ("ddp", [0, 1])])
def test_torchrun_starts_the_group_again_to_the_same_weights(cwd, undisturbed, strategy, lost):
    out = f"restarted-{strategy}-{len(lost)}"
    with Agents() as agents:
        options = ("--standalone", "--nproc_per_node=2", "--max-restarts=1", ROOT / "train.py")
        agent = agents.start(cwd, *options, *flags(out, "gpt2.json", strategy=strategy), "--resume")
        agents.wait_for_step(cwd / out, 12)
        for pid in [agents.rank(number) for number in lost]:
            os.kill(pid, signal.SIGKILL)
        assert agent.wait(TIMEOUT) == 0, agent.stderr
    assert "resuming from" in agent.stdout
    assert_same(cwd / out, undisturbed[strategy], 0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_hangs_is_named(cwd, undisturbed, strategy):
    out, lost = f"hung-{strategy}", 1
    arguments = flags(out, "gpt2.json", strategy=strategy, rank_timeout=4)
    ranks = start_ranks(2, *arguments, cwd=cwd)
    try:
        assert any(line.startswith("step 8/") for line in ranks[0].lines())
        since = time.monotonic()
        ranks[lost].send_signal(signal.SIGSTOP)
        assert ranks[1 - lost].wait(60) == 6, ranks[1 - lost].stderr
        assert time.monotonic() - since < 4 + 4
    finally:
        for rank in ranks:
            rank.kill()
    (line,) = ranks[1 - lost].stderr.splitlines()[-1:]
    assert line.startswith("train.py: error: the connection to another rank is lost (") and "--resume" in line
    ranks[lost].wait(10)
    run_ranks(cwd, *arguments, "--resume")
    assert_same(cwd / out, undisturbed[strategy], 0)


@pytest.mark.parametrize(
    ("strategy", "lost", "writing"),
    [("ddp", 1, "checkpoints/.step-*"), ("fsdp", 0, "checkpoints/.step-*"), ("ddp", 0, ".model.being-written")],
)
def test_a_rank_that_stops_inside_a_save_is_noticed(cwd, undisturbed, strategy, lost, writing):
    """The rank stops while the temporary directory of a checkpoint or of model/ exists. The directory stays."""
    out = f"stopped-{strategy}-{lost}-{len(writing)}"
    arguments = flags(out, "gpt2.json", strategy=strategy, rank_timeout=4)
    ranks = start_ranks(2, *arguments, cwd=cwd)
    is_inside = False
    try:
        while not is_inside:
            ranks[lost].send_signal(signal.SIGCONT)
            while not list((cwd / out).glob(writing)):
                assert ranks[0].returncode is ranks[1].returncode is None, "no save was met"
                time.sleep(0.001)
            ranks[lost].send_signal(signal.SIGSTOP)
            since = time.monotonic()
            time.sleep(0.5)
            is_inside = bool(list((cwd / out).glob(writing)))
        assert ranks[1 - lost].wait(60) == 6, ranks[1 - lost].stderr
        assert 3 < time.monotonic() - since < 4 + 4
    finally:
        for rank in ranks:
            rank.kill()
    assert "the connection to another rank is lost (" in ranks[1 - lost].stderr.splitlines()[-1]
    ranks[lost].wait(10)
    run_ranks(cwd, *arguments, "--resume")
    assert_same(cwd / out, undisturbed[strategy], 0)


@pytest.mark.parametrize(
    ("strategy", "optimizer"), [("ddp", "torch.optim.SGD(groups)"), ("fsdp", ADAMW)], ids=["ddp", "fsdp"]
)
def test_what_has_no_moments_is_resumed_to_the_bit(cwd, tmp_path, strategy, optimizer):
    """One weight has no gradients, and one save is before the first step. SGD's state holds no tensor."""
    here = "    freeze(model, config.freeze)\n"
    idle = f"    model.transformer.idle = torch.nn.Linear(2, 2, device=model.device)\n{here}"
    options = {"cwd": cwd, "script": copy_tree(tmp_path, train=(ADAMW, optimizer), model=(here, idle))}
    arguments = ("--max_steps", 4, "--save_every", 2, "--learning_rate", 1e-2, "--output_dir")
    run_dir, arguments = tmp_path / "run", (*flags("", strategy=strategy), *arguments)
    ranks = start_ranks(2, *arguments, run_dir, **options)
    try:
        while not (run_dir / "config.yaml").exists():  # written before the first evaluation
            assert ranks[0].returncode is None, ranks[0].stderr
            time.sleep(0.001)
        ranks[1].send_signal(signal.SIGUSR1)
        assert [rank.wait(TIMEOUT) for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()

    def state(directory):
        groups = [path for path in (directory / "checkpoints/step-000004").iterdir() if path.is_dir()]
        return {(group.name, name): tensor for group in groups for name, tensor in load_shards(group).items()}

    expected = state(run_dir)
    kinds = {name.rpartition(":")[2] for group, name in expected if group == "optimizer"}
    assert kinds == ({"step", "exp_avg", "exp_avg_sq"} if optimizer == ADAMW else set())
    assert ("weights", "transformer.idle.weight") in expected
    for step in (0, 2):
        shutil.copytree(run_dir, copy := tmp_path / f"from-{step}")
        for later in range(step + 2, 6, 2):
            shutil.rmtree(copy / f"checkpoints/step-{later:06}")
        again = run_ranks(cwd, *arguments, copy, "--resume", script=options["script"])
        assert f"at step {step}\n" in again[0].stdout
        ours = state(copy)
        assert ours.keys() == expected.keys() and all(ours[key].equal(expected[key]) for key in expected)


WAITING = """
import time
from cli.errors import run_script
from distributed.world import DistributedConfig, World
from train import Signals

def main():
    signals = Signals()
    with World(DistributedConfig(rank_timeout=6)) as signals.world:
        signals.world.on_main(lambda: time.sleep(7))
        print("no hang, however long it takes", flush=True)
        signals.world.on_main(lambda: time.sleep(60))

run_script(main)
"""


LOST = r"waiting\.py: error: rank 1: the connection to another rank is lost \(.*"


@pytest.mark.parametrize(
    ("ended", "number", "codes", "said"), [(0, signal.SIGKILL, [-9, 6], LOST), (0, signal.SIGTERM, [143, 6], LOST)]
)
def test_ranks_notice_the_end_of_another_also_while_one_works_alone(tmp_path, ended, number, codes, said):
    (tmp_path / "waiting.py").write_text(WAITING)
    ranks = start_ranks(2, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, script=tmp_path / "waiting.py")
    try:
        assert next(ranks[1].lines()).startswith("no hang")
        time.sleep(1)
        since = time.monotonic()
        ranks[ended].send_signal(number)
        code = ranks[1 - ended].wait(30)
        assert time.monotonic() - since < 2 + 3  # two seconds so that rank 0 may report first
        ranks[ended].kill()
        assert [ranks[ended].wait(10), code] == codes
    finally:
        for rank in ranks:
            rank.kill()
    line = ranks[1].stderr.splitlines()[-1:] or [""]
    assert re.fullmatch(said, line[0]), ranks[1].stderr


def test_torchrun_ends_a_first_rank_that_hangs_and_starts_the_group_again(cwd, undisturbed):
    with Agents() as agents:
        options = ("--standalone", "--nproc_per_node=2", "--max-restarts=1", ROOT / "train.py")
        agent = agents.start(cwd, *options, *flags("hung-0", "gpt2.json", rank_timeout=10), "--resume")
        agents.wait_for_step(cwd / "hung-0", 8)
        os.kill(agents.rank(0), signal.SIGSTOP)
        assert agent.wait(TIMEOUT) == 0, agent.stderr
    assert "train.py: error: rank 1: the connection to another rank is lost" in agent.stderr
    assert "resuming from" in agent.stdout
    assert_same(cwd / "hung-0", undisturbed["ddp"], 0)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of models, and ways to train them


@pytest.fixture(scope="module")
def adapters(cwd):
    """Train an adapter in a single process."""
    run_one(cwd, *lora_flags("adapter", micro_batch_size=4))
    return cwd / "adapter"


def lora_flags(out, **changed):
    return [*flags(out, None, tokenizer=None, lora_rank=4, learning_rate=2e-5, **changed), "--model", "base"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_adapters_are_those_of_one_process(cwd, adapters, strategy):
    out = f"lora-{strategy}"
    run_ranks(cwd, *lora_flags(out, strategy=strategy))
    saved = [run_dir / "model" for run_dir in (cwd / out, adapters)]
    assert {path.name for path in saved[0].iterdir()} == {path.name for path in saved[1].iterdir()}
    assert_near(*(load_file(path / "adapter_model.safetensors") for path in saved), 1e-6)
    assert_losses(cwd / out, adapters, 1e-6)


def assert_near(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) <= tolerance


def assert_losses(run_dir, reference, tolerance):
    losses = [[record["loss"] for record in read_jsonl(path / "metrics.jsonl")] for path in (run_dir, reference)]
    assert losses[0] == pytest.approx(losses[1], abs=tolerance, rel=0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_layers_that_are_computed_twice_give_the_same(cwd, one, strategy):
    out = f"twice-{strategy}"
    run_ranks(cwd, *flags(out, strategy=strategy), "--gradient_checkpointing")
    assert_same(cwd / out, one, 1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_compiled_ranks_learn_the_same(cwd, one, strategy):
    out = f"compiled-{strategy}"
    ranks = start_ranks(2, *flags(out, strategy=strategy, compile="on"), cwd=cwd)
    try:
        assert [rank.wait(TIMEOUT) for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert "compiled" in ranks[0].stdout and not any(rank.stderr for rank in ranks)
    assert_losses(cwd / out, one, 1e-5)
    assert_near(*(load_file(path / "model/model.safetensors") for path in (cwd / out, one)), 1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_documents_are_kept_apart_on_all_ranks(cwd, strategy):
    out = f"apart-{strategy}"
    run_one(cwd, *flags(f"{out}-one", micro_batch_size=4, pack="documents"))
    run_ranks(cwd, *flags(out, strategy=strategy, pack="documents"))
    assert_same(cwd / out, cwd / f"{out}-one", 1e-6)


@pytest.mark.parametrize(("strategy", "fix"), [("ddp", "one process"), ("fsdp", "--strategy ddp")])
def test_what_a_strategy_cannot_do_is_refused_before_a_run_begins(cwd, strategy, fix):
    kind, sizes = NAMES["Reformer"]  # its layers run their own backward passes
    (cwd / f"{kind}.json").write_text(json.dumps({"model_type": kind, **sizes}))
    ranks = run_ranks(cwd, *flags("refused", f"{kind}.json", strategy=strategy), codes=(2, ANY))
    assert re.search(
        rf"--strategy {strategy}: reformer fails with it \(.*\)\. Use {fix}\.$", ranks[0].stderr, re.MULTILINE
    )
    assert not (cwd / "refused").exists() and "error" not in ranks[1].stderr


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["LLaMA", "Mamba", "BLOOM", "Mixtral", "XLNet", "BERT", "GPT Neo", "GIT"])
def test_architecture(cwd, name, strategy):
    """It learns on two ranks. The saved model is a plain one with the logged loss."""
    kind, sizes = NAMES[name]
    out = f"{kind}-{strategy}"
    (cwd / f"{kind}.json").write_text(json.dumps({"model_type": kind, **sizes}))
    changed = {"strategy": strategy, "learning_rate": 1e-2, "eval_fraction": None, "eval_files": "eval.jsonl"}
    run_ranks(cwd, *flags(out, f"{kind}.json", keep="last", **changed))
    losses = [record["loss"] for record in read_jsonl(cwd / out / "metrics.jsonl") if record["split"] == "eval"]
    assert losses[-1] < losses[0] - 0.2
    options = ("--model", f"{out}/model", "--files", "eval.jsonl", "--block_size", 32, "--precision", "fp32")
    done = run_script("perplexity.py", *options, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"^loss: (\S+)", done.stdout, re.MULTILINE)[1]) == pytest.approx(losses[-1], abs=2e-5)
    _, said = AutoModelForCausalLM.from_pretrained(cwd / out / "model", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_trains_under_autocast_alone_is_not_refused(cwd, strategy):
    kind, sizes = NAMES["OpenAI GPT"]
    (cwd / f"{kind}.json").write_text(json.dumps({"model_type": kind, **sizes}))
    run_ranks(cwd, *flags(f"{kind}-{strategy}", f"{kind}.json", strategy=strategy, precision="bf16"))


def test_layers_that_are_left_out_at_random_are_refused(cwd):
    (cwd / "opt.json").write_text(json.dumps({"model_type": "opt", "layerdrop": 0.1, **NAMES["OPT"][1]}))
    ranks = run_ranks(cwd, *flags("drops", "opt.json"), codes=(2, ANY))
    assert "layerdrop" in ranks[0].stderr and not (cwd / "drops").exists()

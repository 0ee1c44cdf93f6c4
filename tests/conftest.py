"""Fixtures and helpers. All tests run offline, on the CPU, on text and models that they make themselves."""

import json
import os
import random
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

# These must be set before any Hugging Face library is imported: a cache of our own, and no network.
CACHE = tempfile.TemporaryDirectory(prefix="test-cache-")
os.environ |= {"HF_HOME": CACHE.name, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ["TORCHINDUCTOR_CACHE_DIR"] = CACHE.name
# Threads sleep while they wait. On a busy machine, spinning took most of the time of these small models.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ.pop("HF_TOKEN", None)

import processes  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from chat_families import CHATML, IM, make_tokenizer  # noqa: E402
from torch.distributed.checkpoint import HuggingFaceStorageReader  # noqa: E402
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel  # noqa: E402

from corpus.flags import TextConfig  # noqa: E402
from corpus.records import Documents  # noqa: E402
from corpus.sources import read_documents  # noqa: E402
from model import ModelConfig, load_tokenizer  # noqa: E402

ROOT = Path(__file__).parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Start the server of scripts in each process that runs tests. With `-n` these are the workers."""
    if not config.getoption("numprocesses", None):
        processes.prepare()


WORDS = ["the", "a", "model", "token", "text", "of", "loss", "learns", "writes", "reads", "and", "in", "but", "never"]
WORDS += ["é", "東京", "x = 1", "def", "return", "(self):", ",", ".", "\n", "\n\n"]


def make_text(num_words: int, seed: int = 0) -> str:
    """Return text of a few words, with newlines, code and letters beyond ASCII."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(num_words))


def write_jsonl(path: Path, num_documents: int, seed: int = 0, words: int = 60) -> Path:
    """Write nested records in ELI5's shape."""
    rows = (
        {
            "title": f"q{i}",
            "answers": {"text": [make_text(words, seed + 2 * i), make_text(words // 2, seed + 2 * i + 1)]},
        }
        for i in range(num_documents)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_script(script: str, *args: object, cwd: Path, **options):
    """Run ``python SCRIPT ARGS`` as people do. Return the finished process with its stdout and stderr as text.

    ``options`` are those of `processes.run`: env, stdin, timeout and fresh. fresh is slow and skips no work.
    """
    return processes.run(script, *args, cwd=cwd, **options)


def start_ranks(
    size: int, *args: object, cwd: Path, env: dict[str, str] | None = None, script: str | Path = "train.py"
) -> list[processes.Process]:
    """Start ``train.py ARGS`` on ``size`` ranks, as torchrun does. No agent ends the remaining ranks."""
    group = processes.meeting_place() | {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)} | (env or {})
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    return [processes.start(script, *args, cwd=cwd, env=group | rank) for rank in own]


def in_child(work: Callable[[], int | None]) -> int:
    """Call ``work`` in a forked process. Return its exit code: the result of ``work``, or 9 for an error.

    ``work`` computes nothing with torch: OpenMP's threads do not survive a fork, and the process would wait for them.
    """
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            code = work() or 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 9
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def load_shards(directory: Path) -> dict[str, torch.Tensor]:
    """Return the whole tensors of a part of a checkpoint, such as step-000008/weights."""
    reader = HuggingFaceStorageReader(str(directory))
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def checkpoint_bytes(path: Path) -> dict[tuple[str, str], bytes]:
    """Return the bits of all tensors of a checkpoint. The order of its files' metadata is random."""
    return {
        (group, name): tensor.numpy().tobytes()
        for group in ("weights", "optimizer")
        for name, tensor in load_shards(path / group).items()
    }


def tiny_gpt2(vocab_size: int, dropout: float = 0.0, n_positions: int = 64) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_layer=2,
        n_head=2,
        n_embd=32,
        n_positions=n_positions,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return GPT2LMHeadModel(config)


@torch.no_grad()
def chain_gpt2(vocab_size: int, successors: dict[int, int], otherwise: int) -> GPT2LMHeadModel:
    """Return a GPT-2 that answers each token with its successor, and with ``otherwise`` if it has none."""
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": vocab_size, "n_inner": 8, "n_positions": 512}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, tie_word_embeddings=False, **sizes)).eval()
    for name, weight in model.named_parameters():
        weight.fill_("ln" in name and name.endswith("weight"))
    model.transformer.wte.weight.copy_(torch.eye(vocab_size))
    for token in range(vocab_size):
        model.lm_head.weight[successors.get(token, otherwise), token] = 1
    return model


@pytest.fixture(scope="session")
def speaker(tmp_path_factory) -> Path:
    """Save conversations, and a model that says "Hi", the end of a turn, and then "xxx" without end."""
    path, tokenizer = tmp_path_factory.mktemp("speaker"), make_tokenizer(CHATML, *IM)
    said = [tokenizer.convert_tokens_to_ids(token) for token in ("Ċ", "H", "i", "<|im_end|>")]
    model = chain_gpt2(len(tokenizer), dict(pairwise(said)), otherwise=tokenizer.convert_tokens_to_ids("x"))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    lines = (json.dumps({"messages": talk(f"question {i}", "Hi")}) + "\n" for i in range(9))
    (path / "chats.jsonl").write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(8000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def jsonl_file(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("jsonl") / "rows.jsonl", 60)


@pytest.fixture(scope="session")
def tokenizer(text_file):
    return load_tokenizer(ModelConfig(tokenizer="train:320"), read_documents(TextConfig(), "--files", [str(text_file)]))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer) -> Path:
    """Save a tiny GPT-2 with its tokenizer for `from_pretrained`. Dropout is 0.1 in training."""
    path = tmp_path_factory.mktemp("model") / "tiny-gpt2"
    tiny_gpt2(len(tokenizer), dropout=0.1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def rows(jsonl_file) -> Documents:
    return read_documents(TextConfig(text_column="answers.text"), "--train_files", [str(jsonl_file)])


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def corpus(tmp_path):
    """Write three files of records, one long record in each, and a file of evaluation text."""
    for file in range(3):
        rows = [{"n": i % 5, "name": f"{i}é", "text": make_text(4 + 7 * i, 20 * file + i)} for i in range(9)]
        rows[4]["text"] = make_text(700, file)
        rows = [row | {"said": talk(row["name"], row["text"])} for row in rows]
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval.jsonl").write_text(
        "".join(json.dumps(row | {"text": make_text(8), "said": talk("a", "b")}) + "\n" for row in rows[:5])
    )
    return {"train_files": [f"{tmp_path}/[0-9].jsonl"], "eval_files": [f"{tmp_path}/eval.jsonl"], "block_size": 32}


@pytest.fixture
def site(tmp_path):
    """Serve the test's directory by HTTP. Return its address."""
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()

"""Wrong input, as a table: the flags that a user gives, and the words that the one-line answer must hold.

    for case in CASES:
        problem = check(case, run)     # run(script, argv, cwd) -> (exit code, stdout, stderr); None: as it should be

Each case is plain data and needs no test framework. So other programs can run it too, for example in a process of its
own. Every case runs in a new directory. The file `good.txt` in it is a correct text.
"""

import functools
import gzip
import json
import os
import pickle
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import torch
from conftest import make_text, tiny_gpt2
from safetensors.torch import save_file
from transformers import RobertaConfig, RobertaForCausalLM

from corpus.flags import TextConfig
from corpus.sources import read_documents
from model import ModelConfig, load_tokenizer

NOBODY = 65534
FIRED = "canary-fired"  # the file that a canary makes in the working directory if something runs it
Build = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """``flags`` are added to those of every call (see `arguments`). The answer must hold ``words``."""

    name: str
    flags: str
    words: tuple[str, ...]
    build: tuple[Build, ...] = ()  # each makes files in the directory that it gets
    script: str = "train.py"
    env: dict[str, str] = field(default_factory=dict)  # if not empty, the case needs a process of its own
    as_nobody: bool = False  # root may read and write everything, so `check` is nobody while this runs
    absent: str = ""  # text that the answer must not hold


# ---------------------------------------------------------------------------------------------------------------------
# Builders


def file(name: str, content: bytes | str) -> Build:
    def build(directory: Path) -> None:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return build


def rows(name: str, *texts: object, column: str = "text") -> Build:
    """Make a .jsonl file with a record for each of ``texts``."""
    return file(name, "".join(json.dumps({column: text}) + "\n" for text in texts))


def parquet(name: str, keep: float = 1.0) -> Build:
    """Make a .parquet file, cut off after a part of its bytes."""

    def build(directory: Path) -> None:
        pyarrow.parquet.write_table(pa.table({"text": [make_text(50, i) for i in range(20)]}), directory / name)
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(len(content) * keep)])

    return build


def folder(name: str) -> Build:
    return lambda directory: (directory / name).mkdir(parents=True)


def link(name: str, target: str) -> Build:
    return lambda directory: (directory / name).symlink_to(target)


def mode(name: str, bits: int) -> Build:
    return lambda directory: (directory / name).chmod(bits)


@functools.cache
def good_model() -> Path:
    """Return a tiny GPT-2 of 64 positions with its tokenizer, made once per process."""
    keep.append(holder := tempfile.TemporaryDirectory(prefix="inputs-"))
    root = Path(holder.name)
    root.chmod(0o755)
    (root / "text.txt").write_text(make_text(8000), encoding="utf-8")
    text = read_documents(TextConfig(), "--files", [str(root / "text.txt")])
    tokenizer = load_tokenizer(ModelConfig(tokenizer="train:320"), text)
    tiny_gpt2(len(tokenizer)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root / "model"


keep: list[tempfile.TemporaryDirectory] = []


def model(*changes: Callable[[Path], object], name: str = "model") -> Build:
    """Copy the good model and apply ``changes`` to the copy."""

    def build(directory: Path) -> None:
        shutil.copytree(good_model(), directory / name)
        for change in changes:
            change(directory / name)

    return build


def without(name: str) -> Build:
    return lambda directory: (directory / name).unlink()


def cut(name: str, size: int) -> Build:
    return lambda directory: os.truncate(directory / name, size)


def edit(name: str, **changes: object) -> Build:
    """Change keys of a JSON file. None removes a key."""

    def build(directory: Path) -> None:
        content = json.loads((directory / name).read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (directory / name).write_text(json.dumps(kept))

    return build


def small_embedding(directory: Path) -> None:
    tiny_gpt2(100).save_pretrained(directory)


def roberta(directory: Path) -> None:
    """Save a RoBERTa with 64 rows of positions. The family's padding takes two of them."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    positions = {"max_position_embeddings": 64, "pad_token_id": 1, "is_decoder": True}
    RobertaForCausalLM(RobertaConfig(vocab_size=320, **size, **positions)).save_pretrained(directory)


class Canary:
    """An object that makes a file when it is unpickled."""

    def __reduce__(self):
        return open, (FIRED, "w")


def canary(name: str) -> Build:
    """Make a pickle that runs code, either a plain one or one in PyTorch's format."""

    def build(directory: Path) -> None:
        if name.endswith((".bin", ".pt", ".pth")):
            torch.save({"weight": Canary()}, directory / name)
        else:
            (directory / name).write_bytes(pickle.dumps(Canary()))

    return build


CODE = f"open({FIRED!r}, 'w')\n"  # the same as a Python file


def custom_code(directory: Path) -> None:
    """Replace the architecture of a model by a Python file beside its weights."""
    (directory / "modeling_own.py").write_text(CODE)
    (directory / "configuration_own.py").write_text(CODE)
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit("config.json", model_type="own", architectures=["OwnModel"], auto_map=classes)(directory)


def custom_tokenizer(directory: Path) -> None:
    (directory / "tokenization_own.py").write_text(CODE)
    auto_map = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    edit("tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)(directory)
    edit("config.json", model_type="own")(directory)


def finished_run(name: str) -> Build:
    """Make the one file of a finished run that is read before anything else."""
    return file(f"{name}/metrics.jsonl", '{"step": 1, "split": "eval", "loss": 1.0, "final": true}\n')


# ---------------------------------------------------------------------------------------------------------------------
# The table

A, LONG = "some text", make_text(400)
DATA = "--train_files "
NO_NETWORK = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
HEADER = b"\0" * 64

CASES = [
    # Files that do not exist or are not files.
    Case("missing file", DATA + "nowhere.txt", ("--train_files nowhere.txt", "no such file")),
    Case("missing among others", DATA + "good.txt x.txt.gz", ("--train_files x.txt.gz", "no such file")),
    Case("missing evaluation file", "--eval_files nowhere.txt", ("--eval_files nowhere.txt", "no such file")),
    Case("no match", DATA + "'*.csv'", ("--train_files *.csv", "no file matches")),
    Case("directory without text", DATA + "x", ("--train_files x: no file with text", ".jsonl"),
         (folder("x"), file("x/.hidden.txt", A), file("x/a.html", A))),
    Case("directory named as a file", DATA + "x.txt", ("x.txt", "no file with text"), (folder("x.txt"),)),
    Case("directory of text and records", DATA + "x", ("several formats", "json, text"),
         (file("x/a.txt", A), rows("x/a.jsonl", A))),
    Case("dangling link", DATA + "x.txt", ("x.txt", "no such file"), (link("x.txt", "nowhere"),)),
    Case("pipe", DATA + "x.txt", ("x.txt", "not a regular file"), (lambda d: os.mkfifo(d / "x.txt"),)),
    Case("device", DATA + "/dev/zero", ("/dev/zero", "not a regular file")),
    Case("unreadable file", DATA + "x.txt", ("x.txt", "cannot be read", "Permission denied"),
         (file("x.txt", A), mode("x.txt", 0)), as_nobody=True),
    Case("unreadable directory", DATA + "x/x.txt", ("x/x.txt",),
         (file("x/x.txt", A), mode("x", 0)), as_nobody=True),
    Case("a name that is too long", DATA + "x" * 300 + ".txt", ("xxx.txt", "no such file")),
    # Formats.
    Case("empty file", DATA + "x.txt", ("x.txt", "is empty", "Pass a file"), (file("x.txt", ""),)),
    Case("empty jsonl", DATA + "x.jsonl", ("x.jsonl", "is empty"), (file("x.jsonl", ""),)),
    Case("empty among others", DATA + "good.txt x.txt", ("x.txt", "is empty"), (file("x.txt", ""),)),
    Case("blank jsonl", DATA + "x.jsonl", ("x.jsonl",), (file("x.jsonl", "\n\n"),)),
    Case("header alone", DATA + "x.csv", ("x.csv", "no records"), (file("x.csv", "text\n"),)),
    Case("empty list", DATA + "x.json", ("x.json",), (file("x.json", "[]"),)),
    Case("unknown format", DATA + "x.html", ("x.html", "unknown format", ".jsonl"), (file("x.html", "<p>"),)),
    Case("no suffix", DATA + "x", ("--train_files x:", "unknown format"), (file("x", A),)),
    Case("gz alone", DATA + "x.gz", ("x.gz", "unknown format"), (file("x.gz", gzip.compress(b"a")),)),
    Case("mixed formats", DATA + "good.txt x.jsonl", ("several formats", "json, text"), (rows("x.jsonl", A),)),
    # Not text.
    Case("latin-1 txt", DATA + "x.txt", ("x.txt", "not UTF-8", "iconv"), (file("x.txt", "café".encode("latin-1")),)),
    Case("utf-16 txt", DATA + "x.txt", ("x.txt", "not UTF-8"), (file("x.txt", LONG.encode("utf-16")),)),
    Case("utf-16 txt without a mark", DATA + "x.txt", ("x.txt", "NUL", "UTF-16"),
         (file("x.txt", "plain".encode("utf-16-le")),)),
    Case("latin-1 csv", DATA + "x.csv", ("x.csv", "not UTF-8"),
         (file("x.csv", "text\ncafé\n".encode("latin-1")),)),
    Case("latin-1 jsonl", DATA + "x.jsonl", ("x.jsonl", "not UTF-8"),
         (file("x.jsonl", '{"text": "a"}\n{"text": "café"}\n'.encode("latin-1")),)),
    Case("nul in a txt.gz", DATA + "x.txt.gz", ("x.txt.gz", "NUL"), (file("x.txt.gz", gzip.compress(b"a\0b")),)),
    Case("nul in evaluation text", "--eval_files x.txt", ("x.txt", "NUL"), (file("x.txt", b"12345\0"),)),
    Case("an image called txt", DATA + "x.txt", ("x.txt", "not UTF-8"), (file("x.txt", b"\x89PNG\r\n\x1a\n"),)),
    # Broken.
    Case("jsonl broken in the middle", DATA + "x.jsonl", ("x.jsonl", "line 3"),
         (file("x.jsonl", '{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n'),)),
    Case("jsonl.gz broken in the middle", DATA + "x.jsonl.gz", ("x.jsonl.gz", "line 2"),
         (file("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": b}\n{"text": "c"}\n')),)),
    Case("jsonl with an unescaped quote, far in", DATA + "x.jsonl", ("x.jsonl", "line 4001"),
         (file("x.jsonl", '{"text": "a"}\n' * 4000 + '{"text": "say "b""}\n' + '{"text": "a"}\n' * 10),)),
    Case("jsonl cut off", DATA + "x.jsonl", ("x.jsonl", "line 2"), (file("x.jsonl", '{"text": "a"}\n{"text": "'),)),
    Case("jsonl of plain lines", DATA + "x.jsonl", ("x.jsonl", "line 1"), (file("x.jsonl", "one\ntwo\n"),)),
    Case("jsonl of strings", DATA + "x.jsonl", ("x.jsonl",), (file("x.jsonl", '"one"\n"two"\n'),)),
    Case("jsonl of numbers", DATA + "x.jsonl", ("x.jsonl",), (file("x.jsonl", "1\n2\n"),)),
    Case("json list broken", DATA + "x.json", ("x.json", "line 3"),
         (file("x.json", '[\n{"text": "a"},\n{"text": b}\n]'),)),
    Case("json object broken", DATA + "x.json", ("x.json", "line 2"), (file("x.json", '{"text": "a"}\n{"text":\n'),)),
    Case("one broken of three", DATA + "'*.jsonl'", ("b.jsonl", "line 1"),
         (rows("a.jsonl", A), file("b.jsonl", "{]\n"), rows("c.jsonl", A))),
    Case("one broken parquet of three", DATA + "'*.parquet'", ("b.parquet",),
         (parquet("a.parquet"), parquet("b.parquet", 0.5), parquet("c.parquet"))),
    Case("one latin-1 of two", DATA + "good.txt x.txt", ("x.txt", "not UTF-8"),
         (file("x.txt", b"caf\xe9"),)),
    Case("csv with ragged rows", DATA + "x.csv", ("x.csv", "line 3"), (file("x.csv", "text,n\na,1\nb,2,3,4\nc,1\n"),)),
    Case("csv with an open quote", DATA + "x.csv", ("x.csv", "line 3: unexpected end"),
         (file("x.csv", 'text\na\n"b\nc\n'),)),
    Case("parquet that is text", DATA + "x.parquet", ("x.parquet",), (file("x.parquet", LONG),)),
    Case("parquet cut off", DATA + "x.parquet", ("x.parquet",), (parquet("x.parquet", 0.5),)),
    Case("arrow that is text", DATA + "x.arrow", ("x.arrow",), (file("x.arrow", LONG),)),
    Case("gzip that is text", DATA + "x.txt.gz", ("x.txt.gz", "cannot be read"), (file("x.txt.gz", A),)),
    Case("gzip cut off", DATA + "x.txt.gz", ("x.txt.gz", "cannot be read"),
         (file("x.txt.gz", gzip.compress(LONG.encode())[:-20]),)),
    Case("gzip damaged", DATA + "x.txt.gz", ("x.txt.gz", "cannot be read"),
         (file("x.txt.gz", gzip.compress(b"", 9)[:10] + b"\xff" * 50),)),
    Case("jsonl.gz that is text", DATA + "x.jsonl.gz", ("x.jsonl.gz",), (rows("x.jsonl.gz", A, A),)),
    Case("jsonl.gz cut off", DATA + "x.jsonl.gz", ("x.jsonl.gz",),
         (file("x.jsonl.gz", gzip.compress(b'{"text": "some text"}\n' * 100)[:-20]),)),
    # Columns and records.
    Case("no such column", DATA + "x.jsonl --text_column body",
         ("--text_column body: column body does not exist", "The record has text, n. Use --text_column text."),
         (file("x.jsonl", '{"text": "a", "n": 1}\n'),)),
    Case("no such column below", DATA + "x.jsonl --text_column answers.body",
         ("--text_column answers.body", "answers.text"), (rows("x.jsonl", {"text": ["a"]}, column="answers"),)),
    Case("no such column in csv", DATA + "x.csv", ("--text_column text", "title, body"),
         (file("x.csv", "title,body\na,b\n"),)),
    Case("null", DATA + "x.jsonl", ("record 3", "None"), (rows("x.jsonl", A, A, None),)),
    Case("null in a parquet", DATA + "x.parquet", ("record 2", "None"),
         (lambda d: pyarrow.parquet.write_table(pa.table({"text": [A, None]}), d / "x.parquet"),)),
    Case("numbers", DATA + "x.jsonl", ("record 1", "contains 7"), (rows("x.jsonl", 7, 8),)),
    Case("a number among texts", DATA + "x.jsonl", ("record 2", "contains 8"), (rows("x.jsonl", A, 8),)),
    Case("a list with a null", DATA + "x.jsonl", ("record 2", "None"), (rows("x.jsonl", [A], [A, None]),)),
    Case("lists of numbers", DATA + "x.jsonl", ("record 1", "[1, 2]"), (rows("x.jsonl", [1, 2]),)),
    Case("records in the column", DATA + "x.jsonl --text_column answers", ("record 1", "not text"),
         (rows("x.jsonl", {"text": "a"}, column="answers"),)),
    # Templates and filters of records.
    Case("a template that is broken", DATA + "x.jsonl --text_column '{text'",
         ("--text_column {text: not a valid template", "braces"), (rows("x.jsonl", A),)),
    Case("a template with a form", DATA + "x.jsonl --text_column '{text:>9}'",
         ("--text_column {text:>9}: not a valid template",), (rows("x.jsonl", A),)),
    Case("a template of a missing column", DATA + "x.jsonl --text_column '{text}{body}'",
         ("--text_column {text}{body}", "column body does not exist", "The record has text"), (rows("x.jsonl", A),)),
    Case("an empty column", "--text_column ''", ("--text_column : not a valid template",)),
    Case("template and prompt", "--text_column '{b}' --prompt_column p --completion_column c", ("exclude each",)),
    Case("a prompt without completion", "--prompt_column p", ("--prompt_column p: needs --completion_column",)),
    Case("no such completion", DATA + "x.jsonl --prompt_column text --completion_column b",
         ("--completion_column b: column b does not exist", "The record has text"), (rows("x.jsonl", A),)),
    Case("a completion that is a number", DATA + "x.jsonl --prompt_column p --completion_column c",
         ("--prompt_column p --completion_column c: record", "contains 7"),
         (file("x.jsonl", '{"p": "a", "c": 7}\n' * 9),)),
    Case("a filter that is none", "--filter a", ("--filter a", "column=value")),
    Case("a filter of a missing column", DATA + "x.jsonl --filter b=1",
         ("--filter b=1: column b does not exist", "The record has text"), (rows("x.jsonl", A),)),
    Case("a filter that leaves nothing", DATA + "x.jsonl --filter text=b", ("--filter text=b", "none of 1 record"),
         (rows("x.jsonl", A),)),
    Case("a mixture without weights", "--mix good.txt", ("--mix good.txt", "name:weight")),
    Case("a mixture without weight", "--mix good.txt:0", ("--mix good.txt:0", "above 0")),
    Case("a mixture of something missing", "--mix good.txt:1 x.txt:1", ("--mix x.txt", "no such file")),
    Case("a mixture of a missing data set", "--mix good.txt:1 ./x:1", ("--mix ./x", "cannot be loaded")),
    Case(
        "a mixture with a part of another form",
        "--mix good.txt:1 n.jsonl:1",
        ("--mix n.jsonl", "column text does not exist"),
        (file("n.jsonl", '{"other": "a"}\n'),),
    ),
    Case("a mixture beside files", "--mix good.txt:1 --train_files good.txt", ("--train_files good.txt and --mix",)),
    Case("a mixture without end", "--mix good.txt:1 '*.txt:1e-12'", ("--mix", "one epoch would have")),
    Case("an empty message", DATA + "x.jsonl --eval_files good.txt", ("record 2: message 1 lacks",),
         (rows("x.jsonl", *[[{"role": "assistant", "content": c}] for c in (A, None, A)]),)),
    Case("a conversation without an answer", DATA + "x.jsonl", ("has no message of the assistant", "--loss_on all"),
         (rows("x.jsonl", *[[{"role": "user", "content": A}]] * 9),)),
    Case("long documents alone", "--long_documents drop", ("--long_documents drop", "--block_size 16")),
    Case("evaluation text that is trained on", "--deduplicate --eval_files good.txt",
         ("none of its tokens has a loss",)),
    # Too little text.
    Case("fewer tokens than a block", DATA + "x.txt --block_size 64", ("--block_size 64", "only 18 tokens"),
         (file("x.txt", "a b c d e f g h i j"),)),
    Case("an evaluation set without a token", "--eval_files x.txt", ("--eval_files x.txt", "empty"),
         (file("x.txt", ""),)),
    Case("an evaluation set of one token", "--eval_files x.jsonl", ("the evaluation text: none of its tokens",),
         (rows("x.jsonl", ""),)),
    # Numbers.
    *[Case(f"{flag} {value}", f"--{flag} {value}", (f"--{flag}", shown or value, rule))
      for flag, value, shown, rule in (
          ("batch_size", "0", "", "at least 1"),
          ("batch_size", "-1", "", "at least 1"),
          ("batch_size", "1000000000000", "", "at most 1000000000"),
          ("batch_size", "2.5", "", "whole number"),
          ("batch_size", "abc", "", "whole number"),
          ("batch_size", "''", "''", "whole number"),
          ("learning_rate", "-1e-4", "--learning_rate", "expected one argument"),
          ("micro_batch_size", "0", "", "at least 1"),
          ("micro_batch_size", "1000000000001", "", "at most"),
          ("max_steps", "0", "", "at least 1"),
          ("max_steps", "1e3", "", "whole number"),
          ("max_steps", "99999999999999999999", "", "at most"),
          ("num_epochs", "0", "", "above 0"),
          ("num_epochs", "inf", "", "below"),
          ("learning_rate", "nan", "", "above 0"),
          ("learning_rate", "inf", "", "below 1"),
          ("learning_rate", "-0.1", "", "above 0"),
          ("learning_rate", "0", "", "above 0"),
          ("learning_rate", "2", "", "below 1"),
          ("weight_decay", "-0.1", "", "at least 0"),
          ("warmup_steps", "-1", "", "at least 0"),
          ("warmup_steps", "1.5", "", "not a whole number"),
          ("max_grad_norm", "nan", "", "at least 0"),
          ("block_size", "1", "", "at least 2"),
          ("block_size", "0", "", "at least 2"),
          ("block_size", "1000000000000", "", "at most"),
          ("max_documents", "0", "", "at least 1"),
          ("eval_fraction", "0", "", "above 0"),
          ("eval_fraction", "1", "", "below 1"),
          ("seed", "-1", "", "at least 0"),
          ("seed", "4294967296", "", "at most 4294967295"),
          ("keep_checkpoints", "0", "", "at least 1"),
          ("log_every", "0", "", "at least 1"),
          ("save_every", "1000000000000", "", "at most"),
          ("precision", "fp8", "", "'fp32', 'bf16', 'fp16'"),
          ("compile", "maybe", "", "'auto', 'on', 'off'"),
          ("tokenizer", "train:10", "", "257"),
          ("tokenizer", "train:many", "", "257"),
          ("tokenizer", "train:1000000000000", "", "257"),
      )],
    Case("two numbers at once", "--batch_size 0 --seed -1", ("--batch_size 0", "--seed -1")),
    Case("warmup longer than the run", "--warmup_steps 5 --max_steps 5",
         ("--warmup_steps 5: the run ends at step 5. Set a smaller value.",)),
    *[Case(f"removed flag {name}", f"--{name} 1", (f"--{name}: no longer a flag", words)) for name, words in (
        ("grad_accum_steps", "--micro_batch_size"), ("oom", "--micro_batch_size"), ("warmup_ratio", "--warmup_steps"),
        ("text_template", "--text_column"), ("max_skips", "--max_skipped_steps"), ("merge_lora", "export.py"))],
    Case("fp16 on a CPU", "--precision fp16", ("--precision fp16", "bf16, fp32")),
    Case("block beyond the positions", "--block_size 65", ("--block_size 65", "64 positions")),
    Case("a prompt beyond the positions", f"--sample_prompt '{'the model ' * 40}'", ("--sample_prompt the model",)),
    # Flags, and files of flags.
    Case("unknown flag", "--frobnicate 3", ("--frobnicate: unknown", "--help")),
    Case("misspelt flag", "--bach_size 3", ("--bach_size: unknown", "Use --batch_size")),
    Case("abbreviated flag", "--batch 3", ("--batch: unknown", "Use --")),
    Case("stray word", "stray", ("stray: unknown",)),
    Case("token as a flag", "--token=hf_secret", ("--token: unknown",), absent="hf_secret"),
    Case("token as two words", "--token hf_secret", ("--token: unknown",), absent="hf_secret"),
    Case("a flag without its value", "--batch_size", ("--batch_size", "expected one argument")),
    Case("no model", "--model=", ("--model: missing", "--model_config")),
    Case("no text", "--train_files", ("--train_files", "expected at least one argument")),
    Case("two sources", "--dataset a/b --train_files good.txt", ("--dataset a/b", "exclude")),
    Case("two models", "--model a --model_config b", ("--model a", "exclude")),
    Case("split without a dataset", "--dataset_split test", ("--dataset_split test: needs --dataset",)),
    Case("missing yaml", "--config c.yaml", ("c.yaml", "No such file")),
    Case("yaml is a directory", "--config .", ("--config .", "directory")),
    Case("broken yaml", "--config c.yaml", ("c.yaml", "not valid YAML", "line 3"),
         (file("c.yaml", "seed: 1\nbatch_size: [\n"),)),
    Case("yaml is a list", "--config c.yaml", ("c.yaml", "mapping"), (file("c.yaml", "- batch_size\n"),)),
    Case("yaml is a word", "--config c.yaml", ("c.yaml", "mapping"), (file("c.yaml", "batch_size\n"),)),
    Case("yaml is latin-1", "--config c.yaml", ("c.yaml", "not valid YAML"), (file("c.yaml", b"model: caf\xe9\n"),)),
    Case("yaml is binary", "--config c.yaml", ("c.yaml", "not valid YAML"), (file("c.yaml", b"a: \0\1\n"),)),
    Case("unknown yaml key", "--config c.yaml", ("c.yaml", "bach_size: unknown", "Use batch_size"),
         (file("c.yaml", "bach_size: 2\n"),)),
    Case("token in yaml", "--config c.yaml", ("c.yaml", "token: unknown"), (file("c.yaml", "token: hf_secret\n"),),
         absent="hf_secret"),
    Case("token in broken yaml", "--config c.yaml", ("c.yaml", "not valid YAML"),
         (file("c.yaml", "token: hf_secret: x\n"),), absent="hf_secret"),
    Case("wrong type in yaml", "--config c.yaml", ("--batch_size two: must be",),
         (file("c.yaml", "batch_size: two\n"),)),
    Case("a list for a number in yaml", "--config c.yaml", ("batch_size: takes one value",),
         (file("c.yaml", "batch_size: [1, 2]\n"),)),
    Case("a word for a switch in yaml", "--config c.yaml", ("resume", "maybe"), (file("c.yaml", "resume: maybe\n"),)),
    Case("nul in yaml", "--config c.yaml", ("no such file",), (file("c.yaml", 'eval_files: ["a\\0b.txt"]\n'),)),
    Case("1e-4 in yaml is a number", "--config c.yaml --batch_size 0", ("--batch_size 0",),
         (file("c.yaml", "learning_rate: 1e-4\n"),), absent="learning_rate"),
    Case("python in yaml", "--config c.yaml", ("c.yaml", "not valid YAML", "python/object"),
         (file("c.yaml", f'seed: !!python/object/apply:os.system ["touch {FIRED}"]\n'),)),
    # Models.
    Case("no such model directory", "--model ./nowhere", ("--model ./nowhere",)),
    Case("a model that is a file", "--model good.txt", ("--model good.txt",)),
    Case("empty model directory", "--model model", ("--model model",), (folder("model"),)),
    Case("no config", "--model model", ("--model model", "config"), (model(without("config.json")),)),
    Case("broken config", "--model model", ("--model model", "config.json"),
         (model(file("config.json", "{broken")),)),
    Case("a config that is a list", "--model model", ("--model model",), (model(file("config.json", "[]")),)),
    Case("unknown model type", "--model model", ("--model model", "nonesuch"),
         (model(edit("config.json", model_type="nonesuch")),)),
    Case("no model type", "--model model", ("--model model", "model_type"),
         (model(edit("config.json", model_type=None)),)),
    Case("a wrong type in the config", "--model model", ("--model model", "n_layer"),
         (model(edit("config.json", n_layer="two")),)),
    Case("not a causal model", "--model model", ("--model model", "t5"),
         (model(edit("config.json", model_type="t5")),)),
    Case("no weights", "--model model", ("--model model", "model.safetensors"),
         (model(without("model.safetensors")),)),
    Case("truncated weights", "--model model", ("--model model", "model.safetensors"),
         (model(cut("model.safetensors", 5000)),)),
    Case("empty weights", "--model model", ("--model model", "model.safetensors"),
         (model(cut("model.safetensors", 0)),)),
    Case("zeros for weights", "--model model", ("--model model", "model.safetensors"),
         (model(file("model.safetensors", HEADER)),)),
    Case("weights of another shape", "--model model", ("--model model", "transformer.wte.weight", "[3, 3]"),
         (model(lambda d: save_file({"transformer.wte.weight": torch.zeros(3, 3)}, d / "model.safetensors",
                                    {"format": "pt"})),)),
    Case("a pickle for weights", "--model model", ("--model model", "pytorch_model.bin", "can run code", "python -c"),
         (model(without("model.safetensors"), canary("pytorch_model.bin")),)),
    Case("a pickle called safetensors", "--model model", ("--model model", "model.safetensors"),
         (model(lambda d: torch.save({"weight": Canary()}, d / "model.safetensors")),)),
    Case("custom code", "--model model", ("--model model", "code"), (model(custom_code),), absent="trust_remote_code"),
    Case("custom code from scratch", "--model_config model", ("--model_config model", "code"), (model(custom_code),),
         absent="trust_remote_code"),
    Case("custom tokenizer", "--model model", ("--model model", "code"), (model(custom_tokenizer),),
         absent="trust_remote_code"),
    Case("no tokenizer", "--model model", ("--model model", "tokenizer"),
         (model(without("tokenizer.json"), without("tokenizer_config.json")),)),
    Case("broken tokenizer", "--model model", ("--model model", "tokenizer"),
         (model(file("tokenizer.json", "{broken")),)),
    Case("a tokenizer that is another JSON", "--model model", ("--model model", "tokenizer"),
         (model(file("tokenizer.json", '{"a": 1}')),)),
    Case("truncated tokenizer", "--model model", ("--model model", "tokenizer"),
         (model(cut("tokenizer.json", 300)),)),
    Case("broken tokenizer_config", "--model model", ("--model model", "tokenizer"),
         (model(file("tokenizer_config.json", "{broken")),)),
    Case("more ids than rows", "--model model", ("tokenizer model", "319", "100 rows"), (model(small_embedding),)),
    Case("roberta's positions", "--model model --block_size 63", ("--block_size 63", "62 positions"),
         (model(roberta),)),
    Case("overrides that are no JSON", "--model_overrides n_layer=4", ("--model_overrides n_layer=4", "JSON object")),
    Case("overrides that are a list", "--model_overrides [4]", ("--model_overrides [4]", "JSON object")),
    Case("an unknown override", """--model_overrides '{"n_layers": 4}'""", ("--model_overrides", "n_layers")),
    Case("an override of the wrong type", """--model_overrides '{"n_layer": "4"}'""", ("n_layer",)),
    Case("an override beyond sense", """--model_config model --model_overrides '{"n_head": 7}'""",
         ("--model_config model", "7"), (model(),)),
    Case("an override beyond memory", """--model_config model --model_overrides '{"vocab_size": 1000000000000000}'""",
         ("--model_config model",), (model(),)),
    Case("a negative override", """--model_config model --model_overrides '{"n_embd": -2}'""",
         ("--model_config model",), (model(),)),
    Case("a config file that is missing", "--model_config nowhere.json", ("--model_config nowhere.json",)),
    Case("a config file that is broken", "--model_config c.json --tokenizer train:300", ("--model_config c.json",),
         (file("c.json", "{"),)),
    Case("a config without its tokenizer", "--model_config c.json", ("--model_config .", "--tokenizer"),
         (file("c.json", '{"model_type": "gpt2"}'),)),
    Case("a malformed id", "--model 'a b/c'", ("--model a b/c",)),
    Case("a malformed tokenizer id", "--tokenizer a//b", ("--tokenizer a//b",)),
    Case("a model that is not in the cache, offline", "--model no/model", ("--model no/model",)),
    # The Hub.
    Case("a model and no network", "--model no/model", ("--model no/model", "network"), env=NO_NETWORK),
    Case("a dataset and no network", "--dataset no/data", ("--dataset no/data", "network"), env=NO_NETWORK),
    Case("a malformed dataset id", "--dataset 'a b/c'", ("--dataset a b/c",)),
    Case("a revision of a directory", "--dataset data@main",
         ("--dataset data@main", "has no revisions", "Remove @main"), (rows("data/train.jsonl", A),)),
    Case("an empty revision", "--dataset a/b@", ("--dataset a/b@", "Use ID@REVISION")),
    Case("a mixture with an empty revision", "--mix good.txt:1 a/b@:1", ("--mix a/b@: lacks", "Use ID@REVISION")),
    Case("a revision and no network", "--dataset no/data@v1", ("--dataset no/data@v1", "network"), env=NO_NETWORK),
    Case("a missing dataset directory", "--dataset ./nowhere", ("--dataset ./nowhere",)),
    Case("an empty dataset directory", "--dataset data", ("--dataset data",), (folder("data"),)),
    Case("a dataset that is a script", "--dataset data", ("--dataset data", "script"), (file("data/data.py", CODE),)),
    Case("a dataset that is a file", "--dataset good.txt", ("--dataset good.txt",)),
    Case("a broken saved dataset", "--dataset data", ("--dataset data",), (file("data/state.json", "{"),)),
    Case("a saved dataset without its table", "--dataset data", ("--dataset data",),
         (file("data/state.json", '{"_data_files": [{"filename": "x.arrow"}]}'), file("data/dataset_info.json", "{}"))),
    Case("no such split", "--dataset data --dataset_split other", ("--dataset data", "other"),
         (rows("data/train.jsonl", A),)),
    Case("a malformed split", "--dataset data --dataset_split 'train[a'", ("--dataset data", "train[a"),
         (rows("data/train.jsonl", A),)),
    Case("a malformed repo to push to", "--push_to_hub 'a b'", ("--push_to_hub a b", "user/name")),
    Case("not logged in", "--push_to_hub user/name", ("--push_to_hub user/name", "hf auth login")),
    # The output directory.
    Case("holds another run", "--output_dir out", ("--output_dir out", "another run", "--overwrite"),
         (finished_run("out"),)),
    Case("holds something else", "--output_dir out --overwrite", ("--output_dir out", "no run"),
         (file("out/model/mine.txt", A),)),
    Case("overwrites its own model", "--model linked --output_dir out --overwrite",
         ("--model linked: lies in --output_dir out", "Use another --output_dir"),
         (finished_run("out"), model(name="out/model"), link("linked", "out/model"))),
    Case("overwrites its own text", "--mix 'out/checkpoints/*/*.txt:1' --output_dir out --overwrite",
         ("--mix out/checkpoints/*/*.txt:1: lies in --output_dir out",),
         (finished_run("out"), file("out/checkpoints/step-000001/x.txt", LONG))),
    Case("is a file", "--output_dir out", ("--output_dir out", "is a file"), (file("out", A),)),
    Case("is below a file", "--output_dir out/run", ("--output_dir out/run", "out is a file"), (file("out", A),)),
    Case("is a link", "--output_dir out", ("--output_dir out", "symbolic link", "elsewhere"),
         (folder("elsewhere"), link("out", "elsewhere"))),
    Case("is a link to a run", "--output_dir out --overwrite", ("--output_dir out", "symbolic link", "elsewhere"),
         (finished_run("elsewhere"), link("out", "elsewhere"))),
    Case("is a dangling link", "--output_dir out", ("--output_dir out", "symbolic link", "nowhere"),
         (link("out", "nowhere"),)),
    Case("is read-only", "--output_dir out", ("--output_dir out", "read-only"),
         (folder("out"), mode("out", 0o555)), as_nobody=True),
    Case("is in a read-only directory", "--output_dir up/out/x", ("--output_dir up/out/x", ": up is read-only"),
         (folder("up"), mode("up", 0o555)), as_nobody=True),
    # The other scripts.
    Case("perplexity of nothing", "--files", ("--files", "at least one"), script="perplexity.py"),
    Case("perplexity of a missing file", "--files x.txt", ("--files x.txt", "no such file"), script="perplexity.py"),
    Case("perplexity of an empty file", "--files x.txt", ("--files x.txt", "empty"), (file("x.txt", ""),),
         "perplexity.py"),
    Case("perplexity of broken JSON", "--files x.jsonl", ("--files x.jsonl", "line 1"), (file("x.jsonl", "{\n"),),
         "perplexity.py"),
    Case("perplexity of nul", "--files x.txt", ("x.txt", "NUL"), (file("x.txt", b"a\0"),), "perplexity.py"),
    Case("perplexity of a null", "--files x.jsonl", ("record 1",), (rows("x.jsonl", None),), "perplexity.py"),
    Case("perplexity without a model", "--model=", ("--model: missing",), script="perplexity.py"),
    Case("perplexity with a stride too long", "--stride 17", ("--stride 17", "at most --block_size 16"),
         script="perplexity.py"),
    Case("perplexity with a block too long", "--block_size 65", ("--block_size 65", "64"), script="perplexity.py"),
    Case("perplexity with a pickle", "--model model", ("pytorch_model.bin", "can run code"),
         (model(without("model.safetensors"), canary("pytorch_model.bin")),), "perplexity.py"),
    Case("perplexity with custom code", "--model model", ("--model model", "code"), (model(custom_code),),
         "perplexity.py", absent="trust_remote_code"),
    Case("perplexity in fp16 on a CPU", "--precision fp16", ("--precision fp16",), script="perplexity.py"),
    Case("export without a model", "--model=", ("--model: missing", "Pass"), script="export.py"),
    Case("export over something else", "--out good.txt", ("--out good.txt", "exists"), script="export.py"),
    Case("export in another dtype", "--dtype fp8", ("--dtype", "'fp32', 'bf16', 'fp16'"), script="export.py"),
    Case("export of a pickle", "--model model", ("pytorch_model.bin", "can run code"),
         (model(without("model.safetensors"), canary("pytorch_model.bin")),), "export.py"),
    Case("export of a revision of a directory", "--model ./model@main", ("is local and has no revisions", "@main"),
         (model(),), "export.py"),
    Case("no model to generate with", "--model ./nowhere", ("--model ./nowhere",), script="generate.py"),
    Case("no finished run", "--model=", ("no finished run", "--model"), script="generate.py"),
    Case("generate with a pickle", "--model model", ("pytorch_model.bin", "can run code"),
         (model(without("model.safetensors"), canary("pytorch_model.bin")),), "generate.py"),
    Case("generate with custom code", "--model model", ("--model model", "code"), (model(custom_code),),
         "generate.py", absent="trust_remote_code"),
    Case("more ids than rows to generate from", "--model model", ("100 rows",), (model(small_embedding),),
         "generate.py"),
    Case("too many tokens", "--max_new_tokens 64", ("--max_new_tokens 64", "64 positions"), script="generate.py"),
    Case("an absurd number of samples", "--num_samples 1000000000000", ("--num_samples", "at most"),
         script="generate.py"),
    Case("temperature 0", "--temperature 0", ("--temperature 0.0", "above 0"), script="generate.py"),
    Case("top_p 2", "--top_p 2", ("--top_p 2.0", "at most 1"), script="generate.py"),
    Case("greedy samples", "--greedy --num_samples 2", ("--num_samples 2", "--greedy"), script="generate.py"),
    Case("chat with a model that cannot", "--chat", ("--chat", "no chat template"), script="generate.py"),
    Case("chat with two answers", "--chat --num_samples 2", ("--chat", "--num_samples 2"), script="generate.py"),
    Case("no prompts file", "--prompts_file p.txt", ("--prompts_file p.txt", "No such file"), script="generate.py"),
    Case("prompts file is a directory", "--prompts_file .", ("--prompts_file .", "directory"), script="generate.py"),
    Case("prompts file is not UTF-8", "--prompts_file p.txt", ("--prompts_file p.txt", "utf-8"),
         (file("p.txt", b"\xff\xfe"),), "generate.py"),
    Case("prompts file is empty", "--prompts_file p.txt", ("no prompt",), (file("p.txt", "\n"),), "generate.py"),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The check

BASE = {
    "train.py": {"--model": None, "--train_files": "good.txt", "--block_size": "16", "--max_steps": "2"},
    "perplexity.py": {"--model": None, "--files": "good.txt", "--block_size": "16"},
    "export.py": {"--model": None, "--out": "out"},
    "generate.py": {"--model": None, "--prompt": "the model", "--max_new_tokens": "4"},
}
INSTEAD = {
    "--dataset": "--train_files",
    "--mix": "--train_files",
    "--model_config": "--model",
    "--prompts_file": "--prompt",
}


def arguments(case: Case) -> list[str]:
    """Return the flags of a correct call that the case does not give itself, then the case's flags."""
    given = shlex.split(case.flags)
    taken = {flag for word in given for flag in (word.partition("=")[0], INSTEAD.get(word.partition("=")[0]))}
    base = {flag: value or str(good_model()) for flag, value in BASE[case.script].items() if flag not in taken}
    words = [word for flag in base.items() for word in flag]
    return words + [word for word in given if word != "--model="]


def listing(directory: Path) -> dict[str, tuple]:
    """Return the kinds, sizes and times of all files and directories, by name."""
    paths = [directory, *directory.rglob("*")]
    stats = {str(path): path.lstat() for path in paths}
    return {path: (stat.st_mode, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def check(case: Case, run: Callable[[str, list[str], Path], tuple[int, str, str]]) -> str | None:
    """Run the case in a new directory. Return the problems with the answer, or None."""
    with tempfile.TemporaryDirectory(prefix="case-") as name:
        directory = Path(name)
        directory.chmod(0o777 if case.as_nobody else 0o755)
        (directory / "good.txt").write_text(make_text(600), encoding="utf-8")
        for build in case.build:
            build(directory)
        before, argv = listing(directory), arguments(case)
        drop = case.as_nobody and os.geteuid() == 0
        if drop:
            os.setresuid(NOBODY, NOBODY, 0)
        try:
            code, out, err = run(case.script, argv, directory)
        finally:
            if drop:
                os.setresuid(0, 0, 0)
        after = listing(directory)
    lines = err.splitlines()
    several = case.name == "two numbers at once"  # all errors in flags are reported at once, one per line
    problems = [
        (code != 2, f"exit code {code}"),
        (len(lines) != 1 + several, f"{len(lines)} lines on stderr"),
        (not all(re.match(rf"{case.script}: error: \S", line) for line in lines), "stderr has another form"),
        ("Traceback" in out + err, "a traceback"),
        (any(word not in err for word in case.words), f"lacks {[word for word in case.words if word not in err]}"),
        (case.absent and case.absent in out + err, f"holds {case.absent}"),
        (before != after, f"wrote {sorted(dict(after.items() ^ before.items()))}"),
    ]
    found = [problem for holds, problem in problems if holds]
    return f"{case.name}: {', '.join(found)}\n{err[-3000:]}" if found else None

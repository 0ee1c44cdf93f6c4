"""The house rules: lines per file and function, imports between packages, and changes that touch one file."""

import ast
import json
import math
import shutil
from pathlib import Path

import processes
import pytest
from conftest import ROOT, load_shards, read_jsonl

SCRIPTS = {"train": 320, "data": 280, "model": 260, "generate": 280, "perplexity": 120, "export": 80}  # most lines
PACKAGES = {"cli": 0, "corpus": 1, "modeling": 1, "distributed": 2, "training": 3}  # each imports only lower ones
IMPORTS = {
    "train": {"data", "model", "generate", "perplexity"},
    "perplexity": {"data", "model"},
    "export": {"data", "perplexity"},
    "generate": {"model"},
}
FILES = [*(ROOT / f"{name}.py" for name in SCRIPTS), *(f for p in PACKAGES for f in sorted((ROOT / p).rglob("*.py")))]


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions_of(path: Path) -> list[tuple[str, ast.AST, int]]:
    found = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]  # fmt: skip
    return [(node.name, node, node.end_lineno - node.lineno + 1) for node in found]


def test_files_and_functions_are_short():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS.keys()
    lines = {name: lines_of(ROOT / f"{name}.py") for name in SCRIPTS}
    assert all(lines[name] <= most for name, most in SCRIPTS.items()), lines
    assert sum(lines.values()) <= 1300, lines
    long = {str(path): lines_of(path) for path in FILES if path.name != "train.py" and lines_of(path) > 300}
    assert not long
    long = {f"{path.name}:{name}": size for path in FILES for name, _, size in functions_of(path)
            if size > (110 if (path.name, name) == ("train.py", "train") else 60)}  # fmt: skip
    assert not long


def test_the_loop_is_plain():
    """`train` has no inner function, at most 50 lines before its only `while`, and one `for`: over samples."""
    (train,) = [node for name, node, _ in functions_of(ROOT / "train.py") if name == "train"]
    inner = [
        n for n in ast.walk(train) if isinstance(n, (ast.FunctionDef, ast.Lambda, ast.ClassDef)) and n is not train
    ]
    assert not inner
    (loop,) = [node for node in ast.walk(train) if isinstance(node, ast.While)]
    assert loop in train.body
    (samples,) = [node for node in ast.walk(train) if isinstance(node, ast.For)]
    assert "config.sample_prompt" in ast.unparse(samples.iter)
    docstring = train.body[0]
    assert loop.lineno - docstring.end_lineno - 1 <= 50


def imported_by(path: Path) -> set[str]:
    """Return the first part of the name of each module that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    ours = imported_by(path) & (SCRIPTS.keys() | PACKAGES.keys())
    package = path.parent.name if path.parent != ROOT else None
    if package:
        assert not ours & SCRIPTS.keys(), "a package imports one of the six files"
        above = {name for name in ours - {package} if PACKAGES[name] >= PACKAGES[package]}
        assert not above, "a package imports one that is not below it"
    else:
        assert ours & SCRIPTS.keys() <= IMPORTS.get(path.stem, set())


# ---------------------------------------------------------------------------------------------------------------------
# Changes


def replace(old: str, new: str):
    def change(text: str) -> str:
        assert text.count(old) == 1, old
        return text.replace(old, new)

    return change


LINE = "return least + (peak - least) * (num_steps - step) / max(1, num_steps - decay_step)"
ROOT_DECAY = "return peak * (1 - math.sqrt((step - decay_step) / (num_steps - decay_step)))"
CSV = '''

class Csv:
    """The scalars of a run as comma-separated values."""

    def __init__(self, run_dir, first_step):
        self._file = open(run_dir / "scalars.csv", "a")

    def log(self, step, split, values):
        self._file.writelines(f"{step},{split},{key},{value}\\n" for key, value in values.items())

    def text(self, step, tag, text):
        print(step, tag, len(text), file=self._file)

    def summary(self, hyperparameters, metrics):
        print("end", metrics["loss"], file=self._file)

    def close(self):
        self._file.close()


TRACKERS = {"csv": Csv, "tensorboard": TensorBoard}
'''
# The only file that each change touches.
CHANGES = {
    "schedule": ("train.py", replace(LINE, ROOT_DECAY)),
    "optimizer": ("train.py", replace(
        'torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, beta2), fused=True)',
        "torch.optim.NAdam(groups)")),
    "format": ("corpus/readers.py", replace('    ".txt": None,\n', '    ".txt": None,\n    ".rst": None,\n')),
    "tracker": ("training/log.py", replace('\n\nTRACKERS = {"tensorboard": TensorBoard}\n', CSV)),
}  # fmt: skip


@pytest.fixture(scope="module")
def changed(tmp_path_factory, model_dir, text_file):
    """Run a changed copy of the tree for each change, and an unchanged one. Return each run and its process."""
    started = {}
    for name, (file, change) in {**CHANGES, "nothing": ("train.py", str)}.items():
        root = tmp_path_factory.mktemp(name)
        for part in [*(f"{name}.py" for name in SCRIPTS), *PACKAGES]:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
            copy(ROOT / part, root / part)
        (root / file).write_text(change((root / file).read_text()))
        shutil.copy2(text_file, text := root / ("notes.rst" if name == "format" else "notes.txt"))
        flags = ["--model", model_dir, "--train_files", text, "--block_size", 32, "--max_steps", 6, "--warmup_steps", 2]
        flags += ["--log_every", 1, "--precision", "fp32", "--sample_prompt", "the"]
        started[name] = root, processes.start(root / "train.py", *flags, cwd=root, fresh=True)
    yield {name: (root / "runs/train", process) for name, (root, process) in started.items()}
    for _, process in started.values():
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nothing", *CHANGES])
def test_a_change_touches_one_file(changed, name):
    run, process = changed[name]
    assert process.wait(120) == 0, process.stderr
    records = [record for record in read_jsonl(run / "metrics.jsonl") if record["split"] == "train"]
    rates = [r["learning_rate"] for r in records]
    root = [0, 1e-4, *(2e-4 * (1 - math.sqrt(i / 4)) for i in range(4))]
    linear = [0, 1e-4, *(2e-4 * (1 - i / 4) for i in range(4))]
    assert rates == pytest.approx(root if name == "schedule" else linear)
    moments = load_shards(run / "checkpoints/step-000006/optimizer")
    assert any("mu_product" in key for key in moments) == (name == "optimizer")
    assert (run / "scalars.csv").exists() == (name == "tracker") and (run / "tensorboard").is_dir()
    if name == "tracker":
        text = (run / "scalars.csv").read_text()
        assert f"6,train,loss,{records[-1]['loss']}" in text and "\nend " in text and "sample: the" in text
    assert json.loads((run / "checkpoints/step-000006/state.json").read_text())["train_state"]["step"] == 6
    card = (run / "model/README.md").read_text()
    assert "AdamW" not in card and "linear" not in card  # else the changes would touch a second file
    if name == "optimizer":  # its moments mean nothing to AdamW
        flags = ("--config", run / "config.yaml", "--resume", "--max_steps", 8)
        again = processes.run("train.py", *flags, cwd=run.parent.parent)
        assert again.returncode == 2 and "--resume: optimizer was NAdam and is now AdamW" in again.stderr

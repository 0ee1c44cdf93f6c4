"""The core of the suite with the oldest supported transformers, and with the newest one of the index."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

CORE = ("modeling/test_model.py", "modeling/test_lora.py", "modeling/test_peft.py", "test_generate.py")
OLDEST = "5.17.0"


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [f"transformers=={OLDEST}", "transformers"], ids=["oldest", "newest"])
def test_core(wanted, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", str(tmp_path)]
    done = subprocess.run([*pip, wanted], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(tmp_path)
    shown = "import transformers; print(transformers.__file__, transformers.__version__)"
    options = {"env": environment, "cwd": ROOT, "capture_output": True, "text": True}
    path, version = subprocess.run([sys.executable, "-c", shown], check=True, **options).stdout.split()
    assert path.startswith(str(tmp_path)) and (version == OLDEST) == (OLDEST in wanted)
    suite = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(f"tests/{name}" for name in CORE)]
    done = subprocess.run(suite, **options)
    assert done.returncode == 0, done.stdout[-5000:]

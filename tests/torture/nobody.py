"""Run a script as ``python SCRIPT ARGS`` does, but without root's right to read and write everything.

python tests/torture/nobody.py train.py --config small.yaml
"""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv[:2] = [str(Path(__file__).resolve().parent.parent.parent / sys.argv[1])]
    if os.geteuid() == 0:
        os.setresuid(65534, 65534, 65534)
    runpy.run_path(sys.argv[0], run_name="__main__")

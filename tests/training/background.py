"""Run train.py with saves in the background, as with CUDA. From the second save on, a thread first waits SECONDS.

python background.py SECONDS --config ...
"""

import sys
import time
from itertools import count

import train
from cli.errors import run_script
from training import checkpoint
from training.checkpointer import Checkpointer

seconds, saves = float(sys.argv.pop(1)), count()


class BackgroundCheckpointer(Checkpointer):
    def __init__(self, *given):
        super().__init__(*given)
        self.in_background = True


class SlowShards(checkpoint._Shards):
    def write(self):
        time.sleep(seconds if next(saves) >= 2 else 0)  # a save has two groups
        super().write()


train.Checkpointer, checkpoint._Shards = BackgroundCheckpointer, SlowShards
run_script(train.main)

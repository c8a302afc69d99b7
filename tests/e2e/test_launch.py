"""How a rank ends: its work done, its exit code kept, and the interpreter not torn down."""

import subprocess
import sys

import pytest

RANK = """
import atexit, sys, time
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist
from llmkd.launch import leave

class Last:  # a global dies in finalization: what must not happen while gloo's threads run
    def __del__(self):
        print("finalized", flush=True)

kept = Last()
if {ranks}:
    dist.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
atexit.register(print, "exit function")
ThreadPoolExecutor().submit(lambda: (time.sleep(0.3), print("background work")))
print("said", end=" ")  # not flushed
leave({code})
"""


@pytest.mark.parametrize(("ranks", "code"), [(True, 0), (True, 3), (False, 0), (False, 3)])
def test_leave(tmp_path, ranks, code):
    text = RANK.format(ranks=ranks, code=code, file=tmp_path / "store")
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    lines = ["said background work", "exit function"] + ["finalized"] * (not ranks)
    assert done.stdout.splitlines() == lines

"""A program in two processes, or more, that talk by gloo, for the tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# gloo's threads must end before the interpreter does: one that asks for the interpreter's lock
# after that ends the process with "terminate called without an active exception".
PARTING = """
from torch import distributed
if distributed.is_initialized():
    distributed.destroy_process_group()
"""


def run_pair(program: str, *words: str, port: int, count: int = 2) -> None:
    """Run a Python program as rank 0 and rank 1 (to `count` - 1); all must end well."""
    base = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + (os.getpid() + port) % 20000),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    line = [sys.executable, "-c", program + PARTING, *words]
    ranks = [
        subprocess.Popen(
            line, env=base | {"RANK": str(i), "LOCAL_RANK": str(i)}, stderr=subprocess.PIPE
        )
        for i in range(count)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors.decode()[-2000:]
    finally:
        for process in ranks:  # the others wait for one that failed
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()

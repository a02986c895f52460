"""Runs a command under the pretend GPU: `python tests/pretend_gpu/run.py python -m pytest ...`.

Every Python process that the command starts sees the GPU. Environment:
    PRETEND_GPU_STREAMS=prompt   run work as it comes, not as late as possible
    PRETEND_GPU_DEVICES=2        how many devices there are
    PRETEND_GPU_LOG=FILE         append every operation to a file
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import build

HERE = Path(__file__).resolve().parent


def environment() -> dict[str, str]:
    """The variables under which a process sees the pretend GPU."""
    paths = [
        *map(str, (HERE / "startup", HERE.parent, build.ROOT)),
        *os.environ.get("PYTHONPATH", "").split(os.pathsep),
    ]
    return {
        **os.environ,
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "LD_PRELOAD": str(build.runtime_library()),
        "LD_LIBRARY_PATH": str(build.LIB),
        "TRITON_LIBCUDA_PATH": str(build.LIB),
        "TRITON_INTERPRET": "0",
        "PRETEND_GPU": str(build.LIB),
        "PRETEND_GPU_EXTENSION": str(build.EXTENSION),
    }


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    build.build()
    variables = environment()
    os.execvpe(sys.argv[1], sys.argv[1:], variables)

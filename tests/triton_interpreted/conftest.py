"""Triton interprets or compiles a whole process: these tests run where TRITON_INTERPRET=1 is set.

`tests/test_triton_kernels.py` starts such a process.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

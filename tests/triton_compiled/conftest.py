"""Triton interprets or compiles a whole process: these tests run where it compiles.

`tests/test_triton_compiled.py` starts such a process.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "0" else ["test_*.py"]

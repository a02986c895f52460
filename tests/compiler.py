"""The C++ compiler of the tests' own libraries, and flags for all of them, as setup.py takes them."""

import os
import shutil

CXX = os.environ.get("CXX") or shutil.which("g++")
MORE_FLAGS = tuple(os.environ.get("FUSED_ADAMW_CXX_FLAGS", "").split())

"""What lets a wheel that is built on a new system load on an old one (wheels/old_glibc.py)."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "wheels" / "old_glibc.py"
SYMBOLS = """\
    1: 0000000000086d20  2230 FUNC    GLOBAL DEFAULT   15 start@@GLIBC_2.34
    2: 0000000000086d20  2230 FUNC    GLOBAL DEFAULT   15 start@GLIBC_2.2.5
    3: 0000000000086d20  2230 FUNC    GLOBAL DEFAULT   15 start@GLIBC_2.12
    4: 0000000000086d20  2230 IFUNC   GLOBAL DEFAULT   15 copy@@GLIBC_2.14
    5: 0000000000086d20  2230 IFUNC   GLOBAL DEFAULT   15 copy@GLIBC_2.2.5
    6: 0000000000086d20  2230 FUNC    WEAK   DEFAULT   15 fresh@@GLIBC_2.32
    7: 0000000000086d20     4 OBJECT  GLOBAL DEFAULT   36 table@@GLIBC_2.33
    8: 0000000000086d20     4 OBJECT  GLOBAL DEFAULT   36 table@GLIBC_2.2.5
    9: 0000000000086d20  2230 FUNC    GLOBAL DEFAULT   15 seldom@@GLIBC_2.30
   10: 0000000000086d20  2230 FUNC    GLOBAL DEFAULT   15 seldom@GLIBC_2.29
"""


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def test_the_newest_version_that_is_old_enough_is_taken(script):
    """2.12 is newer than 2.2.5; what has no old version, or a default that is old, is left alone."""
    assert script["older_versions"](SYMBOLS) == {"start": "GLIBC_2.12"}


def test_functions_are_asked_for_where_they_were(script):
    home = script["former_home"]
    assert home("pthread_create", "libc.so.6") == "libpthread.so.0"
    assert home("dlopen", "libc.so.6") == "libdl.so.2"
    assert home("shm_open", "libc.so.6") == "librt.so.1"
    assert home("pow", "libm.so.6") == "libm.so.6"


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("readelf"), reason="about ELF, by binutils")
def test_a_library_that_is_linked_so_asks_for_old_versions_alone(tmp_path):
    """And it runs here: old versions are still in a new libc."""
    source = """
        #include <cmath>
        #include <memory>
        #include <sstream>
        #include <vector>
        #include <pthread.h>
        static void* work(void*) { return nullptr; }
        extern "C" double answer(double x, int n) {
          pthread_t thread;
          pthread_create(&thread, nullptr, work, nullptr);
          pthread_join(thread, nullptr);
          auto shared = std::make_shared<std::vector<double>>(n, std::pow(x, 3.0));
          std::ostringstream text;
          text << (*shared)[0] << shared.use_count();
          return std::stod(text.str());
        }
    """
    (tmp_path / "answer.cpp").write_text(source)
    command = [sys.executable, SCRIPT, tmp_path / "old"]
    flags = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    library = tmp_path / "answer.so"
    link = ["-Wl,--exclude-libs,ALL", "-o", library]
    compile_ = ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", tmp_path / "answer.cpp", *flags, *link]
    subprocess.run(compile_, check=True)
    asked = subprocess.run(["readelf", "-VW", library], check=True, capture_output=True, text=True).stdout
    versions = [(kind, number) for kind, number in re.findall(r"\b(GLIBC|GLIBCXX)_([\d.]+)", asked)]
    assert len(versions) > 3
    limits = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25)}
    assert all(tuple(map(int, number.split("."))) <= limits[kind] for kind, number in versions)
    run_it = f"import ctypes; f = ctypes.CDLL({str(library)!r}).answer; f.restype = ctypes.c_double\n"
    run_it += "print(f(ctypes.c_double(2.0), 5))"
    assert subprocess.check_output([sys.executable, "-c", run_it], text=True).strip() == "81.0"

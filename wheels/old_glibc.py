"""Let a link here yield a library that loads under an older glibc and libstdc++, as manylinux asks.

    python wheels/old_glibc.py FOLDER    # fills FOLDER, and prints what to add to LDFLAGS

A linker binds each function to its newest version in the C library that it finds. Where that version is too
new and an older one is still there, a stub that has the older one alone is put before the real library. What
libstdc++ and glibc gained later, and headers use unasked, is compiled from gained.cpp. auditwheel has the
last word on the result.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

GLIBC = (2, 28)
# Where functions were before glibc 2.34 took them all into libc.
FORMER_HOMES = {
    r"pthread_|sem_": "libpthread.so.0",
    r"dl[a-z]+$": "libdl.so.2",
    r"(shm|mq|timer|aio|lio)_": "librt.so.1",
}


def version(text: str) -> tuple[int, ...]:
    """GLIBC_2.2.5 as (2, 2, 5)."""
    return tuple(int(part) for part in text.removeprefix("GLIBC_").split("."))


def older_versions(symbols: str, limit: tuple[int, ...] = GLIBC) -> dict[str, str]:
    """Functions whose default version is above the limit, with their newest version that is not.

    Args:
        symbols: what `readelf --dyn-syms` prints.
        limit: the version of glibc that must do.
    """
    known: dict[str, list[str]] = {}
    too_new = set()
    for name, default, found in re.findall(r" I?FUNC .* (\w+)@(@?)(GLIBC_[\d.]+)$", symbols, re.M):
        if version(found) <= limit:
            known.setdefault(name, []).append(found)
        elif default:
            too_new.add(name)
    return {name: max(known[name], key=version) for name in sorted(too_new & known.keys())}


def former_home(function: str, library: str) -> str:
    """The library that had a function before glibc 2.34."""
    homes = (home for pattern, home in FORMER_HOMES.items() if re.match(pattern, function))
    return next(homes, library)


def write_stub(folder: Path, cc: str, library: str, functions: dict[str, str]) -> Path:
    """A library of that name which has these functions in these versions, and nothing behind them."""
    name = library.partition(".")[0]
    source, versions, stub = (folder / f"{name}.{end}" for end in ("s", "map", "so"))
    lines = [".text"]
    for index, (function, found) in enumerate(functions.items()):
        lines += [f".globl stub{index}", f".type stub{index}, %function", f"stub{index}:"]
        lines.append(f".symver stub{index}, {function}@@{found}")
    source.write_text("\n".join(lines) + '\n.section .note.GNU-stack,"",%progbits\n')
    nodes = sorted(set(functions.values()), key=version)
    versions.write_text("".join(f"{node} {{}};\n" for node in nodes))
    flags = ["-shared", "-nostdlib", f"-Wl,-soname,{library}", f"-Wl,--version-script={versions}"]
    subprocess.run([cc, *flags, str(source), "-o", str(stub)], check=True)
    return stub


def main(folder: Path) -> None:
    """Fill the folder, and print the flags."""
    cc, cxx = os.environ.get("CC", "cc"), os.environ.get("CXX", "c++")
    folder.mkdir(parents=True, exist_ok=True)
    stubs: dict[str, dict[str, str]] = {}
    for library in ("libc.so.6", "libm.so.6"):
        command = [cc, f"-print-file-name={library}"]
        path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        command = ["readelf", "--wide", "--dyn-syms", path]
        symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for function, found in older_versions(symbols).items():
            stubs.setdefault(former_home(function, library), {})[function] = found
    gained = folder / "gained.o"
    source = Path(__file__).with_name("gained.cpp")
    command = [cxx, "-std=c++17", "-O2", "-fPIC", "-Wall", "-c", str(source), "-o", str(gained)]
    subprocess.run(command, check=True)
    archive = gained.with_suffix(".a")  # an archive, as --exclude-libs hides what comes from one
    subprocess.run(["ar", "rcs", str(archive), str(gained)], check=True)
    print(archive, *(write_stub(folder, cc, library, functions) for library, functions in stubs.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

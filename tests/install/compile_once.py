"""A launcher for compilers (CMAKE_CXX_COMPILER_LAUNCHER) that reuses what was compiled before in another folder.

The matrix of installs builds the same sources against the same headers two dozen times, each time in another folder.
ccache would not help, since its keys contain the folders' names. Here the key of a file is its preprocessed text
without those names, together with the compiler and its flags.

    COMPILE_ONCE=folder compile_once.py c++ ... -c file.cpp
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

WITH_PATHS = ("-I", "-L", "-ffile-prefix-map", "/")


def main(command: list[str]) -> int:
    """Copies the object file of an earlier run to where the compiler would write it, or runs the compiler."""
    if "-c" not in command or "-o" not in command:
        return subprocess.run(command, check=False).returncode
    at = command.index("-o")
    target = Path(command[at + 1])
    preprocess = [word for word in (*command[:at], *command[at + 2 :]) if word != "-c"]
    text = subprocess.run([*preprocess, "-E", "-P"], stdout=subprocess.PIPE, text=True, check=False)
    if text.returncode:  # let the compiler say why
        return subprocess.run(command, check=False).returncode
    compiler = str(Path(shutil.which(command[0]) or command[0]).resolve())
    flags = [compiler] + [word for word in command if word.startswith("-") and not word.startswith(WITH_PATHS)]
    known_by = re.sub(r'"/[^"\n]*/(site-packages|csrc)/', r'"\1/', text.stdout) + "\0".join(flags)
    kept = Path(os.environ["COMPILE_ONCE"]) / f"{hashlib.sha256(known_by.encode()).hexdigest()}.o"
    if not kept.exists():
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
        unfinished = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(target, unfinished)
        unfinished.rename(kept)
    shutil.copyfile(kept, target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

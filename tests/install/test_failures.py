"""An install that lacks a part says so when it is made and later, and fails if that part is required."""

import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from environments import copy_sources, report, run

TOOLS = ("pip", "setuptools", "_distutils_hack", "wheel", "cmake", "ninja", "pybind11", "packaging")
NO_COMPILER = "configuring: No CMAKE_CXX_COMPILER could be found"
FIRST_OPS = """
import warnings, torch, rlhf_kernels
x = torch.ones(1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    rlhf_kernels.kl_penalty(x.double(), x.double())  # the reference's anyway
    assert not caught, caught[0].message
    for _ in range(2):
        rlhf_kernels.kl_penalty(x, x)
    rlhf_kernels.masked_gae(x[None], x[None], None)
for warning in caught:
    print(f"{warning.category.__name__} of {warning.filename}: {warning.message}")
"""


class Place:
    """A copy of the sources, and an environment with what a build needs, except what a test leaves out."""

    def __init__(self, folder: Path):
        self.folder, self.sources = folder, copy_sources(folder / "sources")
        run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], folder)
        self.python = folder / "env" / "bin" / "python"
        (self.site,) = (folder / "env").glob("lib/python*/site-packages")
        self.no_compiler = folder / "path"  # a path for tests, with nothing on it but Ninja
        self.no_compiler.mkdir()
        (self.no_compiler / "ninja").symlink_to(shutil.which("ninja", path=Path(sys.executable).parent))

    def give(self, *packages):
        """Links packages of the environment that runs the tests into this one."""
        for package in packages:
            for source in Path(torch.__file__).parents[1].glob(f"{package}*"):  # with its dist-info folder
                (self.site / source.name).symlink_to(source)

    def give_torch(self):
        """Makes everything in the tests' environment importable; what is in this one comes first."""
        (self.site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")

    def install(self, *, ok=True, **variables):
        """Installs without build isolation, which would need a registry. Returns all output."""
        command = [self.python, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
        return run([*command, self.sources], self.folder, ok=ok, **variables)

    def script(self, name, lines):
        """Writes a shell script and returns its path."""
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
        return str(path)

    def report(self):
        """What ``python -m rlhf_kernels`` says of this install."""
        return report(self.python, self.folder)


@pytest.fixture
def place(tmp_path):
    result = Place(tmp_path)
    result.give(*TOOLS)
    return result


def both_say(reason, remedy, said, later, part):
    """Asserts that the reason and the remedy are said while installing, and in the report."""
    assert f"rlhf-kernels: {part} was not built: {reason}" in said
    assert remedy in said
    lines = later.splitlines()
    at = next(at for at, line in enumerate(lines) if line.startswith(f"backend {part:>9}: "))
    assert lines[at].startswith(f"backend {part:>9}: not built: {reason}")
    assert lines[at + 1].startswith(f"       to have it: {remedy}")
    assert "installing again: pip install --force-reinstall --no-cache-dir, or uv " in later


def test_without_a_compiler_and_with_an_nvcc_that_is_broken(place):
    place.give_torch()
    broken = place.script("nvcc", "echo 'libcuda_oops.so: error: cannot open' >&2\nexit 1")
    said = place.install(PATH=str(place.no_compiler), RLHF_KERNELS_BUILD_CUDA="1", CUDACXX=broken)
    later = place.report()
    both_say(NO_COMPILER, "install a C++20 compiler (Debian, Ubuntu: apt install g++)", said, later, "cpu")
    reason = f"asking nvcc ({broken}) for the GPUs it knows: libcuda_oops.so: error: cannot open"
    both_say(reason, "install CUDA 12 or newer with its nvcc", said, later, "cuda")
    assert f"native module: not built: {NO_COMPILER}" in later

    warned = run([place.python, "-c", FIRST_OPS], place.folder).splitlines()
    assert len(warned) == 1, warned  # once, however many ops
    assert warned[0].startswith("UserWarning of <string>: rlhf_kernels: ops run on the reference")
    assert NO_COMPILER in warned[0]
    assert "install a C++20 compiler" in warned[0]
    assert run([place.python, "-c", FIRST_OPS], place.folder, RLHF_KERNELS_BACKEND="reference") == ""


@pytest.mark.long
def test_an_nvcc_that_compiles_nothing_is_quoted(place):
    place.give_torch()
    knows_gpus = "[ $1 = --list-gpu-arch ] && echo compute_80 && exit 0"
    broken = place.script("nvcc", f"{knows_gpus}\necho 'nvcc fatal   : no cicc here' >&2\nexit 1")
    said = place.install(PATH=str(place.no_compiler), RLHF_KERNELS_BUILD_CUDA="1", CUDACXX=broken)
    reason = f"trying nvcc ({broken}): nvcc fatal : no cicc here"
    both_say(reason, "install CUDA 12 or newer with its nvcc", said, place.report(), "cuda")


def test_without_torch_or_nvcc(place):
    said = place.install(RLHF_KERNELS_BUILD_CUDA="1", CUDA_HOME="/nowhere", PATH=str(place.no_compiler))
    place.give_torch()
    later = place.report()
    both_say("there is no torch to build with", "pip install 'torch>=2.10'", said, later, "cpu")
    both_say("there is no nvcc on the path, nor where CUDACXX or CUDA_HOME say", "install CUDA 12", said, later, "cuda")


@pytest.mark.long
@pytest.mark.parametrize(
    ("required", "variables", "reasons"),
    [
        ("cpu", {}, [f"asks for cpu, but {NO_COMPILER}"]),
        ("cpu,cuda", {"CUDACXX": "/no/nvcc"}, [f"asks for cpu, but {NO_COMPILER}"]),
        ("cuda", {"CUDACXX": "/no/nvcc"}, ["asks for cuda, but [Errno 2]"]),
        ("cuda", {"RLHF_KERNELS_BUILD_CUDA": "0"}, ["asks for cuda, but RLHF_KERNELS_BUILD_CUDA was 0"]),
        ("gpu", {}, [": has 'gpu', must be of cpu, cuda"]),
    ],
)  # fmt: skip
def test_what_is_required_and_missing_fails_the_install(place, required, variables, reasons):
    place.give_torch()
    said = place.install(ok=False, PATH=str(place.no_compiler), RLHF_KERNELS_REQUIRE=required, **variables)
    for reason in reasons:
        assert re.search(rf"^\s*rlhf-kernels: RLHF_KERNELS_REQUIRE ?{re.escape(reason)}", said, re.MULTILINE), said
    assert "Successfully installed" not in said
    assert "Traceback" not in said.split("rlhf-kernels: RLHF_KERNELS_REQUIRE")[-1]


@pytest.mark.long
def test_sources_that_hide_an_installed_package_say_so(place):
    place.give_torch()
    assert "holds sources, which were not built" in report(place.python, place.sources)
    place.install(PATH=str(place.no_compiler))
    said = report(place.python, place.sources)
    assert f"Python took the sources in {place.sources / 'rlhf_kernels'} for the package" in said
    assert str(place.site / "rlhf_kernels") in said
    assert "start Python in another folder" in said


@pytest.mark.long
def test_what_an_earlier_build_left_does_not_pass_for_this_one(place):
    place.give_torch()
    platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    left = place.sources / "build" / f"lib.{platform}" / "rlhf_kernels"
    left.mkdir(parents=True)
    for name in ("_ops.so", "_cuda.so"):
        (left / name).write_text("of yesterday")
    place.install(PATH=str(place.no_compiler))
    assert "backend       cpu: not built" in place.report()
    assert not list((place.site / "rlhf_kernels").glob("*.so"))


@pytest.mark.install
@pytest.mark.parametrize("required", ["", "cpu"])
def test_a_full_disk(place, required):
    place.give_torch()
    build = place.sources / "build"
    build.mkdir()
    command = f"mount -t tmpfs -o size=3m tmpfs {build} && {place.python} -m pip install -v --no-build-isolation "
    command += f"--no-deps --no-index {place.sources}"
    unshare = ["unshare", "--mount", "--map-root-user"] if os.getuid() else ["unshare", "--mount"]
    if "ok" not in run([*unshare, "sh", "-c", f"mount -t tmpfs none {build} && echo ok"], place.folder, ok=None):
        pytest.skip("a small disk is made with unshare and mount, which are not allowed here")
    said = run([*unshare, "sh", "-c", command], place.folder, ok=not required, RLHF_KERNELS_REQUIRE=required)
    assert "No space left on device" in said
    if required:
        assert "rlhf-kernels: RLHF_KERNELS_REQUIRE asks for cpu, but compiling: " in said
    else:
        both_say("compiling: ", "make room on the disk, then install again", said, place.report(), "cpu")


@pytest.mark.long
def test_a_backend_that_is_forced_and_missing_is_reported_and_refused(place):
    place.give_torch()
    place.install(PATH=str(place.no_compiler))
    said = run([place.python, "-m", "rlhf_kernels"], place.folder, ok=False, RLHF_KERNELS_BACKEND="cpu")
    assert f"backend       cpu: not built: {NO_COMPILER}" in said
    assert said.splitlines()[-1].startswith("RLHF_KERNELS_BACKEND asks for backend 'cpu', but not built: ")
    said = run([place.python, "-c", FIRST_OPS], place.folder, ok=False, RLHF_KERNELS_BACKEND="cpu")
    assert said.splitlines()[-1].startswith(
        "RuntimeError: RLHF_KERNELS_BACKEND asks for backend 'cpu', but not built: "
    )


@pytest.mark.long
@pytest.mark.parametrize("record", ["", "{"])
def test_a_record_that_cannot_be_read_is_said(place, record):
    place.give_torch()
    (place.sources / "rlhf_kernels" / "_build.json").write_text(record)
    said = report(place.python, place.sources)
    assert "backend       cpu: not built: unknown, as " in said
    assert "_build.json can't be read" in said


@pytest.mark.install
def test_another_compiler_is_taken_the_next_time(place):
    """First a compiler that compiles only what CMake tries, then one that never works, then the usual one."""
    place.give_torch()
    refuses = 'case "$*" in *csrc/*) echo "kernels: error: not for me" >&2; exit 1;; esac'
    picky = place.script("picky", f'{refuses}\nexec c++ "$@"')
    said = place.install(CXX=picky)
    both_say("compiling: kernels: error: not for me", "pip install -v shows all", said, place.report(), "cpu")
    assert "\nkernels: error: not for me" in said.replace("\n  ", "\n")  # pip indents some lines
    said = place.install(CXX="/bin/false")
    reason = 'configuring: The C++ compiler "/bin/false" is not able to compile a simple test program'
    both_say(reason, "have CXX, CXXFLAGS and LDFLAGS name what works", said, place.report(), "cpu")
    place.install(RLHF_KERNELS_REQUIRE="cpu")
    assert "backend       cpu: available" in place.report()
    place.install(ok=False, CXX="/bin/false", RLHF_KERNELS_REQUIRE="cpu")


@pytest.mark.install
def test_what_was_missing_is_found_by_the_next_install(place):
    place.give_torch()
    place.install(PATH=str(place.no_compiler))
    said = place.install(RLHF_KERNELS_REQUIRE="cpu")
    assert "Successfully installed" in said
    assert "backend       cpu: available" in place.report()

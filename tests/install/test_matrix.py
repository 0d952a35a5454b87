"""Every way in which people install from source, in new environments. Each must end with an install that has kernels.

Takes half an hour and gigabytes of torch: ``make test-install``. "newest" is the torch that the registry gives.
"""

import itertools
import sys
from pathlib import Path

import pytest
from environments import BUILD_TOOLS, ROOT, assert_has_kernels, copy_sources, environment, run, torch_of, uv

pytestmark = [pytest.mark.install, pytest.mark.timeout(3600)]

TORCHES = {"2.13.0": "torch==2.13.0", "newest": "torch"}


@pytest.fixture(scope="session")
def options(tmp_path_factory):
    """The environment variables of every build."""
    launcher = Path(__file__).with_name("compile_once.py")
    return {
        "RLHF_KERNELS_BUILD_CUDA": "0",
        "RLHF_KERNELS_REQUIRE": "cpu",
        "CMAKE_CXX_COMPILER_LAUNCHER": f"{sys.executable};{launcher}",
        "COMPILE_ONCE": str(tmp_path_factory.mktemp("compiled")),
    }


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    python = environment(folder / "env", "build", *BUILD_TOOLS)
    run([python, "-m", "build", "--sdist", "--outdir", folder, copy_sources(folder / "sources")], folder)
    (path,) = folder.glob("rlhf_kernels-*.tar.gz")
    return path


@pytest.fixture(scope="session", params=TORCHES)
def wheel(request, options, tmp_path_factory):
    """A wheel that was built with one torch. It is then installed beside every torch."""
    folder = tmp_path_factory.mktemp("wheel")
    python = environment(folder / "env", TORCHES[request.param], *BUILD_TOOLS)
    command = [python, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder]
    run([*command, copy_sources(folder / "sources")], folder, **options)
    (path,) = folder.glob("rlhf_kernels-*.whl")
    return path


@pytest.fixture
def install(options):
    """A function that installs in an environment, and asserts that it has kernels afterwards."""

    def install(installer, python, isolated, *what):
        command = {
            "pip": [python, "-m", "pip", "install"],
            "uv": [uv(), "pip", "install", "--python", python],
        }[installer]
        folder, torch = python.parents[2], torch_of(python)
        run([*command, *(() if isolated else ("--no-build-isolation",)), *what], folder, **options)
        assert torch in ([], torch_of(python))
        assert_has_kernels(python, folder)

    return install


@pytest.mark.parametrize(
    ("torch", "installer", "isolated", "source"),
    list(itertools.product(TORCHES, ("pip", "uv"), (True, False), (".", "-e .", "sdist"))),
)
def test_from_source(torch, installer, isolated, source, install, sdist, tmp_path):
    python = environment(tmp_path / "env", TORCHES[torch], *(() if isolated else BUILD_TOOLS))
    what = [sdist] if source == "sdist" else [*source.split()[:-1], copy_sources(tmp_path / "sources")]
    install(installer, python, isolated, *what)


@pytest.mark.parametrize(("torch", "installer"), list(itertools.product(TORCHES, ("pip", "uv"))))
def test_a_wheel(torch, installer, install, wheel, tmp_path):
    install(installer, environment(tmp_path / "env", TORCHES[torch]), True, wheel)


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_torch_comes_with_it(installer, install, sdist, tmp_path):
    install(installer, environment(tmp_path / "env"), True, sdist)


def test_from_a_repository(install, tmp_path):
    python = environment(tmp_path / "env", "torch==2.13.0")
    install("pip", python, True, f"git+file://{ROOT}")


def test_a_strict_editable_install(install, tmp_path):
    python = environment(tmp_path / "env", "torch==2.13.0", *BUILD_TOOLS)
    strict = ["--config-settings", "editable_mode=strict", "-e", copy_sources(tmp_path / "sources")]
    install("pip", python, False, *strict)

"""wheels/, which ``make wheel`` runs: the libraries that it links with, and what it checks."""

import ctypes
import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("auditwheel")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="manylinux is for Linux")

FOLDER = Path(__file__).parents[2] / "wheels"


def module(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    loaded = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


stand_ins = module("stand_ins")
make = module("make")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stand_ins")
    stand_ins.Folder(path, "c++").make()
    return path


def link(source, folder, path):
    (path / "library.cpp").write_text(source)
    subprocess.run(
        ["c++", "-std=c++17", "-O1", "-fPIC", "-shared", f"-L{folder}", "-Wl,--exclude-libs,ALL", path / "library.cpp",
         "-o", path / "library.so"],
        check=True,
    )  # fmt: skip
    return path / "library.so"


# exp has a newer version since glibc 2.29, and string streams a newer constructor since GCC 9.
USES_BOTH = """
#include <cmath>
#include <sstream>
#include <stdexcept>
extern "C" double exponential(double x) { return std::exp(x); }
extern "C" void refuse(int number) {
  std::ostringstream text;
  text << "no " << number;
  throw std::invalid_argument(text.str());
}
"""


def test_what_is_linked_asks_for_the_policys_versions_and_runs_here(folder, tmp_path):
    library = link(USES_BOTH, folder, tmp_path)
    allowed = stand_ins.allowed_versions(stand_ins.machine_of(library))
    listed = subprocess.run(["readelf", "-VW", library], capture_output=True, text=True, check=True).stdout
    asked = set(re.findall(r"Name: ([A-Z]+_[\d.]+)", listed))
    assert {"GLIBC", "GLIBCXX"} <= {version.partition("_")[0] for version in asked}
    assert asked <= allowed
    assert stand_ins.strangers(library) == []
    function = ctypes.CDLL(str(library)).exponential
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double]
    assert function(1.0) == pytest.approx(2.718281828459045, abs=1e-15)


def test_an_exception_crosses_into_a_library_that_is_linked_as_usual(folder, tmp_path):
    link(USES_BOTH, folder, tmp_path)
    (tmp_path / "caller.cpp").write_text(
        "#include <iostream>\n#include <stdexcept>\n"
        'extern "C" void refuse(int);\n'
        "int main() { try { refuse(7); } catch (const std::invalid_argument& e) { std::cout << e.what(); } }\n"
    )
    program = tmp_path / "caller"
    subprocess.run(
        ["c++", tmp_path / "caller.cpp", tmp_path / "library.so", f"-Wl,-rpath,{tmp_path}", "-o", program], check=True
    )
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == "no 7"


def test_data_keeps_its_kind_and_size(folder):
    allowed = stand_ins.allowed_versions(stand_ins.machine_of(folder / "libc.so.6"))
    for name in ("libc.so.6", "libstdc++.so.6"):
        own, _ = stand_ins.newest(stand_ins.definitions(stand_ins.Folder(folder, "c++").own(name)), allowed)
        wanted = {symbol.name: symbol for symbol in own if symbol.kind != "STT_FUNC"}
        made = {symbol.name: symbol for symbol in stand_ins.definitions(folder / name) if symbol.kind != "STT_FUNC"}
        assert {name: symbol for name, symbol in wanted.items() if symbol.size} == made
    assert made["_ZTVSt13runtime_error"].size > 0
    assert made["_ZSt11__once_call"].kind == "STT_TLS"


def test_a_symbol_that_the_policy_lacks_is_named(folder, tmp_path):
    own = stand_ins.Folder(folder, "c++").own("libc.so.6")
    chosen, newer = stand_ins.newest(stand_ins.definitions(own), stand_ins.allowed_versions(stand_ins.machine_of(own)))
    too_new = sorted(name for name in newer - {symbol.name for symbol in chosen} if re.fullmatch("[a-z0-9]+", name))
    if not too_new:
        pytest.skip("this system's C library is as old as the policy's")
    calls = {too_new[0], "aoti_torch_something", "PySomething"}
    declared = "".join(f'extern "C" void {name}();\n' for name in calls)
    library = link(
        declared + f'extern "C" void all() {{ {"".join(f"{name}();" for name in calls)} }}', folder, tmp_path
    )
    assert stand_ins.strangers(library) == [too_new[0]]


def test_a_python_that_does_not_run_is_passed_over(monkeypatch, tmp_path, capsys):
    here = f"3.{sys.version_info[1]}"
    shim = tmp_path / "shims" / f"python{here}"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    real = tmp_path / "pyenv" / "versions" / f"{here}.1" / "bin" / f"python{here}"
    real.parent.mkdir(parents=True)
    real.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(shim.parent))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.delenv("PYTHON", raising=False)
    monkeypatch.setattr(sys, "executable", str(shim))
    assert make.version_of(str(shim)) is None
    monkeypatch.setattr(make, "PYTHONS", [here, "3.99"])
    assert make.found_pythons() == {here: str(real)}
    assert "Python 3.99: not here, so no wheel for it" in capsys.readouterr().out


def test_a_wheel_without_a_part_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_KERNELS_BUILD_CUDA", "1")
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        archive.writestr("rlhf_kernels/_ops.so", "")
    with pytest.raises(SystemExit, match=r"some.whl has \['_ops'\], must have \['_C', '_cuda', '_ops'\]"):
        make.check(tmp_path / "some.whl", tmp_path / "unpacked")

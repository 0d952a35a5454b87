"""The source distribution has all that a build needs, and no more."""

import sys
import tarfile

from environments import ROOT, copy_sources, run

NEEDED = ("csrc/", "rlhf_kernels/", "rlhf/")
BESIDE = {"CMakeLists.txt", "MANIFEST.in", "README.md", "build_backend.py", "pyproject.toml", "setup.py"}
MADE = {"PKG-INFO", "setup.cfg"}


def test_the_files_of_the_sdist(tmp_path):
    sources = copy_sources(tmp_path / "sources")
    (sources / "rlhf_kernels" / "_ops.so").write_text("built here once")
    (sources / "rlhf_kernels" / "_build.json").write_text("{}")
    code = "import build_backend; build_backend.build_sdist('..')"
    run([sys.executable, "-c", code], sources)
    (path,) = tmp_path.glob("rlhf_kernels-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    names = {name for name in names if not name.startswith("rlhf_kernels.egg-info/")}
    tracked = set(
        filter(None, run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).split("\n"))
    )
    needed = {name for name in tracked if name.startswith(NEEDED) and (ROOT / name).is_file()}
    assert names == needed | BESIDE | MADE

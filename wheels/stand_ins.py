"""Stand-ins for the system's libraries, so that what is linked with them runs on an older system than this one.

A compiler binds ``exp`` to the newest version that the libraries beside it have, and the result then asks for a system
as new. A stand-in has a library's name and the symbols that a manylinux policy allows, each in the newest version that
it allows, and no code: what is linked with it binds to those, and finds the system's own library when it runs. Names
and versions come from the compiler's own libraries and from auditwheel's policy.

What the older libstdc++ lacks comes from the compiler's static one, behind the stand-in. Only such parts: exceptions
are thrown into torch, so that their globals must be those of the one libstdc++ that torch uses too. What the older C
library lacks stays undefined. The linker can't complain of it, as torch's symbols are undefined until torch is there:
:func:`strangers` names it afterwards.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from elftools.elf.elffile import ELFFile

POLICY = "manylinux_2_28"

# Where symbols were before glibc 2.34 took these libraries into libc.so.6. A loader looks for a symbol in every library
# that is loaded, so that all of a name's kin can go to one.
FORMER_LIBRARIES = {
    "libpthread.so.0": r"_*(pthread|sem|mtx|cnd|thrd|tss|call_once)",
    "libdl.so.2": r"dl",
    "librt.so.1": r"_*(aio|lio|mq|shm|timer)_",
}

# What the old C library lacks and the static libstdc++ reads: whether there is one thread alone. No is always right.
COMPATIBILITY = """
.section .rodata
.globl __libc_single_threaded
.hidden __libc_single_threaded
.type __libc_single_threaded, %object
.size __libc_single_threaded, 1
__libc_single_threaded: .byte 0
.section .note.GNU-stack, "", %progbits
"""

# Undefined without a version, but not strange: torch's stable shim, its copy of Sleef, and Python.
OF_THE_PROCESS = ("aoti_torch_", "torch_", "Sleef_", "Py", "_Py")


class Symbol(NamedTuple):
    """A symbol of a stand-in."""

    name: str
    version: str
    kind: str  # STT_FUNC, STT_OBJECT or STT_TLS
    size: int


def allowed_versions(machine: str) -> set[str]:
    """The symbol versions of the policy, such as GLIBC_2.28.

    Raises:
        SystemExit: the policy is not one for this machine.
    """
    policies = json.loads((resources.files("auditwheel.policy") / "manylinux-policy.json").read_text())
    limits = next(policy["symbol_versions"] for policy in policies if policy["name"] == POLICY)
    if machine not in limits:
        raise SystemExit(f"{POLICY} is for {', '.join(limits)}, not for {machine}")
    return {f"{prefix}_{version}" for prefix, versions in limits[machine].items() for version in versions}


def machine_of(library: Path) -> str:
    """The machine that a library is for, as manylinux names it."""
    with library.open("rb") as file:
        machine = ELFFile(file).header["e_machine"]
    return str(machine).removeprefix("EM_").lower()


def age(version: str) -> tuple[int, ...]:
    """Sorts versions of one prefix, oldest first."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("_")[2]))


def definitions(library: Path) -> Iterator[Symbol]:
    """Every versioned symbol that a library defines, once per version."""
    with library.open("rb") as file:
        elf = ELFFile(file)
        names = {
            version["vd_ndx"]: next(iter(parts)).name
            for version, parts in elf.get_section_by_name(".gnu.version_d").iter_versions()
        }
        versions = elf.get_section_by_name(".gnu.version")
        for number, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
            index = versions.get_symbol(number)["ndx"]
            if symbol["st_shndx"] in ("SHN_UNDEF", "SHN_ABS") or not isinstance(index, int):
                continue  # the absolute ones are the versions themselves
            kind = symbol["st_info"]["type"]
            if kind not in ("STT_OBJECT", "STT_TLS"):
                kind = "STT_FUNC"  # one that is chosen as the library loads is a function too
            # The topmost bit says that this version is not the one to link with.
            yield Symbol(symbol.name, names.get(index & 0x7FFF, ""), kind, symbol["st_size"])


def newest(symbols: Iterator[Symbol], allowed: set[str]) -> tuple[list[Symbol], set[str]]:
    """Each symbol in its newest allowed version; and the names of those that have a newer one."""
    chosen: dict[str, Symbol] = {}
    newer = set()
    for symbol in symbols:
        if symbol.version not in allowed:
            newer.add(symbol.name)
        elif symbol.name not in chosen or age(symbol.version) > age(chosen[symbol.name].version):
            chosen[symbol.name] = symbol
    return list(chosen.values()), newer


def assembly(symbols: list[Symbol]) -> str:
    """What defines them, of their kinds and sizes. The labels are ours, as a version is a part of no label."""
    sections = {
        "STT_FUNC": ('.section .text,"ax",%progbits', "%function"),
        "STT_OBJECT": ('.section .bss,"aw",%nobits', "%object"),
        "STT_TLS": ('.section .tbss,"awT",%nobits', "%tls_object"),
    }
    lines = []
    for number, (name, version, kind, size) in enumerate(symbols):
        section, type_name = sections[kind]
        label = f"stand_in_{number}"
        room = 1 if kind == "STT_FUNC" else max(1, size)
        lines += [section, ".balign 16", f".globl {label}", f".type {label}, {type_name}", f"{label}: .zero {room}"]
        lines += [f".size {label}, {room}", f".symver {label}, {name}@@{version}"]
    return "\n".join([*lines, '.section .note.GNU-stack, "", %progbits', ""])


class Folder:
    """Makes the stand-ins of one compiler's libraries."""

    def __init__(self, path: Path, compiler: str):
        self.path, self.compiler = path.resolve(), compiler
        self.path.mkdir(parents=True, exist_ok=True)

    def make(self) -> None:
        """Fills the folder: a compiler that is given it with ``-L`` finds these before its own."""
        libc = self.own("libc.so.6")
        allowed = allowed_versions(machine_of(libc))
        of_libc, newer = newest(definitions(libc), allowed)
        moved = [symbol for symbol in of_libc if symbol.name in newer]
        for soname, kin in FORMER_LIBRARIES.items():
            self.library(soname, [symbol for symbol in moved if re.match(kin, symbol.name)])
            self.script(soname, soname)
        # What has come from yet another library has no stand-in; the C library's own names have always been its own.
        self.library("libc.so.6", [s for s in of_libc if s.name not in newer or s.name == "__libc_start_main"])
        for soname in ("libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", self.loader()):
            self.library(soname, newest(definitions(self.own(soname)), allowed)[0])

        self.archive("libcompatibility.a", COMPATIBILITY)
        # As the compiler's own scripts of these names.
        late = " ".join(str(self.path / name) for name in (*FORMER_LIBRARIES, self.loader()))
        self.script("libc.so", "libc.so.6", "libcompatibility.a", self.own("libc_nonshared.a"), f"AS_NEEDED ( {late} )")
        self.script("libm.so", "libm.so.6")
        self.script("libgcc_s.so", "libgcc_s.so.1", self.own("libgcc.a"))
        self.script("libstdc++.so", "libstdc++.so.6", self.own("libstdc++.a"))

    def own(self, name: str) -> Path:
        """The compiler's own file of this name.

        Raises:
            SystemExit: it has none.
        """
        path = Path(self.run("-print-file-name=" + name).strip())
        if not path.is_absolute():
            raise SystemExit(f"{self.compiler} has no {name}")
        return path.resolve()

    def loader(self) -> str:
        """The name of the dynamic loader, which the C library needs."""
        return next(name for name in needed(self.own("libc.so.6")) if name.startswith("ld-"))

    def library(self, soname: str, symbols: list[Symbol]) -> None:
        """Writes a shared library with these symbols and no code."""
        source, script = self.path / f"{soname}.s", self.path / f"{soname}.versions"
        source.write_text(assembly(symbols))
        versions = sorted({symbol.version for symbol in symbols})
        script.write_text("".join(f"{version} {{ local: stand_in_*; }};\n" for version in versions[:1])
                          + "".join(f"{version} {{ }};\n" for version in versions[1:]))  # fmt: skip
        self.run("-nostdlib", "-shared", f"-Wl,-soname,{soname}", f"-Wl,--version-script={script}", str(source),
                 "-o", str(self.path / soname))  # fmt: skip

    def archive(self, name: str, source: str) -> None:
        """Writes a static library of one object."""
        code, member = self.path / f"{name}.s", self.path / f"{name}.o"
        code.write_text(source)
        self.run("-c", str(code), "-o", str(member))
        (self.path / name).unlink(missing_ok=True)
        subprocess.run([self.run("-print-prog-name=ar").strip(), "rcs", self.path / name, member], check=True)

    def script(self, name: str, *parts: str | Path) -> None:
        """Writes what the linker reads for ``-l``: a group of files, this folder's unless they have one."""
        name = re.sub(r"\.so\.\d+$", ".so", name)
        paths = [str(part) if "(" in str(part) else str(self.path / part) for part in parts]
        (self.path / name).write_text(f"GROUP ( {' '.join(paths)} )\n")

    def run(self, *arguments: str) -> str:
        """Runs the compiler and returns what it says."""
        return subprocess.run([self.compiler, *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout


def strangers(library: Path) -> list[str]:
    """What a library wants of nobody: symbols without a version that are none of torch's nor of Python's.

    A symbol that a stand-in leaves out, as no old enough version of it exists, is among them.
    """
    with library.open("rb") as file:
        elf = ELFFile(file)
        versions = elf.get_section_by_name(".gnu.version")
        return [
            symbol.name
            for number, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols())
            if symbol["st_shndx"] == "SHN_UNDEF"
            and symbol["st_info"]["bind"] == "STB_GLOBAL"
            and symbol.name
            and (versions is None or not isinstance(versions.get_symbol(number)["ndx"], int))
            and not symbol.name.startswith(OF_THE_PROCESS)
        ]


def needed(library: Path) -> list[str]:
    """The libraries that one asks for."""
    with library.open("rb") as file:
        return [tag.needed for tag in ELFFile(file).get_section_by_name(".dynamic").iter_tags("DT_NEEDED")]

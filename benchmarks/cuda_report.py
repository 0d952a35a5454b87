"""What nvcc made of the CUDA kernels: registers, stack, spills and shared memory of each, for every architecture.

Also looks for 128-bit loads in the machine code, and at the symbols that the library takes from other libraries. Needs
no GPU. Exits with 1 if a kernel spills or keeps anything in local memory, if a streaming kernel has no 128-bit load, if
a symbol comes neither from the system nor from torch's stable shim, or if the CUDA runtime can be seen from outside.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

STREAMING = ("sums_kernel", "gradient_kernel", "sequence_kernel", "whiten_kernel", "loss_kernel", "penalty_kernel",
             "rewards_kernel")  # fmt: skip
SHIMS = ("torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h")


def main() -> int:
    """Reads the log and the library of a build, and prints what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="build.log of the CUDA part")
    parser.add_argument("library", type=Path, help="_cuda.so")
    arguments = parser.parse_args()
    console = Console(width=130)
    kernels = compiled(arguments.log.read_text())
    if not kernels:
        raise SystemExit(f"{arguments.log}: no kernel was compiled in this build; remove its folder, and build again")
    table = Table("kernel", "architecture", "registers", "stack B", "spilled B", "shared B")
    for (name, architecture), numbers in sorted(kernels.items()):
        table.add_row(name, architecture, *(str(n) for n in numbers))
    console.print(table)
    complaints = [
        f"{name} for {architecture}: {stack} bytes of stack, {spills} spilled"
        for (name, architecture), (_, stack, spills, _) in kernels.items()
        if stack or spills
    ]
    complaints += narrow(arguments.library, console)
    complaints += strangers(arguments.library, console)
    complaints += exports(arguments.library, console)
    size = arguments.library.stat().st_size / 2**20
    console.print(f"{len(kernels)} kernels compiled, {size:.1f} MiB in all; {len(complaints) or 'no'} complaints")
    for complaint in complaints:
        console.print(complaint)
    return bool(complaints)


def readable(symbols: list[str]) -> list[str]:
    """Kernels' names without namespaces and parameters; template arguments stay."""
    if not symbols:
        return []
    plain = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = []
    for line in plain.splitlines():
        name, arguments = re.search(r"(\w+_kernel)\b(?:<(.*)>\()?", line).groups()
        for number, dtype in enumerate(("float32", "bfloat16", "float16")):
            arguments = (arguments or "").replace(f"(rlhf_kernels::Dtype){number}", dtype)
        arguments = arguments.replace("rlhf_kernels::cuda::(anonymous namespace)::", "")
        names.append(f"{name}<{arguments}>" if arguments else name)
    return names


def compiled(log: str) -> dict[tuple[str, str], tuple[int, int, int, int]]:
    """Registers, stack, spilled bytes and shared memory, by kernel and architecture, from what ptxas -v says."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers(?:.*?, (\d+) bytes smem)?",
        re.DOTALL,
    )
    found = [pattern.match(log, at.start()) for at in re.finditer("Compiling entry function", log)]
    matches = [match for match in found if match]
    names = readable([match[1] for match in matches])
    return {
        (name, match[2]): (int(match[6]), int(match[3]), int(match[4]) + int(match[5]), int(match[7] or 0))
        for name, match in zip(names, matches, strict=True)
    }


def narrow(library: Path, console: Console) -> list[str]:
    """Streaming kernels without a load of 128 bits."""
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else None
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(beside))
    if tool is None:
        console.print("no cuobjdump (CUDA's toolkit and triton have one): the machine code was not looked at")
        return []
    code = subprocess.run([tool, "-sass", str(library)], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"Function : (\w+)", code)[1:]
    names = readable(functions[::2])
    loads = [
        (name, len(re.findall(r"LDG\.E\S*\.128", body))) for name, body in zip(names, functions[1::2], strict=True)
    ]
    streaming = [(name, count) for name, count in loads if name.startswith(STREAMING)]
    console.print(f"128-bit loads: {sum(count > 0 for _, count in streaming)} of {len(streaming)} streaming kernels")
    return [f"{name} has no 128-bit load" for name, count in streaming if count == 0]


def strangers(library: Path, console: Console) -> list[str]:
    """Undefined symbols not in torch's stable shim and without a version; those of the C and C++ libraries have one."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    undefined = [line.split()[-1] for line in listed.stdout.splitlines() if line.split()[-2] == "U"]
    include = Path(torch.__file__).parent / "include"
    shims = set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", "".join((include / name).read_text() for name in SHIMS)))
    of_torch = [name for name in undefined if name in shims]
    console.print(
        f"undefined symbols: {len(of_torch)} of torch's stable shim, {len(undefined) - len(of_torch)} of the system"
    )
    return [f"{name} is none of torch's stable shim" for name in undefined if "@" not in name and name not in shims]


def exports(library: Path, console: Console) -> list[str]:
    """Exported symbols of the CUDA runtime inside. Other libraries could bind to them, or they to other libraries'."""
    listed = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    seen = [name for name in symbols if re.match(r"_*(cu|cuda|nv|fatbin)", name)]
    console.print(f"symbols offered: {len(symbols)}, {len(seen) or 'none'} of the CUDA runtime")
    return [f"{name} of the CUDA runtime is to be seen from outside" for name in seen]


if __name__ == "__main__":
    sys.exit(main())

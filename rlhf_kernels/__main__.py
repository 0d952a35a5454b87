"""``python -m rlhf_kernels``: what this install has, and why the rest is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys

import torch

import rlhf_kernels
from rlhf_kernels import install
from rlhf_kernels.backends import BACKENDS, isa, missing, refused


def main() -> int:
    """Prints the backends and the native module's build; returns 1 if the backend that is forced is not there."""
    print(f"rlhf-kernels {rlhf_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"in {install.PACKAGE}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can see"
    print(f"GPU: {gpu}")
    remedies = {name: install.remedy(name) for name in BACKENDS if missing(name)}
    for name in BACKENDS:
        print(f"backend {name:>9}: {missing(name) or ('available' if name != 'cpu' else f'available, with {isa()}')}")
        if remedies.get(name):
            print(f"{'to have it':>17}: {remedies[name]}")
    print("native module:", native_module())
    if any(remedies.values()):
        print(f"installing again: {install.AGAIN}, or what was built before may come back")
    if refused() is not None:
        print(refused())
    elif os.environ.get("RLHF_KERNELS_BACKEND"):
        print(f"RLHF_KERNELS_BACKEND forces {os.environ['RLHF_KERNELS_BACKEND']}")
    return int(refused() is not None)


def native_module() -> str:
    """The build of ``_C``, or why it is missing."""
    if importlib.util.find_spec("rlhf_kernels._C") is None:
        return f"{install.absent('cpu')}; sequence packing runs in Python"
    try:
        from rlhf_kernels import _C
    except ImportError as error:
        return f"does not load ({error}); sequence packing runs in Python"
    info = _C.build_info() | {"headers": f"of torch {install.BUILT_WITH}"}
    return ", ".join(f"{key} {value}" for key, value in info.items())


if __name__ == "__main__":
    sys.exit(main())

"""The command ``rlhf``, also as ``python -m rlhf``. If only the ops are installed, it says what to install as well."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from rlhf import interrupts

TRAIN = {"accelerate", "datasets", "jsonargparse", "matplotlib", "peft", "psutil", "rich", "safetensors", "tensorboard",
         "tokenizers", "transformers", "yaml"}  # fmt: skip
LABEL = {"fastapi", "jinja2", "uvicorn"}
EVAL = {"lm_eval"}
EXTRAS = {
    package: extra for extra, packages in (("train", TRAIN), ("label", LABEL), ("eval", EVAL)) for package in packages
}


def main() -> int:
    """Runs the command line. Returns status 2 if a package of an extra is missing."""
    interrupts.hold_off()  # until a stage begins: from then on the command handles Ctrl-C itself
    try:
        from rlhf import cli

        return cli.main()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        print(
            f"rlhf: error: {package} is not installed: pip install 'rlhf-kernels[{EXTRAS[package]}]'", file=sys.stderr
        )
        return 2


def start() -> NoReturn:
    """Runs the command line and ends the program."""
    status = main()
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        # A thread of gloo that wants the GIL, to let go of a tensor, while Python is taken down aborts the process.
        # Such threads can't be joined: torch's caches keep the group to the end.
        if status == 0:
            distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    start()

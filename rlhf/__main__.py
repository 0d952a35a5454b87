"""The command ``rlhf``, also as ``python -m rlhf``. In an install of the ops alone it says what the trainer needs."""

from __future__ import annotations

import sys

from rlhf import interrupts

TRAIN = {"accelerate", "datasets", "jsonargparse", "matplotlib", "rich", "safetensors", "tensorboard", "tokenizers",
         "transformers", "yaml"}  # fmt: skip


def main() -> int:
    """Runs the command line; status 2 where a package of the extra ``train`` is missing."""
    interrupts.hold_off()  # until a stage begins, which says more
    try:
        from rlhf import cli

        return cli.main()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in TRAIN:
            raise
        print(f"rlhf: error: {package} is not installed: pip install 'rlhf-kernels[train]'", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

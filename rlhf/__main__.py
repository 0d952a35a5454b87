"""The command ``rlhf``, also as ``python -m rlhf``. In an install of the ops alone it says what the trainer needs."""

from __future__ import annotations

import sys

TRAIN = {"accelerate", "datasets", "jsonargparse", "matplotlib", "rich", "safetensors", "tensorboard", "tokenizers",
         "transformers", "yaml"}  # fmt: skip


def main() -> int:
    """Runs the command line; status 2 where a package of the extra ``train`` is missing."""
    try:
        from rlhf import cli

        return cli.main()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in TRAIN:
            raise
        print(f"rlhf: error: {package} is not installed: pip install 'rlhf-kernels[train]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while libraries are still being imported; a stage says more
        print("rlhf: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

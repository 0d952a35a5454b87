"""A function running in a process of its own while the experiment goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from rlhf.checkpoints import RunError
from rlhf.training import console, quiet_libraries


class Background:
    """Starts ``function(*args, **options)`` on one core, quietly. Its process ends when its parent ends or dies."""

    def __init__(self, function: Callable[..., Any], *args: Any, **options: Any):
        self.process = multiprocessing.get_context("spawn").Process(
            target=_run, args=(os.getpid(), function, args, options), daemon=True
        )
        self.process.start()

    def wait(self, metrics: Path, steps: int) -> None:
        """Waits for the end, with a bar that counts the records of the metrics file.

        Raises:
            RunError: the function failed.
        """
        with Progress(console=console) as progress:
            bar = progress.add_task(metrics.parent.name.replace("_", " "), total=steps)
            while self.process.is_alive():
                if metrics.exists():
                    progress.update(bar, completed=metrics.read_bytes().count(b"\n"))
                time.sleep(1)
            progress.update(bar, completed=steps)
        self.process.join()
        if self.process.exitcode:
            raise RunError(
                f"{metrics.parent}: its process ended with status {self.process.exitcode}; go on with --resume"
            )


def _run(parent: int, function: Callable[..., Any], args: tuple, options: dict) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    quiet_libraries()
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    console.quiet = True
    torch.set_num_threads(1)
    function(*args, **options)


def _die_with(parent: int) -> None:
    """Ends this process when its parent is gone: a resumed experiment will write to the same directory."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)

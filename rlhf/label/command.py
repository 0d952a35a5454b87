"""The command ``rlhf label``: serves the page, or writes what came of it."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
from pathlib import Path

import uvicorn
from rich.console import Console

from rlhf.config import LabelConfig
from rlhf.files import write_whole
from rlhf.label.app import make_app
from rlhf.label.export import records
from rlhf.label.guard import is_local
from rlhf.label.report import describe
from rlhf.label.store import Store
from rlhf.label.tasks import Kind, read_tasks
from rlhf.settings import ConfigError

console = Console(stderr=True)


def label(config: LabelConfig, *, export: str | None = None, report: bool = False) -> None:
    """Serves the page until it is interrupted; or writes the answers to the file ``export``, or prints a report."""
    directory = Path(config.output_dir)
    path = directory / "labels.sqlite"
    reads = export is not None or report
    if reads and not path.exists():
        raise ConfigError(f"output_dir: {directory} holds no labels")
    if not reads and not path.exists() and not config.data:
        raise ConfigError("data: is [], must be at least one file or data set, where no labels were begun")
    tasks = read_tasks(config.data, config.task) if config.data and not reads else []
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {directory} can't be used: {error}") from error
    if reads:
        with contextlib.closing(Store(path)) as store:
            if export is not None:
                write_export(store, Path(export))
            if report:
                print(describe(store))
        return
    # Listened first, so that a start that fails leaves nothing behind.
    with listen(config.host, config.port) as listening, contextlib.closing(Store(path)) as store:
        kind: Kind = config.task
        if (kept := store.keep("task", kind)) != kind:
            raise ConfigError(f"task: is {kind}, but {path} was begun with {kept}")
        if tasks:
            store.add(tasks)
        serve(store, config, listening)


def write_export(store: Store, target: Path) -> None:
    """Writes the answers as records, whole or not at all."""
    found = records(store)
    if not found:
        raise ConfigError(f"export: {store.path} holds no answers yet")
    if target.exists() and not target.is_file():
        raise ConfigError(f"export: {target} is there, and is no file")
    if target.resolve().name.startswith(store.path.name) and target.resolve().parent == store.path.resolve().parent:
        raise ConfigError(f"export: {target} is where the answers are kept")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found))
    except OSError as error:
        raise ConfigError(f"export: {target} can't be written: {error}") from error
    console.print(f"label: {len(found)} records in [bold]{target}[/]")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"host, port: {host}:{port} can't be listened on: {error}") from error


def serve(store: Store, config: LabelConfig, listening: socket.socket) -> None:
    """Answers until Ctrl-C or a signal ends it."""
    token = None if is_local(config.host) else store.keep("token", secrets.token_urlsafe(24))
    seed = int(store.keep("seed", str(config.seed)))  # kept, since answers are put back into order by it
    app = make_app(store, config.task, labels_per_prompt=config.labels_per_prompt, seed=seed, token=token)
    where = f"http://{host_in_url(config.host)}:{listening.getsockname()[1]}/" + (f"?token={token}" if token else "")
    console.print(f"label: {store.count()} prompts at [bold]{where}[/]; Ctrl-C ends", soft_wrap=True, highlight=False)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3))
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises anew once it has ended in order
        server.run(sockets=[listening])
    answers = sum(answer.answer is not None for answer in store.answers())
    console.print(f"label: {answers} answers in [bold]{store.path}[/]; the same command goes on")


def host_in_url(host: str) -> str:
    """The name by which a browser reaches an address that is listened on."""
    if host in ("127.0.0.1", "localhost"):
        return "localhost"
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host

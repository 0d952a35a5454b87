"""A server of the page in a process of its own, which can be killed, and requests to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote, urlsplit


class Client:
    """A labeller's browser, without a browser."""

    def __init__(self, url, name=None):
        self.netloc = urlsplit(url).netloc
        self.cookies = {} if name is None else {"labeller": quote(name)}

    def ask(self, method, path, body=None, **headers):
        """The status, headers and text of an answer."""
        connection = http.client.HTTPConnection(self.netloc, timeout=10)
        own = {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())}
        if method == "POST":
            own |= {"Origin": f"http://{self.netloc}", "Content-Type": "application/json"}
        own |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {name: value for name, value in own.items() if value is not None})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()
        finally:
            connection.close()

    def get(self, path, **headers):
        return self.ask("GET", path, **headers)

    def post(self, path, body, **headers):
        status, _, text = self.ask("POST", path, body, **headers)
        return status, json.loads(text) if text.startswith("{") else text

    def next(self):
        """The number of the next task, or None."""
        status, headers, _ = self.get("/")
        return int(headers["location"].removeprefix("/task/")) if status == 303 else None


class Server:
    """``rlhf label`` on a port that stays the same when it is started again."""

    def __init__(self, directory, *arguments):
        self.directory, self.arguments, self.port = directory, arguments, 0
        self.start()

    def start(self):
        command = [sys.executable, "-m", "rlhf", "label", "--output_dir", self.directory, "--port", self.port]
        self.process = subprocess.Popen(
            [str(word) for word in (*command, *self.arguments)],
            stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "300"},
        )  # fmt: skip
        line = self.process.stderr.readline()
        found = re.search(r"(\d+) prompts at (http://\S+?);", line)
        assert found, line + self.process.stderr.read()
        self.url = found[2]
        self.port = urlsplit(self.url).port

    def stop(self, number=signal.SIGKILL):
        """Ends the process, and returns what it said on its way."""
        self.process.send_signal(number)
        said = self.process.stderr.read()
        self.process.stderr.close()
        self.status = self.process.wait()
        return said

    def export(self):
        """The answers as records."""
        target = Path(self.directory) / "export.jsonl"
        command = [sys.executable, "-m", "rlhf", "label", "--output_dir", self.directory, "--export", target]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        return [json.loads(line) for line in target.read_text().split("\n")[:-1]]  # not those of U+0085


def ranking(count, completions=3):
    """Records whose completions say how good they are: ``quality 2``, in another order in each."""
    return [
        {
            "prompt": f"prompt {i}",
            "completions": [f"quality {(i + j) % completions}" for j in range(completions)],
            "origin": i,
        }
        for i in range(count)
    ]

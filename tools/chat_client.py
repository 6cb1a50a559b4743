"""Start the chat page and talk to it: over HTTP, past the page, or in headless Chromium."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parent.parent
TWIN = "notebooks/py/05_gradio_chat.py"
MOCK = "tools/mock_chat.py"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
Messages = list[dict[str, Any]]


@dataclass
class Server:
    """A chat page that runs in a process of its own; what it prints goes to `log`."""

    url: str
    log: Path
    pid: int

    def times(self, word: str) -> list[float]:
        """When the stand-in began ("begins") or ended ("ends") its answers, in seconds."""
        return [float(t) for t in re.findall(rf"^{word} ([\d.]+)", self.log.read_text(), re.M)]

    def at_once(self) -> int:
        """How many answers the stand-in wrote at the same time, at most."""
        return max(map(int, re.findall(r"^ends [\d.]+ (\d+)", self.log.read_text(), re.M)))


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(script: str, log: Path, *arguments: str, **env: str) -> Iterator[Server]:
    """Serve the page until the block ends.

    Args:
        script: `TWIN` with the newest or the embedded adapter, `MOCK` with the stand-in.
        log: where what it prints goes.
        arguments: NAME=value for the notebook's constants.
        env: variables of the environment.

    Raises:
        RuntimeError: with what it printed last, if it ends or is silent for two minutes.
    """
    port = free_port()
    given = ["PROFILE=cpu", "SERVE=True"] if script == TWIN else []
    command = [sys.executable, script, f"PORT={port}", *given, *arguments]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **env}
        )
    server = Server(f"http://127.0.0.1:{port}", log, process.pid)
    try:
        until = time.monotonic() + 120
        while "open http" not in log.read_text():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the chat page did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=20)


def find_respond(url: str) -> int:
    """The number of the function that generates: the page asks for it by number."""
    with urlopen(f"{url}/config", timeout=10) as answer:
        functions = json.load(answer)["dependencies"]
    return next(f["id"] for f in functions if f["api_name"] == "respond")


def call(url: str, messages: Messages, respond: int | None = None) -> str:
    """Call the generating function past the page, as anybody with the address could.

    Args:
        url: of the server.
        messages: the conversation, `{"role", "content"}` each; nothing checks it before the server.
        respond: as `find_respond` gives it; asked for when None.

    Returns:
        The last message's text.

    Raises:
        RuntimeError: if the server answers with an error.
    """
    session = uuid.uuid4().hex
    body = {
        "data": [messages],
        "fn_index": find_respond(url) if respond is None else respond,
        "session_hash": session,
    }
    head = {"Content-Type": "application/json"}
    urlopen(Request(f"{url}/gradio_api/queue/join", json.dumps(body).encode(), head)).close()
    with urlopen(f"{url}/gradio_api/queue/data?session_hash={session}", timeout=300) as events:
        for line in events:
            event = json.loads(line[5:]) if line.startswith(b"data:") else {}
            if event.get("msg") == "process_completed":
                if not event["success"]:
                    raise RuntimeError(f"the server answered: {event['output']}")
                return text_of(event["output"]["data"][0][-1])
    raise RuntimeError("the server closed the stream without an answer")


def text_of(message: dict[str, Any]) -> str:
    """A message's text, whichever of the page's two forms it has."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def said(*texts: str) -> Messages:
    """Texts as a conversation: person, chat, person, ..."""
    roles = ("user", "assistant")
    parts = ([{"type": "text", "text": text}] for text in texts)
    return [{"role": roles[n % 2], "content": part} for n, part in enumerate(parts)]

"""A chat server on a free port of this machine that says what a test wants."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHOWN = re.compile(r"\[Response A\]\n(.*?)\n\n\[Response B\]\n(.*?)\n\nWhich", re.DOTALL)


class ChatServer:
    """`reply(body, number)` gives (status, payload, headers) or just a payload; calls are kept."""

    def __init__(self, reply: Callable[[dict[str, Any], int], Any]) -> None:
        self.reply, self.bodies, self.headers, self.paths = reply, [], [], []
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.paths.append(self.path)
                    number = len(outer.bodies)
                said = outer.reply(body, number)
                status, payload, headers = said if isinstance(said, tuple) else (200, said, {})
                data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                try:
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(data))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The responses in a question of the default template."""
    return SHOWN.search(body["messages"][-1]["content"]).groups()  # type: ignore[union-attr]


def says(text: str, logprobs: dict[str, float] | None = None, tokens: int = 10) -> dict[str, Any]:
    """An answer of one token as OpenAI writes it."""
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "index": 0}
    if logprobs is not None:
        listed = [{"token": t, "logprob": lp, "bytes": [1]} for t, lp in logprobs.items()]
        at = {"token": text, "logprob": logprobs.get(text, -9.0), "top_logprobs": listed}
        choice["logprobs"] = {"content": [at]}
    return {"choices": [choice], "usage": {"total_tokens": tokens}}

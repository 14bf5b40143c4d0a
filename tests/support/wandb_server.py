"""A W&B server as small as it can be: it takes an online run, and says when to stop it.

wandb's own core talks to it over HTTP as it does to the real one; only the answers are made up.
"""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """Knows one run, whatever is asked about; what is sent to it is thrown away."""

    def __init__(self, url: str) -> None:
        self.env = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
        """Environment of a program that shall log to this server."""
        self._is_stopped = False

    def stop(self) -> None:
        """Do what a person does with the button on the page of the run."""
        self._is_stopped = True

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """Return what the server says to a request."""
        if not path.endswith("/graphql"):  # rows, which are answered with what to do next
            return {"stopped": True} if self._is_stopped else {}
        names = json.loads(body).get("variables", {})
        project = {"id": "p", "name": names.get("project"), "entity": {"id": "e", "name": "me"}}
        run = {
            "id": "r",
            "name": names.get("name"),
            "displayName": names.get("displayName"),
            "historyLineCount": 0,
            "stopped": self._is_stopped,
            "project": project,
        }
        return {
            "data": {
                "viewer": {"id": "u", "username": "me", "entity": "me", "teams": {"edges": []}},
                "upsertBucket": {"bucket": run, "inserted": True},
                "project": {**project, "run": run},
                "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []},
            }
        }


@contextmanager
def running() -> Iterator[WandbServer]:
    """Run a server on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            answer = json.dumps(server.answer(self.path, body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server = WandbServer(f"http://127.0.0.1:{http.server_address[1]}")
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()

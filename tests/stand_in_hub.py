"""As much of the Hugging Face Hub as a download needs, on this machine."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import orjson


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download needs: one repository."""

    files: dict[str, bytes]
    sha = "0123456789" * 4

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0].lstrip("/")
        name = path.rsplit("/", 1)[-1]
        if path.startswith("api/models/me/mine/tree/"):
            tree = [
                {"type": "file", "path": file, "size": len(content), "oid": file}
                for file, content in self.files.items()
            ]
            self._send(orjson.dumps(tree), {"Content-Type": "application/json"}, body)
        elif path.startswith("api/models/me/mine"):
            siblings = [{"rfilename": file} for file in self.files]
            self._send(orjson.dumps({"id": "me/mine", "sha": self.sha, "siblings": siblings}), {}, body)
        elif path.startswith("me/mine/resolve/") and name in self.files:
            headers = {"ETag": f'"{len(self.files[name])}-{name}"', "X-Repo-Commit": self.sha}
            self._send(self.files[name], headers, body)
        else:
            self.send_response(404)
            known = path.startswith("me/mine")
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(200)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[str]:
    """The address of a Hub whose only repository, me/mine, holds these files."""
    handler = type("Handler", (_Hub,), {"files": files})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()

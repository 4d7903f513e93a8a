"""As much of the Hugging Face Hub as a download or an upload needs, on this machine."""

from __future__ import annotations

import base64
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

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


@dataclass
class Repositories:
    """A Hub that repositories are pushed to, by someone called me, whose token is "hf_mine"."""

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Content of each file, by repository and name."""
    private: dict[str, bool] = field(default_factory=dict)
    n_commits: int = 0
    refuse: int | None = None
    """Status of the answer to a commit; None accepts it."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files, by digest."""


class _Writable(http.server.BaseHTTPRequestHandler):
    hub: Repositories

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            if self.headers.get("Authorization") != "Bearer hf_mine":
                return self._send(401, {"error": "Invalid user token."})
            return self._send(200, {"type": "user", "name": "me", "orgs": []})
        name = self.path.removeprefix("/api/models/").split("?")[0]
        if name in self.hub.files:
            return self._send(200, {"id": name, "private": self.hub.private[name], "siblings": []})
        return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def do_PUT(self) -> None:
        self.hub.stored[self.path.rpartition("/")[2]] = self._body()
        self._send(200, {})

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/api/repos/create":
            asked = orjson.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.hub.files:
                return self._send(409, {"error": "You already created this model repo", "url": name})
            self.hub.files[name] = {}
            self.hub.private[name] = asked.get("private") or asked.get("visibility") == "private"
            return self._send(200, {"url": f"{self.hub.url}/{name}"})
        if self.path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            asked = orjson.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in asked
            ]
            return self._send(200, {"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = orjson.loads(body)["objects"]
            found = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/stored/{one['oid']}"}}}
                for one in objects
            ]
            return self._send(200, {"transfer": "basic", "objects": found})
        if "/commit/" in self.path:
            if self.hub.refuse:
                return self._send(self.hub.refuse, {"error": "You have no right to write here."})
            repository = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(orjson.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.hub.files[repository][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.hub.files[repository][value["path"]] = self.hub.stored[value["oid"]]
            self.hub.n_commits += 1
            sha = f"{self.hub.n_commits:040}"
            url = f"{self.hub.url}/{repository}/commit/{sha}"
            return self._send(200, {"success": True, "commitOid": sha, "commitUrl": url})
        return self._send(404, {"error": f"no such path: {self.path}"})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        sent = orjson.dumps(content)
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def taking_pushes() -> Iterator[Repositories]:
    """A Hub without a repository, to which they can be pushed."""
    hub = Repositories()
    handler = type("Handler", (_Writable,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()

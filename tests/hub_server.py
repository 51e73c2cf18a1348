"""A stand-in of the Hugging Face hub on the loopback interface: repositories, uploads with LFS, commits, checks of cards."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


class Hub(ThreadingHTTPServer):
    """files: content by path, of each repository. sent: oids of large files that were sent. cut_off: after how many of them the
    connection breaks; keys: that were shown."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.cut_off: int | None = None
        self.lock = threading.Lock()  # clients send files side by side
        self.keys: set[str] = set()

    def add(self, name: str, private: bool = False, **card: Any) -> dict[str, Any]:
        self.repositories[name] = {"private": private, "files": {}, "commits": [], "card": card}
        return self.repositories[name]


@contextmanager
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def complaint(content: str) -> str:
    """What the hub would say of this card's metadata; empty if it accepts them."""
    block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    data = yaml.safe_load(block[1]) if block else None
    if not isinstance(data, dict):
        return "there is no block of metadata"
    lists = [value for name in ("tags", "datasets") for value in data.get(name, [])]
    texts = [data.get(name, "x") for name in ("license", "base_model", "library_name", "pipeline_tag")]
    if not all(isinstance(value, str) and value for value in [*lists, *texts]):
        return "a value is not text"
    return "" if re.fullmatch(r"(x|[\w.-]+(/[\w.-]+)?)", texts[1]) else f"{texts[1]} is not a model"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        path = self.path.removeprefix("/api/models/").partition("?")[0]
        name = path.removesuffix("/tree/main")
        repository = self.server.repositories.get(name)
        if repository is None:
            return self._answer(404, {"error": "no such repository"})
        if name != path:
            rows = [
                {"type": "file", "path": file, "size": len(content), "oid": "0"}
                for file, content in repository["files"].items()
            ]
            return self._answer(200, rows)
        return self._answer(
            200, {"id": name, "private": repository["private"], "siblings": [], "cardData": repository["card"]}
        )

    def do_PUT(self) -> None:
        content, hub = self._body(), self.server
        oid = hashlib.sha256(content).hexdigest()
        assert self.path == f"/lfs/{oid}"
        with hub.lock:
            breaks = hub.cut_off is not None and len(hub.sent) >= hub.cut_off
            if not breaks:
                hub.objects[oid] = content
                hub.sent.append(oid)
        if breaks:
            self.close_connection = True
            return self.connection.close()
        return self._answer(200, {})

    def do_POST(self) -> None:
        path, body, hub = self.path.partition("?")[0], self._body(), self.server
        if path == "/api/validate-yaml":
            problem = complaint(json.loads(body)["content"])
            errors = [{"message": problem}] if problem else []
            return self._answer(400 if problem else 200, {"errors": errors, "warnings": []})
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        hub.keys.add(key)
        if key != "hf_write":
            return self._answer(401, {"error": "Invalid user token"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.repositories:
                return self._answer(
                    409, {"error": "You already created this model repo", "url": f"{hub.address}/{name}"}
                )
            hub.add(name, asked.get("visibility") == "private" or asked.get("private", False))
            return self._answer(200, {"url": f"{hub.address}/{name}"})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": wanted["oid"], "size": wanted["size"]}
                | (
                    {}
                    if wanted["oid"] in hub.objects
                    else {"actions": {"upload": {"href": f"{hub.address}/lfs/{wanted['oid']}"}}}
                )
                for wanted in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        name, action = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path).groups()
        repository = hub.repositories[name]
        if action == "preupload":
            files = [
                {
                    "path": wanted["path"],
                    "uploadMode": "lfs" if wanted["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for wanted in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository["files"][value["path"]] = hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository["files"][value["path"]]
            else:
                repository["commits"].append(value["summary"])
        number = f"{len(repository['commits']):040d}"
        return self._answer(200, {"commitUrl": f"{hub.address}/{name}/commit/{number}", "commitOid": number})

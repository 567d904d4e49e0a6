"""A stand-in of the Hugging Face hub on this machine: what downloads and uploads of this project call, and its faults.

    with HubServer() as hub:
        hub.add("owner/name", {"config.json": b"{}"})
        snapshot_download("owner/name", endpoint=hub.endpoint)

Repositories of all kinds, branches, tokens, private and gated ones, LFS uploads checked by their SHA-256, commits,
downloads with ranges. Not in it: Xet (set HF_HUB_DISABLE_XET=1), multipart uploads, redirects, pull requests.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_repository import LFS_SUFFIXES, Blob, Repository, upload_mode

TOKEN = "hf_" + "StandIn" * 5
READ_TOKEN = "hf_" + "OnlyRead" * 4
KINDS = ("models", "datasets", "spaces")


@dataclass
class Fault:
    """What happens to the next requests whose ``METHOD /path`` matches.

    Attributes:
        status: answered instead; 0 cuts the connection.
        times: requests; None all.
        after: bytes of the answer's content that are sent before the cut.
        reset: the cut is a reset, not an end.
    """

    pattern: str
    status: int = 0
    times: int | None = 1
    after: int = 0
    reset: bool = False
    code: str = ""
    message: str = "out of order"


@dataclass
class HubServer:
    """Use as a context manager.

    Attributes:
        tokens: token → (user, may write).
        requests: ``METHOD /path`` and, of downloads that are resumed, `` Range: …``, in order.
    """

    tokens: dict[str, tuple[str, bool]] = field(
        default_factory=lambda: {TOKEN: ("user", True), READ_TOKEN: ("user", False)}
    )
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    sent: int = 0
    connections: list[socket.socket] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """No connection is accepted any more, and the open ones end."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(
        self, name: str, files: dict[str, bytes], *, kind: str = "models", branch: str = "main", **more: Any
    ) -> str:
        """Put files into a repository, which is made if need be; returns the commit."""
        repository = self.repositories.setdefault((kind, name), Repository(**more))
        blobs = {path: Blob(data, path.endswith(LFS_SUFFIXES)) for path, data in files.items()}
        self.storage |= {blob.sha256: blob.data for blob in blobs.values() if blob.lfs}
        return repository.commit(blobs, branch)

    def content(self, name: str, branch: str = "main") -> dict[str, bytes]:
        files = self.repositories["models", name].files(branch)
        assert files is not None
        return {path: blob.data for path, blob in files.items()}

    def downloads(self) -> list[str]:
        """Files that were asked for, by path in their repository."""
        return [re.sub(r".*/resolve/[^/]*/", "", line) for line in self.requests if re.match("GET .*/resolve/", line)]

    def fault_of(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times != 0 and re.search(fault.pattern, request):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None


class _Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def log_message(self, *_: Any) -> None:
        """Nothing on the tests' output."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(self._chunks())
        self.route = unquote(urlsplit(self.path).path)
        line = f"{self.command} {self.route}"
        resumed = self.headers.get("Range")
        self.hub.requests.append(line + (f" Range: {resumed}" if resumed else ""))
        self.fault = self.hub.fault_of(line)
        if self.fault and self.fault.status:
            return self._answer(self.fault.status, {"error": self.fault.message}, self.fault.code, self.fault.message)
        if self.fault and not self.fault.after:
            return self._cut()
        try:
            with self.hub.lock:
                self._dispatch()
        except _Refusal as refusal:
            self._answer(refusal.status, {"error": refusal.message}, refusal.code, refusal.message)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    # ------------------------------------------------------------ answers

    def _answer(self, status: int, content: Any = None, code: str = "", message: str = "", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and not self.fault.status:
            self.wfile.write(data[: self.fault.after])
            self.hub.sent += len(data[: self.fault.after])
            return self._cut()
        self.wfile.write(data)
        self.hub.sent += len(data)

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            if self.fault and self.fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)

    # ------------------------------------------------------------ who asks for what

    def _user(self) -> tuple[str, bool] | None:
        words = (self.headers.get("Authorization") or "").split()
        if not words:
            return None
        if words[-1] not in self.hub.tokens:
            raise _Refusal(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens[words[-1]]

    def _require_writer(self, owner: str) -> None:
        user = self._user()
        if user is None:
            raise _Refusal(401, "", "Invalid username or password.")
        if user != (owner, True):
            raise _Refusal(403, "", f'You don\'t have the rights to write under the namespace "{owner}"')

    def _repository(self, kind: str, name: str, write: bool = False) -> Repository:
        user, repository = self._user(), self.hub.repositories.get((kind, name))
        hidden = repository is not None and repository.private and (user or ("",))[0] != name.split("/")[0]
        if repository is None or hidden:
            if user is None:
                raise _Refusal(401, "", "Invalid username or password.")
            raise _Refusal(404, "RepoNotFound", "Repository not found")
        if write:
            self._require_writer(name.split("/")[0])
        return repository

    def _files(self, repository: Repository, revision: str) -> tuple[str, dict[str, Blob]]:
        files = repository.files(revision)
        if files is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository.branches.get(revision, revision), files

    def _dispatch(self) -> None:
        parts = self.route.strip("/").split("/")
        if self.route == "/api/repos/create":
            return self._create(json.loads(self.body))
        if self.route == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self.route == "/api/whoami-v2":
            user = self._user()
            return self._answer(200, {"name": user[0]}) if user else self._answer(401, {}, "", "no token")
        if parts[0] == "lfs":
            return self._store(parts[1])
        if parts[0] == "api" and parts[1] in KINDS:
            return self._api(parts[1], "/".join(parts[2:4]), parts[4] if len(parts) > 4 else "", "/".join(parts[5:]))
        kind = parts.pop(0) if parts[0] in KINDS else "models"
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        if parts[2:4] == ["info", "lfs"]:
            return self._lfs(kind, "/".join(parts[:2]).removesuffix(".git"), parts[-1], json.loads(self.body))
        raise _Refusal(404, "", f"the stand-in does not know {self.command} {self.route}")

    def _api(self, kind: str, name: str, verb: str, rest: str) -> None:
        write = verb in ("preupload", "commit", "branch")
        repository = self._repository(kind, name, write)
        if verb in ("", "revision"):
            sha, files = self._files(repository, rest or "main")
            siblings = [self._sibling(path, blob) for path, blob in sorted(files.items())]
            state = {"private": repository.private, "gated": "manual" if repository.gated else False}
            return self._answer(200, {"id": name, "sha": sha, "siblings": siblings, "tags": [], **state})
        if verb == "refs":
            names = repository.branches.items()
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in names]
            return self._answer(200, {"branches": branches, "converts": [], "tags": []})
        if verb == "branch":
            if rest in repository.branches:
                raise _Refusal(409, "", f"Reference already exists: {rest}")
            repository.branches[rest] = repository.branches["main"]
            return self._answer(200, {})
        sha, files = self._files(repository, rest.split("/")[0])
        if verb == "tree":
            return self._answer(200, [{"path": path, **blob.described()} for path, blob in sorted(files.items())])
        if verb == "paths-info":
            wanted = parse_qs(self.body.decode())["paths"]
            return self._answer(200, [{"path": p, **files[p].described()} for p in wanted if p in files])
        if verb == "preupload":
            return self._answer(200, {"files": [upload_mode(file, files) for file in json.loads(self.body)["files"]]})
        if verb == "commit":
            return self._commit(name, repository, rest)
        raise _Refusal(404, "", f"the stand-in does not know {verb}")

    def _sibling(self, path: str, blob: Blob) -> dict[str, Any]:
        lfs = {"lfs": {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": 130}} if blob.lfs else {}
        return {"rfilename": path, "size": len(blob.data), "blobId": blob.oid, **lfs}

    # ------------------------------------------------------------ verbs

    def _create(self, wanted: dict[str, Any]) -> None:
        user, kind = self._user(), f"{wanted.get('type') or 'model'}s"
        owner = wanted.get("organization") or (user or ("",))[0]
        self._require_writer(owner)
        name = f"{owner}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"
        # The hub has a space of names for each kind; here one is taken for all, so that both answers can be seen.
        if any(other == name for _, other in self.hub.repositories):
            return self._answer(
                409, {"error": "You already created this repo", "url": url}, "", "You already created it"
            )
        repository = Repository(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        repository.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", lfs=False)})
        self.hub.repositories[kind, name] = repository
        self._answer(200, {"url": url, "name": name, "id": name})

    def _lfs(self, kind: str, name: str, verb: str, wanted: dict[str, Any]) -> None:
        self._repository(kind, name, write=True)
        if verb == "verify":
            if len(self.hub.storage.get(wanted["oid"], b"")) != wanted["size"]:
                raise _Refusal(404, "", "no such object")
            return self._answer(200, {})
        objects = []
        for item in wanted["objects"]:
            verify = f"{self.hub.endpoint}/{name}.git/info/lfs/verify"
            actions = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}, "verify": {"href": verify}}
            objects.append(item if item["oid"] in self.hub.storage else {**item, "actions": actions})
        self._answer(200, {"objects": objects, "transfer": "basic"})

    def _store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refusal(400, "", "the content is not what its hash says")
        self.hub.storage[oid] = self.body
        self._answer(200, {})

    def _commit(self, name: str, repository: Repository, branch: str) -> None:
        if branch not in repository.branches:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        files = dict(repository.commits[repository.branches[branch]])
        for line in self.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                repository.messages.append(value["summary"])
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile" and value["oid"] not in self.hub.storage:
                raise _Refusal(400, "", f"LFS pointer of {value['path']} points to a file that does not exist")
            elif key == "lfsFile":
                files[value["path"]] = Blob(self.hub.storage[value["oid"]], lfs=True)
            elif key == "deletedFile":
                files.pop(value["path"])
        sha = repository.commit(files, branch)
        self._answer(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha})

    def _resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self._repository(kind, name)
        if repository.gated and (self._user() or ("",))[0] != name.split("/")[0]:
            raise _Refusal(403 if self._user() else 401, "GatedRepo", "Access to this model is restricted")
        sha, files = self._files(repository, revision)
        if path not in files:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        blob, first = files[path], 0
        if span := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            first = int(span[1])
        headers = {"ETag": f'"{blob.sha256 if blob.lfs else blob.oid}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        if first:
            headers["Content_Range"] = f"bytes {first}-{len(blob.data) - 1}/{len(blob.data)}"
        self._answer(206 if first else 200, blob.data[first:], "", "", **headers)

"""A Hub in memory on 127.0.0.1: the endpoints `huggingface_hub` calls to push and to load a model.

Written after the requests of huggingface_hub 2.4 (HfApi.create_repo, create_branch, upload_folder,
model_info, list_repo_tree, hf_hub_download, snapshot_download) and the Hub's documented answers:
error codes in `X-Error-Code`, 409 for what exists, NDJSON commits, Git LFS batches with a signed
upload address and a verify call, LFS downloads behind a redirect to another host. Not spoken: Xet.
A client with `hf_xet` has to be told HF_HUB_DISABLE_XET=1, or the server `lfs=False`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

Files = dict[str, bytes]
REPO = r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
KIND = "(?:models|datasets)"  # one table of names for both: tests use either
REVISION = r"(?P<revision>[^/]+)"


@dataclass
class Repo:
    """A repository: for every branch its commits, each the whole tree; the newest is the last."""

    private: bool
    branches: dict[str, list[tuple[str, Files]]] = field(default_factory=dict)

    def tree(self, revision: str) -> tuple[str, Files]:
        """Commit id and files of a branch or a commit id. Raises Refusal if there is neither."""
        for name, commits in self.branches.items():
            if name == revision:
                return commits[-1]
            for oid, files in commits:
                if oid == revision:
                    return oid, files
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def commit(self, branch: str, files: Files, message: str) -> str:
        """Make `files` the newest tree of `branch`; the commit's id."""
        commits = self.branches.setdefault(branch, [])
        text = f"{branch} {len(commits)} {message} {sorted(map(git_id, files.values()))}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        commits.append((oid, files))
        return oid


class Refusal(Exception):
    """An answer that is an error: status, the Hub's error code or None, text."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class Call:
    """A request as it came in."""

    method: str
    path: str
    authorization: str | None
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What to send."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def answer_json(value: object, status: int = 200, **headers: str) -> Answer:
    body = json.dumps(value).encode()
    return Answer(status, body, {"Content-Type": "application/json", **headers})


def git_id(content: bytes) -> str:
    """The id git gives a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """Start with `with HubServer({"hf_...": "write"}) as hub`, then point HF_ENDPOINT to `hub.url`.

    `tokens` maps a token to `write` or `read`; all belong to the user `me`, who may write to owners
    `me` and `team`. `repos` and `calls` are for tests to look into; `broken` maps the start of a
    path to a `Refusal` given instead of an answer.
    """

    user, owners = "me", ("me", "team")

    def __init__(self, tokens: dict[str, str], *, lfs: bool = True) -> None:
        self.tokens, self.lfs = tokens, lfs
        self.repos: dict[str, Repo] = {}
        self.blobs: Files = {}  # LFS objects by SHA-256
        self.calls: list[Call] = []
        self.broken: dict[str, Refusal] = {}
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        # Another host by name, as on the Hub: tokens must not follow a redirect to it.
        self.storage = f"http://localhost:{self.http.server_port}/lfs-storage"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> HubServer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def files(self, repo: str, revision: str = "main") -> Files:
        return self.repos[repo].tree(revision)[1]

    def answer(self, call: Call) -> Answer:
        """Find the route and call it. Raises Refusal."""
        split = urlsplit(call.path)
        for start, refusal in self.broken.items():
            if split.path.startswith(start):
                raise refusal
        for method, pattern, route in ROUTES:
            match = re.fullmatch(pattern, split.path)
            if match and call.method in method.split():
                found = {key: unquote(value or "") for key, value in match.groupdict().items()}
                with self.lock:
                    return route(self, Request(self, call, parse_qs(split.query), found))
        raise Refusal(404, None, f"no such endpoint: {call.method} {split.path}")


@dataclass(frozen=True)
class Request:
    """A call with its route's parts; knows who asks."""

    hub: HubServer
    call: Call
    query: dict[str, list[str]]
    parts: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.call.body)

    def role(self) -> str | None:
        """`write`, `read`, or None for a stranger. Raises Refusal for a token nobody knows."""
        if self.call.authorization is None:
            return None
        token = self.call.authorization.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def must_write(self, owner: str) -> None:
        role = self.role()
        if role is None:
            raise Refusal(401, None, "Invalid username or password.")
        if role != "write" or owner not in self.hub.owners:
            raise Refusal(403, None, f"You don't have the rights to write under {owner}")

    def repo(self, *, write: bool = False) -> Repo:
        """The repository of the path. Raises Refusal if the asker may not see or change it."""
        name = self.parts["repo"]
        role = self.role()
        found = self.hub.repos.get(name)
        if found is None or (found.private and role is None):
            raise Refusal(404 if role else 401, "RepoNotFound", "Repository not found")
        if write:
            self.must_write(name.split("/")[0])
        return found


def create_repo(hub: HubServer, request: Request) -> Answer:
    asked = request.json
    owner = asked.get("organization") or hub.user
    request.must_write(owner)
    name = f"{owner}/{asked['name']}"
    if name in hub.repos:
        error = "You already created this model repo"
        return answer_json({"error": error, "url": f"{hub.url}/{name}"}, 409)
    repo = hub.repos[name] = Repo(private=asked.get("visibility") == "private")
    repo.commit("main", {".gitattributes": b""}, "initial commit")
    return answer_json({"url": f"{hub.url}/{name}", "name": name})


def create_branch(hub: HubServer, request: Request) -> Answer:
    repo, branch = request.repo(write=True), request.parts["revision"]
    if branch in repo.branches:
        raise Refusal(409, None, f"Reference already exists: {branch}")
    repo.branches[branch] = list(repo.branches["main"])
    return answer_json({})


def model_info(hub: HubServer, request: Request) -> Answer:
    repo = request.repo()
    oid, files = repo.tree(request.parts.get("revision") or "main")
    siblings = [{"rfilename": path} for path in sorted(files)]
    name = request.parts["repo"]
    return answer_json({"id": name, "sha": oid, "private": repo.private, "siblings": siblings})


def tree(hub: HubServer, request: Request) -> Answer:
    _, files = request.repo().tree(request.parts["revision"])
    start = request.parts["path"] and request.parts["path"].strip("/") + "/"
    inside = {path: content for path, content in files.items() if path.startswith(start)}
    if start and not inside:
        raise Refusal(404, "EntryNotFound", f"{start} does not exist")
    deep = request.query.get("recursive") == ["true"]
    found: dict[str, dict[str, Any]] = {}
    for path, content in inside.items():
        first, _, rest = path.removeprefix(start).partition("/")
        if rest:
            entry = {"type": "directory", "path": start + first, "oid": "0" * 40, "size": 0}
            found[start + first] = entry
        if deep or not rest:
            found[path] = {"type": "file", "path": path, "oid": git_id(content)}
            found[path] |= {"size": len(content), **_lfs_part(hub, path, content)}
    return answer_json(list(found.values()))


def validate_yaml(hub: HubServer, request: Request) -> Answer:
    """The head has to be YAML, and a model-index to have the fields the Hub insists on."""
    head = re.match(r"---\n(.*?)\n---\n", request.json["content"], re.DOTALL)
    try:
        data = yaml.safe_load(head.group(1)) if head else {}
        for model in data.get("model-index", ()):
            for result in model["results"]:
                assert model["name"] and result["task"]["type"]
                assert result["dataset"]["type"] and result["dataset"]["name"]
                assert all(metric["type"] and "value" in metric for metric in result["metrics"])
    except (yaml.YAMLError, AssertionError, KeyError) as error:
        return answer_json({"errors": [{"message": repr(error)}], "warnings": []}, 400)
    warnings = [] if head else [{"message": "empty or missing yaml metadata in repo card"}]
    return answer_json({"errors": [], "warnings": warnings})


def preupload(hub: HubServer, request: Request) -> Answer:
    _, files = request.repo(write=True).tree(request.parts["revision"])
    listed = []
    for asked in request.json["files"]:
        path, content = asked["path"], files.get(asked["path"])
        mode = "lfs" if _is_lfs(hub, path) else "regular"
        hashed = hashlib.sha256(content or b"").hexdigest() if mode == "lfs" else None
        oid = None if content is None else hashed or git_id(content)
        listed.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return answer_json({"files": listed})


def lfs_batch(hub: HubServer, request: Request) -> Answer:
    request.repo(write=True)
    objects = []
    for asked in request.json["objects"]:
        item: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in hub.blobs:
            signed = f"{hub.storage}/{asked['oid']}?signature=abc"
            verify = f"{hub.url}/lfs-verify"
            item["actions"] = {"upload": {"href": signed}, "verify": {"href": verify}}
        objects.append(item)
    return answer_json({"transfer": "basic", "objects": objects})


def lfs_store(hub: HubServer, request: Request) -> Answer:
    """Storage takes signed addresses; a token that came here would have left the Hub."""
    if request.call.authorization is not None:
        raise Refusal(400, None, "only one auth mechanism allowed")
    if hashlib.sha256(request.call.body).hexdigest() != request.parts["oid"]:
        raise Refusal(400, None, "content does not match its SHA-256")
    hub.blobs[request.parts["oid"]] = request.call.body
    return Answer()


def lfs_verify(hub: HubServer, request: Request) -> Answer:
    request.must_write(hub.user)
    if len(hub.blobs.get(request.json["oid"], b"")) != request.json["size"]:
        raise Refusal(404, None, "object is not in storage")
    return Answer()


def lfs_load(hub: HubServer, request: Request) -> Answer:
    if request.call.authorization is not None:
        raise Refusal(400, None, "only one auth mechanism allowed")
    return Answer(200, hub.blobs[request.parts["oid"]])


def commit(hub: HubServer, request: Request) -> Answer:
    repo, branch = request.repo(write=True), request.parts["revision"]
    files, message = dict(repo.tree(branch)[1]), ""
    for line in request.call.body.splitlines():
        item = json.loads(line)
        key, value = item["key"], item["value"]
        if key == "header":
            message = value["summary"]
        elif key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in hub.blobs:
                raise Refusal(400, None, f"LFS object {value['oid']} was never uploaded")
            files[value["path"]] = hub.blobs[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]
        else:
            raise Refusal(400, None, f"unknown operation {key}")
    oid = repo.commit(branch, files, message)
    url = f"{hub.url}/{request.parts['repo']}/commit/{oid}"
    return answer_json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


def resolve(hub: HubServer, request: Request) -> Answer:
    oid, files = request.repo().tree(request.parts["revision"])
    path = request.parts["path"]
    if path not in files:
        raise Refusal(404, "EntryNotFound", f"{path} does not exist")
    content = files[path]
    headers = {"X-Repo-Commit": oid, "ETag": f'"{git_id(content)}"'}
    if not _is_lfs(hub, path):
        return Answer(200, content, headers)
    blob = hashlib.sha256(content).hexdigest()
    headers |= {"X-Linked-Etag": f'"{blob}"', "X-Linked-Size": str(len(content))}
    return Answer(302, b"", {**headers, "Location": f"{hub.storage}/{blob}?signature=def"})


def _is_lfs(hub: HubServer, path: str) -> bool:
    return hub.lfs and path.endswith((".safetensors", ".png", ".arrow"))


def _lfs_part(hub: HubServer, path: str, content: bytes) -> dict[str, Any]:
    if not _is_lfs(hub, path):
        return {}
    oid = hashlib.sha256(content).hexdigest()
    return {"lfs": {"oid": oid, "size": len(content), "pointerSize": 134}}


ROUTES: list[tuple[str, str, Callable[[HubServer, Request], Answer]]] = [
    ("POST", "/api/repos/create", create_repo),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", f"/api/{KIND}/{REPO}/branch/{REVISION}", create_branch),
    ("POST", f"/api/{KIND}/{REPO}/preupload/{REVISION}", preupload),
    ("POST", f"/api/{KIND}/{REPO}/commit/{REVISION}", commit),
    ("GET", f"/api/{KIND}/{REPO}/tree/{REVISION}(?P<path>/.*)?", tree),
    ("GET", f"/api/{KIND}/{REPO}/revision/{REVISION}", model_info),
    ("GET", f"/api/{KIND}/{REPO}", model_info),
    ("POST", rf"/(?:datasets/)?{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", "/lfs-storage/(?P<oid>[0-9a-f]{64})", lfs_store),
    ("GET HEAD", "/lfs-storage/(?P<oid>[0-9a-f]{64})", lfs_load),
    ("POST", "/lfs-verify", lfs_verify),
    ("GET HEAD", f"/(?:datasets/)?{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve),
]


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # the client keeps connections open

        def handle_any(self) -> None:
            authorization = self.headers.get("Authorization")
            call = Call(self.command, self.path, authorization, self.read_body())
            hub.calls.append(call)
            try:
                answer = hub.answer(call)
            except Refusal as refusal:
                headers = {"X-Error-Message": refusal.message}
                headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
                answer = answer_json({"error": refusal.message}, refusal.status, **headers)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: what the tests capture is to be the client's output alone."""

    return Handler

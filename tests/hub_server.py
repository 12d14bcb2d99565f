"""A small Hugging Face Hub on this machine: enough of its HTTP protocol for the real client, all in memory.

with HubServer() as hub:
    env = hub.environment(tmp_path)  # for launched scripts
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "tester"
TOKEN = "hf_local_server_token"
READ_TOKEN = "hf_local_server_token_that_may_only_read"
DATE = "2026-01-01T00:00:00.000Z"
COMMIT = {"id": "0" * 40, "title": "", "date": DATE}
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
REPO = r"(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
RESOLVE = r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"


class Refusal(Exception):
    """An answer other than success, as the Hub gives it: status, code and message."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass(frozen=True)
class File:
    """The bytes of a file, and whether they are in git or in large file storage."""

    content: bytes
    large: bool

    @property
    def blob(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def entry(self, path: str) -> dict:
        """How tree and paths-info list it."""
        large = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}} if self.large else {}
        common = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob, "lastCommit": COMMIT}
        return {**common, **large}


@dataclass
class Repository:
    """The commits of one branch: every revision's files by their paths."""

    private: bool = False
    messages: list[str] = field(default_factory=list)
    revisions: dict[str, dict[str, File]] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", large=False)})

    @property
    def head(self) -> str:
        return list(self.revisions)[-1]

    def commit(self, message: str, files: dict[str, File]) -> str:
        """A new revision that holds these files and no others."""
        sha = hashlib.sha1(f"{id(self)} {len(self.messages)} {message}".encode()).hexdigest()
        self.messages.append(message)
        self.revisions[sha] = files
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, File]]:
        sha = self.head if revision == "main" else revision
        if sha not in self.revisions:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, self.revisions[sha]


class HubServer:
    """The Hub while the `with` block lasts. `requests` holds every request as (method, path, range)."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def environment(self, folder: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Environment variables of a process that takes this server for the Hub; its caches go below the folder."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(Path(folder) / "huggingface"),
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def add(self, repo_id: str, folder: Path, repo_type: str = "model", private: bool = False) -> Repository:
        """A repository with a folder's files, as if somebody had uploaded them."""
        repository = self.repositories.setdefault((f"{repo_type}s", repo_id), Repository(private))
        files = {
            path.relative_to(folder).as_posix(): File(path.read_bytes(), is_large(path.read_bytes()))
            for path in Path(folder).rglob("*")
            if path.is_file()
        }
        repository.commit("upload", {**repository.at("main")[1], **files})
        return repository

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """What a repository holds now, without .gitattributes."""
        files = self.repositories[f"{repo_type}s", repo_id].at("main")[1]
        return {path: file.content for path, file in files.items() if path != ".gitattributes"}


def is_large(sample: bytes) -> bool:
    """Whether preupload sends a file to large file storage: the Hub does so with binary files."""
    return b"\0" in sample[:512]


class Handler(BaseHTTPRequestHandler):
    """One request: find its route, answer in JSON or bytes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        hub: HubServer = self.server.hub
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.query = {name: values[0] for name, values in parse_qs(address.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append((self.command, path, self.headers.get("Range")))
        try:
            for method, pattern, route in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    return self.send(*route(self, hub, **match.groupdict()))
            raise Refusal(404, f"no route for {self.command} {path}")
        except Refusal as refusal:
            self.send(refusal.status, {"error": str(refusal)}, refusal.headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def send(self, status: int, content: dict | list | bytes, headers: dict[str, str] | None = None) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass

    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def require_user(self, write: bool = False) -> None:
        if self.token() not in (TOKEN, READ_TOKEN):
            raise Refusal(401, "Invalid username or password.")
        if write and self.token() == READ_TOKEN:
            raise Refusal(403, "You don't have the rights to write with this token.")

    def repository(self, kind: str | None, id: str, write: bool = False) -> Repository:
        found = self.server.hub.repositories.get((kind or "models", id))
        if found is None or (found.private and self.token() not in (TOKEN, READ_TOKEN)):
            status = 404 if self.token() else 401
            raise Refusal(status, "Repository not found", "RepoNotFound")
        if write:
            self.require_user(write=True)
            if not id.startswith(f"{USER}/"):
                raise Refusal(403, f"You don't have the rights to write to {id}.")
        return found


def whoami(request: Handler, hub: HubServer):
    request.require_user()
    return 200, {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}


def create(request: Handler, hub: HubServer):
    request.require_user(write=True)
    asked = json.loads(request.body)
    owner, kind = asked.get("organization") or USER, f"{asked.get('type') or 'model'}s"
    url = {"url": f"{hub.url}/{'datasets/' if kind == 'datasets' else ''}{owner}/{asked['name']}"}
    if (kind, f"{owner}/{asked['name']}") in hub.repositories:
        return 409, {"error": "You already created this repo", **url}
    if owner != USER:
        raise Refusal(403, f"You don't have the rights to create a repo under the namespace {owner}.")
    hub.repositories[kind, f"{owner}/{asked['name']}"] = Repository(private=asked.get("visibility") == "private")
    return 200, url


def auth_check(request: Handler, hub: HubServer, kind: str, id: str, write: str | None):
    request.repository(kind, id, write=write is not None)
    return 200, {}


def info(request: Handler, hub: HubServer, kind: str, id: str, revision: str | None = None):
    repository = request.repository(kind, id)
    sha, files = repository.at(revision or "main")
    siblings = [{"rfilename": path} for path in sorted(files)]
    common = {"id": id, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []}
    return 200, {**common, "modelId": id, "lastModified": DATE, "createdAt": DATE, "downloads": 0, "likes": 0}


def tree(request: Handler, hub: HubServer, kind: str, id: str, revision: str, path: str | None = None):
    files = request.repository(kind, id).at(revision)[1]
    start = f"{path}/" if path else ""
    entries = {}
    for name, file in files.items():
        if name.startswith(start):
            parents = [str(parent) for parent in PurePosixPath(name).parents if str(parent) != "."]
            entries.update({parent: folder_entry(parent) for parent in parents if parent.startswith(start)})
            entries[name] = file.entry(name)
    if not entries:
        raise Refusal(404, f"{path} does not exist", "EntryNotFound")
    recursive = request.query.get("recursive", "").lower() == "true"
    return 200, [entry for name, entry in entries.items() if recursive or "/" not in name[len(start) :]]


def folder_entry(path: str) -> dict:
    return {"type": "directory", "path": path, "oid": "0" * 40, "lastCommit": COMMIT}


def paths_info(request: Handler, hub: HubServer, kind: str, id: str, revision: str):
    files = request.repository(kind, id).at(revision)[1]
    answer = []
    for path in parse_qs(request.body.decode())["paths"]:
        if path in files:
            answer.append(files[path].entry(path))
        elif any(name.startswith(f"{path}/") for name in files):
            answer.append(folder_entry(path))
    return 200, answer


def preupload(request: Handler, hub: HubServer, kind: str, id: str, revision: str):
    files = request.repository(kind, id, write=True).at(revision)[1]
    answer = []
    for asked in json.loads(request.body)["files"]:
        mode = "lfs" if is_large(base64.b64decode(asked["sample"])) else "regular"
        there = files.get(asked["path"])
        oid = None if there is None else there.sha256 if there.large else there.blob
        answer.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return 200, {"files": answer}


def lfs_batch(request: Handler, hub: HubServer, kind: str | None, id: str):
    request.repository(kind, id, write=True)
    asked = json.loads(request.body)["objects"]
    uploads = {o["oid"]: {"actions": {"upload": {"href": f"{hub.url}/storage/{o['oid']}"}}} for o in asked}
    return 200, {"objects": [{**o, **({} if o["oid"] in hub.objects else uploads[o["oid"]])} for o in asked]}


def store(request: Handler, hub: HubServer, oid: str):
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, "the content is not what its oid says")
    hub.objects[oid] = request.body
    return 200, {}


def commit(request: Handler, hub: HubServer, kind: str, id: str, revision: str):
    repository = request.repository(kind, id, write=True)
    files, message = dict(repository.at(revision)[1]), ""
    for operation in map(json.loads, request.body.splitlines()):
        value = operation["value"]
        match operation["key"]:
            case "header":
                message = value["summary"]
            case "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), large=False)
            case "lfsFile":
                files[value["path"]] = File(hub.objects[value["oid"]], large=True)
            case "deletedFile":
                del files[value["path"]]
    sha = repository.commit(message, files)
    return 200, {"commitOid": sha, "commitUrl": f"{hub.url}/{id}/commit/{sha}"}


def validate_yaml(request: Handler, hub: HubServer):
    front_matter = FRONT_MATTER.match(json.loads(request.body)["content"])
    try:
        metadata = yaml.safe_load(front_matter[1]) if front_matter else {}
    except yaml.YAMLError as error:
        return 400, {"errors": [{"message": str(error)}], "warnings": []}
    if not isinstance(metadata, dict):
        return 400, {"errors": [{"message": "metadata must be a mapping"}], "warnings": []}
    return 200, {"errors": [], "warnings": []}


def resolve(request: Handler, hub: HubServer, kind: str | None, id: str, revision: str, path: str):
    sha, files = request.repository(kind, id).at(revision)
    if path not in files:
        raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
    file = files[path]
    headers = {"X-Repo-Commit": sha, "ETag": f'"{file.sha256 if file.large else file.blob}"', "Accept-Ranges": "bytes"}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if not wanted:
        return 200, file.content, headers
    size = len(file.content)
    first, last = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
    if first >= size:
        raise Refusal(416, "range", **{"Content-Range": f"bytes */{size}"})
    return 206, file.content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{size}"}


ROUTES = [  # methods, path, what answers
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("GET", rf"/api/{REPO}/auth-check(?P<write>/write)?", auth_check),
    ("GET", rf"/api/{REPO}(?:/revision/(?P<revision>[^/]+))?", info),
    ("GET", rf"/api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", tree),
    ("POST", rf"/api/{REPO}/paths-info/(?P<revision>[^/]+)", paths_info),
    ("POST", rf"/api/{REPO}/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", rf"/api/{REPO}/commit/(?P<revision>[^/]+)", commit),
    ("POST", r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", store),
    ("GET HEAD", RESOLVE, resolve),
]

"""A small Hugging Face Hub on 127.0.0.1, for tests that push and load by repository id.

It is a real HTTP server. Nothing of huggingface_hub is imported or patched. The unmodified clients talk to it from
other processes. Their environment needs these variables before huggingface_hub is imported:

    HF_ENDPOINT=<HubServer.endpoint>
    HF_TOKEN=<the token given to HubServer>  to write, to call whoami and to read private repositories
    HF_HUB_DISABLE_XET=1                     to write: if hf_xet is installed, uploads skip LFS and demand Xet
    HF_HOME=<an empty folder>                for a fresh cache

Repositories have one branch, main, and every commit stays readable by its sha. Not offered: Xet, multipart uploads,
other branches, tags, pull requests, .gitignore rules.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import parse_qs, unquote

LFS_SUFFIXES = {".arrow", ".bin", ".gz", ".h5", ".npz", ".onnx", ".parquet", ".pt", ".pth", ".safetensors", ".zip"}
USER = "user"


class HubError(Exception):
    """A refusal. The clients choose their exception by its status and X-Error-Code."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | headers


@dataclass(frozen=True)
class Blob:
    """One version of a file. `etag` is its id for the clients: the sha256 under LFS, the git id otherwise."""

    sha256: str
    etag: str
    size: int
    lfs: bool


@dataclass
class Repo:
    """A repository: the tree of each commit by its sha, oldest first. The last commit is main."""

    repo_type: str
    repo_id: str
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit({})  # as on the Hub, a new repository already has a sha

    def commit(self, tree: dict[str, Blob]) -> str:
        content = [self.repo_type, self.repo_id, len(self.commits), {path: tree[path].etag for path in sorted(tree)}]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = tree
        return sha

    def resolve(self, revision: str = "main") -> str:
        sha = next(reversed(self.commits)) if revision == "main" else revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def entries(self, revision: str) -> dict[str, dict[str, Any]]:
        """Return files and folders by path, in the form of the tree and paths-info calls."""
        # The git ids of folders and of LFS pointers are made up. The clients only report them.
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in sorted(self.commits[self.resolve(revision)].items()):
            for folder in map(str, PurePosixPath(path).parents[:-1]):
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40}
            lfs = {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}} if blob.lfs else {}
            entries[path] = {"type": "file", "path": path, "size": blob.size, "oid": blob.etag[:40]} | lfs
        return entries


def uses_lfs(path: str, size: int) -> bool:
    """Return whether a file is uploaded by LFS. The clients never upload an empty file by LFS."""
    return size > 10 * 2**20 or (size > 0 and Path(path).suffix in LFS_SUFFIXES)


class HubServer:
    """The Hub. It serves while its context is open. File contents are in `root`, by sha256; the rest is in memory."""

    def __init__(self, root: Path, token: str = "hf_test"):
        self.token = token
        self.requests: list[tuple[str, str]] = []  # (method, path without its query), in order of arrival
        self.repos: dict[tuple[str, str], Repo] = {}
        self.granted: set[str] = set()  # LFS files that a batch call has allowed to be uploaded
        self.lock = threading.RLock()
        self.blobs = Path(root) / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_repo(self, repo_id: str, folder: Path, repo_type: str = "model") -> str:
        """Publish a folder: main becomes exactly its files. Return the commit's sha."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        with self.lock:
            repo = self.repos.setdefault((repo_type, repo_id), Repo(repo_type, repo_id))
            return repo.commit({path: self.store(data, uses_lfs(path, len(data))) for path, data in contents.items()})

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """Return the files of main."""
        repo = self.repos[repo_type, repo_id]
        return {path: (self.blobs / blob.sha256).read_bytes() for path, blob in repo.commits[repo.resolve()].items()}

    def store(self, data: bytes, lfs: bool) -> Blob:
        sha256 = hashlib.sha256(data).hexdigest()
        with self.lock:
            if not (self.blobs / sha256).is_file():
                (self.blobs / sha256).write_bytes(data)
        etag = sha256 if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return Blob(sha256, etag, len(data), lfs)


@dataclass
class Reply:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


Answer = Reply | dict[str, Any] | list[Any]  # the last two are sent as JSON
ROUTES: list[tuple[str, re.Pattern[str], bool, Callable[..., Answer]]] = []
# An id is owner/name, but the clients also ask for a bare name. Ids, revisions and paths arrive percent-encoded.
REPO = r"(?P<repo_id>[^/]+(?:/[^/]+)?)"
API = rf"/api/(?P<repo_type>model|dataset)s/{REPO}"
WEB = rf"/(?:(?P<repo_type>dataset)s/)?{REPO}"
REVISION = r"/(?P<revision>[^/]+)"


def route(method: str, pattern: str, token: bool = False) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Let a handler answer `method` on paths that match `pattern`. If `token`, the request must have the token."""

    def register(handler: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((method, re.compile(pattern), token, handler))
        return handler

    return register


class Handler(BaseHTTPRequestHandler):
    """One connection. Handlers get the groups of their pattern, with `repo` instead of the repository's type and id."""

    protocol_version = "HTTP/1.1"  # the clients keep connections open
    disable_nagle_algorithm = True  # headers and body are written separately: a body must not wait for the headers' ack

    def __init__(self, hub: HubServer, *args: Any):
        self.hub = hub
        super().__init__(*args)

    def do_GET(self) -> None:
        try:
            answer = self.answer()
            reply = answer if isinstance(answer, Reply) else Reply(json.dumps(answer).encode())
        except HubError as error:
            reply = Reply(json.dumps({"error": str(error)}).encode(), error.status, error.headers)
        self.send_response(reply.status)
        for name, value in ({"Content-Type": "application/json"} | reply.headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing, because HubServer.requests is the log."""

    def answer(self) -> Answer:
        path, _, query = self.path.partition("?")
        self.hub.requests.append((self.command, path))
        self.query = parse_qs(query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        shown = self.headers.get("Authorization")
        if shown not in (None, f"Bearer {self.hub.token}"):
            raise HubError(401, "Invalid credentials in Authorization header")
        for method, pattern, token, handler in ROUTES:
            if method != self.command.replace("HEAD", "GET") or not (match := pattern.fullmatch(path)):
                continue
            if token and not shown:
                raise HubError(401, "Invalid username or password.")
            args: dict[str, Any] = {name: unquote(value) for name, value in match.groupdict().items() if value}
            if "repo_id" in args:
                repo = self.hub.repos.get((args.pop("repo_type", "model"), args.pop("repo_id")))
                if repo is None or (repo.private and not shown):
                    raise HubError(404, "Repository not found", "RepoNotFound")
                args["repo"] = repo
            return handler(self, **args)
        raise HubError(404, "No such page")

    def url(self, repo: Repo) -> str:
        """Return the address of the repository in a browser. The clients read its id off the address."""
        return f"{self.hub.endpoint}/{'' if repo.repo_type == 'model' else repo.repo_type + 's/'}{repo.repo_id}"

    @route("GET", "/api/whoami-v2", token=True)
    def whoami(self) -> Answer:
        """Return the user who holds the token."""
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "id": USER, "name": USER, "fullname": USER, "orgs": [], "auth": access}

    @route("POST", "/api/repos/create", token=True)
    def create(self) -> Answer:
        """Create a repository. If it exists, answer with a 409, which the clients accept under exist_ok.

        Nobody may create a repository under another user's name.
        """
        wanted = json.loads(self.body)
        if wanted.get("organization") not in (None, USER):
            raise HubError(403, f"You don't have the rights to create a model under {wanted['organization']}")
        key = wanted.get("type") or "model", f"{wanted.get('organization') or USER}/{wanted['name']}"
        with self.hub.lock:
            status = 409 if key in self.hub.repos else 200
            repo = self.hub.repos.setdefault(key, Repo(*key, private=wanted.get("visibility") == "private"))
        return Reply(json.dumps({"url": self.url(repo)}).encode(), status)

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Answer:
        """Check a README's metadata before it is committed. Everything is accepted here."""
        return {"errors": [], "warnings": []}

    @route("GET", rf"{API}(?:/revision{REVISION})?")
    def info(self, repo: Repo, revision: str = "main") -> Answer:
        """Answer model_info and dataset_info: the sha of a revision, and its files."""
        sha = repo.resolve(revision)
        siblings = [{"rfilename": path, "size": blob.size} for path, blob in sorted(repo.commits[sha].items())]
        return {"id": repo.repo_id, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings}

    @route("GET", f"{API}/refs")
    def refs(self, repo: Repo) -> Answer:
        """Return branches and tags."""
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.resolve()}
        return {"branches": [main], "converts": [], "tags": [], "pullRequests": []}

    @route("GET", rf"{API}/tree{REVISION}(?:/(?P<path>.+))?")
    def tree(self, repo: Repo, revision: str, path: str = "") -> Answer:
        """List a folder, one level deep or all levels, always on one page."""
        entries = repo.entries(revision)
        if path and entries.get(path, {}).get("type") != "directory":
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        start, recursive = f"{path}/" if path else "", self.query.get("recursive") == ["true"]
        inside = [name for name in entries if name.startswith(start)]
        return [entries[name] for name in inside if recursive or "/" not in name.removeprefix(start)]

    @route("POST", f"{API}/paths-info{REVISION}")
    def paths_info(self, repo: Repo, revision: str) -> Answer:
        """Describe chosen paths (a form, not JSON). Leave out paths that do not exist."""
        entries = repo.entries(revision)
        return [entries[path] for path in parse_qs(self.body.decode()).get("paths", []) if path in entries]

    @route("GET", rf"{WEB}/resolve{REVISION}/(?P<path>.+)")
    def resolve(self, repo: Repo, revision: str, path: str) -> Answer:
        """Download a file or a range of it. HEAD returns its commit, size and etag only."""
        headers = {"X-Repo-Commit": repo.resolve(revision)}
        blob = repo.commits[headers["X-Repo-Commit"]].get(path)
        if blob is None:  # the commit lets the clients remember that the file is missing
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        headers |= {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", "ETag": f'"{blob.etag}"'}
        if blob.lfs:
            headers |= {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.sha256}"'}
        data = (self.hub.blobs / blob.sha256).read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return Reply(data, headers=headers)
        start, stop = int(span[1]), min(int(span[2] or blob.size) + 1, blob.size)
        if start >= stop:
            raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{blob.size}"})
        return Reply(data[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{blob.size}"})

    @route("POST", f"{API}/preupload{REVISION}", token=True)
    def preupload(self, repo: Repo, revision: str) -> Answer:
        """Push, step 1: tell how to upload each file, and the id of the file that it replaces."""
        tree, files = repo.commits[repo.resolve(revision)], json.loads(self.body)["files"]
        for file in files:
            mode = "lfs" if uses_lfs(file["path"], file["size"]) else "regular"
            held = tree[file["path"]].etag if file["path"] in tree else None
            file |= {"uploadMode": mode, "shouldIgnore": False, "oid": held}
        return {"files": files}

    @route("POST", rf"{WEB}\.git/info/lfs/objects/batch", token=True)
    def lfs_batch(self, repo: Repo) -> Answer:
        """Push, step 2, LFS files only: return upload addresses of files not stored yet. Ask for no verify call."""
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if not (self.hub.blobs / item["oid"]).is_file():
                item["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}
                self.hub.granted.add(item["oid"])
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_upload(self, oid: str) -> Answer:
        """Push, step 3: take an LFS file. The request has no token. It must be named in an earlier batch call."""
        if oid not in self.hub.granted:
            raise HubError(403, "This upload was not asked for")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the announced sha256")
        self.hub.store(self.body, lfs=True)
        return Reply()

    @route("POST", f"{API}/commit{REVISION}", token=True)
    def commit(self, repo: Repo, revision: str) -> Answer:
        """Push, step 4: make one commit of a header and changes, one JSON object per line."""
        if revision != "main" or "create_pr" in self.query:
            raise HubError(400, "Only commits to main are taken")
        with self.hub.lock:
            tree = dict(repo.commits[repo.resolve()])
            for line in self.body.splitlines():
                change = json.loads(line)
                key, value, path = change["key"], change["value"], change["value"].get("path", "")
                if key == "header" and value.get("parentCommit", repo.resolve()) != repo.resolve():
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
                if key == "file":
                    tree[path] = self.hub.store(base64.b64decode(value["content"]), lfs=False)
                elif key == "lfsFile" and (self.hub.blobs / value["oid"]).is_file():
                    tree[path] = self.hub.store((self.hub.blobs / value["oid"]).read_bytes(), lfs=True)
                elif key in ("deletedFile", "deletedFolder"):
                    gone = path.removesuffix("/")
                    tree = {name: tree[name] for name in tree if name != gone and not name.startswith(f"{gone}/")}
                elif key != "header":
                    raise HubError(400, f"Cannot apply {line.decode()}")
            sha = repo.commit(tree)
        return {"commitOid": sha, "commitUrl": f"{self.url(repo)}/commit/{sha}"}

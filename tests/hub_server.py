"""A small Hugging Face Hub for tests: enough of its HTTP interface for the real client to push, pull and be refused.

    with Hub() as hub:                       # on 127.0.0.1, a free port
        hub.endpoint                         # for HF_ENDPOINT; HF_HUB_DISABLE_XET=1 besides
        hub.repos["user/name"].commits       # newest last, each with its files
        hub.fail("POST", "/commit/", 500)    # the next such request; "drop" and "drop-after" cut the connection

Repositories are kept in memory. Files of LFS_FROM bytes go through the LFS protocol, as on the Hub.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


LFS_FROM = 10 * 2**20
MAX_BODY = 64 * 2**20
USERS = {"hf_user": "user", "hf_other": "other"}  # token -> name


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    @property
    def commits(self) -> list[Commit]:
        return self.branches["main"]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)

    def add(self, branch: str, message: str, files: dict[str, bytes]) -> Commit:
        commits = self.branches.setdefault(branch, [])
        parent = commits[-1].oid if commits else branch
        digest = hashlib.sha1(f"{parent} {message} {len(commits)}".encode())
        for path in sorted(files):
            digest.update(path.encode() + files[path])
        commits.append(Commit(digest.hexdigest(), message, files))
        return commits[-1]


class Hub:
    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self._failures: list[list] = []
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fail(self, method: str, part: str, how: int | str, times: int = 1) -> None:
        """Answer the next requests whose path contains `part` with a status, or cut the connection."""
        self._failures += [[method, part, how]] * times

    def failure(self, method: str, path: str) -> int | str | None:
        with self.lock:
            for failure in self._failures:
                if failure[0] == method and failure[1] in path:
                    self._failures.remove(failure)
                    return failure[2]
        return None

    def count(self, method: str, part: str) -> int:
        return sum(m == method and part in path for m, path in self.requests)


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message or code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    hub: Hub

    def log_message(self, *_):
        pass

    # ---- Answers ----

    def respond(self, status: int, body=b"", headers: dict | None = None) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Request-Id": "test", **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            data = b""
            while size := int(self.rfile.readline(32).strip(), 16):
                if len(data) + size > MAX_BODY:
                    raise Refused(413)
                data += self.rfile.read(size)
                self.rfile.readline(8)
            self.rfile.readline(8)
            return data
        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_BODY:
            raise Refused(413)
        return self.rfile.read(length)

    def serve(self) -> None:
        url = urllib.parse.urlparse(self.path)
        path = urllib.parse.unquote(url.path)
        query = urllib.parse.parse_qs(url.query)
        self.hub.requests.append((self.command, path))
        failure = self.hub.failure(self.command, path)
        try:
            if failure == "drop":
                # In the middle of the request's body.
                self.rfile.read(min(64, int(self.headers.get("Content-Length") or 0)))
                return self.cut()
            body = self.body()
            if isinstance(failure, int):
                headers = {"Retry-After": "0"} if failure == 429 else {}
                return self.respond(failure, {"error": f"injected {failure}"}, headers)
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    with self.hub.lock:
                        answer = function(self, *match.groups(), body=body, query=query)
                    return self.cut() if failure == "drop-after" else self.respond(*answer)
            raise Refused(404)
        except Refused as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self.respond(error.status, {"error": error.message}, {k: v for k, v in headers.items() if v})

    do_GET = do_HEAD = do_POST = do_PUT = serve

    # ---- Who and what ----

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return USERS.get(token)

    def repo(self, name: str, write: bool = False) -> Repo:
        user, repo = self.user(), self.hub.repos.get(name)
        # As on the Hub: who may not see a repository is not told that it is there.
        if repo is None or (repo.private and user != name.split("/")[0]):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != name.split("/")[0]:
            raise Refused(403 if user else 401, message="You don't have the rights to write here")
        return repo

    def commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # ---- The interface ----

    def create(self, body, query):
        user, wanted = self.user(), json.loads(body)
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        owner = wanted.get("organization") or user
        if owner != user:
            raise Refused(403, message=f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{wanted['name']}"
        answer = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repos:
            return 409, {"error": "You already created this model repo", **answer}
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repos[name] = repo = Repo(private)
        repo.add("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return 200, answer

    def branch(self, name, branch, body, query):
        repo = self.repo(name, write=True)
        if branch in repo.branches:
            return 409, {"error": f"Reference already exists: refs/heads/{branch}"}
        repo.branches[branch] = list(repo.commits)
        return 200, {}

    def info(self, name, revision=None, *, body, query):
        repo = self.repo(name)
        commit = self.commit(repo, revision or "main")
        return 200, {
            "_id": "0", "id": name, "modelId": name, "sha": commit.oid, "private": repo.private, "tags": [],
            "downloads": 0, "likes": 0, "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }  # fmt: skip

    def entry(self, path: str, data: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if len(data) >= LFS_FROM:
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
        return entry

    def tree(self, name, revision, folder=None, *, body, query):
        files = self.commit(self.repo(name), revision).files
        return 200, [self.entry(path, files[path]) for path in sorted(files) if path.startswith(folder or "")]

    def paths_info(self, name, revision, body, query):
        files = self.commit(self.repo(name), revision).files
        wanted = urllib.parse.parse_qs(body.decode()).get("paths", [])
        return 200, [self.entry(path, files[path]) for path in wanted if path in files]

    def resolve(self, name, revision, path, body, query):
        commit = self.commit(self.repo(name), revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **headers}
        data = commit.files[path]
        etag = hashlib.sha256(data).hexdigest() if len(data) >= LFS_FROM else git_oid(data)
        headers |= {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start and int(start[1]) < len(data):
            headers["Content-Range"] = f"bytes {start[1]}-{len(data) - 1}/{len(data)}"
            return 206, data[int(start[1]) :], headers
        return 200, data, headers

    def preupload(self, name, revision, body, query):
        commit = self.commit(self.repo(name, write=True), revision)
        answer = []
        for wanted in json.loads(body)["files"]:
            there = commit.files.get(wanted["path"])
            mode = "lfs" if wanted["size"] >= LFS_FROM else "regular"
            oid = None
            if there is not None:
                oid = hashlib.sha256(there).hexdigest() if mode == "lfs" else git_oid(there)
            answer.append({"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": answer}

    def lfs_batch(self, name, body, query):
        self.repo(name, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}/verify"},
                }
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def lfs_put(self, oid, body, query):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, message="The content has another hash")
        self.hub.lfs[oid] = body
        return 200, b""

    def lfs_verify(self, oid, body, query):
        size = len(self.hub.lfs.get(oid, b""))
        return (200, {}) if size == json.loads(body)["size"] else (404, {"error": "not there, or of another size"})

    def make_commit(self, name, branch, body, query):
        repo = self.repo(name, write=True)
        commit = self.commit(repo, branch)
        files, message = dict(commit.files), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, commit.oid):
                    raise Refused(412, message="A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise Refused(400, message=f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, message=f"unknown operation {item['key']}")
        if query.get("create_pr"):
            branch = f"refs/pr/{len(repo.branches)}"
            repo.branches[branch] = list(repo.commits)
        new = repo.add(branch, message, files)
        url = f"{self.hub.endpoint}/{name}"
        answer = {"success": True, "commitOid": new.oid, "commitUrl": f"{url}/commit/{new.oid}", "hookOutput": ""}
        return 200, {**answer, **({"pullRequestUrl": f"{url}/discussions/1"} if query.get("create_pr") else {})}

    def validate_yaml(self, body, query):
        self.user()
        return 200, {"errors": [], "warnings": []}

    def whoami(self, body, query):
        user = self.user()
        if user is None:
            raise Refused(401)
        return 200, {"name": user, "type": "user", "orgs": []}


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_REPO = r"/api/models/([^/]+/[^/]+)"
ROUTES = [
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), _REPO + r"/branch/(.+)", Handler.branch),
    (("GET", "HEAD"), _REPO, Handler.info),
    (("GET", "HEAD"), _REPO + r"/revision/(.+)", Handler.info),
    (("GET",), _REPO + r"/tree/([^/]+)(?:/(.*))?", Handler.tree),
    (("POST",), _REPO + r"/paths-info/(.+)", Handler.paths_info),
    (("POST",), _REPO + r"/preupload/(.+)", Handler.preupload),
    (("POST",), _REPO + r"/commit/(.+)", Handler.make_commit),
    (("POST",), r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/lfs/([0-9a-f]{64})", Handler.lfs_put),
    (("POST",), r"/lfs/([0-9a-f]{64})/verify", Handler.lfs_verify),
    (("GET", "HEAD"), r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
    (("POST",), r"/api/validate-yaml", Handler.validate_yaml),
    (("GET",), r"/api/whoami-v2", Handler.whoami),
]

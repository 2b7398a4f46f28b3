"""A loopback stand-in for the Hub: enough of its API for the real clients to create, upload, list, resolve
and range-read datasets and models.

Not a test; imported by those that read from, or publish to, the Hub.
"""

import base64
import hashlib
import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

COMMIT = "c0ffee" + "0" * 34  # of what a repository held from the start
NAME = r"([^/]+/[^/]+)"
KIND = r"(models|datasets)"
LARGE_FILES = (
    ".safetensors",
    ".bin",
    ".png",
    ".arrow",
    ".parquet",
)  # as in the .gitattributes of a new model


class HubServer:
    """`with HubServer({"owner/name": {"path": bytes}}) as hub:` serves at hub.url.

    `troubles` are statuses (429, 503, …), alone or with the answer's headers (429, {"Retry-After": "2"}), or
    "cut" (the connection ends in the middle of a body); each is dealt out once, at random moments. `scripted`
    maps a regular expression over "METHOD path" to troubles dealt out in their order to what matches: also
    "drop" (no answer, nothing done), "lose" (done, no answer) and "hang" (nothing done, no answer until
    `released` is set). `served` lists the (method, path, status) of all answers, `uploads` the SHA-256 of
    every large file that came. With a `token`, writing and whatever is in `private` take it; its owner is
    `user`.
    """

    def __init__(self, repositories, troubles=(), seed=0, *, scripted=None, token=None):
        self.repositories = repositories  # name → path → content, of the branch main
        self.branches = {}  # (name, branch) → path → content
        self.heads = {}  # (name, branch) → commit
        self.snapshots = {}  # (name, commit) → path → content
        self.private = set()
        self.objects = {}  # large files by SHA-256
        self.uploads = []
        self.troubles = list(troubles)
        self.scripted = {pattern: list(items) for pattern, items in (scripted or {}).items()}
        self.token = token
        self.random = random.Random(seed)
        self.served = []
        self.lock = threading.Lock()
        self.hanging, self.released = threading.Event(), threading.Event()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def trouble(self, request):
        with self.lock:
            for pattern, troubles in self.scripted.items():
                if troubles and re.search(pattern, request):
                    return troubles.pop(0)
            if self.troubles and self.random.random() < 0.5:
                return self.troubles.pop(0)
        return None

    def files(self, name, revision="main"):
        """The files of a branch or commit, or None where there is no such thing."""
        if name not in self.repositories:
            return None
        if revision in ("main", self.heads.get((name, "main"), COMMIT)):
            return self.repositories[name]
        return self.branches.get((name, revision), self.snapshots.get((name, revision)))

    def head(self, name, revision="main"):
        if (name, revision) in self.snapshots:
            return revision
        return self.heads.get((name, revision), COMMIT)

    def commit(self, name, revision, operations):
        """Carry them out all at once; returns the commit, or None if a large file was never uploaded."""
        with self.lock:
            files = dict(self.files(name, revision))
            for operation in operations:
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    if value["oid"] not in self.objects:
                        return None
                    files[value["path"]] = self.objects[value["oid"]]
                elif operation["key"] == "deletedFile":
                    del files[value["path"]]
            commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
            self.snapshots[name, commit] = dict(files)
            self.heads[name, revision] = commit
            target = self.repositories[name] if revision == "main" else self.branches[name, revision]
            target.clear()
            target.update(files)
            return commit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def do_POST(self):
        self.answer(body=True)

    def do_PUT(self):
        self.answer(body=True)

    def answer(self, body):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            content = self.read_chunks()
        path = unquote(urlsplit(self.path).path)
        self.lost = False
        trouble = self.hub.trouble(f"{self.command} {path}")
        if isinstance(trouble, int):
            trouble = (trouble, {"Retry-After": "0"})
        if isinstance(trouble, tuple):
            return self.send(trouble[0], b"try again", body, trouble[1])
        if trouble == "hang":
            self.hub.hanging.set()
            self.hub.released.wait()
        if trouble in ("drop", "hang"):
            self.close_connection = True
            return self.hub.served.append((self.command, self.path, trouble))
        self.lost = trouble == "lose"
        if path == "/api/repos/create":
            return self.create(json.loads(content), body)
        if path == "/api/validate-yaml":
            problems = card_problems(json.loads(content)["content"])
            status = 400 if problems else 200
            errors = [{"message": problem} for problem in problems]
            return self.send_json({"errors": errors, "warnings": []}, body, status)
        if match := re.fullmatch(rf"/(?:datasets/)?{NAME}\.git/info/lfs/objects/batch", path):
            return self.lfs_batch(match[1], json.loads(content), body)
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})(/verify)?", path):
            return self.lfs_object(match[1], bool(match[2]), content, body, cut=trouble == "cut")
        if match := re.fullmatch(rf"/(?:datasets/)?{NAME}/resolve/([^/]+)/(.*)", path):
            return self.resolve(*match.groups(), body, cut=trouble == "cut")
        if not (match := re.fullmatch(rf"/api/{KIND}/{NAME}(?:/(.*))?", path)):
            return self.send(404, b"{}", body)
        kind, name, rest = match.groups()
        action, _, rest = (rest or "").partition("/")
        if not self.may(name, writes=action in ("preupload", "commit", "branch")):
            return self.refuse(body)
        revision, _, below = rest.partition("/")
        files = self.hub.files(name, revision or "main")
        if action == "branch":
            return self.branch(name, revision, body)
        if files is None:
            code = "RevisionNotFound" if name in self.hub.repositories else "RepoNotFound"
            return self.send(404, b"{}", body, {"X-Error-Code": code})
        if action == "preupload":
            return self.preupload(files, json.loads(content)["files"], body)
        if action == "commit":
            return self.commit(kind, name, revision, content, body)
        if action in ("", "revision"):
            about = {
                "id": name,
                "sha": self.hub.head(name, revision or "main"),
                "siblings": [{"rfilename": path} for path in sorted(files)],
                "private": name in self.hub.private,
                "tags": [],
                "downloads": 0,
            }
            return self.send_json(about, body)
        if action == "tree":
            items = self.tree(files, below.rstrip("/"), "recursive=true" in self.path.lower())
            if below and not items:
                return self.send(404, b"{}", body, {"X-Error-Code": "EntryNotFound"})
            return self.send_json(items, body)
        if action == "paths-info":
            wanted = (
                json.loads(content)["paths"]
                if content.startswith(b"{")
                else re.findall(r"paths=([^&]+)", content.decode())
            )
            everything = self.tree(files, "", True)
            return self.send_json([item for item in everything if item["path"] in map(unquote, wanted)], body)
        return self.send(404, b"{}", body)

    def read_chunks(self):
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def may(self, name, writes):
        """Whether the sender may do that, by the token that came along."""
        if self.hub.token is None:
            return True
        knows = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        return knows if writes else knows or name not in self.hub.private

    def refuse(self, body):
        known = self.headers.get("Authorization") is not None
        message = "Invalid credentials in Authorization header" if known else "Repository not found"
        return self.send(401, b"{}", body, {"X-Error-Message": message})

    def create(self, asked, body):
        owner = asked.get("organization") or "user"
        name = f"{owner}/{asked['name']}"
        if not self.may(name, writes=True):
            return self.refuse(body)
        if self.hub.token is not None and owner != "user":
            message = f'You don\'t have the rights to create a model under the namespace "{owner}"'
            return self.send(403, b"{}", body, {"X-Error-Message": message})
        folder = "datasets/" if asked.get("type") == "dataset" else ""
        content = {"url": f"{self.hub.url}/{folder}{name}", "name": name}
        if name in self.hub.repositories:
            return self.send_json(content, body, 409)
        self.hub.repositories[name] = {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(name)
        return self.send_json(content, body)

    def branch(self, name, branch, body):
        if branch == "main" or (name, branch) in self.hub.branches:
            return self.send_json({"error": "Reference already exists"}, body, 409)
        self.hub.branches[name, branch] = dict(self.hub.repositories[name])
        return self.send_json({}, body)

    def preupload(self, files, asked, body):
        modes = []
        for file in asked:
            is_large = file["path"].endswith(LARGE_FILES)
            mode = {"path": file["path"], "uploadMode": "lfs" if is_large else "regular"}
            if file["path"] in files:
                mode["oid"] = object_id(file["path"], files[file["path"]])
            modes.append({**mode, "shouldIgnore": False})
        return self.send_json({"files": modes}, body)

    def lfs_batch(self, name, asked, body):
        if not self.may(name, writes=True):
            return self.refuse(body)
        objects = []
        for item in asked["objects"]:
            address = f"{self.hub.url}/lfs/{item['oid']}"
            actions = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
            present = item["oid"] in self.hub.objects
            objects.append({**item, **({} if present else {"actions": actions})})
        return self.send_json({"transfer": "basic", "objects": objects}, body)

    def lfs_object(self, oid, is_verified, content, body, cut):
        if self.command == "PUT":
            if hashlib.sha256(content).hexdigest() != oid:
                return self.send(400, b"not the content that was announced", body)
            self.hub.objects[oid] = content
            self.hub.uploads.append(oid)
            return self.send(200, b"", body)
        if oid not in self.hub.objects:
            return self.send(404, b"{}", body)
        if is_verified:
            return self.send_json({}, body)
        return self.send_file(self.hub.objects[oid], body, {"ETag": f'"{oid}"'}, cut)

    def commit(self, kind, name, revision, content, body):
        commit = self.hub.commit(name, revision, list(map(json.loads, content.splitlines())))
        if commit is None:
            return self.send(400, b"{}", body, {"X-Error-Message": "a large file was not uploaded"})
        folder = "datasets/" if kind == "datasets" else ""
        url = f"{self.hub.url}/{folder}{name}/commit/{commit}"
        return self.send_json(
            {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""}, body
        )

    def resolve(self, name, revision, path, body, cut):
        if not self.may(name, writes=False):
            return self.refuse(body)
        files, head = self.hub.files(name, revision), self.hub.head(name, revision)
        if files is None:
            code = "RevisionNotFound" if name in self.hub.repositories else "RepoNotFound"
            return self.send(404, b"", body, {"X-Error-Code": code})
        if path not in files:
            return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": head})
        data, oid = files[path], object_id(path, files[path])
        about = {"ETag": f'"{oid}"', "X-Repo-Commit": head}
        if path.endswith(".safetensors"):  # large files lie on another host, as the Hub's do
            self.hub.objects[oid] = data
            about |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(data))}
            return self.send(
                302,
                b"",
                body,
                {**about, "Location": f"{self.hub.url}/lfs/{oid}".replace("127.0.0.1", "localhost")},
            )
        return self.send_file(data, body, about, cut)

    def tree(self, files, below, recursive):
        items, folders = [], set()
        for name, data in sorted(files.items()):
            if below and not name.startswith(below + "/"):
                continue
            inside = name[len(below) + 1 :] if below else name
            parents = inside.split("/")[:-1]
            for depth in range(1, len(parents) + 1):
                folder = "/".join([*([below] if below else []), *parents[:depth]])
                if folder not in folders and (recursive or depth == 1):
                    folders.add(folder)
                    items.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": folder})
            if recursive or not parents:
                oid = hashlib.sha1(data).hexdigest()
                items.append({"type": "file", "oid": oid, "size": len(data), "path": name})
        return items

    def send_file(self, data, body, headers, cut):
        first, last, status = 0, len(data) - 1, 200
        headers = {**headers, "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, status = int(match[1]), 206
            last = min(int(match[2] or last), last)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.send(status, data[first : last + 1], body, headers, cut)

    def send_json(self, content, body, status=200):
        self.send(status, json.dumps(content).encode(), body, {"Content-Type": "application/json"})

    def send(self, status, content, body, headers=None, cut=False):
        self.hub.served.append((self.command, self.path, "cut" if cut else "lost" if self.lost else status))
        if self.lost:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True


def card_problems(card):
    """What the Hub's documentation of card metadata does not allow: https://hf.co/docs/hub/model-cards."""
    if not card.startswith("---\n"):
        return []
    metadata = yaml.safe_load(card.split("---\n")[1])
    problems = []

    def check(value, kind, name):
        if not isinstance(value, kind):
            problems.append(f'"{name}" must be {kind}, not {value!r}')

    for name in ("library_name", "pipeline_tag", "license"):
        if name in metadata:
            check(metadata[name], str, name)
    for name in ("tags", "datasets"):
        for item in metadata.get(name, []):
            check(item, str, name)
    for number, model in enumerate(metadata.get("model-index", [])):
        where = f"model-index[{number}]"
        check(model.get("name"), str, f"{where}.name")
        for result in model["results"]:
            check(result["task"]["type"], str, f"{where}.task.type")
            for name in ("name", "type"):
                check(result["dataset"].get(name), str, f"{where}.dataset.{name}")
            for metric in result["metrics"]:
                check(metric.get("type"), str, f"{where}.metrics.type")
                check(metric.get("value"), (int, float, str), f"{where}.metrics.value")
    return problems


def object_id(path, content):
    """What the Hub calls a file's content: SHA-256 of a large one, git's SHA-1 of any other."""
    if path.endswith(LARGE_FILES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

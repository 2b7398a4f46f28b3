"""A loopback stand-in for the Hub: enough of its API for the real clients to list, resolve and range-read a
dataset.

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

COMMIT = "c0ffee" + "0" * 34


class HubServer:
    """`with HubServer({"owner/name": {"path": bytes}}) as hub:` serves at hub.url.

    `troubles` are statuses (429, 503, …) or "cut" (the connection ends in the middle of a body); each is
    dealt out once, at random moments, and `served` lists the (method, path, status) of all answers.
    """

    def __init__(self, repositories, troubles=(), seed=0):
        self.repositories = repositories
        self.troubles = list(troubles)
        self.random = random.Random(seed)
        self.served = []
        self.lock = threading.Lock()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def trouble(self):
        with self.lock:
            if self.troubles and self.random.random() < 0.5:
                return self.troubles.pop(0)
        return None


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

    def answer(self, body):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        trouble = self.hub.trouble()
        if isinstance(trouble, int):
            return self.send(trouble, b"try again", body, {"Retry-After": "0"})
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.hub.repositories.setdefault(name, {})
            return self.send_json({"url": f"{self.hub.url}/datasets/{name}", "name": name}, body)
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []}, body)
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/preupload/[^/]+", path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
            return self.send_json({"files": files}, body)
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/commit/[^/]+", path):
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    data = base64.b64decode(line["value"]["content"])
                    self.hub.repositories[match[1]][line["value"]["path"]] = data
            url = f"{self.hub.url}/datasets/{match[1]}/commit/{COMMIT}"
            return self.send_json(
                {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""}, body
            )
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            files = self.hub.repositories.get(match[1])
            if files is None:
                return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": name} for name in sorted(files)]
            about = {
                "id": match[1],
                "sha": COMMIT,
                "siblings": siblings,
                "private": False,
                "tags": [],
                "downloads": 0,
            }
            return self.send_json(about, body)
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", path):
            below = (match[2] or "").rstrip("/")
            return self.send_json(self.tree(match[1], below, "recursive=true" in self.path.lower()), body)
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/[^/]+", path):
            wanted = (
                json.loads(content)["paths"]
                if content.startswith(b"{")
                else re.findall(r"paths=([^&]+)", content.decode())
            )
            everything = self.tree(match[1], "", True)
            return self.send_json([item for item in everything if item["path"] in map(unquote, wanted)], body)
        if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.*)", path):
            data = self.hub.repositories.get(match[1], {}).get(match[2])
            if data is None:
                return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return self.send_file(data, body, cut=trouble == "cut")
        return self.send(404, b"{}", body)

    def tree(self, repository, below, recursive):
        items, folders = [], set()
        for name, data in sorted(self.hub.repositories[repository].items()):
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

    def send_file(self, data, body, cut):
        first, last, status = 0, len(data) - 1, 200
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, status = int(match[1]), 206
            last = min(int(match[2] or last), last)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.send(status, data[first : last + 1], body, headers, cut)

    def send_json(self, content, body):
        self.send(200, json.dumps(content).encode(), body, {"Content-Type": "application/json"})

    def send(self, status, content, body, headers=None, cut=False):
        self.hub.served.append((self.command, self.path, "cut" if cut else status))
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

# SPDX-License-Identifier: Apache-2.0
"""A hub on this machine: what huggingface_hub asks of one when it fetches and when it commits, kept in memory."""

import base64
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote, urlsplit


class Repository:
    """Commits of files, by hash; branches, by name."""

    def __init__(self, files=None, private=False, gated=False):
        self.commits, self.branches, self.messages = {}, {}, []
        self.private, self.gated = private, gated
        self.commit("main", files or {}, "start")

    def commit(self, branch, files, message):
        """Puts these files, and no others, at the head of a branch."""
        self.messages.append(message)
        name = hashlib.sha1(f"{len(self.messages)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[name] = dict(files)
        self.branches[branch] = name
        return name

    def find(self, revision):
        """The hash that a branch or a hash stands for."""
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hub(http.server.ThreadingHTTPServer):
    """Repositories by id. `asked` is every request so far; `uploads` what came by git's protocol for large files.

    Attributes:
      token: who has it may write, and see what is private.
      ignored: names that the repository's .gitignore leaves out.
    """

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.repositories, self.asked, self.uploads = {}, [], {}
        self.token, self.ignored = "secret", ()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def fetched(self):
        """Names of the files whose content was asked for."""
        return sorted(path.rpartition("/")[2] for method, path in self.asked if method == "GET" and "/resolve/" in path)

    def stop(self):
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub  # each answer ends its connection, so that a hub that has stopped answers nothing

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, answer in _ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(self, *match.groups())
        return self._say(404, {"error": f"this hub has no {self.command} {path}"})

    def _say(self, status, found=None, headers=()):
        content = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(content), **dict(headers)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def _known(self):
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def _at(self, name, revision="main"):
        """The repository and the hash of a revision; None after an answer that says what is wrong."""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self._known):
            return self._say(404 if self._known else 401, {"error": "?"}, {"X-Error-Code": "RepoNotFound"})
        if repository.gated:
            return self._say(403, {"error": "?"}, {"X-Error-Code": "GatedRepo"})
        commit = repository.find(revision)
        if commit is None:
            return self._say(404, {"error": "?"}, {"X-Error-Code": "RevisionNotFound"})
        return repository, commit

    def _info(self, name, revision=None):
        if found := self._at(name, revision or "main"):
            repository, commit = found
            self._say(200, {"id": name, "sha": commit, "private": repository.private, "siblings": [], "tags": []})

    def _tree(self, name, revision):
        if found := self._at(name, revision):
            repository, commit = found
            files = repository.commits[commit].items()
            self._say(200, [{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in files])

    def _file(self, name, revision, file):
        if found := self._at(name, revision):
            repository, commit = found
            if file not in repository.commits[commit]:
                return self._say(404, {"error": "?"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            content = repository.commits[commit][file]
            self._say(200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit})

    def _create(self):
        asked = json.loads(self._body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self._known:
            return self._say(401, {"error": "no token"})
        if name in self.server.repositories:
            return self._say(409, {"error": "it exists", "url": f"{self.server.address}/{name}"})
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.server.repositories[name] = Repository({".gitattributes": b"*"}, private)
        self._say(200, {"url": f"{self.server.address}/{name}"})

    def _branch(self, name, branch):
        repository, commit = self.server.repositories[name], self.server.repositories[name].find("main")
        if branch in repository.branches:
            return self._say(409, {"error": "it exists"})
        repository.branches[branch] = commit
        self._say(200, {})

    def _preupload(self, name, revision):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": file["path"] in self.server.ignored,
                "oid": None,
            }
            for file in json.loads(self._body)["files"]
        ]
        self._say(200, {"files": files})

    def _batch(self, name):
        upload = {"upload": {"href": f"{self.server.address}/upload/{{}}", "header": {}}}
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": json.loads(json.dumps(upload).replace("{}", o["oid"], 1))}
            for o in json.loads(self._body)["objects"]
        ]
        self._say(200, {"transfer": "basic", "objects": objects})

    def _upload(self, oid):
        assert hashlib.sha256(self._body).hexdigest() == oid
        self.server.uploads[oid] = self._body
        self._say(200, {})

    def _commit(self, name, revision):
        if not self._known:
            return self._say(403, {"error": "this token may not write"})
        repository = self.server.repositories[name]
        steps = [json.loads(line) for line in self._body.splitlines()]
        head = repository.find(revision)
        if steps[0]["value"].get("parentCommit", head) != head:
            return self._say(412, {"error": "the branch has moved on"})
        files = dict(repository.commits[head])
        for step in steps[1:]:
            value = step["value"]
            if step["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
            else:
                del files[value["path"]]
        oid = repository.commit(revision, files, steps[0]["value"]["summary"])
        self._say(200, {"commitUrl": f"{self.server.address}/{name}/commit/{oid}", "commitOid": oid})


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = {
    rf"GET /api/models/{_NAME}": _Handler._info,
    rf"GET /api/models/{_NAME}/revision/(.+)": _Handler._info,
    rf"GET /api/models/{_NAME}/tree/([^/]+)/?": _Handler._tree,
    rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)": _Handler._file,
    r"POST /api/repos/create": _Handler._create,
    r"POST /api/validate-yaml": lambda handler: handler._say(200, {"errors": [], "warnings": []}),
    rf"POST /api/models/{_NAME}/branch/(.+)": _Handler._branch,
    rf"POST /api/models/{_NAME}/preupload/(.+)": _Handler._preupload,
    rf"POST /{_NAME}\.git/info/lfs/objects/batch": _Handler._batch,
    r"PUT /upload/(\w+)": _Handler._upload,
    rf"POST /api/models/{_NAME}/commit/(.+)": _Handler._commit,
}


def _oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

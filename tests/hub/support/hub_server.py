"""A Hugging Face Hub on the loopback interface, for the real client over real HTTP.

    with HubServer() as hub:
        hub.add_user('me', 'hf_me')
        hub.create_repo('me/model')
        sha = hub.commit('me/model', {'config.json': b'{}'})
        ...  # point HF_ENDPOINT at hub.endpoint

Models only. Two listeners, the Hub and its storage, so that redirects to files cross an origin as they do in the real
world; the storage answers 400 when a token reaches it. Everything lives in memory. With `xet=True` a third listener
speaks the Xet protocol (`xet_server.py`), which the client uses by default; without it the client needs
`HF_HUB_DISABLE_XET=1`.

The answers follow what `huggingface_hub` 2.4 reads: status, `X-Error-Code`, `X-Error-Message`, a JSON `error`, the
`url` in a 409, `X-Repo-Commit` on a missing entry. Objects and commits have git's own ids.

`HubServer.fault` makes the next matching requests go wrong; `HubServer.log` is what came in.
"""

import base64
import binascii
import contextlib
import fnmatch
import hashlib
import itertools
import json
import re
import secrets
import socket
import socketserver
import struct
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

MAX_REGULAR_SIZE = 10 * 2**20

_LFS_PATTERNS = (
    '*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx '
    '*.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz '
    '*.wasm *.xz *.zip *.zst *tfevents*'
)
GITATTRIBUTES = ''.join(f'{p} filter=lfs diff=lfs merge=lfs -text\n' for p in _LFS_PATTERNS.split()).encode()

# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = frozenset(
    (
        'apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 '
        'bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc '
        'cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 '
        'cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 '
        'cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 '
        'eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c '
        'ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa '
        'unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 '
        'llama3.2 llama3.3 llama4 grok2-community gemma unknown other'
    ).split()
)
_RELATIONS = ('adapter', 'merge', 'quantized', 'finetune')


# --- Requests, answers, faults ----------------------------------------------------------------------------------------


@dataclass
class Record:
    """One request as it came in; `status` is None when it was never answered."""

    method: str
    path: str
    headers: dict[str, str]
    listener: str
    size: int = 0
    status: int | None = None

    def __str__(self) -> str:
        return f'{self.method} {self.path} -> {self.status} ({self.listener})'


@dataclass
class Request:
    """A request with its body, handed to a route."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        try:
            data = json.loads(self.body)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise HubError(400, 'Invalid JSON body')
        return data

    def flag(self, name: str) -> bool:
        return self.query.get(name, [''])[0].lower() in ('1', 'true')


@dataclass
class Reply:
    """An answer: a status, a body, headers."""

    status: int = 200
    body: bytes = b''
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> 'Reply':
        return cls(status, json.dumps(data).encode(), {'Content-Type': 'application/json', **(headers or {})})


class HubError(Exception):
    """An error answer in the Hub's form."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        **body: Any,
    ) -> None:
        super().__init__(message)
        extra = {'X-Error-Message': message.splitlines()[0], **({'X-Error-Code': code} if code else {})}
        self.reply = Reply.json({'error': message, **body}, status, {**extra, **(headers or {})})


@dataclass
class Fault:
    """What goes wrong with the next requests that match; `hits` counts those it struck."""

    method: str
    path: re.Pattern[str]
    times: int | None
    status: int | None
    headers: dict[str, str]
    body: bytes | None
    drop: bool
    truncate: int | None
    honest: bool
    corrupt: bool
    stall: bool
    after: bool
    call: Callable[[], object] | None
    drip: float | None
    hits: int = 0

    def strikes(self, method: str, path: str) -> bool:
        spent = self.times is not None and self.hits >= self.times
        return not spent and self.method in ('*', method) and self.path.search(path) is not None


class _HangUp(Exception):
    """Close the connection without an answer."""


def _flip(data: bytes) -> bytes:
    if not data:
        return data
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x01]) + data[middle + 1 :]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    server: '_Listener'

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError, _HangUp):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get('Transfer-Encoding', '').lower() == 'chunked':
            parts = []
            while size := int(self.rfile.readline().split(b';')[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b''.join(parts)
        size = int(self.headers.get('Content-Length', 0))
        body = self.rfile.read(size)
        if len(body) < size:
            raise _HangUp
        return body

    def _reset(self) -> None:
        """Close at once, so that the client sees its connection reset rather than ended."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.rfile.close()
        self.wfile.close()
        self.connection.close()

    def _serve(self) -> None:
        hub, listener = self.server.hub, self.server.name
        headers = {k.lower(): v for k, v in self.headers.items()}
        parts = urllib.parse.urlsplit(self.path)
        record = Record(self.command, self.path, headers, listener)
        cut = hub._cut_off(record)
        if cut is not None:
            self.rfile.read(cut)
            self._reset()
            raise _HangUp
        body = self._body()
        record.size = len(body)
        fault = hub._receive(record)
        if fault and not fault.after and self._go_wrong(fault, record):
            return
        if fault and fault.corrupt and self.command == 'PUT':
            body = _flip(body)
        query = urllib.parse.parse_qs(parts.query, keep_blank_values=True)
        reply = hub._answer(listener, Request(self.command, parts.path, query, headers, body))
        if fault and fault.after and self._go_wrong(fault, record):
            return
        self._send(reply, record, fault)

    def _go_wrong(self, fault: Fault, record: Record) -> bool:
        """Do what the fault says in place of an answer, if it says so."""
        if fault.call:
            fault.call()
        if fault.stall:
            self.server.hub._hold()
            raise _HangUp
        if fault.drop:
            raise _HangUp
        if fault.status is not None:
            message = f'Injected failure {fault.status}'
            reply = HubError(fault.status, message, headers=fault.headers).reply
            if fault.body is not None:
                reply.body = fault.body
                reply.headers['Content-Type'] = 'text/plain'
            self._send(reply, record, None)
            return True
        return False

    def _send(self, reply: Reply, record: Record, fault: Fault | None) -> None:
        body = reply.body
        if fault and fault.corrupt and self.command == 'GET' and reply.status in (200, 206):
            body = _flip(body)
        if fault and fault.headers and fault.status is None:
            reply.headers.update(fault.headers)
        length = len(body)
        cut = fault.truncate if fault and self.command != 'HEAD' else None
        if cut is not None:
            body = body[:cut]
            length = len(body) if fault and fault.honest else length
        record.status = reply.status
        self.send_response(reply.status)
        self.send_header('X-Request-Id', secrets.token_hex(8))
        if reply.status != 204:
            self.send_header('Content-Length', str(length))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if cut is not None:
            self.close_connection = True
            self.send_header('Connection', 'close')
        self.end_headers()
        if fault and fault.drip and self.command != 'HEAD':
            self._drip(body, fault.drip)
        elif self.command != 'HEAD':
            self.wfile.write(body)
        if cut is not None:
            self.wfile.flush()
            raise _HangUp

    def _drip(self, body: bytes, seconds: float) -> None:
        """Send a byte, and another one after some seconds, until the body or the test ends."""
        for i in range(len(body)):
            self.wfile.write(body[i : i + 1])
            self.wfile.flush()
            if self.server.hub._held(seconds):
                raise _HangUp

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: 'HubServer', name: str, port: int = 0) -> None:
        self.hub, self.name = hub, name
        self._sockets: set[socket.socket] = set()
        self._threads_of: list[threading.Thread] = []
        self._lock = threading.Lock()
        super().__init__(('127.0.0.1', port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        # HTTPServer would look up the name of the host, which can take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = '127.0.0.1', self.server_address[1]

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._sockets.add(request)
            self._threads_of.append(threading.current_thread())
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._sockets.discard(request)
                self._threads_of.remove(threading.current_thread())

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.hub._note_bug()

    def close(self) -> None:
        """Stop listening, hang up on everyone and wait for the handlers."""
        self.shutdown()
        self._thread.join()
        self.server_close()
        with self._lock:
            threads = list(self._threads_of)
            for connection in self._sockets:
                with contextlib.suppress(OSError):  # The client was faster.
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)


# --- Users, repositories, git -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class User:
    name: str
    token: str
    role: str
    namespaces: frozenset[str]


@dataclass(frozen=True)
class File:
    """A file in a commit: its git blob, and for a large one what the pointer in that blob says."""

    oid: str
    size: int
    data: bytes | None = None
    sha256: str | None = None
    xet: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    @property
    def pointer_size(self) -> int:
        return len(_pointer(self.sha256 or '', self.size))


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    files: dict[str, File]
    title: str
    message: str
    author: str
    date: str


@dataclass
class PullRequest:
    num: int
    title: str
    description: str
    author: str
    base: str
    is_pull_request: bool
    status: str
    created: str
    start: str
    head: str | None = None
    merge: str | None = None
    comments: list[dict[str, Any]] = field(default_factory=list)


def git_oid(kind: str, data: bytes) -> str:
    """The id git gives to an object."""
    return hashlib.sha1(f'{kind} {len(data)}\0'.encode() + data).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    return f'version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n'.encode()


def _regular(data: bytes) -> File:
    return File(git_oid('blob', data), len(data), data=data)


def _large(sha256: str, size: int, xet: str | None) -> File:
    return File(git_oid('blob', _pointer(sha256, size)), size, sha256=sha256, xet=xet)


def _tree_oids(files: Mapping[str, File]) -> dict[str, str]:
    """Ids of all directories, '' for the root."""
    children: dict[str, dict[str, tuple[bool, str]]] = {'': {}}
    for path, file in files.items():
        folder, _, name = path.rpartition('/')
        children.setdefault(folder, {})[name] = (False, file.oid)
        while folder:
            folder = folder.rpartition('/')[0]
            children.setdefault(folder, {})
    oids = {}
    for folder in sorted(children, key=lambda f: (-f.count('/') - bool(f), f)):
        # Git sorts a directory as if its name ended in a slash.
        entries = sorted(children[folder].items(), key=lambda e: e[0].encode() + (b'/' if e[1][0] else b''))
        body = b''.join(
            (b'40000 ' if is_dir else b'100644 ') + name.encode() + b'\0' + bytes.fromhex(oid)
            for name, (is_dir, oid) in entries
        )
        oids[folder] = git_oid('tree', body)
        if folder:
            parent, _, name = folder.rpartition('/')
            children[parent][name] = (True, oids[folder])
    return oids


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern of .gitattributes or .gitignore takes in a path."""
    pattern = pattern.lstrip('/') if '/' in pattern.strip('/') else pattern
    if pattern.endswith('/'):
        return path.startswith(pattern) or f'/{pattern}' in f'/{path}'
    if '/' in pattern:
        return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, pattern.replace('/**/', '/'))
    return any(fnmatch.fnmatchcase(part, pattern) for part in path.split('/'))


class Repo:
    """A model repository: commits by id, branches, tags, pull requests."""

    def __init__(self, repo_id: str, private: bool, gated: str | bool, disabled: bool, now: str) -> None:
        self.id, self.private, self.gated, self.disabled, self.created = repo_id, private, gated, disabled, now
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.discussions: dict[int, PullRequest] = {}
        self.allowed: set[str] = set()
        self.objects: set[str] = set()

    def find(self, revision: str) -> Commit | None:
        name = revision.removeprefix('refs/heads/')
        sha = self.branches.get(name) or self.tags.get(revision.removeprefix('refs/tags/'))
        if sha is None and (match := re.fullmatch(r'refs/pr/(\d+)', revision)):
            found = self.discussions.get(int(match[1]))
            sha = found.head if found else None
        if sha is None and re.fullmatch(r'[0-9a-f]{7,40}', revision):
            sha = next((s for s in self.commits if s.startswith(revision)), None)
        return self.commits[sha] if sha else None

    def write_ref(self, revision: str) -> Callable[[str], None] | None:
        """How to move a branch or an open pull request, None when the revision is neither."""
        name = revision.removeprefix('refs/heads/')
        if name in self.branches:
            return lambda sha: self.branches.__setitem__(name, sha)
        match = re.fullmatch(r'refs/pr/(\d+)', revision)
        found = self.discussions.get(int(match[1])) if match else None
        if found and found.is_pull_request and found.status in ('open', 'draft'):
            return lambda sha: setattr(found, 'head', sha)
        return None

    def add(self, parent: str | None, files: dict[str, File], title: str, message: str, author: str, now: str) -> str:
        tree = _tree_oids(files)['']
        seconds = int(datetime.fromisoformat(now.replace('Z', '+00:00')).timestamp())
        who = f'{author} <{author}@users.noreply.huggingface.co> {seconds} +0000'
        lines = [f'tree {tree}', *([f'parent {parent}'] if parent else []), f'author {who}', f'committer {who}']
        text = '\n'.join(lines) + f'\n\n{title}\n' + (f'\n{message}\n' if message else '')
        sha = git_oid('commit', text.encode())
        self.commits[sha] = Commit(sha, parent, files, title, message, author, now)
        return sha

    def history(self, commit: Commit) -> list[Commit]:
        chain = [commit]
        while chain[-1].parent:
            chain.append(self.commits[chain[-1].parent])
        return chain

    def last_change(self, commit: Commit, path: str) -> Commit:
        def oid(c: Commit) -> list[tuple[str, str]]:
            return [(p, f.oid) for p, f in sorted(c.files.items()) if p == path or p.startswith(path + '/')]

        chain = self.history(commit)
        pairs = zip(chain, [*chain[1:], None], strict=True)
        return next(c for c, before in pairs if before is None or oid(c) != oid(before))


# --- Model cards ------------------------------------------------------------------------------------------------------


class _CardLoader(yaml.SafeLoader):
    """Refuses the same key twice, as the Hub's parser does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(set(map(repr, keys))) < len(keys):
            raise yaml.constructor.ConstructorError(None, None, 'duplicated mapping key', node.start_mark)
        return super().construct_mapping(node, deep)


def card_metadata(text: str) -> Any:
    """The metadata block of a README, None without one; raises yaml.YAMLError."""
    match = re.match(r'\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(?:\r?\n|$)', text, flags=re.DOTALL)
    return yaml.load(match[1], Loader=_CardLoader) if match else None


def _check_ids(data: Mapping[str, Any], key: str, errors: list[str], pattern: str = r'\S(?:.*\S)?') -> None:
    value = data.get(key)
    if key not in data or isinstance(value, str):
        items = [value] if isinstance(value, str) else []
        names = [f'"{key}"']
    elif isinstance(value, list):
        items, names = value, [f'"{key}[{i}]"' for i in range(len(value))]
    else:
        errors.append(f'"{key}" must be one of [string, array]')
        return
    for item, name in zip(items, names, strict=False):
        if not isinstance(item, str):
            errors.append(f'{name} must be a string')
        elif not re.fullmatch(pattern, item):
            errors.append(f'{name} with value "{item}" fails to match the required pattern: /{pattern}/')


def _check_fields(data: Any, name: str, fields: Mapping[str, type | tuple[type, ...]], errors: list[str]) -> None:
    if not isinstance(data, dict):
        errors.append(f'"{name}" must be of type object')
        return
    for key, kind in fields.items():
        if data.get(key) is None:
            errors.append(f'"{name}.{key}" is required')
        elif not isinstance(data[key], kind):
            errors.append(f'"{name}.{key}" must be a string')


def _check_model_index(index: Any, errors: list[str]) -> None:
    if not isinstance(index, list):
        errors.append('"model-index" must be an array')
        return
    anything = (str, int, float, bool, list, dict)
    for i, model in enumerate(index):
        name = f'model-index[{i}]'
        _check_fields(model, name, {'name': str}, errors)
        results = model.get('results') if isinstance(model, dict) else None
        if not isinstance(results, list):
            errors.append(f'"{name}.results" must be an array')
            continue
        for j, result in enumerate(results):
            at = f'{name}.results[{j}]'
            if not isinstance(result, dict):
                errors.append(f'"{at}" must be of type object')
                continue
            _check_fields(result.get('task'), f'{at}.task', {'type': str}, errors)
            _check_fields(result.get('dataset'), f'{at}.dataset', {'type': str, 'name': str}, errors)
            metrics = result.get('metrics')
            if not isinstance(metrics, list) or not metrics:
                errors.append(f'"{at}.metrics" must be an array of at least one metric')
            else:
                for k, metric in enumerate(metrics):
                    _check_fields(metric, f'{at}.metrics[{k}]', {'type': str, 'value': anything}, errors)
            source = result.get('source')
            if source is not None:
                _check_fields(source, f'{at}.source', {'url': str}, errors)


def check_card(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a README's metadata by the Hub's rules."""
    try:
        data = card_metadata(text)
    except yaml.YAMLError as error:
        return [f'Invalid YAML: {error}'], []
    if data is None or data == {}:
        return [], ['empty or missing yaml metadata in repo card']
    if not isinstance(data, dict):
        return ['"metadata" must be of type object'], []
    errors: list[str] = []
    repo_id = r'[\w.\-]+(?:/[\w.\-]+)?'
    for key, pattern in {'base_model': repo_id, 'datasets': repo_id}.items():
        _check_ids(data, key, errors, pattern)
    for key in ('language', 'metrics', 'tags'):
        _check_ids(data, key, errors)
    if 'license' in data:
        found = data['license'] if isinstance(data['license'], list) else [data['license']]
        if any(license not in LICENSES for license in found):
            errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
    errors.extend(
        f'"{key}" must be a string'
        for key in ('license_name', 'license_link', 'library_name', 'pipeline_tag', 'thumbnail', 'new_version')
        if key in data and not isinstance(data[key], str)
    )
    if 'base_model_relation' in data and data['base_model_relation'] not in _RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(_RELATIONS)}]')
    if 'widget' in data and not isinstance(data['widget'], list):
        errors.append('"widget" must be an array')
    if 'co2_eq_emissions' in data and not isinstance(data['co2_eq_emissions'], (int, float, dict)):
        errors.append('"co2_eq_emissions" must be one of [number, object]')
    if 'model-index' in data:
        _check_model_index(data['model-index'], errors)
    return errors, []


# --- The server -------------------------------------------------------------------------------------------------------

Route = Callable[['HubServer', Request, dict[str, str]], Reply]
_ROUTES: list[tuple[str, str, re.Pattern[str], Route]] = []


def route(listener: str, method: str, path: str) -> Callable[[Route], Route]:
    """Register a handler; `{repo}` takes two segments, `{path}` the rest, any other `{name}` one segment."""

    def group(match: re.Match[str]) -> str:
        kind = {'repo': '[^/]+/[^/]+', 'path': '.+'}.get(match[1], '[^/]+')
        return f'(?P<{match[1]}>{kind})'

    pattern = re.compile(re.sub(r'\{(\w+)\}', group, path))

    def register(function: Route) -> Route:
        _ROUTES.append((listener, method, pattern, function))
        return function

    return register


class HubServer:
    """The loopback Hub.

    Args:
        xet: speak the Xet protocol for large files, as the real Hub does.
        page_size: entries per page of a listing.
        part_size: LFS uploads larger than this many bytes are asked for in parts of this size, None for never.

    Attributes:
        endpoint: url of the Hub, for `HF_ENDPOINT`.
        storage_endpoint: url of the storage that files are redirected to.
        cas_endpoint: url of the Xet content store, None without Xet.
        objects: the bytes of large files by sha256.
    """

    def __init__(self, *, xet: bool = False, page_size: int = 1000, part_size: int | None = None) -> None:
        self.page_size, self.part_size = page_size, part_size
        self.objects: dict[str, bytes] = {}
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, User] = {}
        self.lock = threading.RLock()
        self._secret = secrets.token_hex(16)
        self._log: list[Record] = []
        self._arrival = threading.Condition()
        self._faults: list[Fault] = []
        self._gate = threading.Event()
        self._stopping = False
        self._bugs: list[BaseException] = []
        self._parts: dict[tuple[str, int], bytes] = {}
        self._clock = itertools.count()
        self._started = datetime.now(timezone.utc)
        self.cas: Any = None
        self._names = ['hub', 'storage']
        if xet:
            from xet_server import XetStore

            self.cas = XetStore(self)
            self._names.append('cas')
        self._listeners: dict[str, _Listener] = {}
        self._ports: dict[str, int] = {}
        self.start()

    # -- Running

    def start(self) -> None:
        """Listen, on the same ports as before after `stop`."""
        self._stopping = False
        for name in self._names:
            self._listeners[name] = _Listener(self, name, self._ports.get(name, 0))
            self._ports[name] = self._listeners[name].server_port

    def stop(self) -> None:
        """Go away: connections are cut and new ones refused until `start`."""
        self._stopping = True
        self.release()
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()

    def close(self) -> None:
        """Stop for good; raises what went wrong inside the server, which no test may overlook."""
        self.stop()
        if self._bugs:
            raise RuntimeError('The loopback Hub itself failed') from self._bugs[0]

    def __enter__(self) -> 'HubServer':
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        return f'http://127.0.0.1:{self._ports["hub"]}'

    @property
    def storage_endpoint(self) -> str:
        return f'http://127.0.0.1:{self._ports["storage"]}'

    @property
    def cas_endpoint(self) -> str | None:
        return f'http://127.0.0.1:{self._ports["cas"]}' if self.cas else None

    # -- What tests set up and look at

    def add_user(self, name: str, token: str, role: str = 'write', namespaces: Iterable[str] = ()) -> User:
        """Let a token in: its user, whether it may write ('write' or 'read'), and the organisations he belongs to."""
        user = User(name, token, role, frozenset({name, *namespaces}))
        self.users[token] = user
        return user

    def create_repo(
        self,
        repo_id: str,
        *,
        private: bool = False,
        gated: str | bool = False,
        disabled: bool = False,
    ) -> Repo:
        """Make a repository with the Hub's first commit; `gated` is False, 'auto' or 'manual' (True means 'auto')."""
        with self.lock:
            if repo_id in self.repos:
                raise ValueError(f'{repo_id} exists already')
            now = self.now()
            repo = Repo(repo_id, private, 'auto' if gated is True else gated, disabled, now)
            author = repo_id.split('/')[0]
            repo.branches['main'] = repo.add(
                None, {'.gitattributes': _regular(GITATTRIBUTES)}, 'initial commit', '', author, now
            )
            self.repos[repo_id] = repo
            return repo

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | None],
        revision: str = 'main',
        message: str = 'Update',
        *,
        lfs: bool | None = None,
    ) -> str:
        """Commit on the server's side, checking nothing: None deletes a file; `lfs` overrules the usual choice."""
        with self.lock:
            repo = self.repos[repo_id]
            head, move = repo.find(revision), repo.write_ref(revision)
            if head is None or move is None:
                raise ValueError(f'{revision} is no branch of {repo_id}')
            tree = dict(head.files)
            for path, data in files.items():
                if data is None:
                    del tree[path]
                elif lfs if lfs is not None else self._is_large(head, path, len(data), data[:512]):
                    tree[path] = self.store(repo, data)
                else:
                    tree[path] = _regular(data)
            sha = repo.add(head.sha, tree, message, '', repo_id.split('/')[0], self.now())
            move(sha)
            return sha

    def store(self, repo: Repo, data: bytes) -> File:
        """Put the bytes of a large file into storage and give the file that points at them."""
        sha256 = hashlib.sha256(data).hexdigest()
        self.objects[sha256] = data
        repo.objects.add(sha256)
        if self.cas and sha256 not in self.cas.file_of:
            self.cas.seed(data)
        return _large(sha256, len(data), self.cas.file_of[sha256] if self.cas else None)

    def tamper(self, repo_id: str, path: str, data: bytes, revision: str = 'main') -> None:
        """Change what storage hands out for a large file while the repository still states the old sha256."""
        commit = self.repos[repo_id].find(revision)
        file = commit.files.get(path) if commit else None
        if file is None or file.sha256 is None:
            raise ValueError(f'{path} is no large file at {revision} of {repo_id}')
        self.objects[file.sha256] = data
        if self.cas and file.xet:
            self.cas.files[file.xet] = self.cas.files[self.cas.seed(data)]

    def files(self, repo_id: str, revision: str = 'main') -> dict[str, bytes]:
        """Contents of all files at a revision."""
        commit = self.repos[repo_id].find(revision)
        if commit is None:
            raise ValueError(f'{repo_id} has no revision {revision}')
        return {path: self.content(file) for path, file in commit.files.items()}

    def content(self, file: File) -> bytes:
        return file.data if file.data is not None else self.objects[file.sha256 or '']

    def head(self, repo_id: str, revision: str = 'main') -> str:
        """Commit id of a revision."""
        commit = self.repos[repo_id].find(revision)
        if commit is None:
            raise ValueError(f'{repo_id} has no revision {revision}')
        return commit.sha

    def commits(self, repo_id: str, revision: str = 'main') -> list[Commit]:
        """History of a revision, newest first."""
        repo = self.repos[repo_id]
        return repo.history(repo.commits[self.head(repo_id, revision)])

    @property
    def log(self) -> list[Record]:
        """Requests so far, oldest first, without the client's look-up of `/api/agent-harnesses`."""
        with self._arrival:
            return list(self._log)

    def clear_log(self) -> None:
        with self._arrival:
            self._log.clear()

    def wait_for(self, method: str, regex: str, count: int = 1, timeout: float = 30) -> Record:
        """Wait until the `count`-th matching request has come in, whether answered or held, and give its record."""

        def found() -> Record | None:
            hits = [r for r in self._log if method in ('*', r.method) and re.search(regex, r.path)]
            return hits[count - 1] if len(hits) >= count else None

        with self._arrival:
            record = self._arrival.wait_for(found, timeout)
        if record is None:
            seen = ', '.join(map(str, self.log)) or 'nothing'
            raise TimeoutError(f'No {method} {regex!r} within {timeout} s; came: {seen}')
        return record

    def fault(
        self,
        method: str,
        regex: str,
        times: int | None = 1,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        drop: bool = False,
        truncate: int | None = None,
        corrupt: bool = False,
        stall: bool = False,
        *,
        body: bytes | None = None,
        honest: bool = False,
        after: bool = False,
        call: Callable[[], object] | None = None,
        drip: float | None = None,
    ) -> Fault:
        """Make the next matching requests go wrong.

        Args:
            method: HTTP method, '*' for any.
            regex: searched for in the path with its query, on every listener.
            times: how many requests are struck, None for all from now on.
            status: answer this status in place of the real one.
            headers: headers of that answer, or added to the real one.
            drop: read the request, then hang up without an answer.
            truncate: hang up after that many bytes of the answer's body; with `drop`, reset the connection after that
                many bytes of the request's.
            corrupt: flip one bit in the middle of the body: of the answer to GET, of what arrived with PUT.
            stall: hold the connection without an answer until `release`, `stop` or `close`, then hang up.
            body: body of the answer with `status`, as plain text.
            honest: with `truncate`, state the short length in Content-Length.
            after: let the request take effect first; only its answer is lost.
            call: called as the request comes in (with `after`, once it took effect); alone it harms nothing.
            drip: send the body byte by byte, with that many seconds between them, until `release`, `stop` or `close`.

        Returns:
            The fault, whose `hits` tells how often it struck.
        """
        fault = Fault(
            method, re.compile(regex), times, status, dict(headers or {}), body, drop, truncate, honest, corrupt, stall,
            after, call, drip,
        )  # fmt: skip
        with self._arrival:
            self._faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        with self._arrival:
            self._faults.clear()

    def release(self) -> None:
        """Let go of all connections that are held now."""
        gate, self._gate = self._gate, threading.Event()
        gate.set()

    # -- Used by the listeners

    def _receive(self, record: Record, early: bool = False) -> Fault | None:
        with self._arrival:
            matching = (f for f in self._faults if f.strikes(record.method, record.path))
            fault = next((f for f in matching if early == (f.drop and f.truncate is not None)), None)
            if fault:
                fault.hits += 1
            if (fault or not early) and record.path != '/api/agent-harnesses':
                self._log.append(record)
                self._arrival.notify_all()
            return fault

    def _cut_off(self, record: Record) -> int | None:
        """How much of the request's body to read before hanging up, None to read all of it."""
        fault = self._receive(record, early=True)
        return fault.truncate if fault else None

    def _hold(self) -> None:
        gate = self._gate
        if not self._stopping:
            gate.wait()

    def _held(self, seconds: float) -> bool:
        """Wait, unless connections are let go; whether they are."""
        return self._stopping or self._gate.wait(seconds)

    def _note_bug(self, error: BaseException | None = None) -> None:
        self._bugs.append(error or sys.exc_info()[1] or RuntimeError('unknown'))

    def _answer(self, listener: str, request: Request) -> Reply:
        method = 'GET' if request.method == 'HEAD' else request.method
        try:
            for at, verb, pattern, function in _ROUTES:
                match = pattern.fullmatch(request.path) if at == listener and verb == method else None
                if match:
                    groups = {k: urllib.parse.unquote(v) for k, v in match.groupdict().items()}
                    return function(self, request, groups)
            raise HubError(404, f'Sorry, we cannot find the page {request.path}')
        except HubError as error:
            return error.reply
        except Exception as error:
            self._note_bug(error)
            return HubError(500, f'Loopback Hub failed: {error!r}').reply

    # -- Helpers of the routes

    def now(self) -> str:
        """A time that never stands still, so that equal commits differ."""
        moment = self._started + timedelta(seconds=next(self._clock))
        return moment.strftime('%Y-%m-%dT%H:%M:%S.') + f'{moment.microsecond // 1000:03d}Z'

    def sign(self, url_path: str) -> str:
        """A presigned storage url; only the server can make one."""
        return f'{self.storage_endpoint}{url_path}?X-Amz-Signature={self.signature(url_path)}'

    def signature(self, url_path: str) -> str:
        return hashlib.sha256(f'{self._secret}{url_path}'.encode()).hexdigest()

    def check_signed(self, request: Request) -> None:
        if 'authorization' in request.headers:
            raise HubError(400, 'Only one auth mechanism allowed: a token reached the storage')
        if request.query.get('X-Amz-Signature') != [self.signature(request.path)]:
            raise HubError(403, 'The request signature we calculated does not match the signature you provided')

    def user(self, request: Request) -> User | None:
        header = request.headers.get('authorization')
        if header is None:
            return None
        user = self.users.get(header.removeprefix('Bearer ')) if header.startswith('Bearer ') else None
        if user is None:
            raise HubError(401, 'Invalid credentials in Authorization header')
        return user

    def signed_in(self, request: Request) -> User:
        user = self.user(request)
        if user is None:
            raise HubError(401, 'Invalid username or password.')
        return user

    def visible(self, request: Request, repo_id: str) -> tuple[Repo, User | None]:
        """A repository the caller may know of."""
        user, repo = self.user(request), self.repos.get(repo_id)
        if repo is None or (repo.private and (user is None or repo_id.split('/')[0] not in user.namespaces)):
            status, message = (401, 'Invalid username or password.') if user is None else (404, 'Repository not found')
            raise HubError(status, message, 'RepoNotFound')
        if repo.disabled:
            raise HubError(403, 'Access to this resource is disabled.')
        return repo, user

    def readable(self, request: Request, repo_id: str) -> Repo:
        """A repository whose files the caller may read."""
        repo, user = self.visible(request, repo_id)
        allowed = user is not None and (user.name in repo.allowed or repo_id.split('/')[0] in user.namespaces)
        if repo.gated and not allowed:
            if user is None:
                raise HubError(
                    401, f'Access to model {repo_id} is restricted. You must have access to it and be authenticated to '
                    'access it. Please log in.', 'GatedRepo',
                )  # fmt: skip
            raise HubError(
                403, f'Access to model {repo_id} is restricted and you are not in the authorized list. '
                f'Visit {self.endpoint}/{repo_id} to ask for access.', 'GatedRepo',
            )  # fmt: skip
        return repo

    def writable(self, request: Request, repo_id: str, *, pull_request: bool = False) -> tuple[Repo, User]:
        """A repository the caller may write to, or open a pull request on."""
        repo, user = self.visible(request, repo_id)
        if user is None:
            raise HubError(401, 'Invalid username or password.')
        if user.role != 'write':
            raise HubError(403, 'Forbidden: you must use a write token to upload to a repository.')
        if repo_id.split('/')[0] not in user.namespaces and not pull_request:
            message = 'Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request'
            raise HubError(403, message)
        return repo, user

    def revision(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            raise HubError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return commit

    def page(self, request: Request, items: list[Any]) -> Reply:
        """A page of a listing with the link to the next one."""
        size = min(self.page_size, int(request.query.get('limit', [str(self.page_size)])[0]))
        start = int(request.query.get('cursor', ['0'])[0])
        headers = {}
        if start + size < len(items):
            query = {**request.query, 'cursor': [str(start + size)]}
            url = f'{self.endpoint}{request.path}?{urllib.parse.urlencode(query, doseq=True)}'
            headers['Link'] = f'<{url}>; rel="next"'
        return Reply.json(items[start : start + size], headers=headers)

    def _is_large(self, head: Commit, path: str, size: int, sample: bytes) -> bool:
        if size == 0:
            return False
        large = size >= MAX_REGULAR_SIZE or b'\0' in sample
        attributes = head.files.get('.gitattributes')
        for line in (self.content(attributes) if attributes else b'').decode(errors='replace').splitlines():
            pattern, *words = line.split() or ['#']
            if not pattern.startswith('#') and matches(pattern, path):
                if 'filter=lfs' in words:
                    large = True
                elif {'-filter', '!filter'} & set(words):
                    large = size >= MAX_REGULAR_SIZE
        return large

    def entry(self, repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any] | None:
        """A file or folder as listings show it."""
        file = commit.files.get(path)
        if file is not None:
            found: dict[str, Any] = {'type': 'file', 'path': path, 'oid': file.oid, 'size': file.size}
            if file.sha256:
                found['lfs'] = {'oid': file.sha256, 'size': file.size, 'pointerSize': file.pointer_size}
            if file.xet:
                found['xetHash'] = file.xet
        elif any(p.startswith(path + '/') for p in commit.files):
            found = {'type': 'directory', 'path': path, 'oid': _tree_oids(commit.files)[path], 'size': 0}
        else:
            return None
        if expand:
            last = repo.last_change(commit, path)
            found['lastCommit'] = {'id': last.sha, 'title': last.title, 'date': last.date}
            if file is not None:
                safe = {'status': 'safe'}
                found['securityFileStatus'] = {'status': 'safe', 'avScan': safe, 'pickleImportScan': safe}
        return found

    def info(self, repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
        """What model_info shows."""
        card = commit.files.get('README.md')
        try:
            data = card_metadata(self.content(card).decode(errors='replace')) if card else None
        except yaml.YAMLError:
            data = None
        data = data if isinstance(data, dict) else {}
        siblings = []
        for path, file in sorted(commit.files.items()):
            sibling: dict[str, Any] = {'rfilename': path}
            if blobs:
                sibling |= {'size': file.size, 'blobId': file.oid}
                if file.sha256:
                    sibling['lfs'] = {'sha256': file.sha256, 'size': file.size, 'pointerSize': file.pointer_size}
            siblings.append(sibling)
        found = {
            '_id': hashlib.md5(repo.id.encode()).hexdigest()[:24],
            'id': repo.id,
            'modelId': repo.id,
            'sha': commit.sha,
            'private': repo.private,
            'gated': repo.gated,
            'disabled': repo.disabled,
            'author': repo.id.split('/')[0],
            'lastModified': commit.date,
            'createdAt': repo.created,
            'downloads': 0,
            'likes': 0,
            'tags': [str(tag) for tag in data.get('tags') or []],
            'cardData': data,
            'config': {},
            'siblings': siblings,
            'spaces': [],
            'usedStorage': sum(f.size for f in commit.files.values()),
        }
        for key in ('pipeline_tag', 'library_name', 'model-index'):
            if key in data:
                found[key] = data[key]
        weights = commit.files.get('model.safetensors')
        parameters = _count_parameters(self.content(weights)) if weights else None
        if parameters:
            found['safetensors'] = {'parameters': parameters, 'total': sum(parameters.values())}
        return found


def _count_parameters(data: bytes) -> dict[str, int]:
    try:
        (length,) = struct.unpack('<Q', data[:8])
        header = json.loads(data[8 : 8 + length])
        counts: dict[str, int] = {}
        for name, tensor in header.items():
            if name != '__metadata__':
                size = 1
                for n in tensor['shape']:
                    size *= n
                counts[tensor['dtype']] = counts.get(tensor['dtype'], 0) + size
        return counts
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):  # Any bytes may carry that name.
        return {}


# -- Users and repositories


@route('hub', 'GET', '/api/whoami-v2')
def _whoami(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    user = hub.signed_in(request)
    names = sorted(user.namespaces - {user.name})
    orgs = [{'type': 'org', 'name': n, 'fullname': n, 'roleInOrg': 'write'} for n in names]
    token = {'displayName': 'test', 'role': user.role, 'createdAt': hub.now()}
    auth = {'type': 'access_token', 'accessToken': token}
    return Reply.json({'type': 'user', 'name': user.name, 'fullname': user.name, 'orgs': orgs, 'auth': auth})


def _named_repo(hub: HubServer, request: Request, verb: str) -> tuple[str, User, dict[str, Any]]:
    user, body = hub.signed_in(request), request.json()
    if body.get('type') not in (None, 'model'):
        raise HubError(400, f'Repositories of type {body["type"]} are not served here')
    namespace, name = body.get('organization') or user.name, body.get('name')
    repo_id = f'{namespace}/{name}'
    valid = isinstance(name, str) and re.fullmatch(r'[A-Za-z0-9_](?:[\w.\-]{0,94}[A-Za-z0-9_])?', name, flags=re.ASCII)
    if not valid or '--' in repo_id or '..' in repo_id or repo_id.endswith('.git'):
        raise HubError(400, f'Invalid repository name: {repo_id}')
    if user.role != 'write' or namespace not in user.namespaces:
        raise HubError(403, f'You don\'t have the rights to {verb} a model under the namespace "{namespace}"')
    return repo_id, user, body


@route('hub', 'POST', '/api/repos/create')
def _create_repo(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo_id, _, body = _named_repo(hub, request, 'create')
    url = f'{hub.endpoint}/{repo_id}'
    with hub.lock:
        if repo_id in hub.repos:
            raise HubError(409, f'You already created this model repo: {repo_id}', url=url)
        private = bool(body.get('private')) or body.get('visibility') == 'private'
        repo = hub.create_repo(repo_id, private=private)
    return Reply.json({'url': url, 'name': repo_id, 'id': repo.id})


@route('hub', 'DELETE', '/api/repos/delete')
def _delete_repo(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo_id, _, _ = _named_repo(hub, request, 'delete')
    with hub.lock:
        if hub.repos.pop(repo_id, None) is None:
            raise HubError(404, 'Repository not found', 'RepoNotFound')
    return Reply(200)


@route('hub', 'PUT', '/api/models/{repo}/settings')
def _settings(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, _ = hub.writable(request, at['repo'])
    body = request.json()
    if 'visibility' in body or 'private' in body:
        repo.private = bool(body.get('private')) or body.get('visibility') == 'private'
    repo.gated = body.get('gated', repo.gated)
    return Reply.json({'private': repo.private, 'gated': repo.gated})


@route('hub', 'GET', '/api/models')
def _list_models(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    user = hub.user(request)
    author, search = request.query.get('author', [None])[0], request.query.get('search', [''])[0].lower()
    found = []
    for repo_id, repo in sorted(hub.repos.items()):
        namespace = repo_id.split('/')[0]
        mine = user is not None and namespace in user.namespaces
        if (mine or not repo.private) and author in (None, namespace) and search in repo_id.lower():
            found.append(hub.info(repo, repo.commits[repo.branches['main']], False))
    return hub.page(request, found)


@route('hub', 'GET', '/api/models/{repo}')
def _model_info(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, _ = hub.visible(request, at['repo'])
    found = hub.info(repo, hub.revision(repo, at.get('rev', 'main')), request.flag('blobs'))
    if request.flag('securityStatus'):
        found['securityRepoStatus'] = {'scansDone': True, 'filesWithIssues': []}
    if 'expand' in request.query:
        found = {k: v for k, v in found.items() if k in {'_id', 'id', *request.query['expand']}}
    return Reply.json(found)


route('hub', 'GET', '/api/models/{repo}/revision/{rev}')(_model_info)


@route('hub', 'GET', '/api/models/{repo}/auth-check')
def _auth_check(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    hub.readable(request, at['repo'])
    return Reply.json({})


@route('hub', 'GET', '/api/models/{repo}/auth-check/write')
def _auth_check_write(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    hub.writable(request, at['repo'])
    return Reply.json({})


# -- Listings and refs


@route('hub', 'GET', '/api/models/{repo}/tree/{rev}')
def _tree(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, _ = hub.visible(request, at['repo'])
    commit = hub.revision(repo, at['rev'])
    prefix = at['path'].strip('/') + '/' if 'path' in at else ''
    paths = set()
    for path in commit.files:
        if path.startswith(prefix):
            parts = path[len(prefix) :].split('/')
            depth = len(parts) if request.flag('recursive') else 1
            paths |= {prefix + '/'.join(parts[: i + 1]) for i in range(depth)}
    if not paths and prefix:
        message, headers = f'{prefix[:-1]} does not exist on "{at["rev"]}"', {'X-Repo-Commit': commit.sha}
        raise HubError(404, message, 'EntryNotFound', headers=headers)
    return hub.page(request, [hub.entry(repo, commit, path, request.flag('expand')) for path in sorted(paths)])


route('hub', 'GET', '/api/models/{repo}/tree/{rev}/{path}')(_tree)


@route('hub', 'POST', '/api/models/{repo}/paths-info/{rev}')
def _paths_info(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, _ = hub.visible(request, at['repo'])
    commit = hub.revision(repo, at['rev'])
    form = urllib.parse.parse_qs(request.body.decode())
    expand = form.get('expand', [''])[0].lower() == 'true'
    found = [hub.entry(repo, commit, path.strip('/'), expand) for path in form.get('paths', [])]
    return Reply.json([entry for entry in found if entry])


@route('hub', 'GET', '/api/models/{repo}/refs')
def _refs(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, _ = hub.visible(request, at['repo'])

    def refs(kind: str, items: Mapping[str, str]) -> list[dict[str, str]]:
        return [{'name': n, 'ref': f'refs/{kind}/{n}', 'targetCommit': sha} for n, sha in items.items()]

    found = {'branches': refs('heads', repo.branches), 'tags': refs('tags', repo.tags), 'converts': []}
    if request.flag('include_prs'):
        found['pullRequests'] = refs('pr', {str(n): p.head for n, p in repo.discussions.items() if p.head})
    return Reply.json(found)


@route('hub', 'GET', '/api/models/{repo}/commits/{rev}')
def _commits(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, _ = hub.visible(request, at['repo'])
    chain = repo.history(hub.revision(repo, at['rev']))
    return hub.page(
        request,
        [
            {'id': c.sha, 'title': c.title, 'message': c.message, 'authors': [{'user': c.author}], 'date': c.date}
            for c in chain
        ],
    )


def _check_ref_name(name: str) -> None:
    if not re.fullmatch(r'(?!-|/)(?!.*(?:\.\.|//|@\{|\.lock$|/$|\.$))[^\x00-\x20~^:?*\[\\\x7f]+', name):
        raise HubError(400, f'Invalid reference name: {name}')


@route('hub', 'POST', '/api/models/{repo}/branch/{branch}')
def _create_branch(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, _ = hub.writable(request, at['repo'])
    _check_ref_name(at['branch'])
    with hub.lock:
        if at['branch'] in repo.branches:
            raise HubError(409, f'Reference already exists: refs/heads/{at["branch"]}')
        start = (request.json() if request.body else {}).get('startingPoint') or 'main'
        repo.branches[at['branch']] = hub.revision(repo, start).sha
    return Reply.json({'success': True}, 201)


@route('hub', 'DELETE', '/api/models/{repo}/branch/{branch}')
def _delete_branch(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, _ = hub.writable(request, at['repo'])
    if at['branch'] == 'main':
        raise HubError(403, 'Cannot delete the default branch')
    if repo.branches.pop(at['branch'], None) is None:
        raise HubError(404, f'Invalid rev id: {at["branch"]}', 'RevisionNotFound')
    return Reply.json({'success': True})


@route('hub', 'POST', '/api/models/{repo}/tag/{rev}')
def _create_tag(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, _ = hub.writable(request, at['repo'])
    tag = str(request.json().get('tag', ''))
    _check_ref_name(tag)
    with hub.lock:
        commit = hub.revision(repo, at['rev'])
        if tag in repo.tags:
            raise HubError(409, f'Tag reference exists already: refs/tags/{tag}')
        repo.tags[tag] = commit.sha
    return Reply.json({'success': True}, 201)


@route('hub', 'DELETE', '/api/models/{repo}/tag/{tag}')
def _delete_tag(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, _ = hub.writable(request, at['repo'])
    if repo.tags.pop(at['tag'], None) is None:
        raise HubError(404, f'Invalid rev id: {at["tag"]}', 'RevisionNotFound')
    return Reply.json({'success': True})


# -- Commits


@route('hub', 'POST', '/api/validate-yaml')
def _validate_yaml(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    hub.user(request)
    errors, warnings = check_card(str(request.json().get('content', '')))
    status = 400 if errors else 200
    if request.headers.get('accept') == 'text/plain':
        lines = [f'- Error: {e}' for e in errors] + [f'- Warning: {w}' for w in warnings]
        return Reply(status, '\n'.join(lines).encode(), {'Content-Type': 'text/plain; charset=utf-8'})
    found = {'errors': [{'message': e} for e in errors], 'warnings': [{'message': w} for w in warnings]}
    return Reply.json(found, status)


def _for_pull_request(request: Request, revision: str) -> bool:
    return request.flag('create_pr') or revision.startswith('refs/pr/')


@route('hub', 'POST', '/api/models/{repo}/preupload/{rev}')
def _preupload(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, _ = hub.writable(request, at['repo'], pull_request=_for_pull_request(request, at['rev']))
    commit, body = hub.revision(repo, at['rev']), request.json()
    if len(body['files']) > 256:
        raise HubError(400, 'At most 256 files per request')
    ignore = body.get('gitIgnore')
    if ignore is None and '.gitignore' in commit.files:
        ignore = hub.content(commit.files['.gitignore']).decode(errors='replace')
    rules = [line.strip() for line in (ignore or '').splitlines() if line.strip() and not line.startswith('#')]
    found = []
    for file in body['files']:
        path = file['path']
        _checked_path(path)
        large = hub._is_large(commit, path, file['size'], base64.b64decode(file['sample']))
        ignored = False
        for rule in rules:
            if matches(rule.removeprefix('!'), path):
                ignored = not rule.startswith('!')
        mode = 'lfs' if large else 'regular'
        answer: dict[str, Any] = {'path': path, 'uploadMode': mode, 'shouldIgnore': ignored}
        if path in commit.files:
            answer['oid'] = commit.files[path].etag
        found.append(answer)
    return Reply.json({'files': found, 'commitOid': commit.sha})


def _checked_path(path: Any) -> str:
    parts = path.split('/') if isinstance(path, str) else ['']
    bad = {'', '.', '..', '.git'} & {part.lower() for part in parts}
    if bad or len(str(path)) > 1024 or re.search(r'[\x00-\x1f\x7f\\]', str(path)):
        raise HubError(400, f'Invalid path in repository: {path!r}')
    return path


def _apply(hub: HubServer, repo: Repo, files: dict[str, File], operation: Any) -> None:
    """Apply one line of a commit to a tree."""
    key, value = operation.get('key'), operation.get('value') or {}
    path = value.get('path')
    path = _checked_path(path.rstrip('/') if key == 'deletedFolder' and isinstance(path, str) else path)
    if key == 'deletedFile':
        if files.pop(path, None) is None:
            raise HubError(404, f"A file with this name doesn't exist: {path}", 'EntryNotFound')
        return
    if key == 'deletedFolder':
        inside = [p for p in files if p.startswith(path + '/')]
        if not inside:
            raise HubError(404, f"A folder with this name doesn't exist: {path}", 'EntryNotFound')
        for p in inside:
            del files[p]
        return
    parents = ['/'.join(path.split('/')[: i + 1]) for i in range(path.count('/'))]
    if any(p in files for p in parents) or any(p.startswith(path + '/') for p in files):
        raise HubError(400, f'A file and a folder cannot have the same name: {path}')
    if key == 'lfsFile':
        oid = value.get('oid', '')
        if value.get('algo') != 'sha256' or oid not in repo.objects or oid not in hub.objects:
            raise HubError(
                400, 'Your push was rejected because an LFS pointer pointed to a file that does not exist. For '
                f'instance, this can happen if you used git push --no-verify. Offending file: - {path}',
            )  # fmt: skip
        size = len(hub.objects[oid])
        if value.get('size', size) != size:
            raise HubError(400, f'Size of the LFS pointer does not match the stored file: {path}')
        files[path] = _large(oid, size, hub.cas.file_of.get(oid) if hub.cas else None)
    elif key == 'file':
        if value.get('encoding') != 'base64':
            raise HubError(400, f'Unknown encoding of {path}')
        try:
            data = base64.b64decode(value['content'], validate=True)
        except (KeyError, TypeError, binascii.Error):
            raise HubError(400, f'Invalid content of {path}') from None
        if len(data) >= MAX_REGULAR_SIZE:
            raise HubError(400, f'Your push was rejected because it contains files larger than 10 MiB: {path}')
        if b'\0' in data:
            raise HubError(400, f'Your push was rejected because it contains binary files: {path}')
        if path == 'README.md' and (errors := check_card(data.decode(errors='replace'))[0]):
            raise HubError(400, 'Invalid metadata in README.md', errors=[{'message': e} for e in errors])
        files[path] = _regular(data)
    else:
        raise HubError(400, f'Unknown operation {key!r}')


@route('hub', 'POST', '/api/models/{repo}/commit/{rev}')
def _commit(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    create_pr = request.flag('create_pr')
    own_pr = re.fullmatch(r'refs/pr/(\d+)', at['rev'])
    repo, user = hub.writable(request, at['repo'], pull_request=_for_pull_request(request, at['rev']))
    if not request.headers.get('content-type', '').startswith('application/x-ndjson'):
        raise HubError(400, 'Commits are sent as application/x-ndjson')
    try:
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    except ValueError:
        raise HubError(400, 'Invalid JSON in commit') from None
    if not lines or lines[0].get('key') != 'header' or not lines[0]['value'].get('summary'):
        raise HubError(400, 'A commit starts with a header that has a summary')
    header = lines[0]['value']
    with hub.lock:
        head = hub.revision(repo, at['rev'])
        foreign = at['repo'].split('/')[0] not in user.namespaces
        if own_pr and foreign and repo.discussions[int(own_pr[1])].author != user.name:
            raise HubError(403, 'Forbidden: this pull request belongs to another user')
        parent = header.get('parentCommit')
        if create_pr and parent:
            head = hub.revision(repo, parent)
        elif parent and not head.sha.startswith(parent):
            raise HubError(412, 'A commit has happened since. Please refresh and try again.')
        move = repo.write_ref(at['rev'])
        if move is None:
            raise HubError(404, f'Invalid rev id: {at["rev"]} is not a branch', 'RevisionNotFound')
        files = dict(head.files)
        for operation in lines[1:]:
            _apply(hub, repo, files, operation)
        summary, description = header['summary'], header.get('description') or ''
        sha = repo.add(head.sha, files, summary, description, user.name, hub.now())
        url = f'{hub.endpoint}/{repo.id}/commit/{sha}'
        found = {'success': True, 'commitOid': sha, 'commitUrl': url, 'hookOutput': ''}
        if create_pr:
            opened = _open(hub, repo, user, summary, description, at['rev'], True, head.sha)
            opened.head, opened.status = sha, 'open'
            found['pullRequestUrl'] = f'{hub.endpoint}/{repo.id}/discussions/{opened.num}'
        else:
            move(sha)
    return Reply.json(found)


# -- Discussions and pull requests


def _open(
    hub: HubServer, repo: Repo, user: User, title: str, text: str, base: str, pull_request: bool, start: str
) -> PullRequest:
    num, now = len(repo.discussions) + 1, hub.now()
    status = 'draft' if pull_request else 'open'
    head = start if pull_request else None
    found = PullRequest(num, title, text, user.name, base, pull_request, status, now, start, head)
    repo.discussions[num] = found
    return found


def _discussion(hub: HubServer, repo: Repo, num: str) -> PullRequest:
    found = repo.discussions.get(int(num)) if num.isdigit() else None
    if found is None:
        raise HubError(404, f'Discussion {num} not found', 'EntryNotFound')
    return found


def _brief(repo: Repo, found: PullRequest) -> dict[str, Any]:
    return {
        'num': found.num,
        'title': found.title,
        'author': {'name': found.author},
        'status': found.status,
        'createdAt': found.created,
        'isPullRequest': found.is_pull_request,
        'repo': {'name': repo.id, 'type': 'model'},
    }


@route('hub', 'GET', '/api/models/{repo}/discussions')
def _discussions(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, _ = hub.visible(request, at['repo'])
    found = [_brief(repo, d) for d in reversed(repo.discussions.values())]
    return Reply.json({'discussions': found, 'count': len(found), 'start': 0})


@route('hub', 'POST', '/api/models/{repo}/discussions')
def _open_discussion(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, user = hub.writable(request, at['repo'], pull_request=True)
    body = request.json()
    with hub.lock:
        start, pull_request = repo.branches['main'], bool(body.get('pullRequest'))
        found = _open(hub, repo, user, body['title'], body.get('description', ''), 'main', pull_request, start)
    return Reply.json({'num': found.num, 'pullRequest': found.is_pull_request})


@route('hub', 'GET', '/api/models/{repo}/discussions/{num}')
def _discussion_details(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, _ = hub.visible(request, at['repo'])
    found = _discussion(hub, repo, at['num'])
    details = _brief(repo, found) | {'events': found.comments}
    if found.is_pull_request:
        changes = {'base': f'refs/heads/{found.base}'} | ({'mergeCommitId': found.merge} if found.merge else {})
        details |= {'changes': changes, 'filesWithConflicts': [], 'diff': ''}
    return Reply.json(details)


@route('hub', 'POST', '/api/models/{repo}/discussions/{num}/comment')
def _comment(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, user = hub.writable(request, at['repo'], pull_request=True)
    found = _discussion(hub, repo, at['num'])
    message = {
        'id': secrets.token_hex(12),
        'type': 'comment',
        'createdAt': hub.now(),
        'author': {'name': user.name},
        'data': {'edited': False, 'hidden': False, 'latest': {'raw': request.json()['comment']}},
    }
    found.comments.append(message)
    return Reply.json({'newMessage': message})


@route('hub', 'POST', '/api/models/{repo}/discussions/{num}/status')
def _status(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, user = hub.writable(request, at['repo'], pull_request=True)
    found, body = _discussion(hub, repo, at['num']), request.json()
    found.status = body['status']
    event = {
        'id': secrets.token_hex(12),
        'type': 'status-change',
        'createdAt': hub.now(),
        'author': {'name': user.name},
        'data': {'status': found.status},
    }
    found.comments.append(event)
    return Reply.json({'newStatus': event})


@route('hub', 'POST', '/api/models/{repo}/discussions/{num}/merge')
def _merge(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, user = hub.writable(request, at['repo'])
    with hub.lock:
        found = _discussion(hub, repo, at['num'])
        if not found.head or found.status != 'open':
            raise HubError(400, 'Only open pull requests can be merged')
        start, ours = repo.commits[found.start].files, repo.commits[repo.branches[found.base]].files
        theirs, files = repo.commits[found.head].files, dict(ours)
        for path in {*start, *theirs}:
            if start.get(path) != theirs.get(path):
                if ours.get(path) not in (start.get(path), theirs.get(path)):
                    raise HubError(409, f'Merge conflict in {path}')
                files.pop(path, None)
                files |= {path: theirs[path]} if path in theirs else {}
        title = f'{found.title} (#{found.num})'
        found.merge = repo.add(repo.branches[found.base], files, title, '', user.name, hub.now())
        repo.branches[found.base], found.status = found.merge, 'merged'
    return Reply.json({})


# -- Large files


@route('hub', 'POST', '/{repo}.git/info/lfs/objects/batch')
def _lfs_batch(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, _ = hub.writable(request, at['repo'], pull_request=True)
    body = request.json()
    if body.get('operation') != 'upload' or body.get('hash_algo', 'sha256') != 'sha256':
        raise HubError(400, 'Only uploads with sha256 are served here')
    found, transfer = [], 'basic'
    for item in body['objects']:
        oid, size = item['oid'], item['size']
        answer: dict[str, Any] = {'oid': oid, 'size': size}
        found.append(answer)
        if not re.fullmatch('[0-9a-f]{64}', oid):
            answer['error'] = {'code': 422, 'message': f'{oid} is no sha256'}
            continue
        if oid in repo.objects and len(hub.objects[oid]) == size:
            continue
        url_path = f'/repos/{repo.id}/{oid}'
        upload: dict[str, Any] = {'href': hub.sign(url_path)}
        if hub.part_size and size > hub.part_size and 'multipart' in body.get('transfers', []):
            transfer = 'multipart'
            count = -(-size // hub.part_size)
            urls = {str(i + 1): hub.sign(f'{url_path}/part/{i + 1}') for i in range(count)}
            done = f'/api/complete_multipart/{repo.id}/{oid}'
            upload = {
                'href': f'{hub.endpoint}{done}?X-Amz-Signature={hub.signature(done)}',
                'header': {'chunk_size': str(hub.part_size), **urls},
            }
        verify = {'href': f'{hub.endpoint}/{repo.id}.git/info/lfs/objects/verify'}
        answer['actions'] = {'upload': upload, 'verify': verify}
    headers = {'Content-Type': 'application/vnd.git-lfs+json'}
    return Reply.json({'transfer': transfer, 'objects': found}, headers=headers)


@route('hub', 'POST', '/{repo}.git/info/lfs/objects/verify')
def _lfs_verify(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, _ = hub.writable(request, at['repo'], pull_request=True)
    body = request.json()
    if body.get('oid') not in repo.objects or len(hub.objects[body['oid']]) != body.get('size'):
        raise HubError(404, 'LFS object not found or of another size')
    return Reply.json({})


def _keep(hub: HubServer, repo_id: str, oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        raise HubError(400, 'BadDigest: the sha256 you specified did not match what we received')
    with hub.lock:
        hub.objects[oid] = data
        hub.repos[repo_id].objects.add(oid)


@route('storage', 'PUT', '/repos/{repo}/{oid}')
def _put_object(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    hub.check_signed(request)
    _keep(hub, at['repo'], at['oid'], request.body)
    return Reply(200, headers={'ETag': f'"{hashlib.md5(request.body).hexdigest()}"'})


@route('storage', 'PUT', '/repos/{repo}/{oid}/part/{num}')
def _put_part(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    hub.check_signed(request)
    hub._parts[at['oid'], int(at['num'])] = request.body
    return Reply(200, headers={'ETag': f'"{hashlib.md5(request.body).hexdigest()}"'})


@route('hub', 'POST', '/api/complete_multipart/{repo}/{oid}')
def _complete(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    hub.check_signed(request)
    parts = []
    for part in request.json()['parts']:
        data = hub._parts.get((at['oid'], part['partNumber']))
        if data is None or part['etag'].strip('"') != hashlib.md5(data).hexdigest():
            raise HubError(400, f'InvalidPart: part {part["partNumber"]} is missing or differs')
        parts.append(data)
    _keep(hub, at['repo'], at['oid'], b''.join(parts))
    return Reply.json({'completed': True})


@route('storage', 'GET', '/repos/{repo}/{oid}')
def _get_object(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    hub.check_signed(request)
    data = hub.objects.get(at['oid'])
    if data is None:
        raise HubError(404, 'NoSuchKey')
    return ranged(request, data, {'ETag': f'"{at["oid"]}"', 'Content-Type': 'application/octet-stream'})


def ranged(request: Request, data: bytes, headers: Mapping[str, str]) -> Reply:
    """The bytes, or the range of them that was asked for."""
    headers = {'Accept-Ranges': 'bytes', **headers}
    match = re.fullmatch(r'bytes=(\d+)-(\d*)', request.headers.get('range', ''))
    if not match:
        return Reply(200, data, headers)
    start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
    if start > end:
        raise HubError(416, 'Requested range not satisfiable', headers={'Content-Range': f'bytes */{len(data)}'})
    return Reply(206, data[start : end + 1], {**headers, 'Content-Range': f'bytes {start}-{end}/{len(data)}'})


@route('hub', 'GET', '/{repo}/resolve/{rev}/{path}')
def _resolve(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo = hub.readable(request, at['repo'])
    commit = hub.revision(repo, at['rev'])
    headers = {'X-Repo-Commit': commit.sha}
    file = commit.files.get(at['path'])
    if file is None:
        raise HubError(404, 'Entry not found', 'EntryNotFound', headers=headers)
    if file.sha256 is None:
        return ranged(request, hub.content(file), {**headers, 'ETag': f'"{file.oid}"', 'Content-Type': 'text/plain'})
    headers |= {
        'X-Linked-Etag': f'"{file.sha256}"',
        'X-Linked-Size': str(file.size),
        'Location': hub.sign(f'/repos/{repo.id}/{file.sha256}'),
    }
    if file.xet:
        headers |= {
            'X-Xet-Hash': file.xet,
            'Link': f'<{hub.endpoint}/api/models/{repo.id}/xet-read-token/{commit.sha}>; rel="xet-auth", '
            f'<{hub.cas_endpoint}/v1/reconstructions/{file.xet}>; rel="xet-reconstruction-info"',
        }
    return Reply(302, b'', headers)


# -- Xet tokens


def _xet_token(hub: HubServer, repo: Repo, user: User | None, scope: str) -> Reply:
    if hub.cas is None:
        raise HubError(404, 'Xet is not enabled on this server')
    token, expiry = hub.cas.grant(repo, user, scope)
    headers = {
        'X-Xet-Cas-Url': str(hub.cas_endpoint),
        'X-Xet-Access-Token': token,
        'X-Xet-Token-Expiration': str(expiry),
    }
    return Reply.json({'accessToken': token, 'exp': expiry, 'casUrl': hub.cas_endpoint}, headers=headers)


@route('hub', 'GET', '/api/models/{repo}/xet-read-token/{rev}')
def _xet_read(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo = hub.readable(request, at['repo'])
    hub.revision(repo, at['rev'])
    return _xet_token(hub, repo, hub.user(request), 'read')


@route('hub', 'GET', '/api/models/{repo}/xet-write-token/{rev}')
def _xet_write(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    repo, user = hub.writable(request, at['repo'], pull_request=_for_pull_request(request, at['rev']))
    if at['rev'] != 'None':
        hub.revision(repo, at['rev'])
    return _xet_token(hub, repo, user, 'write')


# Last: what is left of a repository's API answers for a repository that is not there.
@route('hub', 'GET', '/api/models/{path}')
def _unknown_repo(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    hub.visible(request, '/'.join(at['path'].split('/')[:2]))
    raise HubError(404, f'Sorry, we cannot find the page {request.path}')

"""The Xet content store of the loopback Hub, for hf_xet 1.8.

Xorbs are kept as they were uploaded and handed out by presigned ranges; a shard says which chunks of which xorbs make a
file. When a shard arrives every file in it is put together and its sha256 compared, so that what the Hub serves over
plain HTTP and over Xet is the same. Chunks known from earlier uploads are offered for deduplication.

Formats and endpoints: https://huggingface.co/docs/xet (shard, xorb, api); upload grants as in xet-core 1.8.
"""

import hashlib
import importlib
import json
import secrets
import struct
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from hub_server import HubError, HubServer, Reply, Repo, Request, User, ranged, route

_ENTRY = 48
_BOOKEND = b'\xff' * 32
_WITH_VERIFICATION = 1 << 31
_WITH_METADATA = 1 << 30
_LIFETIME = 3600
_SEED_CHUNK = 2**16
_SEED_XORB = 2**24


def hash_hex(raw: bytes) -> str:
    """A hash as Xet writes it: four little-endian numbers."""
    return ''.join(f'{n:016x}' for n in struct.unpack('<4Q', raw))


@dataclass(frozen=True)
class Grant:
    """What a token opens."""

    repo: Repo
    user: User | None
    scope: str


@dataclass(frozen=True)
class Xorb:
    """Uploaded bytes and where each chunk ends in them and in the unpacked data."""

    data: bytes
    ends: list[int]
    chunks: list[bytes]


@dataclass(frozen=True)
class Term:
    xorb: str
    size: int
    start: int
    end: int


class XetStore:
    """Xorbs, shards and tokens of one Hub.

    Attributes:
        file_of: Xet hash by sha256 of every file that was registered.
        xorbs: uploaded xorbs by hash.
    """

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        self.file_of: dict[str, str] = {}
        self.xorbs: dict[str, Xorb] = {}
        self.files: dict[str, list[Term]] = {}
        self.tokens: dict[str, Grant] = {}
        self.uploads: dict[str, str] = {}
        self.chunk_shards: dict[str, bytes] = {}

    def grant(self, repo: Repo, user: User | None, scope: str) -> tuple[str, int]:
        token = f'xet_{scope}_{secrets.token_hex(8)}'
        self.tokens[token] = Grant(repo, user, scope)
        return token, int(time.time()) + _LIFETIME

    def check(self, request: Request, scope: str) -> Grant:
        header = request.headers.get('authorization', '')
        grant = self.tokens.get(header.removeprefix('Bearer '))
        if grant is None:
            raise HubError(401, 'Invalid Xet token')
        if scope == 'write' and grant.scope != 'write':
            raise HubError(403, 'This Xet token does not allow to write')
        return grant

    def add_xorb(self, name: str, data: bytes) -> bool:
        new = name not in self.xorbs
        if new:
            self.xorbs[name] = _parse_xorb(data)
        return new

    def seed(self, data: bytes) -> str:
        """Keep a file as if a client had uploaded it, unpacked, and give its Xet hash."""
        hf_xet: Any = importlib.import_module('hf_xet')
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            name = hf_xet.hash_files([file.name])[0].hash
        terms = []
        for start in range(0, len(data), _SEED_XORB):
            block = data[start : start + _SEED_XORB]
            chunks = [block[i : i + _SEED_CHUNK] for i in range(0, len(block), _SEED_CHUNK)]
            sizes = [len(chunk).to_bytes(3, 'little') for chunk in chunks]
            # Nobody computes the name of a xorb but who makes it; any hash will do.
            xorb = hashlib.sha256(block).hexdigest()
            parts = (b'\0' + size + b'\0' + size + chunk for size, chunk in zip(sizes, chunks, strict=True))
            self.add_xorb(xorb, b''.join(parts))
            terms.append(Term(xorb, len(block), 0, len(chunks)))
        with self.hub.lock:
            self.files[name], self.file_of[hashlib.sha256(data).hexdigest()] = terms, name
        return name

    def unpack(self, terms: list[Term]) -> bytes:
        return b''.join(b''.join(self.xorbs[t.xorb].chunks[t.start : t.end]) for t in terms)

    def register(self, repo: Repo, shard: bytes) -> None:
        """Take the files of a shard into a repository, and its chunks into deduplication."""
        files, xorbs = _parse_shard(shard)
        for name, sha256, terms in files:
            missing = {t.xorb for t in terms} - set(self.xorbs)
            if missing:
                raise HubError(400, f'Shard names xorbs that were not uploaded: {sorted(missing)}')
            data = self.unpack(terms)
            if hashlib.sha256(data).hexdigest() != sha256 or [t.size for t in terms] != [
                len(self.unpack([t])) for t in terms
            ]:
                raise HubError(400, f'Shard verification failed: the chunks of {name} do not have sha256 {sha256}')
            with self.hub.lock:
                self.files[name], self.file_of[sha256] = terms, name
                self.hub.objects[sha256] = data
                repo.objects.add(sha256)
        for block in xorbs:
            answer = _dedup_shard(shard[:32], block)
            for start in range(_ENTRY, len(block), _ENTRY):
                self.chunk_shards[hash_hex(block[start : start + 32])] = answer


def _parse_xorb(data: bytes) -> Xorb:
    import lz4.frame

    at, ends, chunks = 0, [], []
    # The optional footer starts with the letters XETBLOB, a chunk with its version 0.
    while at < len(data) and data[at] == 0:
        packed, scheme = int.from_bytes(data[at + 1 : at + 4], 'little'), data[at + 4]
        size = int.from_bytes(data[at + 5 : at + 8], 'little')
        chunk = data[at + 8 : at + 8 + packed]
        try:
            chunk = lz4.frame.decompress(chunk) if scheme in (1, 2) else chunk
        except RuntimeError:
            raise HubError(400, f'Chunk {len(chunks)} of the xorb cannot be unpacked') from None
        if scheme > 2 or len(chunk) != size:
            raise HubError(400, f'Chunk {len(chunks)} of the xorb is malformed')
        at += 8 + packed
        ends.append(at)
        chunks.append(_ungroup(chunk) if scheme == 2 else chunk)
    if not chunks:
        raise HubError(400, 'A xorb without chunks')
    return Xorb(data, ends, chunks)


def _ungroup(grouped: bytes) -> bytes:
    """Undo the grouping of every fourth byte."""
    data, at = bytearray(len(grouped)), 0
    for i in range(4):
        count = len(range(i, len(grouped), 4))
        data[i::4] = grouped[at : at + count]
        at += count
    return bytes(data)


def _parse_shard(shard: bytes) -> tuple[list[tuple[str, str, list[Term]]], list[bytes]]:
    """Files (Xet hash, sha256, terms) and the raw descriptions of xorbs in a shard."""
    files, xorbs, at = [], [], _ENTRY
    try:
        if struct.unpack_from('<Q', shard, 32) != (2,):
            raise HubError(400, 'Unknown version of the shard')
        while shard[at : at + 32] != _BOOKEND:
            name = hash_hex(shard[at : at + 32])
            flags, count = struct.unpack_from('<II', shard, at + 32)
            at += _ENTRY
            terms = []
            for _ in range(count):
                _, size, start, end = struct.unpack_from('<4I', shard, at + 32)
                terms.append(Term(hash_hex(shard[at : at + 32]), size, start, end))
                at += _ENTRY
            at += _ENTRY * count if flags & _WITH_VERIFICATION else 0
            if not flags & _WITH_METADATA:
                raise HubError(400, 'Shard verification failed: a file without sha256')
            files.append((name, hash_hex(shard[at : at + 32]), terms))
            at += _ENTRY
        at += _ENTRY
        while shard[at : at + 32] != _BOOKEND:
            (count,) = struct.unpack_from('<I', shard, at + 36)
            xorbs.append(shard[at : at + _ENTRY * (1 + count)])
            at += _ENTRY * (1 + count)
    except struct.error:
        raise HubError(400, 'The shard is malformed') from None
    return files, xorbs


def _dedup_shard(tag: bytes, block: bytes) -> bytes:
    """The answer to a chunk query: a shard that describes one xorb."""
    bookend = _BOOKEND + bytes(16)
    body = tag + struct.pack('<QQ', 2, 200) + bookend + block + bookend
    now = int(time.time())
    # What the specification calls a reserved space, hf_xet reads as three look-up tables (offset, entries), here empty.
    footer = struct.pack('<3Q', 1, _ENTRY, 2 * _ENTRY) + struct.pack('<2Q', len(body), 0) * 3 + bytes(32)
    footer += struct.pack('<2Q', now, now + _LIFETIME) + bytes(72) + struct.pack('<Q', len(body))
    return body + footer


# --- Routes of the content store --------------------------------------------------------------------------------------


@route('cas', 'GET', '/v1/chunks/{prefix}/{hash}')
def _chunk(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    hub.cas.check(request, 'read')
    shard = hub.cas.chunk_shards.get(at['hash'])
    if shard is None:
        raise HubError(404, 'Chunk not tracked')
    return Reply(200, shard, {'Content-Type': 'application/octet-stream'})


@route('cas', 'POST', '/v1/xorb-grants/{prefix}/{hash}')
def _xorb_grant(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    hub.cas.check(request, 'write')
    if at['hash'] in hub.cas.xorbs:
        return Reply.json({})
    grant_id = secrets.token_hex(8)
    hub.cas.uploads[grant_id] = at['hash']
    url = hub.sign(f'/xorb-uploads/{grant_id}/{request.json()["length"]}')
    return Reply.json({'id': grant_id, 'method': 'PUT', 'url': url, 'headers': {}}, 201)


@route('storage', 'PUT', '/xorb-uploads/{grant}/{length}')
def _put_xorb(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    hub.check_signed(request)
    name = hub.cas.uploads[at['grant']]
    if len(request.body) != int(at['length']):
        raise HubError(400, 'The xorb does not have the length that was granted')
    return Reply(200 if hub.cas.add_xorb(name, request.body) else 412)


@route('cas', 'POST', '/v1/xorb-commits/{prefix}/{hash}/grant/{grant}')
def _commit_xorb(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    hub.cas.check(request, 'write')
    if hub.cas.uploads.get(at['grant']) != at['hash'] or at['hash'] not in hub.cas.xorbs:
        raise HubError(404, 'No data was uploaded for the grant')
    return Reply.json({'was_inserted': True})


@route('cas', 'POST', '/v1/xorbs/{prefix}/{hash}')
def _post_xorb(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    hub.cas.check(request, 'write')
    return Reply.json({'was_inserted': hub.cas.add_xorb(at['hash'], request.body)})


@route('cas', 'POST', '/v1/shards')
def _post_shard(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    hub.cas.register(hub.cas.check(request, 'write').repo, request.body)
    return Reply.json({'result': 1})


@route('cas', 'POST', '/v2/shards')
def _stream_shard(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    hub.cas.register(hub.cas.check(request, 'write').repo, request.body)
    events: list[dict[str, Any]] = [
        {'type': 'validating', 'verified': 1, 'total': 1},
        {'type': 'committing', 'stage': 'uploading'},
        {'type': 'committing', 'stage': 'syncing'},
        {'type': 'result'},
    ]
    body = ''.join(json.dumps(event) + '\n' for event in events).encode()
    return Reply(200, body, {'Content-Type': 'application/x-ndjson'})


def _reconstruct(hub: HubServer, request: Request, name: str) -> tuple[int, list[Term]]:
    """The terms that a file, or the asked range of it, is made of, and how far into them it starts."""
    repo = hub.cas.check(request, 'read').repo
    terms = hub.cas.files.get(name)
    if terms is None or not any(hub.cas.file_of.get(sha256) == name for sha256 in repo.objects):
        raise HubError(404, 'File not found')
    size = sum(t.size for t in terms)
    start, end = 0, size
    if 'range' in request.headers:
        first, _, last = request.headers['range'].removeprefix('bytes=').partition('-')
        start, end = int(first), min(int(last) + 1 if last else size, size)
    if start >= size:
        raise HubError(416, 'Range beyond the end of the file')
    chosen, offset, at = [], 0, 0
    for term in terms:
        if at < end and at + term.size > start:
            offset = offset if chosen else start - at
            chosen.append(term)
        at += term.size
    return offset, chosen


def _stretches(terms: list[Term]) -> dict[str, list[tuple[int, int]]]:
    """The chunks to fetch of each xorb, as stretches that do not overlap, which hf_xet relies on."""
    found: dict[str, list[tuple[int, int]]] = {}
    for name, start, end in sorted((t.xorb, t.start, t.end) for t in terms):
        mine = found.setdefault(name, [])
        if mine and start <= mine[-1][1]:
            mine[-1] = (mine[-1][0], max(end, mine[-1][1]))
        else:
            mine.append((start, end))
    return found


def _reconstruction(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    offset, terms = _reconstruct(hub, request, at['hash'])
    answer: dict[str, Any] = {
        'offset_into_first_range': offset,
        'terms': [
            {'hash': t.xorb, 'unpacked_length': t.size, 'range': {'start': t.start, 'end': t.end}} for t in terms
        ],
    }
    places: dict[str, list[dict[str, Any]]] = {}
    for name, stretches in _stretches(terms).items():
        ends = [0, *hub.cas.xorbs[name].ends]
        for start, end in stretches:
            chunks, data = {'start': start, 'end': end}, {'start': ends[start], 'end': ends[end] - 1}
            url = hub.sign(f'/xorbs/{name}/{data["start"]}-{data["end"]}')
            if at['version'] == '1':
                place: dict[str, Any] = {'range': chunks, 'url': url, 'url_range': data}
            else:
                place = {'url': url, 'ranges': [{'chunks': chunks, 'bytes': data}]}
            places.setdefault(name, []).append(place)
    return Reply.json(answer | {'fetch_info' if at['version'] == '1' else 'xorbs': places})


route('cas', 'GET', '/v{version}/reconstructions/{hash}')(_reconstruction)


@route('storage', 'GET', '/xorbs/{hash}/{range}')
def _get_xorb(hub: HubServer, request: Request, at: dict[str, str]) -> Reply:
    hub.check_signed(request)
    if request.headers.get('range') != f'bytes={at["range"]}':
        raise HubError(403, f'Signed for bytes={at["range"]}, asked for {request.headers.get("range")}')
    return ranged(request, hub.cas.xorbs[at['hash']].data, {'Content-Type': 'application/octet-stream'})

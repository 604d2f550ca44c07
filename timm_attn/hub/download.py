"""Files from the Hub at one commit, each checked against the checksum that the Hub keeps for it."""

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile

from ..files import atomic_write, git_sha1
from .client import HubError, HubFileError, call

_logger = logging.getLogger(__name__)
_COMMIT = re.compile(r'[0-9a-f]{40}')


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub says about a file.

    Args:
        name: Path in the repository.
        size: Bytes.
        checksum: sha256 of an LFS file, git's blob id (40 digits) of another.
    """

    name: str
    size: int
    checksum: str


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit.

    Args:
        repo_id: The repository.
        revision: What was asked for; None is 'main'.
        commit: The commit it stands for.
        files: What the Hub says about the files asked for; empty when it could not be asked.
        offline: Whether only the cache is used, because the Hub cannot be reached.
    """

    repo_id: str
    revision: str | None
    commit: str
    files: dict[str, RemoteFile] = field(default_factory=dict)
    offline: bool = False


def _storage(repo_id: str, cache_dir: str | os.PathLike[str] | None) -> Path:
    root = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    return root / repo_folder_name(repo_id=repo_id, repo_type='model')


def checksum(data: bytes, like: str) -> str:
    """The checksum of a file's bytes in the form of another one.

    Args:
        data: The bytes.
        like: A sha256 or git blob id.
    """
    return hashlib.sha256(data).hexdigest() if len(like) == 64 else git_sha1(data)


def remote_files(api: HfApi, repo_id: str, commit: str, names: Sequence[str]) -> dict[str, RemoteFile]:
    """Sizes and checksums of files at a commit; files that are not there are left out.

    Args:
        api: The client.
        repo_id: The repository.
        commit: The commit.
        names: Paths in the repository.
    """
    found = api.get_paths_info(repo_id, list(names), revision=commit)
    return {
        f.path: RemoteFile(f.path, f.size, f.lfs.sha256 if f.lfs is not None else f.blob_id)
        for f in found
        if isinstance(f, RepoFile)
    }


def resolve(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    names: Sequence[str],
    cache_dir: str | os.PathLike[str] | None = None,
) -> Snapshot:
    """Turns a revision into a commit, once, and asks for the checksums of files there.

    When the Hub cannot be reached, the commit that the cache holds for the revision is used, and a warning says so. An
    answer of the Hub that is no is never replaced by the cache.

    Args:
        api: The client.
        repo_id: The repository.
        revision: A branch, tag or commit; None is 'main'.
        names: The files that will be wanted.
        cache_dir: The cache; None is the client's own.

    Raises:
        HubError: The repository or revision does not exist or may not be seen, or there is neither Hub nor cache.
    """

    def ask() -> Snapshot:
        commit = api.model_info(repo_id, revision=revision).sha
        if commit is None or not _COMMIT.fullmatch(commit):
            raise HubError(f"The Hub named no commit for '{repo_id}' at {revision or 'main'} (got {commit!r}).")
        return Snapshot(repo_id, revision, commit, remote_files(api, repo_id, commit, names))

    try:
        return call('read', repo_id, api.token, ask)
    except HubError as e:
        cached = _cached_commit(repo_id, revision, cache_dir)
        if cached is None or not _unreachable(e):
            if e.offline:
                raise HubError(
                    f"HF_HUB_OFFLINE is set and the cache does not hold '{repo_id}' at {revision or 'main'}: unset it "
                    f'once to '
                    'fetch the model.'
                ) from e
            raise
        _logger.warning(
            "The Hub cannot be asked about '%s' (%s); using commit %s from the cache, checked against the checksums "
            'kept there.',
            repo_id,
            _reason(e),
            cached,
        )
        return Snapshot(repo_id, revision, cached, offline=True)


def _unreachable(e: HubError) -> bool:
    if e.status is not None:
        return e.status == 429 or e.status >= 500
    return e.transient or e.offline or 'Gave up after' in str(e)


def _reason(e: HubError) -> str:
    return 'HF_HUB_OFFLINE is set' if e.offline else str(e)


def _cached_commit(repo_id: str, revision: str | None, cache_dir: str | os.PathLike[str] | None) -> str | None:
    revision = revision or constants.DEFAULT_REVISION
    storage = _storage(repo_id, cache_dir)
    if _COMMIT.fullmatch(revision):
        return revision if (storage / 'snapshots' / revision).is_dir() else None
    ref = storage / 'refs' / revision
    if '..' in Path(revision).parts or not ref.is_file():
        return None
    commit = ref.read_text(encoding='ascii', errors='replace').strip()
    return commit if _COMMIT.fullmatch(commit) and (storage / 'snapshots' / commit).is_dir() else None


def remember(snapshot: Snapshot, cache_dir: str | os.PathLike[str] | None = None) -> None:
    """Notes in the cache which commit a branch or tag stood for, as the client does, so that it is found offline.

    Args:
        snapshot: A snapshot whose files were downloaded and checked.
        cache_dir: The cache; None is the client's own.
    """
    revision = snapshot.revision or constants.DEFAULT_REVISION
    if snapshot.offline or _COMMIT.fullmatch(revision) or '..' in Path(revision).parts:
        return
    try:
        with atomic_write(_storage(snapshot.repo_id, cache_dir) / 'refs' / revision) as path:
            path.write_text(snapshot.commit, encoding='ascii')
    except OSError as e:
        _logger.info('The cache cannot be written (%s): %s will not be found offline.', e, snapshot.repo_id)


def fetch(
    api: HfApi,
    snapshot: Snapshot,
    name: str,
    *,
    max_bytes: int,
    cache_dir: str | os.PathLike[str] | None = None,
) -> bytes:
    """The bytes of one file of a snapshot, from the cache or the Hub, with the checksum the Hub keeps for them.

    A file whose bytes differ (flipped on the way, or altered in the cache) is deleted and fetched once more.

    Args:
        api: The client.
        snapshot: The commit.
        name: Path in the repository.
        max_bytes: A larger file is refused before it is fetched.
        cache_dir: The cache; None is the client's own.

    Raises:
        HubFileError: The file is missing, too large, or its bytes differ twice.
        HubError: The Hub cannot be reached and the cache lacks the file.
    """
    where = f"{name} of '{snapshot.repo_id}' at {snapshot.commit[:12]}"
    remote = snapshot.files.get(name)
    if remote is None and not snapshot.offline:
        raise HubFileError(f'There is no {where}: {_MISSING.get(name, "check the repository")}.')
    if remote is not None and remote.size > max_bytes:
        raise HubFileError(f'{where} has {remote.size} bytes; at most {max_bytes} are expected.')
    for last in (False, True):
        path = _download(api, snapshot, name, cache_dir)
        # Read once: what is checked here is what is used, whatever becomes of the file in the cache.
        with path.open('rb') as file:
            data = file.read() if os.fstat(file.fileno()).st_size <= max_bytes else None
        if data is None:
            _forget(path)
            raise HubFileError(f'{where} has more than {max_bytes} bytes, which are expected at most.')
        expected = remote.checksum if remote is not None else _kept_checksum(path)
        if expected is None:
            raise HubFileError(
                f'The cache holds {where} without its checksum, so it cannot be checked offline: load it once while '
                f'the Hub can be '
                'reached.'
            )
        found = checksum(data, expected)
        if found == expected:
            return data
        _forget(path)
        if last or snapshot.offline:
            break
        _logger.warning('%s has checksum %s, expected %s: fetching it again.', where, found[:12], expected[:12])
    again = 'the repository or the way to it is damaged'
    if snapshot.offline:
        again = 'load it again once the Hub can be reached'
    raise HubFileError(
        f'{where} has checksum {found}, but the Hub keeps {expected} for it. The file was deleted from the cache; '
        f'{again}.'
    )


_MISSING = {
    'config.json': 'without it nobody knows the architecture; ask the author to push with timm_attn.push_to_hub',
    'model.safetensors': 'other weight files, such as pytorch_model.bin, may run code when read and are never loaded; '
    'ask the '
    'author to push safetensors',
}


def _download(api: HfApi, snapshot: Snapshot, name: str, cache_dir: str | os.PathLike[str] | None) -> Path:
    def download() -> str:
        return api.hf_hub_download(
            snapshot.repo_id,
            name,
            revision=snapshot.commit,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=snapshot.offline,
        )

    return Path(call(f'fetch {name} of', snapshot.repo_id, api.token, download))


def _kept_checksum(path: Path) -> str | None:
    # The client names each blob after its ETag, which is the checksum; the blob may in turn be a link into a store
    # shared by repositories, whose names are other hashes.
    target = Path(os.readlink(path)).name if path.is_symlink() else ''
    return target if re.fullmatch(r'[0-9a-f]{40}|[0-9a-f]{64}', target) else None


def _forget(path: Path) -> None:
    """Deletes a file of the cache with everything its links lead through."""
    while True:
        target = path.parent / os.readlink(path) if path.is_symlink() else None
        path.unlink(missing_ok=True)
        if target is None:
            return
        path = target

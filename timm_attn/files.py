"""Files that are written whole or not at all, and read without following what leads elsewhere."""

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and what a killed process left is not recognised
    fcntl = None

# What a killed process may leave: a file or folder that was being written, and one that was being replaced.
_TEMPORARY = ('.tmp', '.tmp.old')
# A model folder's own: files that were being prepared, and those that were being put in place.
_PREPARED, _COMMITTED = '.save.', '.commit.'


def file_hash(path: str | Path, algorithm: str) -> str:
    """The hash of a file, as hexadecimal digits.

    Args:
        path: The file.
        algorithm: 'sha256' or 'sha1', as hashlib names them.
    """
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def git_sha1(data: bytes) -> str:
    """The id that git, and so the Hub, gives a file that is not in LFS.

    Args:
        data: The file's bytes.
    """
    return hashlib.sha1(b'blob %d\0' % len(data) + data, usedforsecurity=False).hexdigest()


def read_within(folder: str | Path, name: str, max_bytes: int | None = None) -> bytes:
    """Reads a file of a folder that somebody else may have filled.

    Args:
        folder: The folder, which may be a link itself.
        name: Path in the folder.
        max_bytes: A larger file is refused.

    Raises:
        ValueError: It is a link that leads out of the folder or nowhere, no regular file, or too large.
        OSError: It is not there or cannot be read.
    """
    root = Path(folder).resolve()
    path = root / name
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        if path.is_symlink():
            raise ValueError(f"'{Path(folder) / name}' is a link that leads nowhere: remove it.") from None
        raise
    except RuntimeError as e:  # links in a circle, before Python 3.13
        raise ValueError(f"'{Path(folder) / name}' is a link that leads nowhere: {e}") from e
    if root not in target.parents:
        raise ValueError(
            f"'{Path(folder) / name}' is a link that leads out of its folder, to '{target}', and is not followed: "
            'put the file itself there.'
        )
    # A pipe would be waited for; a link put there a moment ago would be followed.
    flags = os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_BINARY', 0)
    handle = os.open(target, flags)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise ValueError(f"'{Path(folder) / name}' is no regular file: move it away.")
    with open(handle, 'rb') as file:
        if max_bytes is not None and status.st_size > max_bytes:
            raise ValueError(f"'{Path(folder) / name}' has {status.st_size} bytes; at most {max_bytes} are read.")
        return file.read() if max_bytes is None else file.read(max_bytes + 1)


def _lock(handle: int, wait: bool = False) -> bool:
    if fcntl is None:
        return wait
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return wait
    return True


def _lock_path(path: Path) -> int | None:
    """A handle on a file or folder that this process holds locked, None where it vanished or another one holds it."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_NONBLOCK', 0))
    except OSError:
        return None
    with contextlib.suppress(OSError):
        if _lock(handle) and os.path.samestat(os.fstat(handle), os.lstat(path)):
            return handle
    os.close(handle)
    return None


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _temporary(path: Path, folder: bool) -> tuple[Path, int]:
    """A new file or folder beside `path`, with the permissions that new ones have, and the handle that locks it."""
    while True:
        temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.tmp')
        if folder:
            temporary.mkdir()
        else:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        if fcntl is None:
            return temporary, -1
        # Another process may take it for a leftover in the moment before it is locked.
        if (handle := _lock_path(temporary)) is not None:
            return temporary, handle


def remove_leftovers(path: str | Path) -> None:
    """Removes what killed processes left of their attempts to write `path`; what a living one writes stays.

    Args:
        path: A file or folder that `atomic_write` or `atomic_dir` is for.
    """
    path = Path(path)
    if fcntl is None or not path.parent.is_dir():
        return
    names = [e.name for e in os.scandir(path.parent) if e.name.startswith(f'.{path.name}.')]
    for name in names:
        if name.endswith(_TEMPORARY) and (handle := _lock_path(path.parent / name)) is not None:
            _discard(path.parent / name)
            os.close(handle)


def _unlock(handle: int) -> None:
    if handle >= 0:
        os.close(handle)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that takes its place when the block ends well, and vanishes when not.

    A file that is replaced keeps its permissions. What killed processes left of earlier attempts is removed.

    Args:
        path: The file that shall be written whole or not at all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary, handle = _temporary(path, folder=False)
    try:
        yield temporary
        _keep_mode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        _unlock(handle)


def _keep_mode(old: Path, new: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(old)
        if stat.S_ISREG(status.st_mode):
            new.chmod(stat.S_IMODE(status.st_mode))


@contextmanager
def atomic_dir(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that takes its place when the block ends well, and vanishes when not.

    Args:
        path: The folder that shall be written whole or not at all.
        overwrite: Replace a folder that holds something.

    Raises:
        ValueError: The folder exists and is not empty, or a file has its name.
    """
    path = Path(path)
    check_vacant(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, handle = _temporary(path, folder=True)
    old = temporary.with_name(f'{temporary.name}.old')
    try:
        yield temporary
        # Locked before it gets its new name, so that no other process takes it for a leftover.
        held = _lock_path(path)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        # Not before the new folder is there: until then, the old one of a killed process may be all there is.
        remove_leftovers(path)
        _discard(old)
        _unlock(-1 if held is None else held)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _unlock(handle)


def check_vacant(path: str | Path, overwrite: bool = False) -> None:
    """Refuses a place that a folder cannot be written to; what killed processes left there does not count.

    Args:
        path: The folder to be written.
        overwrite: A folder that holds something will do.

    Raises:
        ValueError: The folder is not empty, or a file has its name.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"'{path}' is a file; a folder is written here: choose another name.")
    if path.is_dir() and not overwrite:
        names = [e.name for e in os.scandir(path)]
        cut_off = any(n.startswith(_COMMITTED) for n in names)
        if not cut_off and not all(n.startswith(_PREPARED) or _is_temporary(n) for n in names):
            raise ValueError(f"'{path}' is not empty; choose another folder or pass --overwrite (overwrite=True).")


def _is_temporary(name: str) -> bool:
    return name.startswith('.') and name.endswith(_TEMPORARY)


# --- Several files that belong together -------------------------------------------------------------------------------


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keeps other processes that write files which belong together out of a folder; they wait.

    Args:
        folder: The folder, which exists.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, wait=True)
        yield
    finally:
        os.close(handle)


def settle(folder: str | Path) -> None:
    """Puts files that belong together in their places, where a process was killed while it did so.

    For readers. An empty folder '.commit.*' stays as a sign that somebody was cut off, whom `atomic_files` then lets
    finish. Where another process is at it, this waits for it.

    Args:
        folder: The folder.

    Raises:
        OSError: The folder cannot be written.
    """
    folder = Path(folder)
    if any(folder.glob(f'{_COMMITTED}*/*')):
        with locked(folder):
            for prepared in folder.glob(f'{_COMMITTED}*'):
                _put_in_place(prepared, folder)


def _put_in_place(prepared: Path, folder: Path) -> None:
    """Moves files that are all ready to their places. May be cut off and done again at any point.

    The last file in the order of their names in `prepared` is the one that readers ask for first. It is taken away
    before any other changes, and comes last, so that nobody takes a mixture for a model.
    """
    names = sorted(e.name for e in os.scandir(prepared) if e.is_file())
    if len(names) > 1:
        (folder / names[-1].partition('.')[2]).unlink(missing_ok=True)
    for name in names:
        os.replace(prepared / name, folder / name.partition('.')[2])
    shutil.rmtree(prepared / 'old', ignore_errors=True)


def _clear(folder: Path) -> bool:
    """Ends what killed processes began, and tells whether one was cut off with all its files ready."""
    found = sorted(e.name for e in os.scandir(folder) if e.name.startswith((_PREPARED, _COMMITTED)))
    for name in found:
        if name.startswith(_COMMITTED):
            _put_in_place(folder / name, folder)
    return any(n.startswith(_COMMITTED) for n in found)


def _remove_signs(folder: Path) -> None:
    for entry in list(os.scandir(folder)):
        if entry.name.startswith((_PREPARED, _COMMITTED)):
            _discard(Path(entry.path))


@contextmanager
def atomic_files(folder: str | Path, names: tuple[str, ...]) -> Iterator[tuple[Path, bool]]:
    """Yields an empty folder in which files that belong together are written; all of them then take their places.

    A process that is killed leaves all of the old files or all of the new ones: until `settle` or the next
    `atomic_files` has run, those are in the folder '.commit.*' beside them (the new ones that have no place yet, and
    links to all the old ones in 'old'). Files that are replaced keep their permissions; files of other names stay as
    they are. Two processes take turns.

    Args:
        folder: The folder.
        names: The files, at most 10; the last is the one that readers ask for first. One that is not written stays.

    Yields:
        The empty folder, and whether an earlier process was cut off after its files were ready: they are in place now.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        cut_off = _clear(folder)
        prepared = folder / f'{_PREPARED}{secrets.token_hex(4)}'
        prepared.mkdir()
        try:
            yield prepared, cut_off
            old = prepared / 'old'
            old.mkdir()
            for i, name in enumerate(names):
                if (folder / name).is_dir() and not (folder / name).is_symlink():
                    raise ValueError(f"'{folder / name}' is a folder; a file is written here: move it away.")
                if (folder / name).is_file() and not (folder / name).is_symlink():
                    with contextlib.suppress(OSError):  # a file system without links: the new files are all there
                        os.link(folder / name, old / name)
                if (prepared / name).exists():
                    _keep_mode(folder / name, prepared / name)
                    os.replace(prepared / name, prepared / f'{i}.{name}')
            ready = folder / prepared.name.replace(_PREPARED, _COMMITTED)
            os.replace(prepared, ready)
        except BaseException:
            shutil.rmtree(prepared, ignore_errors=True)
            raise
        _put_in_place(ready, folder)
        _remove_signs(folder)

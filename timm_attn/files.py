"""Small guards that several parts share: optional packages, atomic files, finite weights."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def git_sha1(path: str | Path) -> str:
    """The id that git, and so the Hub, gives a file that is not in LFS.

    Args:
        path: The file.
    """
    data = Path(path).read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(data) + data, usedforsecurity=False).hexdigest()


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that takes its place when the block ends well, and vanishes when not.

    Args:
        path: The file that shall be written whole or not at all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f'.{path.name}.', suffix='.tmp', dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    if path.exists() and not path.is_dir():
        raise ValueError(f"'{path}' is a file; a folder is written here: choose another name.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"'{path}' is not empty; choose another folder, or pass --overwrite (overwrite=True).")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))
    old = temporary.with_name(f'{temporary.name}.old')
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""The files of a comparison's folder: records of runs, and the leases by which any number of workers share them."""

import contextlib
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import atomic_write

BEAT = 5.0  # Seconds between the signs of life of a worker.
EXPIRY = 90.0  # Seconds without one, on the watcher's own clock, after which a worker counts as dead.

_MODEL = dict(label=str, name=str, args=dict)
_EPOCH = dict(epoch=int, lr=float, train_loss=float, val_loss=float, top1=float, seconds=float)
_ENVIRONMENT = dict(torch=str, timm=str, python=str, machine=str, cores=int, threads=int, clock=str)
_RECORD: dict[str, Any] = dict(
    run=str,
    comparison=str,
    model=_MODEL,
    seed=int,
    top1=float,
    history=[_EPOCH],
    parameters=int,
    activation_mib=float,
    seconds_per_epoch=float,
    environment=_ENVIRONMENT,
    finished=str,
    command=str,
)
_COMPARISON: dict[str, Any] = dict(
    models=[_MODEL],
    seeds=int,
    data=dict(name=str, train=int, val=int, classes=int, measured=str, skipped=dict),
    settings=dict(epochs=int, batch_size=int, img_size=int, pretrained=bool),
)


class LeaseLost(Exception):
    """Another worker has taken the run, since this one gave no sign of life for too long."""


class Lease:
    """The right to do one run.

    The holder of the latest generation of `NAME.<generation>.lease` holds the run; the next generation is made
    exclusively, so of several that find the holder dead only one comes to hold it. A holder changes its file every few
    seconds; a watcher compares what it reads with what it read before, on its own clock, so clocks may differ.

    Args:
        folder: Of the leases, shared by all workers.
        name: Of the run.
        clock: Seconds that only move forward.
    """

    def __init__(self, folder: Path, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder = folder
        self.name = name
        self.clock = clock
        self.path: Path | None = None  # Of the generation that is held here.
        self.moved = False  # Whether the holder gave a sign of life while it was watched.
        self._token = uuid.uuid4().hex
        self._beats = 0
        self._seen: tuple[Path, bytes, float] | None = None
        self._stop = threading.Event()

    def take(self) -> bool:
        """Takes the run where nobody holds it or its holder is dead; False where somebody does."""
        latest = self._latest()
        if latest is not None and not self._dead(latest):
            return False
        generation = 0 if latest is None else _generation(latest) + 1
        path = self.folder / f'{self.name}.{generation}.lease'
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with path.open('xb') as file:
                file.write(self._content())
        except FileExistsError:
            return False
        self.path = path
        return True

    def beat(self) -> None:
        """Gives a sign of life."""
        if self.path is not None and self._latest() == self.path:
            self._beats += 1
            self.path.write_bytes(self._content())

    def check(self) -> None:
        """Makes sure that the run is still held.

        Raises:
            LeaseLost: It is not.
        """
        if self.path is None or self._latest() != self.path:
            raise LeaseLost(self.name)

    def release(self) -> None:
        """Gives the run back, or marks it as done: nobody looks at leases of a run that has its record."""
        if self.path is not None and self._latest() == self.path:
            for path in self._all():
                if _generation(path) <= _generation(self.path):
                    path.unlink(missing_ok=True)
        self.path = None

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Gives signs of life inside the block, from a thread of its own, and the run back after it."""

        def work() -> None:
            while not self._stop.wait(BEAT):
                with contextlib.suppress(OSError):  # A shared folder that hangs for a moment.
                    self.beat()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            self.release()

    def _content(self) -> bytes:
        return json.dumps([self._token, self._beats, *_identity(os.getpid())]).encode()

    def _all(self) -> list[Path]:
        found = [p for p in self.folder.glob('*.lease') if p.name.rsplit('.', 2)[0] == self.name]
        return sorted(found, key=_generation)

    def _latest(self) -> Path | None:
        found = self._all()
        return found[-1] if found else None

    def _dead(self, path: Path) -> bool:
        try:
            content = path.read_bytes()
        except OSError:  # Released just now.
            return False
        with contextlib.suppress(ValueError, TypeError):
            _, _, where, pid, started = json.loads(content)
            if where == _where() and _started(int(pid)) != started:
                return True  # It ran on this machine, and does no more.
        now = self.clock()
        if self._seen is None or self._seen[:2] != (path, content):
            self.moved |= self._seen is not None
            self._seen = (path, content, now)
        return now - self._seen[2] > EXPIRY


def _generation(path: Path) -> int:
    number = path.name.rsplit('.', 2)[1]
    return int(number) if number.isdecimal() else -1


def _identity(pid: int) -> tuple[str, int, str]:
    return _where(), pid, _started(pid)


def _where() -> str:
    """This machine since it was started, and the container in it: where a process number means something."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()]
        parts += [os.readlink('/proc/self/ns/pid')]
    return ' '.join(parts)


def _started(pid: int) -> str:
    """When a process was started, so that another one of the same number is not taken for it; '' without /proc."""
    try:
        # The name in brackets may hold spaces; the 20th field behind it is the time.
        return Path(f'/proc/{pid}/stat').read_text(encoding='utf-8').rpartition(')')[2].split()[19]
    except (OSError, IndexError):
        return 'gone' if os.path.isdir('/proc/self') else ''


def read_record(path: Path, comparison: str, run: Callable[[dict[str, Any], int], str]) -> dict[str, Any]:
    """Reads and checks the record of a finished run.

    Args:
        path: Of the record.
        comparison: The digest of the comparison it must belong to.
        run: Gives the name of a run from its model and seed.

    Raises:
        ValueError: It is damaged, edited, or of another comparison.
    """
    record = load_json(path, 'remove it, and the run is done again')
    try:
        # First, so that a record of another comparison is called that.
        held = record.get('comparison') if isinstance(record, dict) else None
        if isinstance(held, str) and held != comparison:
            raise ValueError(f"'{path}' was made with other settings or data than its folder holds: remove it.")
        _check(record, _RECORD, 'record')
        if not record['history']:
            raise _Damage("'history' is empty")
        if record['top1'] != record['history'][-1]['top1'] or not 0 <= record['top1'] <= 100:
            raise _Damage(f"'top1' (={record['top1']}) is not that of the last epoch in percent")
        if not record['run'] == path.stem == run(record['model'], record['seed']):
            raise _Damage(f"'run' (={record['run']!r}) is not that of its file, model and seed")
    except _Damage as e:
        raise ValueError(f"'{path}' is damaged ({e}): remove it, and the run is done again.") from e
    return record


def read_comparison(out: Path) -> dict[str, Any]:
    """Reads and checks `comparison.json` of a folder.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    path = out / 'comparison.json'
    if not path.is_file():
        raise ValueError(f"'{out}' holds no comparison: there is no comparison.json.")
    held = load_json(path, 'restore it, or choose another folder')
    try:
        _check(held, _COMPARISON, 'comparison')
        if not held['models']:
            raise _Damage("'models' is empty")
    except _Damage as e:
        raise ValueError(f"'{path}' is damaged ({e}): restore it, or choose another folder.") from e
    return held


class _Damage(Exception):
    pass


def _check(value: Any, shape: Any, where: str) -> None:
    """Compares a value from JSON with its shape: a type, a dict of shapes by key, or a list of one shape."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise _Damage(f"'{where}' is no object")
        for key, inner in shape.items():
            if key not in value:
                raise _Damage(f"'{where}' has no '{key}'")
            _check(value[key], inner, key)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise _Damage(f"'{where}' is no list")
        for inner in value:
            _check(inner, shape[0], where)
    elif shape in (int, float):
        kinds = (int,) if shape is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            raise _Damage(f"'{where}' (={value!r}) is no {'whole ' if shape is int else ''}number")
    elif not isinstance(value, shape):
        raise _Damage(f"'{where}' (={value!r}) is no {dict(str='text', dict='object', bool='truth')[shape.__name__]}")


def load_json(path: Path, remedy: str) -> Any:
    """Reads JSON.

    Raises:
        ValueError: It is none; the message holds path and remedy.
    """
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"'{path}' is no JSON ({e}): {remedy}.") from e


def dumps(held: Any) -> str:
    """JSON in which NaN, the deviation of one seed, is null."""
    return json.dumps(_without_nan(held), indent=1, allow_nan=False) + '\n'


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding='utf-8')


def _without_nan(held: Any) -> Any:
    if isinstance(held, dict):
        return {k: _without_nan(v) for k, v in held.items()}
    if isinstance(held, (list, tuple)):
        return [_without_nan(v) for v in held]
    return None if isinstance(held, float) and held != held else held

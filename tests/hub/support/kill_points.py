"""Processes that die at every file operation of a command, and what the folder they worked on holds then.

`run` forks a child for each operation: the n-th child ends, as if by SIGKILL, with its n-th operation below the work
folder, before that takes effect. It runs in a process of its own, which has no other threads.
"""

import functools
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from timm_attn.cli import main
from timm_attn.files import atomic_write
from timm_attn.hub import card_of_folder, push_to_hub, read_folder, save
from timm_attn.hub.load import open_model, pull

KILLED, FAILED = 77, 3
_EVENTS = ('open', 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.link', 'os.chmod', 'os.truncate', 'os.symlink')


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model('simple_cnn_se', num_classes=2).eval()


OLD, NEW = make_model(0), make_model(1)
LABELS = {'old': ['old 0', 'old 1'], 'new': ['new 0', 'new 1']}
MODELS = {'old': OLD, 'new': NEW}


def write(folder: Path, which: str, **kwargs: Any) -> None:
    mean = {'old': (0.1, 0.1, 0.1), 'new': (0.2, 0.2, 0.2)}[which]
    save(MODELS[which], folder, label_names=LABELS[which], data_config={'mean': mean}, **kwargs)


def _die_at(number: int, root: str) -> Callable[[str, tuple[Any, ...]], None]:
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _EVENTS or not isinstance(args[0], str | bytes | os.PathLike):
            return
        count += os.path.abspath(os.fsdecode(args[0])).startswith(root)
        if count == number:
            os._exit(KILLED)

    return hook


def in_child(work: Callable[[], object], number: int | None = None, root: str = '') -> int:
    """The exit status of a child that does some work: 0, KILLED, or FAILED with a traceback on stderr."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        if number is not None:
            sys.addaudithook(_die_at(number, root))
        status = work()
        os._exit(FAILED if isinstance(status, int) and status else 0)
    except BaseException:
        traceback.print_exc()
        os._exit(FAILED)


def _which(model: Any) -> str:
    names = model.pretrained_cfg.get('label_names')
    mean = round(model.pretrained_cfg['mean'][0], 3)
    weights = [k for k, m in MODELS.items() if torch.equal(next(m.parameters()), next(model.parameters()))]
    labels = [k for k, v in LABELS.items() if v == names]
    means = [k for k, v in {'old': 0.1, 'new': 0.2}.items() if v == mean]
    assert weights == labels == means, f'a mixture: weights {weights}, labels {labels}, mean {means}'
    return weights[0]


def with_timm(folder: Path) -> str:
    """What timm's own reader, which compares nothing, makes of a folder."""
    try:
        return _which(timm.create_model(f'local-dir:{folder}', pretrained=True))
    except (FileNotFoundError, RuntimeError):
        return 'refused'


def with_ours(folder: Path) -> str:
    try:
        config, _ = read_folder(folder)
    except ValueError:
        return 'refused'
    assert config.pretrained_cfg['label_names'] in LABELS.values()
    return _which(open_model(folder))


def _convert(folder: Path, *more: str) -> int:
    return main(
        [
            'convert',
            str(folder.parent.parent / 'foreign.pth'),
            '--model',
            'simple_cnn_se',
            '--num-classes',
            '2',
            '--out',
            str(folder),
            *more,
        ]
    )


def _pictures(folder: Path) -> None:
    """What `quickstart` does at its end, and again when it goes on."""
    write(folder, 'new', overwrite=True)
    for name in ('curves.png', 'attention.png'):
        with atomic_write(folder / name) as path:
            path.write_bytes(b'a picture')


# Name -> the command, whether an old model is there, and the names that are there at the end.
_FILES = {'model.safetensors', 'config.json', 'README.md'}
COMMANDS: dict[str, tuple[Callable[[Path], object], bool, set[str]]] = {
    'save': (lambda f: write(f, 'new'), False, _FILES),
    'save over': (lambda f: write(f, 'new', overwrite=True), True, _FILES),
    'pull': (lambda f: pull('me/new', f), False, _FILES),
    'pull over': (lambda f: pull('me/new', f, overwrite=True), True, _FILES),
    'convert': (_convert, False, _FILES),
    'convert over': (lambda f: _convert(f, '--overwrite'), True, _FILES),
    'quickstart': (_pictures, False, _FILES | {'curves.png', 'attention.png'}),
    'card': (lambda f: card_of_folder(f, eval_results={'dataset': 'd', 'top1': 12.5}), True, _FILES),
}


def run(name: str, work: str) -> int:
    """Kills a command at each of its file operations, and looks at the folder with and without readers in between.

    Returns:
        The number of operations.
    """
    command, over, names = COMMANDS[name]
    end = 'old' if name == 'card' else 'new'
    root = Path(work).resolve() / 'root'
    folder = root / 'out'
    torch.save(NEW.state_dict(), Path(work) / 'foreign.pth')
    converts = name.startswith('convert')
    # What is computed once for all models of a kind is computed before the first fork.
    for which in MODELS:
        write(Path(work) / 'warm', which, overwrite=True)
        with_timm(Path(work) / 'warm')
    points = 0
    for readers in (True,) if over else (True, False):
        number = 0
        while True:
            # Without readers, which may put files in their places, every third operation: each costs a process.
            number += 1 if readers else 3
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            if over:
                write(folder, 'old')
                (folder / 'notes.txt').write_text('mine')
            status = in_child(lambda: command(folder), number, str(root))
            if status == 0:
                points = number - 1 if readers else points
                break
            assert status == KILLED, f'{name} failed at its operation {number}'
            if readers and not converts:
                seen = [with_timm(folder), with_ours(folder), with_timm(folder)]
                assert set(seen) <= {'old', 'new', 'refused'}
                assert not over or seen[1] in ('old', 'new'), f'{name}, killed at {number}: the model is gone'
            if readers and converts and folder.exists():
                read = in_child(lambda: read_folder(folder))
                assert not over or read == 0, f'{name}, killed at {number}: the model is gone'
            assert in_child(lambda: command(folder)) == 0, f'{name}, killed at {number}: it does not finish'
            there = {p.name for p in folder.iterdir()}
            assert there == names | ({'notes.txt'} if over else set()), f'{name}, killed at {number}: {there}'
            assert {p.name for p in root.iterdir()} == {'out'}
            if converts:
                model = open_model(folder)
                assert torch.equal(next(model.parameters()), next(NEW.parameters()))
            else:
                assert with_timm(folder) == with_ours(folder) == end
    return points


def run_push(work: str) -> int:
    """Kills a push of a folder at each of its file operations; the folder and the repository stay whole."""
    root = Path(work).resolve() / 'root'
    root.mkdir()
    write(root / 'model', 'new')
    before = {p.name: p.read_bytes() for p in (root / 'model').iterdir()}
    number = 0
    while True:
        number += 1
        push = functools.partial(push_to_hub, root / 'model', f'me/killed{number}')
        status = in_child(push, number, str(root))
        assert {p.name: p.read_bytes() for p in (root / 'model').iterdir()} == before
        if status == 0:
            return number - 1
        assert status == KILLED and in_child(push) == 0


def run_two(work: str) -> list[str]:
    """Two processes save over one folder again and again, while a third reads: never a mixture, never refused."""
    folder = Path(work).resolve() / 'two'
    write(folder, 'old')
    children = []
    for which in ('old', 'new'):
        if (child := os.fork()) == 0:
            try:
                for _ in range(8):
                    write(folder, which, overwrite=True)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(FAILED)
        children.append(child)
    seen, running = [], set(children)
    while running or len(seen) < 5:
        seen.append(with_ours(folder))
        for child in list(running):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                assert status == 0
                running.discard(child)
    assert {p.name for p in folder.iterdir()} == _FILES
    seen.append(with_timm(folder))
    return seen

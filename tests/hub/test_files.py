"""Single files and folders that are written whole or not at all."""

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from timm_attn.files import atomic_dir, atomic_files, atomic_write, check_vacant, read_within, settle


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> Iterator[None]:
    """New files are for their owner only."""
    old = os.umask(0o077)
    yield
    os.umask(old)


def test_permissions_are_those_of_new_files_or_of_the_file_that_is_replaced(tmp_path: Path, umask: None) -> None:
    (tmp_path / 'shared').touch()
    (tmp_path / 'shared').chmod(0o664)
    for name in ('new', 'shared'):
        with atomic_write(tmp_path / name) as path:
            path.write_text('x')
    with atomic_dir(tmp_path / 'folder'):
        pass
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / 'b').touch()
    (tmp_path / 'model' / 'b').chmod(0o640)
    with atomic_files(tmp_path / 'model', ('a', 'b')) as (prepared, _):
        for name in 'ab':
            (prepared / name).write_text('x')
    found = [mode(tmp_path / n) for n in ('new', 'shared', 'folder', 'model/a', 'model/b')]
    assert found == [0o600, 0o664, 0o700, 0o600, 0o640]


def test_the_umask_is_never_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It belongs to the process: for other threads too, files would be open to everybody for a moment.
    def refuse(mask: int) -> int:
        raise AssertionError('the umask was changed')

    monkeypatch.setattr(os, 'umask', refuse)
    with atomic_write(tmp_path / 'a') as path:
        path.write_text('x')
    with atomic_dir(tmp_path / 'b'), atomic_files(tmp_path / 'c', ('x',)) as (prepared, _):
        (prepared / 'x').write_text('x')


def test_leftovers_go_and_what_is_being_written_stays(tmp_path: Path) -> None:
    for name in ('.x.00000000.tmp', '.x.00000001.tmp', '.xy.00000000.tmp'):
        (tmp_path / name).touch()
    (tmp_path / '.x.d.tmp.old').mkdir()
    with atomic_write(tmp_path / 'x') as first:
        first.write_text('first')
        with atomic_write(tmp_path / 'x') as second:
            second.write_text('second')
        assert first.exists() and (tmp_path / 'x').read_text() == 'second'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.xy.00000000.tmp', 'x']
    assert (tmp_path / 'x').read_text() == 'first'

    def fail() -> None:
        with atomic_write(tmp_path / 'x') as path:
            path.write_text('third')
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (tmp_path / 'x').read_text() == 'first' and len(list(tmp_path.iterdir())) == 2


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    for text in 'ab':
        with atomic_dir(out, overwrite=True) as written:
            (written / text).write_text(text)
    assert [p.name for p in out.iterdir()] == ['b'] and [p.name for p in tmp_path.iterdir()] == ['out']
    with pytest.raises(ValueError, match=r'is not empty; choose another folder or pass --overwrite'), atomic_dir(out):
        pass
    with pytest.raises(ValueError, match=r'is a file'), atomic_dir(out / 'b'):
        pass


def test_a_place_with_leftovers_only_is_vacant(tmp_path: Path) -> None:
    (tmp_path / '.save.1').mkdir()
    (tmp_path / '.config.json.1.tmp').touch()
    check_vacant(tmp_path)
    (tmp_path / '.hidden').touch()
    with pytest.raises(ValueError, match=r'is not empty'):
        check_vacant(tmp_path)
    check_vacant(tmp_path, overwrite=True)


def test_files_that_belong_together_wait_for_one_another(tmp_path: Path) -> None:
    order: list[str] = []
    inside = threading.Event()

    def write(name: str) -> None:
        with atomic_files(tmp_path, ('x', 'y')) as (prepared, _):
            order.append(name)
            inside.set()
            (prepared / 'x').write_text(name)
            (prepared / 'y').write_text(name)

    with atomic_files(tmp_path, ('x', 'y')) as (prepared, _):
        thread = threading.Thread(target=write, args=('second',))
        thread.start()
        assert not inside.wait(0.2)
        order.append('first')
        (prepared / 'x').write_text('first')
        (prepared / 'y').write_text('first')
    thread.join(30)
    assert order == ['first', 'second']
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {'x': 'second', 'y': 'second'}


def test_what_was_ready_is_put_in_place_by_readers(tmp_path: Path) -> None:
    (tmp_path / 'x').write_text('old')
    ready = tmp_path / '.commit.1'
    (ready / 'old').mkdir(parents=True)
    (ready / '0.x').write_text('new')
    (ready / '2.z').write_text('new')
    settle(tmp_path)
    assert (tmp_path / 'x').read_text() == (tmp_path / 'z').read_text() == 'new'
    # The sign stays for the command that was cut off: it may finish.
    assert [p.name for p in tmp_path.glob('.commit*')] == ['.commit.1'] and not list(ready.iterdir())
    with atomic_files(tmp_path, ('x',)) as (_, cut_off):
        assert cut_off
    assert {p.name for p in tmp_path.iterdir()} == {'x', 'z'}
    with atomic_files(tmp_path, ('x',)) as (_, cut_off):
        assert not cut_off


def test_a_folder_in_the_place_of_a_file_is_said_before_anything_changes(tmp_path: Path) -> None:
    (tmp_path / 'y').mkdir()
    (tmp_path / 'x').write_text('old')

    def write() -> None:
        with atomic_files(tmp_path, ('x', 'y')) as (prepared, _):
            (prepared / 'x').write_text('new')
            (prepared / 'y').write_text('new')

    with pytest.raises(ValueError, match=r"'.*y' is a folder"):
        write()
    assert (tmp_path / 'x').read_text() == 'old' and {p.name for p in tmp_path.iterdir()} == {'x', 'y'}


def test_reading_stays_within_the_folder_and_waits_for_nobody(tmp_path: Path) -> None:
    folder = tmp_path / 'folder'
    (folder / 'sub').mkdir(parents=True)
    (tmp_path / 'secret').write_text('secret')
    (folder / 'good').write_text('good')
    (folder / 'inner').symlink_to('good')
    (folder / 'absolute').symlink_to(folder / 'good')
    (folder / 'outer').symlink_to('../secret')
    (folder / 'twice').symlink_to('outer')
    (folder / 'sub' / 'up').symlink_to('../..')
    (folder / 'zero').symlink_to('/dev/zero')
    os.mkfifo(folder / 'pipe')
    for name in ('good', 'inner', 'absolute'):
        assert read_within(folder, name) == b'good'
    for name in ('outer', 'twice', 'zero', '../secret', 'sub/up/secret'):
        with pytest.raises(ValueError, match=r'leads out of its folder'):
            read_within(folder, name)
    for name in ('pipe', 'sub'):
        with pytest.raises(ValueError, match=r'no regular file'):
            read_within(folder, name)
    with pytest.raises(ValueError, match=r'has 4 bytes; at most 3'):
        read_within(folder, 'good', 3)
    with pytest.raises(FileNotFoundError):
        read_within(folder, 'nothing')

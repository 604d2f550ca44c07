"""A process that dies at any file operation, a full disc, and two processes at one folder."""

import os
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_attacks import KILLS
from hub_client import RunClient
from hub_tables import Row

from timm_attn.hub import read_folder, save

SUPPORT = str(Path(__file__).with_name('support'))
pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='the child processes are forked')


def _kill(support: str, function: str, *args: str) -> object:
    import sys

    sys.path.insert(0, support)
    import kill_points

    return getattr(kill_points, function)(*args)


@pytest.mark.parametrize('row', KILLS, ids=lambda r: r.id)
def test_killed_at_every_file_operation(row: Row, hub_client: Any, run_client: RunClient, tmp_path: Path) -> None:
    work = tmp_path / 'work'
    work.mkdir()
    if row.what.startswith('pull'):
        folder = _new_model(tmp_path)
        hub_client.hub.create_repo('me/new')
        hub_client.hub.commit('me/new', {p.name: p.read_bytes() for p in folder.iterdir()})
    args = ('run_push', str(work)) if row.what == 'push' else ('run', row.what, str(work))
    points = run_client(_kill, SUPPORT, *args).value
    assert points >= row.fault['at_least']


def _new_model(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    model = timm.create_model('simple_cnn_se', num_classes=2)
    return save(model, tmp_path / 'new', label_names=['new 0', 'new 1'], data_config={'mean': (0.2, 0.2, 0.2)})


def test_two_processes_at_one_folder(run_client: RunClient, tmp_path: Path) -> None:
    seen = run_client(_kill, SUPPORT, 'run_two', str(tmp_path)).value
    assert len(seen) > 4 and set(seen) <= {'old', 'new'}


def _files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_file_that_cannot_be_written_in_full_changes_nothing(tmp_path: Path) -> None:
    folder = _new_model(tmp_path)
    before = _files(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, 2000, len(before['model.safetensors']) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(OSError, match=r'File too large'):
                save(timm.create_model('simple_cnn_se', num_classes=2), folder, overwrite=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert _files(folder) == before


def test_a_full_disc_changes_nothing(tmp_path: Path) -> None:
    small = tmp_path / 'small'
    small.mkdir()
    mount = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=256k', 'none', str(small)], capture_output=True)
    if mount.returncode:
        pytest.skip('no tmpfs can be mounted here')
    try:
        model = timm.create_model('simple_cnn_se', num_classes=2)
        folder = save(model, small / 'model')
        before = _files(folder)
        free = os.statvfs(small)
        (small / 'filler').write_bytes(b'0' * (free.f_bavail * free.f_frsize - 8192))
        with pytest.raises(OSError, match=r'No space left'):
            save(timm.create_model('simple_cnn_se', num_classes=2), folder, overwrite=True)
        assert _files(folder) == before
        read_folder(folder)
    finally:
        subprocess.run(['umount', str(small)], check=True)

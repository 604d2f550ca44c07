"""Every fault at every step of a push: the rows of docs/reliability.md."""

import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_client import Clock
from hub_tables import PUSH_FAULTS, Row

import timm_attn  # noqa: F401
from timm_attn.hub import client
from timm_attn.hub.client import HubError
from timm_attn.hub.folder import save
from timm_attn.hub.load import load_from_hub
from timm_attn.hub.push import push_to_hub

NOTE = 'A note that somebody wrote on the Hub.'


def make_folder(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    return save(timm.create_model('simple_cnn_cbam', num_classes=3), path)


@pytest.fixture(scope='module')
def old_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp('old') / 'model', 0)


@pytest.fixture(scope='module')
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp('new') / 'model', 1)


def seed_repo(hub: Any, folder: Path) -> dict[str, bytes]:
    files = {name: (folder / name).read_bytes() for name in ('config.json', 'model.safetensors', 'README.md')}
    files['README.md'] += f'\n{NOTE}\n'.encode()
    hub.create_repo('me/x')
    hub.commit('me/x', files)
    return files


@pytest.mark.parametrize('row', PUSH_FAULTS, ids=lambda r: r.id)
def test_push(
    row: Row, hub_client: Any, clock: Clock, old_folder: Path, new_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = hub_client.hub
    before: dict[str, bytes] = {}
    revision = 'dev' if row.step == 'create the branch' else None
    if row.step != 'create it':
        before = seed_repo(hub, old_folder)
    hub.fault(row.method, row.path, **{'times': 1, **row.fault})
    if 'time limit' in row.outcome:
        monkeypatch.setattr(client.SETTINGS, 'timeout', 0.2)
    start = time.monotonic()
    if row.ends_well:
        result = push_to_hub(new_folder, 'me/x', revision=revision)
    else:
        with pytest.raises(HubError, match=row.match) as caught:
            push_to_hub(new_folder, 'me/x', revision=revision)
        assert 'hf_me_write' not in str(caught.value)
        if 'time limit' in row.outcome:
            assert time.monotonic() - start < 9
        # Nothing half-done: the old files, or all of the new ones.
        if before:
            there = hub.files('me/x')
            assert {k: there[k] for k in before} == before
        hub.clear_faults()
        hub.release()
        monkeypatch.setattr(client.SETTINGS, 'timeout', 10)
        result = push_to_hub(new_folder, 'me/x', revision=revision)
    if row.outcome == 'done: waited as told':
        assert max(clock.pauses + hub_client.sleeps) in (3, 4)
    there = hub.files('me/x', revision or 'main')
    assert there['model.safetensors'] == (new_folder / 'model.safetensors').read_bytes()
    assert (NOTE in there['README.md'].decode()) == bool(before)
    # One commit per push, however many attempts it took.
    assert len(hub.commits('me/x', revision or 'main')) == (3 if before else 2)
    assert result.commit == hub.head('me/x', revision or 'main')
    x = torch.randn(1, 3, 16, 16)
    expected = timm.create_model(f'local-dir:{new_folder}', pretrained=True).eval()
    assert torch.equal(load_from_hub('me/x', result.commit).eval()(x), expected(x))

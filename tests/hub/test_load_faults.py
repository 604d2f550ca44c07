"""Every fault at every step of a load with an empty cache: the rows of docs/reliability.md."""

import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_client import Clock
from hub_tables import LOAD_FAULTS, Row

from timm_attn.hub import client
from timm_attn.hub.client import HubError
from timm_attn.hub.folder import save
from timm_attn.hub.load import load_from_hub


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(timm.create_model('simple_cnn_gam', num_classes=3), tmp_path_factory.mktemp('folder') / 'model')


@pytest.mark.parametrize('row', LOAD_FAULTS, ids=lambda r: r.id)
def test_load(row: Row, hub_client: Any, clock: Clock, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = hub_client.hub
    hub.create_repo('me/x')
    commit = hub.commit('me/x', {p.name: p.read_bytes() for p in folder.iterdir()})
    hub.fault(row.method, row.path, **{'times': 1, **row.fault})
    if not row.ends_well:
        if 'time limit' in row.outcome:
            monkeypatch.setattr(client.SETTINGS, 'timeout', 0.2)
        start = time.monotonic()
        with pytest.raises(HubError, match=row.match) as caught:
            load_from_hub('me/x')
        assert 'hf_me_write' not in str(caught.value)
        if 'time limit' in row.outcome:
            assert time.monotonic() - start < 9
        if 'gone from the cache' in row.outcome:
            name = 'config.json' if 'config' in row.step else 'model.safetensors'
            assert not list(hub_client.cache.rglob(f'snapshots/*/{name}'))
        hub.clear_faults()
        hub.release()
        monkeypatch.setattr(client.SETTINGS, 'timeout', 10)
    model: Any = load_from_hub('me/x').eval()
    if row.outcome == 'done: waited as told':
        assert max(clock.pauses + hub_client.sleeps) in (3, 4)
    expected = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(model(x), expected(x))
    assert model.pretrained_cfg['hf_hub_id'] == f'me/x@{commit}'

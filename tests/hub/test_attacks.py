"""Hostile and broken repositories: the rows of docs/reliability.md. None may build, run or half-load anything."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_attacks import ATTACKS
from hub_tables import Row

from timm_attn.hub.client import HubFileError
from timm_attn.hub.folder import read_folder, save
from timm_attn.hub.load import load_from_hub


@pytest.fixture(scope='module')
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    torch.manual_seed(0)
    model = timm.create_model('simple_cnn_cbam', num_classes=3)
    folder = save(model, tmp_path_factory.mktemp('good') / 'model', label_names=['a', 'b', 'c'])
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize('row', ATTACKS, ids=lambda r: r.id)
def test_attack(
    row: Row, hub_client: Any, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub = hub_client.hub
    hub.create_repo('me/x')
    hostile = row.fault['change'](dict(files))
    hub.commit('me/x', hostile)
    # A caller who asks for another head switches timm's own strictness off: the checks must not depend on it.
    asked: tuple[dict[str, Any], ...] = ({}, {'num_classes': 7})
    for kwargs in asked:
        if row.ends_well:
            assert load_from_hub('me/x', **kwargs).num_classes == kwargs.get('num_classes', 3)
        else:
            with pytest.raises(HubFileError, match=row.match):
                load_from_hub('me/x', **kwargs)
    assert not any('pytorch_model' in r.path for r in hub.log if r.method in ('GET', 'HEAD'))
    assert not (tmp_path / 'PWNED').exists()
    if not row.ends_well:
        # The same rules hold for a folder that is to be pushed.
        folder = tmp_path / 'folder'
        folder.mkdir()
        for name, data in hostile.items():
            (folder / name).write_bytes(data)
        with pytest.raises(HubFileError):
            read_folder(folder)

"""One's own collection from the weights table."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_client import Clock
from safetensors.torch import save_file

import timm_attn  # noqa: F401
from timm_attn.hub import client, publish
from timm_attn.hub.publish import Published, table
from timm_attn.weights import TAGS

TAG = 'se_resnet50.a3_in1k'


@pytest.fixture
def source(hub_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """timm's repository with random weights, which is all that the converter can see of them."""
    monkeypatch.setattr(client, 'time', Clock())
    torch.manual_seed(0)
    path = tmp_path / 'model.safetensors'
    model = timm.create_model('seresnet50')
    save_file(model.state_dict(), path)
    hub_client.hub.add_user('timm', 'hf_timm')
    hub_client.hub.create_repo('timm/seresnet50.a3_in1k')
    hub_client.hub.commit('timm/seresnet50.a3_in1k', {'model.safetensors': path.read_bytes()})
    return model.eval()


def test_publish_pushes_converts_and_resumes(hub_client: Any, source: Any) -> None:
    hub = hub_client.hub
    hub.fault('POST', '/commit/', times=None, status=503)
    assert [(r.outcome, r.commit) for r in publish.publish('me', only='se_resnet50.a3*')] == [('failed', '')]
    hub.clear_faults()
    hub.clear_log()
    (row,) = publish.publish('me', only='se_resnet50.a3*')
    assert row == Published(TAG, f'me/{TAG}', 'pushed', hub.head(f'me/{TAG}'))
    # What was uploaded before the failure is not sent again.
    assert not [r for r in hub.log if r.method == 'PUT']
    (again,) = publish.publish('me', only='se_resnet50.a3*')
    assert (again.outcome, again.commit) == ('up to date', row.commit)
    files = hub.files(f'me/{TAG}')
    about = json.loads(files['config.json'])['timm_attn']
    assert about['status'] == 'converted' and about['provenance']['source'] == 'timm/seresnet50.a3_in1k'
    card = files['README.md'].decode()
    assert 'license: apache-2.0' in card and '77.036 % top-1' in card and 'model-index' not in card
    assert hashlib.sha256(files['model.safetensors']).hexdigest() in card
    x = torch.randn(1, 3, 64, 64)
    loaded = timm.create_model(f'hf-hub:me/{TAG}', pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), source(x), rtol=1e-5, atol=1e-5)
    hub_client.offline()


def test_dry_run_lists_every_tag_and_asks_nobody(hub_client: Any) -> None:
    rows = publish.publish('org', dry_run=True)
    assert [r.name for r in rows] == [f'{t.model}.{t.tag}' for t in TAGS]
    warm = [r for r in rows if 'warm start' in r.note]
    assert {r.outcome for r in warm} == {'skipped'} and len(warm) == len([t for t in TAGS if t.status == 'warm'])
    assert all(r.outcome == 'would be pushed' for r in rows if r not in warm)
    assert not hub_client.hub.log
    text = table(rows)
    assert text.count('\n') == len(rows) + 1 and 'org/cbam_resnet50.pcv_in1k' in text


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--only 'x\*' matches no tag. There are: cbam_resnet50.pcv_in1k"):
        publish.publish('me', only='x*')


def test_a_licence_that_forbids_it_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    closed = dataclasses.replace(TAGS[0], licence='cc-by-nc-4.0')
    monkeypatch.setattr(publish, 'TAGS', (closed,))
    (row,) = publish.publish('me')
    assert row.outcome == 'skipped' and "'cc-by-nc-4.0' is none that lets one pass it on" in row.note

"""Weights that cannot be fetched: one error of ours, at once, with the way that needs no network."""

import copy
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

import timm_attn
from timm_attn.hub import load_from_hub
from timm_attn.hub.client import HubError

NAMES = ['cbam_resnet50', 'gam_resnet18', 'injected']


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Host names that are looked up; none has an address."""
    hosts: list[str] = []

    def lookup(host: Any, *_: Any, **__: Any) -> Any:
        hosts.append(host.decode() if isinstance(host, bytes) else host)
        raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known')

    monkeypatch.setattr(socket, 'getaddrinfo', lookup)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    for name in ('HTTPS_PROXY', 'https_proxy', 'HTTP_PROXY', 'http_proxy', 'ALL_PROXY', 'all_proxy'):
        monkeypatch.delenv(name, raising=False)
    return hosts


@pytest.mark.parametrize('name', NAMES)
def test_without_a_network_one_lookup_is_all(name: str, asked: list[str]) -> None:
    with pytest.raises(
        ConnectionError, match=r"cannot be had from https?://.*pretrained_cfg_overlay=dict\(file='PATH'"
    ):
        timm.create_model(name, pretrained=True)
    assert len(asked) == 1
    timm.create_model(name, pretrained=False)
    assert len(asked) == 1


def test_the_proxy_is_what_is_asked(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('https_proxy', 'http://proxy.invalid:3128')
    with pytest.raises(ConnectionError, match=r'no connection to proxy\.invalid:3128'):
        timm.create_model('cbam_resnet50', pretrained=True)
    assert asked == ['proxy.invalid']


def test_a_refused_connection_is_final(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(('127.0.0.1', 0))
        monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', f'http://127.0.0.1:{taken.getsockname()[1]}')
        monkeypatch.setenv('no_proxy', '127.0.0.1')
        with pytest.raises(ConnectionError, match=r'no connection to 127\.0\.0\.1:\d+: Connection refused'):
            timm.create_model('gam_resnet18', pretrained=True)


def test_files_need_no_network(asked: list[str], tmp_path: Path) -> None:
    plain: Any = timm.create_model('resnet18')
    save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    overlay = dict(file=str(tmp_path / 'plain.safetensors'))
    model: Any = timm.create_model('gam_resnet18', pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.fc.weight, plain.fc.weight)
    assert asked == []


def test_an_adapters_base_is_not_waited_for(asked: list[str], tmp_path: Path) -> None:
    model = timm_attn.inject(timm.create_model('resnet18'), 'eca')
    base = timm_attn.eject(copy.deepcopy(model))
    timm_attn.save(model, tmp_path / 'adapter', adapter=True, base=base)
    with pytest.raises(
        ValueError,
        match=r"base 'resnet18.*cannot be had from its source \(Unreachable: no connection to .*Offline, pass base=",
    ):
        timm_attn.load(tmp_path / 'adapter')
    assert len(asked) == 1


@pytest.mark.parametrize('name', ['local-dir:runs/x', 'hf-hub:me/x', 'hf_hub:me/x'])
def test_names_with_a_source_are_left_to_timm(name: str, asked: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """timm warns where it is asked for the configuration of such a name."""
    from timm_attn.weights.fetch import fetching

    with fetching(name, True):
        pass
    assert (asked, caplog.records) == ([], [])


def test_a_copy_in_the_cache_needs_no_network(asked: list[str], tmp_path: Path) -> None:
    from timm_attn.weights.fetch import fetching

    cfg: Any = timm.get_pretrained_cfg('cbam_resnet50')
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints' / Path(cfg.url).name).touch()
    with fetching('cbam_resnet50', True):
        pass
    assert asked == []


def test_the_hub_client_does_not_ask_again_where_no_name_is_known(asked: list[str]) -> None:
    with pytest.raises(HubError, match=r'No host of that name: .* use a folder that you have: timm_attn\.load'):
        load_from_hub('me/model')
    assert len(asked) <= 2  # httpx may look a name up for each family of addresses

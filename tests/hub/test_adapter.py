"""Adapters: attention without its base, for the very base that it was trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import timm_attn
from timm_attn.hub.adapter import ADAPTER, digest
from timm_attn.hub.client import HubFileError
from timm_attn.layers import attn_sites

SMALL: dict[str, Any] = dict(layers=(1, 1, 1, 1), channels=(32, 32, 64, 64))


def plain(seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    model = timm.create_model('resnet18', **SMALL, **kwargs)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.75, 1.25)
    return model.eval()


def trained(head: int = 5) -> Any:
    """Attention and head after two steps, the backbone frozen."""
    model: Any = timm.create_model('resnet18', **SMALL)
    model.load_state_dict(plain().state_dict())
    model.reset_classifier(head)
    timm_attn.inject(timm_attn.inject(model, 'eca'), 'se', at='layer2', rd_ratio=0.25)
    timm_attn.freeze_backbone(model).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4)).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    model = trained()
    return model, timm_attn.save(model, tmp_path / 'adapter', adapter=True, base=plain())


def test_adapter_holds_attention_and_head_and_gives_the_model_back(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = saved
    held = safetensors.torch.load_file(folder / ADAPTER)
    sites = tuple(attn_sites(model))
    assert {k for k in held if not k.startswith(sites)} == {'fc.weight', 'fc.bias'}
    assert not (folder / 'model.safetensors').exists()
    x = torch.randn(2, 3, 64, 64)
    file = tmp_path / 'base.safetensors'
    safetensors.torch.save_file(plain().state_dict(), file)
    with torch.no_grad():
        for base in (plain(), file):
            again = timm_attn.load(folder, base=base)
            assert torch.equal(again.eval()(x), model(x))
        # What was loaded can be saved as a whole, and read again.
        whole = timm_attn.save(again, tmp_path / 'whole')
        assert torch.equal(timm_attn.load(whole).eval()(x), model(x))
    with pytest.raises(ValueError, match='is no adapter but a whole model: leave out `base`'):
        timm_attn.load(whole, base=plain())


@pytest.mark.parametrize('key', ['layer1.0.conv1.weight', 'bn1.running_mean', 'bn1.num_batches_tracked'])
def test_base_that_has_moved_is_refused(key: str, tmp_path: Path) -> None:
    model = trained()
    with torch.no_grad():
        model.state_dict()[key].view(-1)[0].add_(1)
    with pytest.raises(ValueError, match=rf'1 tensors of the base .* have moved.*: {key}.*freeze_backbone'):
        timm_attn.save(model, tmp_path / 'adapter', adapter=True, base=plain())
    assert not (tmp_path / 'adapter').exists()


def test_training_without_freezing_moves_statistics(tmp_path: Path) -> None:
    model = timm_attn.inject(plain(), 'eca').train()
    model(torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r'tensors of the base resnet18.*have moved.*bn1\.running_mean'):
        timm_attn.save(model, tmp_path / 'adapter', adapter=True, base=plain())


def test_other_base_is_refused(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    other = plain()
    with torch.no_grad():
        other.bn1.running_var[3] = 1.5
    for base in (plain(seed=1), other):
        with pytest.raises(HubFileError, match=r"weights of the base 'resnet18.a1_in1k' are not those"):
            timm_attn.load(folder, base=base)


def test_base_that_cannot_be_had_is_named(saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise OSError('no route to host')

    _, folder = saved
    real = timm.create_model
    monkeypatch.setattr(
        timm, 'create_model', lambda name, **kw: offline() if kw.get('pretrained') else real(name, **kw)
    )
    with pytest.raises(ValueError, match=r'cannot be had from its source \(OSError: no route.*Offline, pass base='):
        timm_attn.load(folder)


def test_adapter_must_not_hold_the_base(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    held = safetensors.torch.load_file(folder / ADAPTER)
    safetensors.torch.save_file({**held, 'conv1.weight': torch.zeros(64, 3, 7, 7)}, folder / ADAPTER)
    with pytest.raises(HubFileError, match=r'holds tensors of the base.*conv1\.weight'):
        timm_attn.load(folder, base=plain())
    (folder / ADAPTER).write_bytes(b'x' * 100)
    with pytest.raises(HubFileError, match='is no safetensors file, or cut short'):
        timm_attn.load(folder, base=plain())
    safetensors.torch.save_file(
        {k: v * float('nan') if k == 'fc.bias' else v for k, v in held.items()}, folder / ADAPTER
    )
    with pytest.raises(HubFileError, match='NaN'):
        timm_attn.load(folder, base=plain())
    del held['layer2.1.fc1.weight']
    safetensors.torch.save_file(held, folder / ADAPTER)
    with pytest.raises(HubFileError, match=r'does not fit.*layer2\.1\.fc1\.weight'):
        timm_attn.load(folder, base=plain())
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    del config['timm_attn']['adapter']
    (folder / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    with pytest.raises(HubFileError, match='does not say which base'):
        timm_attn.load(folder, base=plain())


def test_nothing_to_adapt_is_refused(tmp_path: Path, saved: tuple[Any, Path]) -> None:
    with pytest.raises(ValueError, match='put there: there is no adapter to save'):
        timm_attn.save(plain(), tmp_path / 'x', adapter=True, base=plain())
    model, folder = saved
    with pytest.raises(ValueError, match=f'already holds {ADAPTER}'):
        timm_attn.save(model, folder, adapter=True, base=plain())


def test_digest_is_of_numbers_names_types_and_shapes() -> None:
    a = torch.arange(6.0)
    found = {digest(d) for d in ({'a': a}, {'b': a}, {'a': a.double()}, {'a': a.view(2, 3)}, {'a': a + 1}, {})}
    assert len(found) == 6
    assert digest({'a': a, 'b': a}) == digest({'b': a.clone(), 'a': a[:]})

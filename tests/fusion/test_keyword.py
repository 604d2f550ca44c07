"""`fused=True` of every registered model."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import timm_attn


def alive(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.running_mean, std=0.1)  # pyright: ignore[reportArgumentType]
    return model.double().eval()


@pytest.mark.parametrize(
    ('name', 'args'),
    [
        ('cbam_resnet18', {'layers': (1, 1, 1, 1)}),
        ('sk_resnet50', {'layers': (1, 1, 1, 1)}),
        ('injected', {'base': 'resnet18', 'attn': 'se'}),
    ],
)
def test_fused_models_compute_the_same_and_are_saved_without_the_keyword(
    name: str, args: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    fused = alive(timm.create_model(name, num_classes=3, fused=True, **args))
    plain = timm.create_model(name, num_classes=3, **args).double().eval()
    plain.load_state_dict(fused.state_dict())
    assert {type(m).__name__ for m in fused.modules()} != {type(m).__name__ for m in plain.modules()}
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-9)
    timm_attn.save(fused.float(), tmp_path)
    assert 'fused' not in json.dumps(json.loads((tmp_path / 'config.json').read_text(encoding='utf-8')))
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    torch.testing.assert_close(again(x.float()), fused(x.float()), rtol=1e-4, atol=1e-4)


def test_fused_is_a_keyword_and_another_is_not() -> None:
    timm.create_model('se_resnet18', fused=False, device='meta')
    with pytest.raises(TypeError, match='fusedd'):
        timm.create_model('se_resnet18', fusedd=True, device='meta')

"""`fused=True` of every registered model."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import timm_attn

ONE: dict[str, Any] = {'layers': (1, 1, 1, 1)}  # blocks a stage


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


@pytest.mark.parametrize(
    ('base', 'args', 'known'),
    [
        ('resnext50_32x4d', ONE, True),
        ('wide_resnet50_2', ONE, True),
        ('resnet18d', ONE, True),
        ('resnetblur18', ONE, True),  # whose blocks all have what the fused ones do not know
        ('seresnet18', {'at': r'layer\d', **ONE}, True),
        ('simam_resnet18', {'at': r'layer\d', **ONE}, True),
        ('res2net50_14w_8s', ONE, False),
        ('convnext_atto', {'at': r'stages\.\d'}, False),
    ],
)
def test_injected_models_of_other_kinds_are_fused_or_say_that_they_are_not(
    base: str, args: dict[str, Any], known: bool
) -> None:
    torch.manual_seed(0)
    args = {'base': base, 'attn': 'cbam', 'num_classes': 3, **args}
    with contextlib.nullcontext() if known else pytest.warns(UserWarning, match='no block that timm_attn.fuse knows'):
        fused = alive(timm.create_model('injected', fused=True, **args))
    for m in fused.modules():
        if hasattr(m, 'compiled'):
            m.compiled = False  # pyright: ignore[reportArgumentType]
    plain = timm.create_model('injected', **args).double().eval()
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    gradients = []
    for model in (fused, plain):
        y = model(x)
        # Far from the weights of a trained net, sums grow: what is compared is of size 1.
        gradients.append(torch.autograd.grad((y / y.detach().norm()).square().sum(), [*model.parameters()]))
    for ours, want in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-6 * want.abs().max().item() + 1e-12)


def test_fused_is_a_keyword_and_another_is_not() -> None:
    timm.create_model('se_resnet18', fused=False, device='meta')
    with pytest.raises(TypeError, match='fusedd'):
        timm.create_model('se_resnet18', fusedd=True, device='meta')

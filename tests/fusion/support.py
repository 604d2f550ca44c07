"""Small models, all of whose parts do something, and what their steps give."""

import os
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import timm_attn

SMALL: dict[str, dict[str, Any]] = {
    'resnet26': {},
    'se_resnet18': {},
    'eca_resnet18': {},
    'srm_resnet18': {},
    'cbam_resnet18': {},
    'bam_resnet18': {},
    'gam_resnet18': {},
    'triplet_resnet18': {},
    'csa_resnet18': {},
    'gsop_resnet50': {'attn_args': {'dim': 16}},
    'sk_resnet50': {},
}


def build(name: str, dtype: torch.dtype = torch.float64, **kwargs: Any) -> nn.Module:
    """A model of one block a stage, whose weights and statistics are nowhere at their start."""
    torch.manual_seed(0)
    kwargs = {'num_classes': 5, 'layers': (1, 1, 1, 1), **SMALL.get(name, {}), **kwargs}
    model = timm.create_model(name, **kwargs).to(dtype)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            assert m.running_mean is not None and m.running_var is not None
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    return model


def images(dtype: torch.dtype = torch.float64, n: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 64, 48, generator=generator, dtype=torch.float64).to(dtype)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of a forward and a backward pass."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    grads = {f'grad {n}': p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {'output': y.detach(), 'grad x': x.grad, **grads, **{n: b.clone() for n, b in model.named_buffers()}}


def check_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        # A bias in front of a BatchNorm has gradient 0, of which both sides give rounding errors: hence the 1.
        scale = max(want.abs().max().item(), 1.0)
        gap = (ours[name] - want).abs().max().item()
        assert gap <= tolerance * scale, f'{name}: {gap:.3g} of {scale:.3g}'


def environment(**changes: str) -> dict[str, str]:
    """Of a process that imports this package, too."""
    paths = str(Path(timm_attn.__file__).parents[1]), os.environ.get('PYTHONPATH', '')
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(paths), **changes}

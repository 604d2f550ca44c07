"""Every attention starts as its released code starts it, alone and inside a registered model."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_attn
from timm_attn import create_attn
from timm_attn.layers._base import Attention


def modules_of(attn: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> dict[str, Any]:
    return {k: m for k, m in attn.named_modules() if isinstance(m, kind)}


def fan_out_normal(weight: Tensor) -> None:
    """kaiming_normal, fan_out: a normal of spread sqrt(2 / (k·k·C_out))."""
    std = math.sqrt(2 / (weight.shape[0] * weight[0, 0].numel()))
    tolerance = 5 / math.sqrt(2 * weight.numel())  # five standard errors of a standard deviation
    assert abs(weight.std().item() / std - 1) < tolerance
    if weight.numel() > 500:
        # A uniform of that spread would end at 1.73 of it.
        assert weight.abs().max() > 2 * std


def torch_default(weight: Tensor) -> None:
    """kaiming_uniform with a = sqrt(5): uniform within 1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(weight[0].numel())
    assert weight.abs().max() <= bound * (1 + 1e-6)
    tolerance = 5 / math.sqrt(2 * weight.numel())
    assert abs(weight.std(correction=0).item() / (bound / math.sqrt(3)) - 1) < max(tolerance, 0.2)


def default_bias(module: Any) -> None:
    bound = 1 / math.sqrt(module.weight[0].numel())
    assert 0 < module.bias.abs().max() <= bound * (1 + 1e-6)


def norms_start(attn: nn.Module, zero: tuple[str, ...] = ()) -> None:
    """Weights 1 (or 0), biases 0, running statistics 0 and 1."""
    for key, bn in modules_of(attn, (nn.BatchNorm1d, nn.BatchNorm2d)).items():
        assert bn.weight.unique().tolist() == [float(key not in zero)], key
        assert not bn.bias.any() and not bn.running_mean.any() and (bn.running_var == 1).all(), key
        assert bn.eps == 1e-5


def check_se(attn: nn.Module) -> None:
    for conv in modules_of(attn, nn.Conv2d).values():
        fan_out_normal(conv.weight)
        if conv.bias is not None:
            default_bias(conv)


def check_cbam(attn: nn.Module) -> None:
    for fc in modules_of(attn, nn.Linear).values():
        torch_default(fc.weight)
        assert not fc.bias.any()
    fan_out_normal(attn.get_parameter('conv.weight'))
    norms_start(attn, zero=('bn',))
    assert attn.get_submodule('bn').momentum == 0.01


def check_bam(attn: nn.Module) -> None:
    for fc in modules_of(attn, nn.Linear).values():
        torch_default(fc.weight)
    for conv in modules_of(attn, nn.Conv2d).values():
        fan_out_normal(conv.weight)
    for layer in modules_of(attn, (nn.Linear, nn.Conv2d)).values():
        assert not layer.bias.any()
    norms_start(attn)
    assert {bn.momentum for bn in modules_of(attn, (nn.BatchNorm1d, nn.BatchNorm2d)).values()} == {0.1}


def check_gam(attn: nn.Module) -> None:
    for layer in modules_of(attn, (nn.Linear, nn.Conv2d)).values():
        torch_default(layer.weight)
        default_bias(layer)
    norms_start(attn)


def check_sk(attn: nn.Module) -> None:
    for conv in modules_of(attn, nn.Conv2d).values():
        fan_out_normal(conv.weight)
        assert conv.bias is None
    norms_start(attn)


def check_eca(attn: nn.Module) -> None:
    conv = attn.get_parameter('conv.weight')
    assert conv.dim() == 3
    assert 0 < conv.abs().max() <= 1 / math.sqrt(conv.numel())


def check_srm(attn: nn.Module) -> None:
    assert not attn.get_parameter('cfc').any()
    norms_start(attn)


def check_gsop(attn: nn.Module) -> None:
    for conv in modules_of(attn, nn.Conv2d).values():
        fan_out_normal(conv.weight)
        default_bias(conv)
    norms_start(attn)


def check_triplet(attn: nn.Module) -> None:
    for conv in modules_of(attn, nn.Conv2d).values():
        fan_out_normal(conv.weight)
    # Of the released code's three gates one alone is named SpatialGate, and its BatchNorm starts at 0.
    norms_start(attn, zero=('hw.bn',))
    assert {bn.momentum for bn in modules_of(attn, nn.BatchNorm2d).values()} == {0.01}


def check_csa(attn: nn.Module) -> None:
    assert not attn.get_parameter('gamma').any()
    assert (attn.get_parameter('temperature') == 1).all()


CHECKS: dict[str, Callable[[nn.Module], None]] = {
    'se': check_se,
    'cbam': check_cbam,
    'bam': check_bam,
    'gam': check_gam,
    'sk': check_sk,
    'eca': check_eca,
    'srm': check_srm,
    'gsop': check_gsop,
    'triplet': check_triplet,
    'csa': check_csa,
}
MODELS = {
    'sk': ('sk_resnet50', 'sk_resnext50_32x4d'),
    'gsop': ('gsop_resnet50',),
}


def test_every_attention_has_a_check() -> None:
    assert sorted(CHECKS) == timm_attn.list_attn()


@pytest.mark.parametrize(
    ('name', 'args'),
    [
        *((name, {}) for name in CHECKS),
        ('se', {'bias': False}),
        ('bam', {'combine': 'add'}),
        ('gam', {'rd_ratio': 1 / 4, 'groups': 4}),
        ('triplet', {'kernel_size': 3}),
        ('sk', {'form': 'sknet'}),
    ],
)
def test_module_starts_as_released(name: str, args: dict[str, Any]) -> None:
    torch.manual_seed(0)
    CHECKS[name](create_attn(name, 256, **args))


def _sites(model: nn.Module) -> Iterator[tuple[str, Attention]]:
    for key, module in model.named_modules():
        if isinstance(module, Attention):
            yield key, module


@pytest.mark.parametrize(
    ('name', 'model_name'),
    [(n, m) for n in CHECKS for m in MODELS.get(n, (f'{n}_resnet18',))],
)
def test_start_survives_the_init_of_the_whole_model(name: str, model_name: str) -> None:
    """ResNet.init_weights gives every Conv2d a new normal start at the end of its constructor."""
    torch.manual_seed(1)
    model = timm.create_model(model_name, layers=(1, 1, 1, 1))
    sites = dict(_sites(model))
    assert len(sites) == (3 if name == 'bam' else 4)
    for key, attn in sites.items():
        try:
            CHECKS[name](attn)
        except AssertionError as e:
            raise AssertionError(f'{model_name}, {key}') from e


@pytest.mark.parametrize('name', ['cbam', 'srm', 'triplet'])
def test_gate_with_zero_start_is_exactly_half(name: str) -> None:
    """A BatchNorm weight (or cfc) of zero: the gate that follows is s(0), whatever comes in."""
    attn = create_attn(name, 64)
    gates = attn.gates(torch.randn(2, 64, 5, 9))
    kind = 'channel' if name == 'srm' else 'spatial'
    assert (gates[kind] == 0.5).all()


def test_start_follows_the_seed() -> None:
    for name in timm_attn.list_attn():
        states = []
        for _ in range(2):
            torch.manual_seed(3)
            states.append(create_attn(name, 64).state_dict())
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0]), name

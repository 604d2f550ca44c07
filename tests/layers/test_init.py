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


def check_fca(attn: nn.Module) -> None:
    for fc in modules_of(attn, nn.Linear).values():
        torch_default(fc.weight)
        assert fc.bias is None


def check_coord(attn: nn.Module) -> None:
    for conv in modules_of(attn, nn.Conv2d).values():
        torch_default(conv.weight)
        default_bias(conv)
    norms_start(attn)
    assert attn.get_submodule('bn1').momentum == 0.1


def check_gc(attn: nn.Module) -> None:
    """The mask kaiming normal by its inputs, the last layer 0."""
    mask: Any = attn.get_submodule('conv_attn')
    std = math.sqrt(2 / mask.weight.numel())
    assert abs(mask.weight.std().item() / std - 1) < 5 / math.sqrt(2 * mask.weight.numel())
    assert not mask.bias.any()
    fc1, fc2 = (attn.get_submodule(f'mlp_add.{k}') for k in ('fc1', 'fc2'))
    torch_default(fc1.get_parameter('weight'))
    default_bias(fc1)
    assert not any(p.any() for p in fc2.parameters())
    norm: Any = attn.get_submodule('mlp_add.norm')
    assert (norm.weight == 1).all() and not norm.bias.any() and norm.eps == 1e-5


def check_scse(attn: nn.Module) -> None:
    for layer in modules_of(attn, (nn.Linear, nn.Conv2d)).values():
        torch_default(layer.weight)
        default_bias(layer)


def check_gct(attn: nn.Module) -> None:
    assert (attn.get_parameter('alpha') == 1).all()
    assert not attn.get_parameter('gamma').any() and not attn.get_parameter('beta').any()


def check_ema(attn: nn.Module) -> None:
    for conv in modules_of(attn, nn.Conv2d).values():
        torch_default(conv.weight)
        default_bias(conv)
    gn: Any = attn.get_submodule('gn')
    assert (gn.weight == 1).all() and not gn.bias.any() and gn.eps == 1e-5


def check_sge(attn: nn.Module) -> None:
    assert not attn.get_parameter('weight').any() and (attn.get_parameter('bias') == 1).all()


def check_nl(attn: nn.Module) -> None:
    for key in ('theta', 'phi', 'g'):
        conv: Any = attn.get_submodule(key)
        assert abs(conv.weight.std().item() / 0.01 - 1) < 5 / math.sqrt(2 * conv.weight.numel())
        assert not conv.bias.any()
    fan_out_normal(attn.get_parameter('conv_out.weight'))
    norms_start(attn, zero=('bn',))


def check_scsa(attn: nn.Module) -> None:
    """Torch's defaults, also for the scalings q, k and v, which timm would draw anew as convolutions."""
    for conv in modules_of(attn, (nn.Conv1d, nn.Conv2d)).values():
        torch_default(conv.weight)
    for key in ('conv3', 'conv5', 'conv7', 'conv9'):
        default_bias(attn.get_submodule(key))
    for norm in modules_of(attn, nn.GroupNorm).values():
        assert (norm.weight == 1).all() and not norm.bias.any() and norm.eps == 1e-5


def check_simam(attn: nn.Module) -> None:
    assert not attn.state_dict()


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
    'fca': check_fca,
    'coord': check_coord,
    'gc': check_gc,
    'scse': check_scse,
    'gct': check_gct,
    'ema': check_ema,
    'sge': check_sge,
    'nl': check_nl,
    'scsa': check_scsa,
    'simam': check_simam,
}
MODELS = {
    'sk': ('sk_resnet50', 'sk_resnext50_32x4d'),
    'gsop': ('gsop_resnet50',),
    'fca': ('fca_resnet34',),
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
    assert len(sites) == {'bam': 3, 'nl': 1}.get(name, 4)
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

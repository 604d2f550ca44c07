"""The layers against the outputs, gradients and buffers of the authors' own code.

Every `*_module.safetensors` in the folder named by TIMM_ATTN_GOLDEN (default: tests/golden, whose README names the
source of each file) is checked in float64. A file holds a state dict under the official names (`sd/`, none for an
attention without parameters) and one or more cases, named by the size of their map (`7x7/`, `10x6/`, ...).
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from timm_attn import create_attn

FOLDER = Path(os.environ.get('TIMM_ATTN_GOLDEN') or Path(__file__).parents[1] / 'golden')
FILES = sorted(FOLDER.glob('*_module.safetensors'))

# A float64 computation agrees to 2e-7; gradients of parameters reach 144, where float32 storage alone costs 5e-6.
ATOL = 2e-6
RTOL_PARAMETERS = 1e-6

BN = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')


@dataclass(frozen=True)
class Official:
    """How an official module is spelled here: our constructor, and its keys renamed to ours."""

    attn: str
    keys: dict[str, str]
    args: dict[str, Any] = field(default_factory=dict)
    in_block: bool = False


def _bn(official: str, ours: str) -> dict[str, str]:
    return {f'{official}.{part}': f'{ours}.{part}' for part in BN}


def _wb(official: str, ours: str) -> dict[str, str]:
    return {f'{official}.{part}': f'{ours}.{part}' for part in ('weight', 'bias')}


def _gate(official: str, ours: str) -> dict[str, str]:
    prefix = f'{ours}.' if ours else ''
    return {
        f'{official}.spatial.conv.weight': f'{prefix}conv.weight',
        **_bn(f'{official}.spatial.bn', f'{prefix}bn'),
    }


SE_BIAS = _wb('fc1', 'fc1') | _wb('fc2', 'fc2')
SE_NOBIAS = {'fc.0.weight': 'fc1.weight', 'fc.2.weight': 'fc2.weight'}
CBAM_CHANNEL = _wb('ChannelGate.mlp.1', 'fc1') | _wb('ChannelGate.mlp.3', 'fc2')
BAM_C, BAM_S = 'channel_att.gate_c.gate_c', 'spatial_att.gate_s.gate_s'
BAM = (
    _wb(f'{BAM_C}_fc_0', 'fc1')
    | _bn(f'{BAM_C}_bn_1', 'bn1')
    | _wb(f'{BAM_C}_fc_final', 'fc2')
    | _wb(f'{BAM_S}_conv_reduce0', 'conv_reduce')
    | _bn(f'{BAM_S}_bn_reduce0', 'bn_reduce')
    | _wb(f'{BAM_S}_conv_di_0', 'conv_dil1')
    | _bn(f'{BAM_S}_bn_di_0', 'bn_dil1')
    | _wb(f'{BAM_S}_conv_di_1', 'conv_dil2')
    | _bn(f'{BAM_S}_bn_di_1', 'bn_dil2')
    | _wb(f'{BAM_S}_conv_final', 'conv_final')
)
GAM = (
    _wb('channel_attention.0', 'fc1')
    | _wb('channel_attention.2', 'fc2')
    | _wb('spatial_attention.0', 'conv1')
    | _bn('spatial_attention.1', 'bn1')
    | _wb('spatial_attention.3', 'conv2')
    | _bn('spatial_attention.4', 'bn2')
)
SK = {
    'b.conv2.weight': 'conv1.weight',
    **_bn('b.bn2', 'bn1'),
    'b.conv2g.weight': 'conv2.weight',
    **_bn('b.bn2g', 'bn2'),
    'b.conv_fc1.weight': 'fc1.weight',
    **_bn('b.bn_fc1', 'bn'),
    'b.conv_fc2.weight': 'fc2.weight',
}
ECA = {'conv.weight': 'conv.weight'}
SRM = {'cfc': 'cfc', **_bn('bn', 'bn')}
GSOP = (
    _wb('conv_for_DR', 'conv_reduce')
    | _bn('bn_for_DR', 'bn_reduce')
    | _bn('row_bn', 'bn_row')
    | _wb('row_conv_group', 'conv_row')
    | _wb('fc_adapt_channels', 'conv_expand')
)
# The official ChannelGateH pools over H, so that its map is (C, W).
TRIPLET_ROTATED = _gate('ChannelGateH', 'cw') | _gate('ChannelGateW', 'hc')
TRIPLET = TRIPLET_ROTATED | _gate('SpatialGate', 'hw')
FCA = {'fc.0.weight': 'fc1.weight', 'fc.2.weight': 'fc2.weight'}
COORD = _wb('conv1', 'conv1') | _bn('bn1', 'bn1') | _wb('conv_h', 'conv_h') | _wb('conv_w', 'conv_w')


def _gc(official: str, ours: str) -> dict[str, str]:
    parts = {'0': 'fc1', '1': 'norm', '3': 'fc2'}
    mlp = {k: v for theirs, mine in parts.items() for k, v in _wb(f'{official}.{theirs}', f'{ours}.{mine}').items()}
    return _wb('conv_mask', 'conv_attn') | mlp


SCSE = _wb('cSE.fc1', 'fc1') | _wb('cSE.fc2', 'fc2') | _wb('sSE.conv', 'conv')
GCT = {key: key for key in ('alpha', 'gamma', 'beta')}
EMA = _wb('gn', 'gn') | _wb('conv1x1', 'conv1x1') | _wb('conv3x3', 'conv3x3')
SGE = {'weight': 'weight', 'bias': 'bias'}
NL = (
    _wb('g.conv', 'g')
    | _wb('theta.conv', 'theta')
    | _wb('phi.conv', 'phi')
    | {'conv_out.conv.weight': 'conv_out.weight'}
    | _bn('conv_out.bn', 'bn')
)
SCSA = (
    _wb('local_dwc', 'conv3')
    | _wb('global_dwc_s', 'conv5')
    | _wb('global_dwc_m', 'conv7')
    | _wb('global_dwc_l', 'conv9')
    | _wb('norm_h', 'norm_h')
    | _wb('norm_w', 'norm_w')
    | _wb('norm', 'norm')
    | {f'{part}.weight': f'{part}.weight' for part in 'qkv'}
)

OFFICIAL = {
    'se_bias': Official('se', SE_BIAS),
    'se_nobias': Official('se', SE_NOBIAS, {'bias': False}),
    'cbam': Official('cbam', CBAM_CHANNEL | _gate('SpatialGate', '')),
    'cbam_nospatial': Official('cbam', CBAM_CHANNEL, {'spatial': False}),
    'bam': Official('bam', BAM),
    'gam_a_r16': Official('gam', GAM, {'channel_gate': None}),
    'gam_c_r16': Official('gam', GAM),
    'gam_c_r4': Official('gam', GAM, {'rd_ratio': 1 / 4}),
    'gam_b_r4_group': Official('gam', GAM, {'rd_ratio': 1 / 4, 'groups': 4, 'shuffle': 'gate', 'channel_gate': None}),
    'sk': Official('sk', SK, in_block=True),
    'eca_k3': Official('eca', ECA, {'kernel_size': 3}),
    'eca_k5': Official('eca', ECA, {'kernel_size': 5}),
    'srm': Official('srm', SRM),
    'gsop_chan_s1': Official('gsop', GSOP, {'dim': 32, 'stride': 1}),
    'gsop_chan_s2': Official('gsop', GSOP, {'dim': 32, 'stride': 2}),
    'triplet': Official('triplet', TRIPLET),
    'triplet_nonsquare': Official('triplet', TRIPLET),
    'triplet_nospatial': Official('triplet', TRIPLET_ROTATED, {'spatial': False}),
    **{f'fca_dct{size}': Official('fca', FCA, {'dct_size': size}) for size in (7, 14, 28, 56)},
    'coord': Official('coord', COORD),
    'gc_add': Official('gc', _gc('channel_add_conv', 'mlp_add')),
    'gc_mul': Official('gc', _gc('channel_mul_conv', 'mlp_scale'), {'fuse': 'mul'}),
    'scse': Official('scse', SCSE),
    'gct': Official('gct', GCT),
    'ema': Official('ema', EMA),
    'sge_g8': Official('sge', SGE, {'groups': 8}),
    'sge_g64': Official('sge', SGE),
    'nl': Official('nl', NL),
    'scsa': Official('scsa', SCSA),
    'scsa_h8': Official('scsa', SCSA, {'num_heads': 8}),
    'simam': Official('simam', {}),
    'simam_l01': Official('simam', {}, {'e_lambda': 0.1}),
}


class InBlock(nn.Module):
    """The part of the official SK block around its attention: a ReLU on either side, a shortcut of zero."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x.relu()).relu()


def _float64(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}


def _split(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _build(official: Official, state: dict[str, Tensor], channels: int) -> tuple[nn.Module, nn.Module]:
    """Our module with the official weights, and what to call: the module, or the module inside its block."""
    unknown, absent = state.keys() - official.keys.keys(), official.keys.keys() - state.keys()
    assert not unknown and not absent, f'the file has the keys {unknown or "-"} too much and lacks {absent or "-"}'
    attn = create_attn(official.attn, channels, **official.args).double()
    ours = attn.state_dict()
    renamed = {official.keys[k]: v for k, v in state.items()}
    # 1x1 convolutions and Linear layers hold the same numbers in the same order.
    attn.load_state_dict({k: v.reshape(ours[k].shape) if k in ours else v for k, v in renamed.items()})
    return attn, InBlock(attn) if official.in_block else attn


def compare(name: str, tensors: dict[str, Tensor]) -> Iterator[tuple[str, float, float]]:
    """Each compared tensor of a file by name, with its largest gap, absolute and as a multiple of what is tolerated."""
    if name not in OFFICIAL:
        pytest.fail(f"'{name}_module.safetensors' is not in the table OFFICIAL: give its constructor and keys.")
    official, tensors = OFFICIAL[name], _float64(tensors)
    state = _split(tensors, 'sd/')
    cases = sorted({k.split('/')[0] for k in tensors} - {'sd'})
    assert cases and all(re.fullmatch(r'\d+x\d+', case) for case in cases), f'{name} has the cases {cases}'
    for case in cases:
        golden = _split(tensors, f'{case}/')
        x, ct = golden.pop('x'), golden.pop('ct')
        assert x.shape[2:] == tuple(map(int, case.split('x'))), f'{name}/{case} has an input of shape {x.shape}'
        ours: dict[str, Tensor] = {}
        for mode in ('eval', 'train'):
            attn, call = _build(official, state, x.shape[1])
            call.train(mode == 'train')
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            (y * ct).sum().backward()
            assert leaf.grad is not None
            ours |= {f'y_{mode}': y.detach(), f'gx_{mode}': leaf.grad}
            if mode == 'train':
                parameters, buffers = dict(attn.named_parameters()), dict(attn.named_buffers())
                for theirs, mine in official.keys.items():
                    if mine in parameters:
                        grad = parameters[mine].grad
                        assert grad is not None, f'{mine} has no gradient'
                        ours[f'gp_train/{theirs}'] = grad.reshape(state[theirs].shape)
                    else:
                        ours[f'after/{theirs}'] = buffers[mine]
        assert ours.keys() == golden.keys(), f'{name}/{case}: not in both: {sorted(ours.keys() ^ golden.keys())}'
        for key, want in golden.items():
            got = ours[key]
            assert got.shape == want.shape, f'{name}/{case}/{key}: {tuple(got.shape)}, official {tuple(want.shape)}'
            allowed = ATOL + (RTOL_PARAMETERS * want.abs() if key.startswith('gp_train/') else 0)
            gap = (got - want).abs()
            share = (gap / allowed).max() if want.is_floating_point() else gap.max()
            yield f'{case}/{key}', float(gap.max()), float(share)


def _gaps(name: str, tensors: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    for key, _, share in compare(name, tensors):
        yield key, share


def test_folder_holds_golden_files() -> None:
    assert FILES, f'no *_module.safetensors in {FOLDER}'


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.name.removesuffix('_module.safetensors'))
def test_module_equals_official_code(path: Path, record_property: Callable[[str, object], None]) -> None:
    gaps = dict(_gaps(path.name.removesuffix('_module.safetensors'), load_file(path)))
    worst = max(gaps, key=lambda key: gaps[key] if gaps[key] == gaps[key] else float('inf'))
    record_property('worst', (worst, gaps[worst]))
    bad = {key: f'{gap:.3g}' for key, gap in gaps.items() if not gap <= 1}
    assert not bad, f'gaps as multiples of the tolerance: {bad}'


def test_fcas_waves_are_the_released_buffers() -> None:
    """At C = 16 a channel has a wave of its own; what comes of one pixel is the wave's value there."""
    waves = load_file(Path(__file__).parents[1] / 'golden' / 'fca_dct.safetensors')
    for key, wave in waves.items():
        size = wave.shape[-1]
        attn: Any = create_attn('fca', 16, dct_size=size, rd_ratio=1).double()
        for row, column in ((0, 0), (1, size - 1), (size // 2, 3)):
            x = torch.zeros(1, 16, size, size, dtype=torch.float64)
            x[:, :, row, column] = 1
            assert (attn.spectrum(x)[0] - wave[:, row, column]).abs().max() < 1e-7, key


def test_unknown_golden_file_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"'cbamm_module\.safetensors' is not in the table"):
        list(_gaps('cbamm', {}))


@pytest.mark.parametrize('key', ['7x7/y_eval', '7x7/gx_train', '7x7/gp_train/fc1.weight', 'sd/fc2.bias'])
def test_changed_golden_file_is_noticed(key: str, tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / 'golden' / 'se_bias_module.safetensors'
    tensors = load_file(source)
    tensors[key].view(-1)[0] += 2e-5
    save_file(tensors, tmp_path / source.name)
    assert max(gap for _, gap in _gaps('se_bias', load_file(tmp_path / source.name))) > 1


def test_missing_golden_tensor_is_noticed() -> None:
    tensors = load_file(Path(__file__).parents[1] / 'golden' / 'srm_module.safetensors')
    del tensors['7x7/gp_train/cfc']
    with pytest.raises(AssertionError, match='not in both'):
        list(_gaps('srm', tensors))


@pytest.mark.parametrize('name', OFFICIAL)
def test_table_names_every_key_of_our_module_once(name: str) -> None:
    official = OFFICIAL[name]
    ours = create_attn(official.attn, 64, **official.args).state_dict()
    assert sorted(official.keys.values()) == sorted(ours)

"""Conversion, against the authors' own outputs and key lists."""

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

from timm_attn.weights import convert, list_sources

Fill = Callable[[str], dict[str, Tensor]]
Build = Callable[..., nn.Module]

# golden file, key list, model, source that is found
NETS = [
    ('se_moskomule_resnet18', 'se_resnet18', 'moskomule'),
    ('cbam_resnet18', 'cbam_resnet18', 'jongchan'),
    ('bam_resnet18', 'bam_resnet18', 'jongchan'),
    ('eca_resnet18_k3577', 'eca_resnet18', 'ecanet'),
    ('srm_resnet18', 'srm_resnet18', 'srm'),
    ('triplet_resnet18', 'triplet_resnet18', 'triplet'),
    ('sk_insight_resnet50', 'sk_resnet50', 'insight'),
    ('gsop_net1_resnet50', 'gsop_resnet50', 'gsop'),
    ('fcanet34', 'fca_resnet34', 'fcanet'),
    ('sge_resnet18', 'sge_resnet18', 'insight'),
    ('simam_resnet18', 'simam_resnet18', 'simam'),
]
LISTS = [
    ('bam_resnet50', 'bam_resnet50', None),
    ('cbam_resnet50', 'cbam_resnet50', None),
    ('eca_resnet50_k3557', 'eca_resnet50', None),
    ('se_moskomule_resnet50', 'se_resnet50', None),
    ('srm_resnet50', 'srm_resnet50', None),
    ('triplet_resnet50', 'triplet_resnet50', None),
    ('pytorchcv_bam_resnet18', 'bam_resnet18', None),
    ('pytorchcv_bam_resnet50', 'bam_resnet50', None),
    ('pytorchcv_cbam_resnet18', 'cbam_resnet18', None),
    ('pytorchcv_cbam_resnet50', 'cbam_resnet50', None),
    ('pytorchcv_seresnet18', 'se_resnet18', None),
    ('pytorchcv_seresnet50b', 'se_resnet50', 'pytorchcv/seresnet50b'),
    ('pytorchcv_sknet50', 'sk_resnext50_32x4d', None),
    ('fcanet50', 'fca_resnet50', None),
]


def _state_hash(state_dict: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(k for k in state_dict if not k.endswith('dct_layer.weight')):
        digest.update(key.encode())
        digest.update(state_dict[key].numpy().tobytes())
    return digest.hexdigest()


def _stage_statistics(x: Tensor) -> Tensor:
    return torch.cat([x.mean().reshape(1), x.std().reshape(1), x.flatten()[:16]])


def _tap(stages: dict[str, Tensor], name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    stages[name] = _stage_statistics(output)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'model_name', 'source'), NETS)
def test_a_released_net_gives_its_authors_logits_and_stage_statistics(
    name: str,
    model_name: str,
    source: str,
    golden: Path,
    filled: Fill,
    with_weights: Build,
    signal: Callable[[str, tuple[int, ...]], Tensor],
) -> None:
    state_dict = filled(name)
    with safe_open(golden / f'{name}.safetensors', 'pt') as file:
        expected = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - it is no dict
        meta = json.loads(file.metadata()['meta'])
    assert _state_hash(state_dict) == meta['state_sha256']

    prefixed = {f'module.{k}': v for k, v in state_dict.items()}
    converted = convert({'epoch': 3, 'arch': 'x', 'state_dict': prefixed}, model_name)
    assert converted.keys() == convert(state_dict, model_name, source).keys()
    model = with_weights(model_name, converted).double()
    stages: dict[str, Tensor] = {}
    for k in range(1, 5):
        # The golden taps lie before BAM, which is the last child of its stage.
        stage = list(model.get_submodule(f'layer{k}').children())
        last = stage[-2] if model_name.startswith('bam') and k < 4 else stage[-1]
        last.register_forward_hook(functools.partial(_tap, stages, f'stage/layer{k}'))
    x = signal('input', (2, 3, 224, 224)) * math.sqrt(3)
    with torch.inference_mode():
        logits = model(x.double())

    torch.testing.assert_close(logits, expected.pop('logits').double(), rtol=0, atol=1e-4)
    assert stages.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(stages[key], value.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(('name', 'model_name', 'source'), LISTS)
def test_every_key_list_converts_and_loads_strictly(
    name: str, model_name: str, source: str | None, filled: Fill
) -> None:
    state_dict = filled(name)
    before = {k: v.clone() for k, v in state_dict.items()}
    converted = convert(state_dict, model_name, source)
    model = timm.create_model(model_name, device='meta')
    assert list(converted) == list(model.state_dict())
    model.load_state_dict(converted, strict=True, assign=True)

    # Nothing but zeros was added, and no number was lost.
    assert state_dict.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in state_dict.items())
    constant = 'dct_layer.weight'  # what the model computes itself
    total = sum(v.double().abs().sum() for k, v in before.items() if not k.endswith(constant))
    torch.testing.assert_close(sum(v.double().abs().sum() for v in converted.values()), total)


def _gam_net(filled: Fill, randomise: Any) -> dict[str, Tensor]:
    """A gam_resnet18 whose attention has the circulating code's names, its first module the shared key list."""
    names = {
        'fc1': 'channel_attention.0',
        'fc2': 'channel_attention.2',
        'conv1': 'spatial_attention.0',
        'bn1': 'spatial_attention.1',
        'conv2': 'spatial_attention.3',
        'bn2': 'spatial_attention.4',
    }
    net = {}
    for key, value in randomise(timm.create_model('gam_resnet18', device='meta'), 0).items():
        if '.se.' in key:
            block, _, part = key.partition('.se.')
            layer, _, leaf = part.partition('.')
            key = f'{block}.gam.{names[layer]}.{leaf}'
        net[key] = value
    shared = {f'layer1.0.gam.{k}': v for k, v in filled('gam_rate16_c64').items()}
    assert shared.keys() <= net.keys()
    return net | shared


def test_circulating_gam_converts_once_the_caller_says_what_its_gate_is(filled: Fill, randomise: Any) -> None:
    net = _gam_net(filled, randomise)
    with pytest.raises(ValueError, match=r'do not tell whether its channel gate has a sigmoid'):
        convert(net, 'gam_resnet18')
    converted = convert(net, 'gam_resnet18', attn_args={'channel_gate': None})
    assert torch.equal(converted['layer1.0.se.fc1.weight'], net['layer1.0.gam.channel_attention.0.weight'])
    with pytest.raises(ValueError, match=r'what is shuffled'):
        convert(net, 'gam_resnet18', attn_args={'channel_gate': None, 'groups': 4})


@pytest.mark.parametrize('attribute', ['triplet_attention', 'pcam', 'triplet'])
@pytest.mark.parametrize('branches', [('ChannelGateH', 'ChannelGateW', 'SpatialGate'), ('cw', 'hc', 'hw')])
@pytest.mark.parametrize('inner', ['spatial', 'conv'])
def test_every_spelling_of_triplet_attention_gives_the_same_weights(
    attribute: str, branches: tuple[str, str, str], inner: str, filled: Fill
) -> None:
    state_dict = filled('triplet_resnet18')
    expected = convert(state_dict, 'triplet_resnet18')
    spelled = {}
    for key, value in state_dict.items():
        key = key.replace('.spatial.', f'.{inner}.').replace('.triplet_attention.', f'.{attribute}.')
        for old, new in zip(('ChannelGateH', 'ChannelGateW', 'SpatialGate'), branches, strict=True):
            key = key.replace(old, new)
        spelled[key] = value
    converted = convert(spelled, 'triplet_resnet18')
    assert all(torch.equal(v, expected[k]) for k, v in converted.items())
    assert converted.keys() == expected.keys()


def test_triplet_with_kernel_3_converts_for_the_model_that_has_it(filled: Fill) -> None:
    state_dict = {
        k: v[..., 2:5, 2:5] if v.shape[-2:] == (7, 7) and 'Gate' in k else v
        for k, v in filled('triplet_resnet18').items()
    }
    converted = convert(state_dict, 'triplet_resnet18', attn_args={'kernel_size': 3})
    assert converted['layer1.0.se.cw.conv.weight'].shape == (1, 2, 3, 3)
    with pytest.raises(ValueError, match=r"attn_args=\{'kernel_size': 3\}"):
        convert(state_dict, 'triplet_resnet18')


def test_shorter_eca_kernels_are_padded_and_give_the_same_logits(filled: Fill, with_weights: Build) -> None:
    state_dict = filled('eca_resnet18_k3577')
    # Cut every kernel to its middle 3: a net with k = 3 everywhere.
    state_dict = {
        k: v[..., (v.shape[-1] - 3) // 2 : (v.shape[-1] + 3) // 2] if v.ndim == 3 else v for k, v in state_dict.items()
    }
    padded = with_weights('eca_resnet18', convert(state_dict, 'eca_resnet18')).double()
    args: dict[str, Any] = {'attn_args': {'kernel_size': 3}}
    short = with_weights('eca_resnet18', convert(state_dict, 'eca_resnet18', **args), **args).double()
    assert padded.get_submodule('layer4.0.se.conv').weight.shape == (1, 1, 7)
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(padded(x), short(x), rtol=0, atol=1e-12)


def test_se_without_biases_gets_zeros_and_the_model_without_biases_none(filled: Fill) -> None:
    state_dict = filled('se_moskomule_resnet18')
    with_bias = convert(state_dict, 'se_resnet18')
    assert not any(v.any() for k, v in with_bias.items() if '.se.' in k and k.endswith('bias'))
    without = convert(state_dict, 'se_resnet18', attn_args={'bias': False})
    assert not any('.se.' in k and k.endswith('bias') for k in without)


def test_missing_batch_counts_are_zero(filled: Fill) -> None:
    old = {k: v for k, v in filled('cbam_resnet18').items() if not k.endswith('num_batches_tracked')}
    converted = convert(old, 'cbam_resnet18')
    assert converted['bn1.num_batches_tracked'] == 0
    assert converted.keys() == timm.create_model('cbam_resnet18', device='meta').state_dict().keys()


def test_insight_se_has_biases_and_matrices(filled: Fill) -> None:
    own = convert(filled('pytorchcv_seresnet18'), 'se_resnet18')
    theirs = {
        k.replace('.se.fc1.', '.se.fc.0.').replace('.se.fc2.', '.se.fc.2.'): v.flatten(1)
        if '.se.fc' in k and k.endswith('weight')
        else v
        for k, v in own.items()
    }
    converted = convert(theirs, 'se_resnet18')
    assert all(torch.equal(v, own[k]) for k, v in converted.items())
    with pytest.raises(ValueError, match=r"source \(='moskomule'\) does not fit: the keys are those of insight"):
        convert(theirs, 'se_resnet18', 'moskomule')


def test_insight_names_the_same_cbam_as_its_authors(filled: Fill) -> None:
    assert (
        convert(filled('cbam_resnet18'), 'cbam_resnet18', 'insight').keys()
        == convert(filled('cbam_resnet18'), 'cbam_resnet18', 'jongchan').keys()
    )


@pytest.mark.parametrize('name', ['seresnet50', 'skresnext50_32x4d'])
def test_timms_own_nets_give_the_same_logits(name: str, randomise: Any, with_weights: Build) -> None:
    state_dict = randomise(timm.create_model(name, device='meta'), 1)
    model_name = {'seresnet50': 'se_resnet50', 'skresnext50_32x4d': 'sk_resnext50_32x4d'}[name]
    ours = with_weights(model_name, convert(state_dict, model_name)).double()
    theirs = with_weights(name, state_dict).double()
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


def test_timms_cbam_is_flipped_and_gives_the_same_logits(randomise: Any, with_weights: Build) -> None:
    from timm.layers.cbam import CbamModule

    theirs = timm.create_model('resnet18', block_args=dict(attn_layer=CbamModule), device='meta')
    state_dict = randomise(theirs, 2)
    theirs.load_state_dict(state_dict, assign=True)
    ours = with_weights('cbam_resnet18', convert(state_dict, 'cbam_resnet18')).double()
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs.double().eval()(x), rtol=1e-9, atol=1e-9)


def test_timms_eca_gives_the_same_logits_though_its_kernels_are_shorter(randomise: Any, with_weights: Build) -> None:
    theirs = timm.create_model('resnet18', block_args=dict(attn_layer='eca'), device='meta')
    state_dict = randomise(theirs, 3)
    theirs.load_state_dict(state_dict, assign=True)
    ours = with_weights('eca_resnet18', convert(state_dict, 'eca_resnet18', 'timm')).double()
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs.double().eval()(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda sd: {'state_dict': sd, 'optimizer': {}},
        lambda sd: {'model': {f'_orig_mod.{k}': v for k, v in sd.items()}},
        lambda sd: {'state_dict': {}, 'state_dict_ema': {f'module.{k}': v for k, v in sd.items()}},
        lambda sd: {'model': {}, 'model_ema': {f'module._orig_mod.{k}': v for k, v in sd.items()}},
        lambda sd: {f'_orig_mod.module.{k}': v for k, v in sd.items()},
    ],
)
def test_wrappers_and_prefixes_are_taken_off(wrap: Callable[[dict[str, Tensor]], dict[str, Any]], filled: Fill) -> None:
    state_dict = filled('srm_resnet18')
    expected = convert(state_dict, 'srm_resnet18')
    converted = convert(wrap(state_dict), 'srm_resnet18')
    assert all(torch.equal(v, expected[k]) for k, v in converted.items())
    assert converted.keys() == expected.keys()


@pytest.mark.parametrize('args', [dict(num_classes=10), dict(in_chans=1), dict(cifar_stem=True, num_classes=100)])
def test_checkpoints_of_other_heads_and_stems_convert_for_the_model_that_has_them(
    args: dict[str, Any], filled: Fill
) -> None:
    state_dict = filled('cbam_resnet18')
    if 'num_classes' in args:
        state_dict |= {
            'fc.weight': state_dict['fc.weight'][: args['num_classes']],
            'fc.bias': state_dict['fc.bias'][: args['num_classes']],
        }
    if 'in_chans' in args:
        state_dict['conv1.weight'] = state_dict['conv1.weight'][:, :1]
    if 'cifar_stem' in args:
        state_dict['conv1.weight'] = state_dict['conv1.weight'][..., 2:5, 2:5]
    converted = convert(state_dict, 'cbam_resnet18', **args)
    timm.create_model('cbam_resnet18', device='meta', **args).load_state_dict(converted, strict=True, assign=True)
    hints = {'num_classes': 'num_classes=', 'in_chans': 'in_chans=1', 'cifar_stem': 'cifar_stem=True'}
    hint = hints[next(iter(args))]
    with pytest.raises(ValueError, match=hint):
        convert(state_dict, 'cbam_resnet18')


def test_our_own_checkpoints_pass_unchanged(randomise: Any) -> None:
    for name in (
        'cbam_resnet18',
        'bam_resnet18',
        'se_resnet18',
        'csa_resnet18',
        'sk_resnet50',
        'simple_cnn',
        'simple_cnn_gam',
    ):
        state_dict = randomise(timm.create_model(name, device='meta'), 0)
        converted = convert(state_dict, name)
        assert list(converted) == list(state_dict)
        assert all(torch.equal(v, state_dict[k]) for k, v in converted.items())


def test_waves_that_half_precision_rounded_are_the_waves(filled: Fill) -> None:
    net = filled('fcanet34')
    expected = convert(net, 'fca_resnet34')
    rounded = {k: v.half().float() if k.endswith('dct_layer.weight') else v for k, v in net.items()}
    assert any(not torch.equal(v, net[k]) for k, v in rounded.items())
    without = {k: v for k, v in net.items() if not k.endswith('dct_layer.weight')}
    for state_dict in (rounded, without):
        converted = convert(state_dict, 'fca_resnet34')
        assert converted.keys() == expected.keys()
        assert all(torch.equal(v, expected[k]) for k, v in converted.items())


def test_our_own_net_without_weights_in_its_attention_needs_a_word(filled: Fill, randomise: Any) -> None:
    own = randomise(timm.create_model('simam_resnet18', device='meta'), 0)
    converted = convert(own, 'simam_resnet18', 'timm_attn')
    assert all(torch.equal(v, own[k]) for k, v in converted.items()) and converted.keys() == own.keys()
    # Its keys are a plain ResNet's, which is another function.
    with pytest.raises(ValueError, match=r"SimAM has no warm start.*source='timm_attn'"):
        convert(own, 'simam_resnet18')
    plain = convert(filled('simam_resnet18'), 'simam_resnet18')
    with pytest.raises(ValueError, match=r"source='timm_attn'"):
        convert(plain, 'simam_resnet18', 'torchvision')


def test_plain_nets_of_pytorchcv_start_warm(plain: Any) -> None:
    theirs = {}
    for key, value in plain(18).items():
        key = re.sub(r'^layer(\d)\.(\d)\.', lambda m: f'features.stage{m[1]}.unit{int(m[2]) + 1}.', key)
        key = re.sub(r'\.(conv|bn)([12])\.', r'.body.conv\2.\1.', key)
        key = key.replace('downsample.0.', 'identity_conv.conv.').replace('downsample.1.', 'identity_conv.bn.')
        key = re.sub(r'^(conv|bn)1\.', r'features.init_block.conv.\1.', key).replace('fc.', 'output.')
        theirs[key] = value
    converted, expected = convert(theirs, 'cbam_resnet18'), convert(plain(18), 'cbam_resnet18')
    assert converted.keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in converted.items())


def test_sources_are_listed() -> None:
    assert list_sources() == [
        'cadene',
        'ecanet',
        'fcanet',
        'gam',
        'gct',
        'gsop',
        'insight',
        'jongchan',
        'mmdetection',
        'mmpretrain',
        'moskomule',
        'pytorchcv',
        'simam',
        'srm',
        'timm',
        'timm_attn',
        'torchvision',
        'triplet',
    ]

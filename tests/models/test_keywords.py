"""Every keyword of timm's ResNet, and ours beside it, gives a model that runs or a ValueError at construction.

What a keyword should give is what timm's own ResNet makes of it: the sizes of its maps and outputs. Most models are on
the meta device, where shapes are computed and numbers are not.
"""

import inspect
from functools import cache, partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import BlurPool2d
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, downsample_avg, downsample_conv
from timm.optim import create_optimizer_v2
from torch import nn

from timm_attn.layers import attn_sites, list_attn

# One model of each attention.
MODELS = [n for name in list_attn() for d in (18, 50, 34) if timm.is_model(n := f'{name}_resnet{d}')]
MODELS = sorted({n.partition('_')[0]: n for n in reversed(MODELS)}.values())
# Keywords of timm's ResNet; those that change nothing on the meta device are there for the signature's sake.
KEYWORDS: dict[str, list[dict[str, Any]]] = {
    'num_classes': [{'num_classes': 0}, {'num_classes': 7}],
    'in_chans': [{'in_chans': 1}],
    'output_stride': [{'output_stride': 16}, {'output_stride': 8}],
    'global_pool': [{'global_pool': p} for p in ('max', 'avgmax', 'catavgmax')]
    + [{'global_pool': '', 'num_classes': 0}],
    'cardinality': [{'cardinality': 32}],
    'base_width': [{'base_width': 128}],
    'stem_width': [{'stem_width': 32, 'stem_type': 'deep'}],
    'stem_type': [{'stem_type': 'deep'}, {'stem_type': 'deep_tiered'}],
    'replace_stem_pool': [{'replace_stem_pool': True}],
    'block_reduce_first': [{'block_reduce_first': 2}],
    'down_kernel_size': [{'down_kernel_size': 3}],
    'avg_down': [{'avg_down': True}],
    'channels': [{'channels': (64, 128, 192, 256)}],  # sge has 64 groups
    'act_layer': [{'act_layer': 'silu'}, {'act_layer': nn.Hardswish}, {'act_layer': 'relu'}],
    'norm_layer': [{'norm_layer': 'groupnorm'}, {'norm_layer': partial(nn.BatchNorm2d, eps=1e-3)}],
    'aa_layer': [{'aa_layer': nn.AvgPool2d}, {'aa_layer': BlurPool2d}],
    'drop_rate': [{'drop_rate': 0.1}],
    'drop_path_rate': [{'drop_path_rate': 0.1}],
    'drop_block_rate': [{'drop_block_rate': 0.1}],
    'zero_init_last': [{'zero_init_last': False}],
    'block_args': [{'block_args': {}}],
    'device': [{'device': 'cpu'}],
    'dtype': [{'dtype': torch.float64}],
}
OURS: list[dict[str, Any]] = [
    {'cifar_stem': True},
    {'cifar_stem': True, 'output_stride': 8},
    {'cifar_stem': True, 'aa_layer': nn.AvgPool2d},
    {'cifar_stem': True, 'avg_down': True},
]
LAST_STRIDE: list[dict[str, Any]] = [
    {},
    {'avg_down': True},
    {'aa_layer': nn.AvgPool2d},
    {'aa_layer': BlurPool2d},
    {'aa_layer': BlurPool2d, 'avg_down': True, 'stem_type': 'deep_tiered'},
    {'down_kernel_size': 3},
    {'cifar_stem': True, 'aa_layer': BlurPool2d},
    {'output_stride': 16, 'avg_down': True},
    {'output_stride': 8, 'aa_layer': BlurPool2d},
]


def shapes(model: Any, in_chans: int) -> list[tuple[int, ...]]:
    """Of each stage's map in eval mode, and of the output in train mode, with a backward pass."""
    like = next(model.parameters())
    x = torch.zeros(2, in_chans, 64, 64, device=like.device, dtype=like.dtype)
    out = model.train()(x)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    found = [*model.eval().forward_intermediates(x, intermediates_only=True), out]
    return [tuple(y.shape) for y in found]


def create(name: str, **kwargs: Any) -> Any:
    args: dict[str, Any] = {'layers': (1, 1, 1, 1), 'num_classes': 3, 'device': 'meta', **kwargs}
    return timm.create_model(name, **args)


@cache
def plain_shapes(depth: str, keyword: str, i: int) -> list[tuple[int, ...]]:
    """Those of timm's own ResNet, which all models of a depth are held to."""
    kwargs = KEYWORDS[keyword][i]
    return shapes(create(f'resnet{depth}', **kwargs), kwargs.get('in_chans', 3))


def check(name: str, kwargs: dict[str, Any], plain: list[tuple[int, ...]]) -> None:
    """The model has the sizes of the plain one, which it names itself, or is refused with a reason."""
    model = create(name, **kwargs)
    maps = shapes(model, kwargs.get('in_chans', 3))
    assert maps == plain
    assert [64 // m[2] for m in maps[:-1]] == [info['reduction'] for info in model.feature_info]
    assert [m[1] for m in maps[:-1]] == [info['num_chs'] for info in model.feature_info]


def test_every_keyword_of_timms_resnet_is_here() -> None:
    assert set(inspect.signature(ResNet).parameters) - {'block', 'layers'} == set(KEYWORDS)
    # What a block takes besides, block_args may hold: its attention.
    for block in BasicBlock, Bottleneck:
        made = {'inplanes', 'planes', 'stride', 'downsample', 'dilation', 'first_dilation', 'drop_block', 'drop_path'}
        assert set(inspect.signature(block).parameters) - made - {'reduce_first'} - set(KEYWORDS) == {'attn_layer'}


@pytest.mark.parametrize('name', MODELS)
def test_each_keyword_works_or_is_refused(name: str) -> None:
    """As timm's own ResNet of that depth takes it; what it refuses itself, it refuses here."""
    depth = name.partition('_resnet')[2]
    refused = []
    for keyword, values in KEYWORDS.items():
        for i, kwargs in enumerate(values):
            try:
                plain = plain_shapes(depth, keyword, i)
            except AssertionError:
                with pytest.raises(AssertionError, match='BasicBlock'):
                    create(name, **kwargs)
                continue
            if name.startswith('gsop'):
                kwargs = {'last_stride': 2, **kwargs}
            try:
                check(name, kwargs, plain)
            except ValueError:
                refused.append(keyword)
    assert refused == (
        ['block_reduce_first', 'act_layer', 'act_layer', 'norm_layer', 'norm_layer'] * name.startswith('sk')
    )


@pytest.mark.parametrize('name', MODELS)
def test_our_stem_goes_with_timms_keywords(name: str) -> None:
    for kwargs in OURS:
        model = create(name, **kwargs)
        maps = shapes(model, 3)
        assert [64 // m[2] for m in maps[:-1]] == [info['reduction'] for info in model.feature_info]
        assert model.feature_info[0]['reduction'] == 1


@pytest.mark.parametrize('kwargs', LAST_STRIDE, ids=str)
@pytest.mark.parametrize('name', ['cbam_resnet18', 'bam_resnet18', 'gsop_resnet50', 'se_resnet50'])
def test_the_last_stage_without_stride_is_the_one_that_timm_builds(name: str, kwargs: dict[str, Any]) -> None:
    """Its first block, with the same weights, as a block of timm's that was made with stride 1."""
    torch.manual_seed(0)
    model = create(name, last_stride=1, device='cpu', channels=(32, 64, 96, 128), zero_init_last=False, **kwargs).eval()
    reductions = [info['reduction'] for info in model.feature_info]
    assert reductions[4] == reductions[3]
    x = torch.randn(2, 3, 64, 64)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [64 // m.shape[2] for m in maps] == reductions
    if 'output_stride' in kwargs:
        return  # timm dilates there
    bottleneck = name.endswith('50')
    inside, outside = (384, 512) if bottleneck else (96, 128)
    shortcut = (downsample_avg if kwargs.get('avg_down') else downsample_conv)(inside, outside, 1, stride=1)
    block = (Bottleneck if bottleneck else BasicBlock)(
        inside, 128, stride=1, downsample=shortcut, aa_layer=kwargs.get('aa_layer')
    )
    ours = model.layer4[0]
    block.se = ours.se
    if kwargs.get('down_kernel_size'):
        block.downsample = ours.downsample  # timm has no 3x3 shortcut without stride
    block.load_state_dict(ours.state_dict())
    want = block.eval()(maps[3])
    assert want.std() > 1e-3
    torch.testing.assert_close(ours(maps[3]), want, rtol=0, atol=0)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        'sk_resnet50',
        {'block_reduce_first': 2},
        r'block_reduce_first \(=2\) gives the 3x3 convolution 32 channels for 64',
    ),
    ('sk_resnext50_32x4d', {'act_layer': 'silu'}, r'act_layer .*SiLU.* must be ReLU'),
    ('sk_resnet50', {'norm_layer': 'groupnorm'}, r'norm_layer .*GroupNorm.* must be BatchNorm2d'),
    (
        'sk_resnet50',
        {'norm_layer': partial(nn.BatchNorm2d, eps=1e-3)},
        r'norm_layer .*eps=0\.001.* must be BatchNorm2d',
    ),
    ('sk_resnet50', {'global_pool': ''}, r"global_pool \(=''\) leaves a map.* 3 classes .*num_classes=0"),
    ('bam_resnet18', {'global_pool': ''}, r"global_pool \(=''\) leaves a map"),
    ('se_resnet18', {'cifar_stem': True, 'stem_type': 'deep'}, r'stem is a Sequential: leave out stem_type'),
    ('sk_resnet50', {'cifar_stem': True, 'replace_stem_pool': True}, r'cifar_stem has no pool.*replace_stem_pool'),
    ('se_resnet18', {'last_stride': 0}, r'last_stride \(=0\) must be 1 or 2'),
    ('se_resnet18', {'block_args': {'attn_layer': 'se'}}, r'no empty (attention )?slot|filled|taken'),
]


@pytest.mark.parametrize(('name', 'kwargs', 'match'), REFUSED)
def test_what_cannot_work_is_refused_at_construction(name: str, kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        create(name, **kwargs)


# What is trained without weight decay.


@pytest.mark.parametrize('features_only', [False, True])
@pytest.mark.parametrize('name', [*MODELS, 'simple_cnn_srm', 'simple_cnn_csa'])
def test_weight_decay_leaves_out_the_same_parameters_of_features_alone(name: str, features_only: bool) -> None:
    kwargs: dict[str, Any] = {'layers': (1, 1, 1, 1)} if 'resnet' in name else {}
    model: Any = timm.create_model(name, features_only=features_only, device='meta', **kwargs)
    exempt = {id(m.get_parameter(p)) for m in attn_sites(model).values() for p in m.no_weight_decay}
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group['weight_decay'] for p in group['params']}
    assert not exempt & decayed
    # timm's own rule leaves out what has one dimension, and what is called a bias.
    weights = {id(p) for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith('.bias')}
    assert decayed == weights - exempt
    if name.startswith(('srm', 'csa', 'simple_cnn')):
        assert exempt
        assert all(any(p is model.get_parameter(k) for p in model.parameters()) for k in model.no_weight_decay())
    else:
        assert hasattr(model, 'no_weight_decay') == bool(exempt)

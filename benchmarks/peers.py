"""Attention ResNets by others, for the comparisons: timm's and torchvision's layers, pytorchcv's models, modules of
fightingcv and segmentation_models_pytorch. Each stands where ours does."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import timm
from timm.layers import create_attn
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

import timm_attn

Build = Callable[[], nn.Module]
Layer = Callable[[int], nn.Module]

TIMM = {
    'se': ('se',),
    'eca': ('eca',),
    'cbam': ('cbam',),
    'coord': ('coord', 'scoord'),
    'gc': ('gc', 'gca'),
    'nl': ('nl',),
}
# Its SE-ResNets with a stride in the 3x3 convolution have a b behind the depth; the small ones have no other place.
PYTORCHCV = {'se': 'seresnet{}b', 'cbam': 'cbam_resnet{}', 'bam': 'bam_resnet{}', 'sk': 'sknet{}'}
# Library, label, module, class, arguments for C channels.
MODULES: dict[str, list[tuple[str, str, str, Callable[[int], dict[str, Any]]]]] = {
    'se': [
        ('fightingcv', 'fightingcv_attention.attention.SEAttention', 'SEAttention', lambda c: {'channel': c}),
        (
            'torchvision',
            'torchvision.ops',
            'SqueezeExcitation',
            lambda c: {'input_channels': c, 'squeeze_channels': c // 16},
        ),
    ],
    'eca': [('fightingcv', 'fightingcv_attention.attention.ECAAttention', 'ECAAttention', lambda c: {})],
    'cbam': [
        (
            'fightingcv',
            'fightingcv_attention.attention.CBAM',
            'CBAMBlock',
            lambda c: {'channel': c, 'reduction': 16, 'kernel_size': 7},
        )
    ],
    'triplet': [('fightingcv', 'fightingcv_attention.attention.TripletAttention', 'TripletAttention', lambda c: {})],
    'coord': [
        ('fightingcv', 'fightingcv_attention.attention.CoordAttention', 'CoordAtt', lambda c: {'inp': c, 'oup': c})
    ],
    'sge': [('fightingcv', 'fightingcv_attention.attention.SGE', 'SpatialGroupEnhance', lambda c: {'groups': 64})],
    'simam': [('fightingcv', 'fightingcv_attention.attention.SimAM', 'SimAM', lambda c: {'e_lambda': 0.1})],
    'scse': [
        ('smp', 'segmentation_models_pytorch.base.modules', 'SCSEModule', lambda c: {'in_channels': c, 'reduction': 16})
    ],
}


def _placed(attn: str, layer: Layer, depth: int) -> Build:
    """A plain ResNet with a layer in each place where our model of that depth has the attention."""

    def build() -> nn.Module:
        model = timm.create_model(f'resnet{depth}')
        place = timm_attn.get_attn(attn).placement
        blocks = [m for m in model.modules() if isinstance(m, BasicBlock | Bottleneck)]
        if place == 'one_block':
            blocks = [model.get_submodule('layer3')[-2]]  # pyright: ignore[reportIndexIssue]
        for block in blocks:
            if place == 'conv2':
                block.add_module('conv2', nn.Sequential(block.conv2, layer(block.conv2.out_channels)))
            else:
                last = block.conv3 if isinstance(block, Bottleneck) else block.conv2
                block.se = layer(last.out_channels)
        return model

    return build


def _pytorchcv(name: str) -> Build:
    def build() -> nn.Module:
        from pytorchcv.model_provider import get_model

        model = get_model(name)
        model.get_submodule('features').add_module('final_pool', nn.AdaptiveAvgPool2d(1))  # theirs wants 224 pixels
        return model

    return build


def _module(module: str, cls: str, args: Callable[[int], Mapping[str, Any]]) -> Layer:
    return lambda c: getattr(importlib.import_module(module), cls)(**args(c))


def _timm(layer: str) -> Layer:
    return lambda c: create_attn(layer, c)  # pyright: ignore[reportReturnType]


def peers(attn: str, depth: int = 50) -> dict[str, Build]:
    """Label -> how to build a ResNet with this attention, of the peers that have it and are installed.

    Args:
        attn: One of `timm_attn.list_attn()`.
        depth: Of the ResNet.
    """
    found = {}
    for layer in TIMM.get(attn, ()):
        label = "timm's layer" if layer == attn else f"timm's {layer}"
        found[f'{attn} {label}'] = _placed(attn, _timm(layer), depth)
    if attn in PYTORCHCV and importlib.util.find_spec('pytorchcv'):
        name = PYTORCHCV[attn].format(depth)
        name = name.removesuffix('b') if depth < 50 else name
        if not (attn == 'sk' and depth < 50):
            found[f'{attn} pytorchcv'] = _pytorchcv(name)
    for library, module, cls, args in MODULES.get(attn, ()):
        if importlib.util.find_spec(module.partition('.')[0]):
            found[f'{attn} {library}'] = _placed(attn, _module(module, cls, args), depth)
    return found

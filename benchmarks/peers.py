"""Attention ResNet-50s by others, for the comparisons: timm's layers, pytorchcv's models, fightingcv's modules."""

import importlib.util
from collections.abc import Callable

import timm
from timm.models.resnet import Bottleneck
from torch import nn

Build = Callable[[], nn.Module]

TIMM = {'se': 'se', 'eca': 'eca', 'cbam': 'cbam', 'coord': 'coord', 'gc': 'gc'}
PYTORCHCV = {'se': 'seresnet50b', 'cbam': 'cbam_resnet50', 'bam': 'bam_resnet50', 'sk': 'sknet50'}
FIGHTINGCV = {
    'se': ('SEAttention', 'SEAttention', lambda c: {'channel': c, 'reduction': 16}),
    'eca': ('ECAAttention', 'ECAAttention', lambda c: {'kernel_size': 3}),
    'cbam': ('CBAM', 'CBAMBlock', lambda c: {'channel': c, 'reduction': 16, 'kernel_size': 7}),
    'triplet': ('TripletAttention', 'TripletAttention', lambda c: {}),
    'coord': ('CoordAttention', 'CoordAtt', lambda c: {'inp': c, 'oup': c}),
    'sge': ('SGE', 'SpatialGroupEnhance', lambda c: {'groups': 64}),
    'simam': ('SimAM', 'SimAM', lambda c: {'e_lambda': 0.1}),
}


def _timm(layer: str) -> Build:
    return lambda: timm.create_model('resnet50', block_args={'attn_layer': layer})


def _pytorchcv(name: str) -> Build:
    def build() -> nn.Module:
        from pytorchcv.model_provider import get_model

        return get_model(name)

    return build


def _fightingcv(attn: str) -> Build:
    def build() -> nn.Module:
        module, cls, args = FIGHTINGCV[attn]
        attention = getattr(importlib.import_module(f'fightingcv_attention.attention.{module}'), cls)
        model = timm.create_model('resnet50')
        for block in model.modules():
            if isinstance(block, Bottleneck):
                block.se = attention(**args(block.conv3.out_channels))
        return model

    return build


def peers(attn: str) -> dict[str, Build]:
    """Label -> how to build a ResNet-50 with this attention, of the peers that have it and are installed."""
    found = {}
    if attn in TIMM:
        found[f"{attn} timm's layer"] = _timm(TIMM[attn])
    if attn in PYTORCHCV and importlib.util.find_spec('pytorchcv'):
        found[f'{attn} pytorchcv'] = _pytorchcv(PYTORCHCV[attn])
    if attn in FIGHTINGCV and importlib.util.find_spec('fightingcv_attention'):
        found[f'{attn} fightingcv'] = _fightingcv(attn)
    return found

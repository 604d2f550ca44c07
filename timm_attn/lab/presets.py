"""Comparisons that have a name: models, data and settings in one table."""

from dataclasses import dataclass, field
from typing import Any

from .train import Entry

_SMALL = dict(layers=[1, 1, 1, 1], channels=[16, 32, 64, 128], cifar_stem=True)
_CIFAR = dict(cifar_stem=True)
_GAM = 'gam_resnet18'


@dataclass(frozen=True)
class Preset:
    """A comparison.

    Args:
        about: One sentence for the help text.
        models: The first is what the others are compared with.
        data: Name of the data set.
        seeds: How many.
        settings: Keyword arguments of `Settings`.
        smoke_args: Keyword arguments that make each model small for a trial.
    """

    about: str
    models: tuple[Entry, ...]
    data: str
    seeds: int
    settings: dict[str, Any]
    smoke_args: dict[str, Any] = field(default_factory=dict)


PRESETS = {
    'digits': Preset(
        about='small ResNets, plain and with SE, CBAM, BAM and GAM, on handwritten digits (the models of quickstart)',
        models=(
            Entry('plain', 'resnet18', _SMALL),
            Entry('SE', 'se_resnet18', _SMALL),
            Entry('CBAM', 'cbam_resnet18', _SMALL),
            Entry('BAM', 'bam_resnet18', _SMALL),
            Entry('GAM', 'gam_resnet18', _SMALL),
        ),
        data='digits',
        seeds=5,
        settings=dict(epochs=12, batch_size=32, img_size=16, opt='adamw', lr=4e-3, weight_decay=0.05, warmup_epochs=1),
    ),
    'se-lab': Preset(
        about='a CNN of two convolutions, alone, with SE and with self-attention over channels, on Fashion-MNIST',
        models=(
            Entry('plain', 'simple_cnn'),
            Entry('SE', 'simple_cnn_se', dict(attn_after=[1, 2])),
            Entry('CSA', 'simple_cnn_csa', dict(attn_after=[1, 2])),
        ),
        data='fashion-mnist',
        seeds=5,
        settings=dict(epochs=15, batch_size=64, img_size=28, opt='adam', lr=1e-3, weight_decay=0.0, sched='none'),
    ),
    'gam-cifar': Preset(
        about='ResNet-50 with the 3x3 stem against SE, BAM, CBAM, Triplet and GAM, on CIFAR-100',
        models=(
            Entry('ResNet-50', 'resnet50', _CIFAR),
            Entry('SE', 'se_resnet50', _CIFAR),
            Entry('BAM', 'bam_resnet50', _CIFAR),
            Entry('CBAM', 'cbam_resnet50', _CIFAR),
            Entry('Triplet', 'triplet_resnet50', _CIFAR),
            Entry('GAM', 'gam_resnet50', _CIFAR),
        ),
        data='cifar100',
        seeds=3,
        settings=dict(epochs=200, batch_size=128, img_size=32, lr=0.1, weight_decay=5e-4, warmup_epochs=5),
        smoke_args=dict(layers=[1, 1, 1, 1], channels=[16, 32, 64, 128]),
    ),
    'gam-ablation': Preset(
        about='ResNet-18 with GAM, whole, channel or spatial part only, and with max-pooling, on CIFAR-100',
        models=(
            Entry('ResNet-18', 'resnet18', _CIFAR),
            Entry('GAM', _GAM, _CIFAR),
            Entry('channel only', _GAM, _CIFAR | dict(attn_args=dict(spatial=False))),
            Entry('spatial only', _GAM, _CIFAR | dict(attn_args=dict(channel=False))),
            Entry('with max-pool', _GAM, _CIFAR | dict(attn_args=dict(max_pool=True))),
        ),
        data='cifar100',
        seeds=3,
        settings=dict(epochs=200, batch_size=128, img_size=32, lr=0.1, weight_decay=5e-4, warmup_epochs=5),
        smoke_args=dict(layers=[1, 1, 1, 1], channels=[16, 32, 64, 128]),
    ),
}

# What `--smoke` lays over any preset: enough to run every line, far too little to learn anything.
SMOKE_SETTINGS: dict[str, Any] = dict(epochs=2, batch_size=16, warmup_epochs=0)
SMOKE_SEEDS = 2
SMOKE_IMAGES = 48, 32  # of the training and of the other split

"""Attention on top of a plain ResNet's weights, without changing what the network computes."""

import copy
import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..layers import BAM, Attention, GSoP, SelectiveKernel, attn_sites

_logger = logging.getLogger(__name__)


def check_can_start(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Refuses what has no warm start.

    Args:
        model: The model with attention.
        state_dict: The weights it shall start from.

    Raises:
        ValueError: As `warm_start`.
    """
    sites = attn_sites(model)
    if not sites:
        raise ValueError('The model has no attention to start: load the weights as they are.')
    kinds = {type(m) for m in sites.values()}
    if SelectiveKernel in kinds:
        raise ValueError(
            'SK has no warm start: it replaces each 3x3 convolution by two others, whose mixture a plain ResNet does '
            'not contain.'
        )
    if GSoP in kinds:
        raise ValueError(
            'GSoP has no warm start: its last stage has stride 1, so its features are not those of a plain ResNet.'
        )
    taken = [k for k in state_dict if k.startswith(tuple(f'{name}.' for name in sites))]
    if taken:
        raise ValueError(f'A warm start wants the weights of a plain ResNet, and these have attention: {taken}.')


def _scale(weights: dict[str, Tensor], key: str, factor: float) -> None:
    if key not in weights:
        raise ValueError(f"A warm start divides '{key}' by the attention's constant, and the checkpoint lacks it.")
    # In float64, so that the one rounding is that of the result.
    weights[key] = (weights[key].double() * factor).to(weights[key].dtype)


def _fold(weights: dict[str, Tensor], site: str, module: Attention, model: nn.Module) -> None:
    """Divides what stands before or after the attention by the constant that its neutral state multiplies by."""
    factor = 1 / (module.neutral_gate * module.gain)
    if factor == 1:
        return
    if isinstance(module, BAM):
        # It multiplies what a ReLU let out and the next stage's shortcut takes, so the next stage's first
        # convolutions are what can be divided.
        stage = int((re.match(r'layer(\d)', site) or ['', '0'])[1])
        following = f'layer{stage + 1}.0'
        block = model.get_submodule(following)
        shortcut = getattr(block, 'downsample', None)
        first = next((n for n, m in (shortcut or nn.Sequential()).named_modules() if isinstance(m, nn.Conv2d)), None)
        if first is None:
            raise ValueError(
                f"'{following}' has no convolution in its shortcut, so the constant of '{site}' has no place there."
            )
        _scale(weights, f'{following}.conv1.weight', factor)
        _scale(weights, f'{following}.downsample.{first}.weight', factor)
        return
    block, _, _ = site.rpartition('.')
    last = f'{block}.bn3' if hasattr(model.get_submodule(block), 'bn3') else f'{block}.bn2'
    for part in ('weight', 'bias'):
        _scale(weights, f'{last}.{part}', factor)


def warm_start(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Gives a plain ResNet's weights the attention of a model, so that the logits stay the plain ResNet's.

    The attention starts neutral: its last layer is zero, and it multiplies by a constant. That constant is divided out
    of the layer before it, the last BatchNorm of the branch, or, for BAM, out of the next stage's first convolutions.
    In eval mode the logits equal the plain ResNet's up to rounding. The attention is untrained, which a log line says.

    Args:
        state_dict: Weights of the plain ResNet under timm's or torchvision's names; not changed.
        model: The model with attention; not changed. What is not zeroed keeps the model's own first values.

    Returns:
        Weights for the model, the attention's behind the others.

    Raises:
        ValueError: The model has no attention, or SK or GSoP, which change the network itself; the weights have
            attention already, or lack a layer that takes the constant.
    """
    check_can_start(model, state_dict)
    sites = attn_sites(model)
    weights = dict(state_dict)
    for site, module in sites.items():
        neutral = copy.deepcopy(module)
        with torch.no_grad():
            neutral.init_neutral()
        weights |= {f'{site}.{k}': v.detach() for k, v in neutral.state_dict().items()}
        _fold(weights, site, module, model)
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    _logger.warning(
        'Warm start of %s: the weights are those of a plain ResNet, the attention is untrained (%d modules in their '
        "neutral state). The logits equal the plain ResNet's; train before judging the attention.",
        cfg.get('architecture') or type(model).__name__,
        len(sites),
    )
    return weights

"""Attention on top of a plain ResNet's weights, without changing what the network computes."""

import copy
import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..layers import Attention, attn_sites
from .unwrap import some

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
    for module in sites.values():
        if module.no_warm_start:
            raise ValueError(module.no_warm_start)
        if module.neutral_gate is None:
            name = type(module).__name__
            raise ValueError(f'{name} has no warm start: it has no state in which it multiplies by a constant.')
    taken = [k for k in state_dict if k.startswith(tuple(f'{name}.' for name in sites))]
    if taken:
        raise ValueError(f'A warm start wants the weights of a plain ResNet, and these have attention: {some(taken)}.')


def _scale(weights: dict[str, Tensor], key: str, factor: float) -> None:
    if key not in weights:
        raise ValueError(f"A warm start divides '{key}' by the attention's constant, and the checkpoint lacks it.")
    # In float64, so that the one rounding is that of the result.
    weights[key] = (weights[key].double() * factor).to(weights[key].dtype)


def _fold(weights: dict[str, Tensor], site: str, module: Attention, model: nn.Module) -> None:
    """Divides what stands before or after the attention by the constant that its neutral state multiplies by."""
    assert module.neutral_gate is not None
    factor = 1 / (module.neutral_gate * module.factor)
    if factor == 1:
        return
    host, _, _ = site.rpartition('.')
    parent = model.get_submodule(host)
    if isinstance(parent, nn.Conv2d):  # which the attention follows
        keys = [f'{host}.weight', *([f'{host}.bias'] if parent.bias is not None else [])]
    elif isinstance(parent, nn.Sequential):
        keys = _after_stage(model, host, site)
    else:
        keys = _before_slot(parent, host, site)
    for key in keys:
        _scale(weights, key, factor)


def _before_slot(block: nn.Module, name: str, site: str) -> list[str]:
    """The last normalisation of the residual branch, which the attention in its slot follows."""
    norms = [
        n
        for n, m in block.named_children()
        if not isinstance(m, Attention)
        and isinstance(w := getattr(m, 'weight', None), Tensor)
        and isinstance(getattr(m, 'bias', None), Tensor)
        and w.ndim == 1
    ]
    if not norms:
        raise ValueError(f"'{name}' has no normalisation that the constant of '{site}' could go to.")
    return [f'{name}.{norms[-1]}.{part}' for part in ('weight', 'bias')]


def _after_stage(model: nn.Module, name: str, site: str) -> list[str]:
    """The first convolutions of the next stage: what follows a stage is what a ReLU let out, and the next shortcut."""
    above, _, last = name.rpartition('.')
    stages = [n for n, _ in model.get_submodule(above).named_children()]
    following = next(iter(stages[stages.index(last) + 1 :]), '')
    following = f'{above}.{following}.0' if above else f'{following}.0'
    try:
        block = model.get_submodule(following)
    except AttributeError:
        block = nn.Module()
    convs = [n for n, m in block.named_modules() if isinstance(m, nn.Conv2d)]
    shortcut = next((n for n in convs if n.startswith('downsample.')), None)
    if shortcut is None:
        raise ValueError(
            f"'{following}' has no convolution in its shortcut, so the constant of '{site}' has no place there."
        )
    return [f'{following}.{n}.weight' for n in (convs[0], shortcut)]


def warm_start(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Gives a plain ResNet's weights the attention of a model, so that the logits stay the plain ResNet's.

    The attention starts neutral: its last layer is zero, and it multiplies by a constant. That constant is divided out
    of the layer before it, the last BatchNorm of the branch, or, behind a stage, out of the next one's first
    convolutions.
    In eval mode the logits equal the plain ResNet's up to rounding. The attention is untrained, which a log line says.

    Args:
        state_dict: Weights of the plain ResNet under timm's or torchvision's names; not changed.
        model: The model with attention; not changed. What is not zeroed keeps the model's own first values.

    Returns:
        Weights for the model, the attention's behind the others.

    Raises:
        ValueError: The model has no attention, or one that has no warm start, such as SK, which changes the network
            itself; the weights have attention already, or lack a layer that takes the constant.
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

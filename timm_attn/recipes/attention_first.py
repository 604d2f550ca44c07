"""First stage of fine-tuning: only the attention and the classifier learn.

timm's train.py cannot freeze parameters, but imports what `--device-modules` names before it builds the model.
Importing this module changes what `timm.create_model` returns in this process: every parameter that belongs neither to
an attention nor to the classifier has `requires_grad=False`, so the optimizer and DistributedDataParallel leave it
alone. Names and keys of the models stay as they are: the checkpoint is an ordinary one, from which the second stage
trains everything.

The BatchNorms of the frozen layers stay in eval, so their statistics do not move either. A model without attention is
refused.
"""

import functools
from collections.abc import Callable
from typing import Any

from timm.models import _registry
from torch import nn

# The package registers its models, which have to be there before all entry points are wrapped.
import timm_attn as timm_attn

from ..injection import freeze_backbone
from ..layers import attn_sites

_depth = 0


def _frozen(entrypoint: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(entrypoint)
    def build(*args: Any, **kwargs: Any) -> nn.Module:
        global _depth
        _depth += 1
        try:
            model = entrypoint(*args, **kwargs)
        finally:
            _depth -= 1
        # `injected` builds its base by name, which has no attention yet.
        if _depth:
            return model
        if not attn_sites(model):
            raise ValueError(
                f'{type(model).__name__} has no attention to train first: choose a model of `timm-attn list`, or '
                f'`injected`, or leave out `--device-modules {__name__}`.'
            )
        return freeze_backbone(model)

    return build


def _wrap_entrypoints() -> None:
    # Not through register_model: it wipes the pretrained cfgs of a name that it overwrites.
    entrypoints = _registry._model_entrypoints
    entrypoints.update({name: _frozen(fn) for name, fn in entrypoints.items()})


_wrap_entrypoints()

"""How every registered model is built: timm's builder, with our weights and merged attention options."""

import functools
from typing import Any, TypeVar

from timm.models import build_model_with_cfg
from torch import nn

from ..weights import checkpoint_filter_fn

M = TypeVar('M', bound=nn.Module)


def build(cls: type[M], variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> M:
    """Builds a registered model.

    Args:
        cls: The model class.
        variant: The registered name.
        pretrained: Load the weights of the tag asked for.
        defaults: The variant's own keywords.
        kwargs: The caller's keywords, which win; `attn_args` are merged one by one.
    """
    args = {**defaults, **kwargs}
    attn_args = {**defaults.get('attn_args', {}), **(kwargs.get('attn_args') or {})}
    if attn_args:
        args['attn_args'] = attn_args
    # The filter looks a download's checksum up where timm puts it.
    filter_fn = functools.partial(checkpoint_filter_fn, cache_dir=args.get('cache_dir'))
    return build_model_with_cfg(cls, variant, pretrained, pretrained_filter_fn=filter_fn, **args)

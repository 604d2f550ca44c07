"""How every registered model is built: timm's builder, with our weights and merged attention options."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import timm.models
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs
from torch import nn

from ..injection import exempt
from ..weights import cfgs_of, checkpoint_filter_fn
from ..weights.fetch import fetching
from ..weights.read import read_checkpoint

M = TypeVar('M', bound=nn.Module)
F = TypeVar('F', bound=Callable[..., nn.Module])
# Keyword of every registered model -> what is done to the built model when it is true. What stands above adds its own.
FINISHERS: dict[str, Callable[[nn.Module], nn.Module]] = {}


class AdvisesConvert:
    """Before a model's class: torch's error on foreign keys, as of `checkpoint_path=`, says what to do with them."""

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads as torch does.

        Raises:
            RuntimeError: The keys or shapes are others; the message names `timm-attn convert`.
        """
        try:
            return super().load_state_dict(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        except RuntimeError as e:
            raise RuntimeError(
                f'{e}\nThe checkpoint of another implementation, or of a plain ResNet, is made loadable by `timm-attn '
                'convert FILE --model NAME --out DIR`: see timm_attn.convert.'
            ) from None


def register_model(fn: F) -> F:
    """timm's, after the configs of the model's tags are in its module's `default_cfgs`, where timm looks for them.

    Args:
        fn: The function that builds the model; its name is the model's. Its module may have facts for all its configs,
            `CFG`, and configs of its own.
    """
    module: Any = sys.modules[fn.__module__]
    cfgs = generate_default_cfgs(cfgs_of([fn.__name__], **getattr(module, 'CFG', {})))
    module.default_cfgs = cfgs | module.default_cfgs
    timm.models.register_model(fn)
    return fn


def build(cls: type[M], variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> M:
    """Builds a registered model.

    Args:
        cls: The model class.
        variant: The registered name.
        pretrained: Load the weights of the tag asked for.
        defaults: The variant's own keywords.
        kwargs: The caller's keywords, which win; `attn_args` are merged one by one. `fused=True` gives the model to
            `timm_attn.fuse`; it is no part of the architecture, and not saved.
    """
    args = {**defaults, **kwargs}
    finish = [done for name, done in FINISHERS.items() if args.pop(name, False)]
    attn_args = {**defaults.get('attn_args', {}), **(kwargs.get('attn_args') or {})}
    if attn_args:
        args['attn_args'] = attn_args
    overlay = dict(args.get('pretrained_cfg_overlay') or {})
    if pretrained and overlay.get('file') and overlay.get('state_dict') is None:
        # timm would choose among raw and averaged weights before our filter sees them, and not say so.
        args['pretrained_cfg_overlay'] = {**overlay, 'state_dict': read_checkpoint(overlay['file']).content}
    # The filter looks a download's checksum up where timm puts it.
    filter_fn = functools.partial(checkpoint_filter_fn, cache_dir=args.get('cache_dir'))
    source = (args.get('pretrained_cfg'), args.get('pretrained_cfg_overlay'), args.get('cache_dir'))
    with fetching(variant, pretrained, *source):
        model: Any = build_model_with_cfg(cls, variant, pretrained, pretrained_filter_fn=filter_fn, **args)
    if 'file' in overlay:
        model.pretrained_cfg.pop('state_dict', None)
    exempt(model)  # features_only takes the model apart, and the class's own method is lost
    # A config that somebody gives, such as that of a saved model, says itself what images its weights want.
    if args.get('cifar_stem') and not isinstance(args.get('pretrained_cfg'), dict | PretrainedCfg):
        _take_small_images(model, args.get('pretrained_cfg_overlay') or {})
    for done in finish:
        model = done(model)
    return model


def _take_small_images(model: Any, overlay: Mapping[str, Any]) -> None:
    """The stem for 32x32 images is given such images by transforms, and by the config of a model that is saved."""
    cfg = model.pretrained_cfg
    small = dict(input_size=(cfg['input_size'][0], 32, 32), crop_pct=1.0, pool_size=None)
    small |= dict.fromkeys(('test_input_size', 'test_crop_pct'))
    cfg.update({k: v for k, v in small.items() if k not in overlay})

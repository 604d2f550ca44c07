r"""`injected`: any model of timm with any attention, by name, so that whatever builds models by name takes it.

timm's scripts, segmentation_models_pytorch's `tu-` encoders and model folders build a model from an architecture and
plain keywords. Here base, attention and place are the keywords:

    timm.create_model('injected', base='convnext_tiny.fb_in1k', attn='cbam', at=r'stages\.\d+', pretrained=True)
"""

from collections.abc import Sequence
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from timm.models._builder import load_pretrained, pretrained_cfg_for_features, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet, FeatureHookNet
from torch import Tensor, nn

from ..injection import base_of, inject, injections, uncalled
from ..layers import attn_sites, did_you_mean
from ..weights.fetch import fetching
from ._build import FINISHERS

__all__ = ['injected_args']

# What `inject` takes, with its defaults; a field that has its default is left out of a config.
_DEFAULTS: dict[str, Any] = {
    'attn_args': {},
    'at': None,
    'where': 'auto',
    'fmt': 'NCHW',
    'start': 'identity',
    'example': None,
}
# timm's words about a checkpoint, which a base's weights with attention among them are not any more.
_OF_A_FILE = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'tag')

default_cfgs = generate_default_cfgs(
    {
        'injected.untrained': {
            'input_size': (3, 224, 224),
            'pool_size': (7, 7),
            'crop_pct': 0.95,
            'interpolation': 'bicubic',
            'mean': (0.485, 0.456, 0.406),
            'std': (0.229, 0.224, 0.225),
            'first_conv': 'conv1',
            'classifier': 'fc',
        }
    }
)


def injected_args(model: nn.Module) -> dict[str, Any]:
    """Keywords with which `timm.create_model('injected', ...)` builds a model again that `inject` changed.

    Args:
        model: A model that `inject` changed.

    Raises:
        ValueError: timm did not make the model that attention was injected into.
    """
    base, done = base_of(model), injections(model)
    if not base.get('architecture'):
        raise ValueError(
            f'A {type(model).__name__} that timm.create_model did not make has no name to rebuild it by: inject into a '
            'model from timm.create_model, or save model.state_dict() yourself and call inject before loading it.'
        )
    rows = [
        {'attn': row['attn'], **{k: row[k] for k, default in _DEFAULTS.items() if row[k] != default}} for row in done
    ]
    args = {k: v for k, v in base['model_args'].items() if k not in ('num_classes', 'in_chans')}
    tag = base.get('tag')
    found: dict[str, Any] = {'base': f'{base["architecture"]}.{tag}' if tag else base['architecture']}
    if args:
        found['base_args'] = args
    if base['model_args'].get('in_chans', 3) != 3:
        found['in_chans'] = base['model_args']['in_chans']
    return {**found, **(rows[0] if len(rows) == 1 else {'injections': rows})}


def _check_base(base: Any) -> None:
    if not isinstance(base, str) or base.split('.')[0] == 'injected':
        raise ValueError(f"base (={base!r}) must be the name of a model of timm, such as 'resnet18'.")
    if ':' not in base and not timm.is_model(base):
        meant = did_you_mean(base.split('.')[0], timm.list_models())
        raise ValueError(f'base (={base!r}) is no model of timm.{meant} timm.list_models() has all.')


def _check_fit(state_dict: dict[str, Tensor], model: Any, cfg: dict[str, Any]) -> dict[str, Tensor]:
    """timm loads without strictness where head or stem have other sizes: then all else must fit all the same."""
    free = set()
    if model.num_classes != cfg.get('num_classes'):
        heads = cfg.get('classifier') or ()
        free |= {f'{name}.{part}' for name in ([heads] if isinstance(heads, str) else heads) for part in _HEAD}
    gains = {f'{site}.gain' for site in attn_sites(model)}
    expected = set(model.state_dict())
    missing, extra = expected - set(state_dict) - free - gains, set(state_dict) - expected - free - gains
    if missing or extra:
        sites = tuple(f'{site}.' for site in attn_sites(model))
        adapter = not extra and not any(k.startswith(sites) for k in missing)
        todo = (
            'They are those of an adapter: timm_attn.load(DIRECTORY), or load_from_hub(REPOSITORY), adds the base.'
            if adapter
            else 'Give the keywords that they were saved with.'
        )
        raise ValueError(
            f'The weights do not fit this injected model: {len(missing)} missing {sorted(missing)[:6]}, '
            f'{len(extra)} that do not belong {sorted(extra)[:6]}. {todo}'
        )
    return state_dict


_HEAD = ('weight', 'bias')


def _features(model: Any, indices: Any, feature_cls: str | None) -> nn.Module:
    """Wraps the model as timm's `features_only` does; by its own `forward_intermediates` where it has one."""
    getter = hasattr(model, 'forward_intermediates')
    feature_cls = feature_cls or ('getter' if getter else 'hook')
    classes: dict[str, Any] = {'getter': FeatureGetterNet, 'hook': FeatureHookNet}
    if feature_cls not in classes:
        raise ValueError(f'feature_cls (={feature_cls!r}) of an injected model must be one of: {", ".join(classes)}.')
    cfg, shape = model.pretrained_cfg, (2, *_input_size(model))
    if indices is None:
        indices = tuple(range(len(model.feature_info)))
    net = classes[feature_cls](model, out_indices=indices)
    net.pretrained_cfg = net.default_cfg = pretrained_cfg_for_features(cfg)
    if traits := getattr(model, '_traits', None):
        net._traits = dict(traits)
    if silent := uncalled(net, shape):
        raise ValueError(
            f'features_only of {type(model).__name__} does not pass {silent[:4]}, which stand outside the modules that '
            'it runs: choose the blocks inside them with `at`.'
        )
    return net


def _input_size(model: Any) -> tuple[int, int, int]:
    size = tuple(model.pretrained_cfg.get('input_size') or (3, 224, 224))
    own = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    height, width = own if own else size[1:]
    return getattr(model, 'in_chans', None) or size[0], height, width


@register_model
def injected(
    pretrained: bool = False,
    *,
    base: str = 'resnet18',
    base_args: dict[str, Any] | None = None,
    attn: str = 'cbam',
    attn_args: dict[str, Any] | None = None,
    at: str | Sequence[str] | None = None,
    where: str = 'auto',
    fmt: str = 'NCHW',
    start: str = 'identity',
    example: Sequence[int] | None = None,
    injections: Sequence[dict[str, Any]] | None = None,
    features_only: bool = False,
    out_indices: Any = None,
    feature_cls: str | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """A model of timm with attention injected; `pretrained=True` gives the base's weights with neutral attention.

    Args:
        pretrained: Load the base's weights; those of the model itself, where a folder or repository is its source.
        base: A model of timm or of this package, with a tag where its weights shall be others than the first.
        base_args: Its keywords; they may also be given beside the others.
        attn: The attention.
        attn_args: Its options.
        at: As for `inject`, and so are `where`, `fmt`, `start` and `example` (a shape).
        where: 'auto', 'slot' or 'output'.
        fmt: 'NCHW' or 'NHWC'.
        start: 'identity' or 'paper'.
        example: Shape of an input.
        injections: Several injections, one after the other, in place of one: dicts with 'attn', 'attn_args', 'at',
            'where', 'fmt', 'start' and 'example'.
        features_only: Return feature maps, as timm's models do.
        out_indices: Which of them.
        feature_cls: 'getter' (by `forward_intermediates`) or 'hook'.
        pretrained_cfg: timm's, for weights of the whole model.
        pretrained_cfg_overlay: timm's, for the base.
        pretrained_model_args: timm's.
        cache_dir: timm's.
        **kwargs: The base's: `num_classes`, `in_chans`, `drop_path_rate`, ...

    Raises:
        ValueError: No such base, or as `inject`.
        TypeError: Unknown keywords.
    """
    _check_base(base)
    rows = [dict(row) for row in injections or ()] or [
        dict(attn=attn, attn_args=attn_args, at=at, where=where, fmt=fmt, start=start, example=example)
    ]
    own: dict[str, Any] | None = None
    finish = [done for name, done in FINISHERS.items() if kwargs.pop(name, False)]
    base_args = {**(base_args or {}), **kwargs}
    if pretrained_cfg is not None and not isinstance(pretrained_cfg, str):
        # A checkpoint of the whole model, from a folder or repository: its numbers of classes and channels are its own.
        own = resolve_pretrained_cfg('injected', pretrained_cfg=pretrained_cfg).to_dict()
        base_args.setdefault('num_classes', own['num_classes'])
        base_args.setdefault('in_chans', own['input_size'][0])
    load_base = pretrained and own is None
    with fetching(base, load_base, None, pretrained_cfg_overlay, cache_dir):
        model: Any = timm.create_model(
            base,
            pretrained=load_base,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
            cache_dir=cache_dir,
            **base_args,
        )
    for row in rows:
        name, options = row.pop('attn', 'cbam'), row.pop('attn_args', None) or {}
        if unknown := sorted(set(row) - set(_DEFAULTS)):
            raise TypeError(f'injections: {unknown} are unknown. Accepted: attn, {", ".join(_DEFAULTS)}.')
        inject(model, name, **row, **options)
    cfg = own or {k: v for k, v in model.pretrained_cfg.items() if k not in _OF_A_FILE}
    model.pretrained_cfg = model.default_cfg = {**cfg, 'architecture': 'injected', 'custom_load': False}
    model.pretrained_model_args = pretrained_model_args or {}
    model._model_args = {}  # the factory adds what it was called with
    if pretrained and own is not None:
        load_pretrained(
            model,
            pretrained_cfg=model.pretrained_cfg,
            num_classes=model.num_classes,
            in_chans=getattr(model, 'in_chans', None) or kwargs.get('in_chans', 3),
            filter_fn=lambda state_dict, model: _check_fit(state_dict, model, model.pretrained_cfg),
            cache_dir=cache_dir,
        )
    for done in finish:
        model = done(model)
    return _features(model, out_indices, feature_cls) if features_only else model

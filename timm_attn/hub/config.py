"""What a config.json from somewhere else may say, and what a safetensors header must say.

timm hands `model_args` to the model's constructor and `pretrained_cfg` to its loader as they come from the repository.
Here every field is checked against a table of types and bounds first, and nothing is built from a file that breaks one
rule.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.models import ResNet
from torch import nn

from ..layers import get_attn
from .client import HubFileError
from .records import check_about, normalise_descriptions, normalise_labels
from .rules import (
    CONFIG,
    WEIGHTS,
    Check,
    boolean,
    integer,
    list_of,
    no_constant,
    no_repeats,
    number,
    one_of,
    or_null,
    text,
)

MAX_CONFIG_BYTES = 1 << 20
MAX_CLASSES = 100_000
MAX_PARAMETERS = 2_000_000_000


def _attn_arg(v: Any) -> bool:
    plain = (boolean, number(-4096, 4096), text(32, r'[\w.-]*'))
    return v is None or any(check(v) for check in plain) or list_of(number(-4096, 4096), 0, 16)(v)


def _attn_args(v: Any) -> bool:
    name = text(32, r'[a-z]\w*')
    return isinstance(v, dict) and len(v) <= 32 and all(map(name, v)) and all(map(_attn_arg, v.values()))


def _labels(v: Any) -> bool:
    return isinstance(v, list | dict) and len(v) <= MAX_CLASSES  # what they hold is checked where they are normalised


def _paths(v: Any) -> bool:
    name = text(128, r'[\w.]+')
    return v is None or name(v) or list_of(name, 1, 8)(v)


# Constructor arguments: what a ResNet of ours or timm's is built from, without what could point elsewhere, switch
# strictness off, or ask for more than the largest model of the family.
MODEL_ARGS: dict[str, tuple[Check, str]] = {
    'num_classes': (integer(0, MAX_CLASSES), f'an integer from 0 to {MAX_CLASSES}'),
    'in_chans': (integer(1, 1024), 'an integer from 1 to 1024'),
    'global_pool': (one_of('', 'avg', 'max', 'avgmax', 'catavgmax', 'fast'), 'a pooling type of timm'),
    'attn_args': (or_null(_attn_args), 'an object of numbers, booleans and short words'),
    'attn_after': (list_of(integer(1, 2), 0, 2), 'a list of 1 and 2'),
    'cifar_stem': (boolean, 'true or false'),
    'output_stride': (one_of(8, 16, 32), '8, 16 or 32'),
    'layers': (list_of(integer(1, 50), 4, 4), 'four integers from 1 to 50'),
    'channels': (list_of(integer(1, 2048), 2, 4), 'two to four integers from 1 to 2048'),
    'last_stride': (one_of(1, 2), '1 or 2'),
    'cardinality': (integer(1, 128), 'an integer from 1 to 128'),
    'base_width': (integer(1, 512), 'an integer from 1 to 512'),
    'stem_width': (integer(1, 512), 'an integer from 1 to 512'),
    'stem_type': (one_of('', 'deep', 'deep_tiered'), "'', 'deep' or 'deep_tiered'"),
    'replace_stem_pool': (boolean, 'true or false'),
    'avg_down': (boolean, 'true or false'),
    'zero_init_last': (boolean, 'true or false'),
    'block_reduce_first': (integer(1, 16), 'an integer from 1 to 16'),
    'down_kernel_size': (one_of(1, 3), '1 or 3'),
}

_LAYER = (text(32, r'\w*'), 'a short word')
_FEW = (list_of(integer(0, 4096), 1, 8), 'one to eight integers up to 4096')
_RATE = (number(0, 1), 'a number from 0 to 1')
# What a base of an injected model may be told besides: shapes, names of layers and rates, none of them far beyond any
# model of timm.
BASE_ARGS: dict[str, tuple[Check, str]] = MODEL_ARGS | {
    'img_size': (
        lambda v: integer(1, 1024)(v) or list_of(integer(1, 1024), 2, 2)(v),
        'an integer from 1 to 1024, or two of them',
    ),
    'patch_size': (integer(1, 64), 'an integer from 1 to 64'),
    'window_size': (integer(1, 64), 'an integer from 1 to 64'),
    'depth': (integer(1, 50), 'an integer from 1 to 50'),
    'depths': (list_of(integer(1, 50), 1, 8), 'one to eight integers from 1 to 50'),
    'dims': _FEW,
    'embed_dim': (lambda v: integer(1, 4096)(v) or _FEW[0](v), 'an integer up to 4096, or a list of them'),
    'num_heads': (lambda v: integer(1, 128)(v) or _FEW[0](v), 'an integer up to 128, or a list of integers'),
    'act_layer': _LAYER,
    'norm_layer': _LAYER,
    'aa_layer': _LAYER,
    'drop_rate': _RATE,
    'drop_path_rate': _RATE,
    'attn_drop_rate': _RATE,
    'proj_drop_rate': _RATE,
    'drop_block_rate': _RATE,
}


def _names_of_modules(v: Any) -> bool:
    # Names, with \d+ for numbers and a bounded number of repetitions, so that matching takes bounded time.
    token = text(256, r'(?:\w|\.|-|\\[.\-]|\\d|\[\d+(?:-\d+)?\])(?:\w|\.|-|\\[.\-]|\\d\+?|\[\d+(?:-\d+)?\])*')
    return text(256)(v) and token(v) and v.count('+') <= 4 if isinstance(v, str) else False


_INJECTION: dict[str, tuple[Check, str]] = {
    'attn': (text(64, r'[a-z]\w*'), 'the name of an attention'),
    'attn_args': MODEL_ARGS['attn_args'],
    'at': (
        or_null(lambda v: _names_of_modules(v) or list_of(_names_of_modules, 1, 1024)(v)),
        'names of modules, in which \\d+ may stand for a number',
    ),
    'where': (one_of('auto', 'slot', 'output'), "'auto', 'slot' or 'output'"),
    'fmt': (one_of('NCHW', 'NHWC'), "'NCHW' or 'NHWC'"),
    'start': (one_of('identity', 'paper'), "'identity' or 'paper'"),
    'example': (or_null(list_of(integer(1, 1024), 2, 5)), 'a shape'),
}


def _fields(table: Mapping[str, tuple[Check, str]]) -> Check:
    return lambda v: isinstance(v, dict) and all(k in table and table[k][0](x) for k, x in v.items())


def _base(v: Any) -> bool:
    return text(128, r'\w+(?:\.[\w.-]+)?')(v) and v.split('.')[0] != 'injected' and timm.is_model(v.split('.')[0])


INJECTED_ARGS: dict[str, tuple[Check, str]] = (
    BASE_ARGS
    | _INJECTION
    | {
        'base': (_base, 'the name of a model of timm or timm_attn'),
        'base_args': (
            or_null(_fields(BASE_ARGS)),
            f'an object with fields of {sorted(BASE_ARGS)}, as those have to be',
        ),
        'injections': (
            or_null(list_of(_fields(_INJECTION), 1, 16)),
            f'a list of objects with fields of {sorted(_INJECTION)}, as those have to be',
        ),
    }
)

_SIZE = (list_of(integer(1, 4096), 3, 3), 'three integers from 1 to 4096')
_POOL = (or_null(list_of(integer(1, 4096), 2, 2)), 'two integers')
_CROP = (or_null(number(0.01, 4)), 'a number from 0.01 to 4')
_WORDS = (or_null(text(4096)), 'a text of at most 4096 characters')

PRETRAINED_CFG: dict[str, tuple[Check, str]] = {
    'architecture': (text(64, r'\w+'), 'a model name'),
    'tag': (or_null(text(128, r'[\w.-]*')), 'a short tag'),
    'custom_load': (one_of(False), 'false: weights are timm state dicts'),
    'input_size': _SIZE,
    'test_input_size': _SIZE,
    'min_input_size': _SIZE,
    'fixed_input_size': (boolean, 'true or false'),
    'interpolation': (
        one_of('bilinear', 'bicubic', 'nearest', 'lanczos', 'box', 'hamming', 'random'),
        'an interpolation',
    ),
    'crop_pct': _CROP,
    'test_crop_pct': _CROP,
    'crop_mode': (one_of('center', 'squash', 'border'), 'center, squash or border'),
    'mean': (list_of(number(-1e4, 1e4), 1, 1024), 'a list of numbers'),
    'std': (list_of(number(1e-8, 1e4), 1, 1024), 'a list of positive numbers'),
    'num_classes': MODEL_ARGS['num_classes'],
    # Any other offset would cut rows off the head.
    'label_offset': (or_null(one_of(0)), '0'),
    'label_names': (or_null(_labels), 'texts'),
    'label_descriptions': (or_null(_labels), 'texts'),
    'pool_size': _POOL,
    'test_pool_size': _POOL,
    'first_conv': (_paths, 'the name of a module'),
    'classifier': (_paths, 'the name of a module'),
    'license': _WORDS,
    'description': _WORDS,
    'origin_url': _WORDS,
    'paper_name': _WORDS,
    'paper_ids': (lambda v: _WORDS[0](v) or list_of(text(256), 0, 16)(v), 'identifiers of papers'),
    'notes': (lambda v: _WORDS[0](v) or list_of(text(4096), 0, 64)(v), 'texts'),
}
# Fields of timm that make its loader read another file, another repository or a tensor from the config.
_ELSEWHERE = frozenset({'url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source'})
# Fields at the top level that are no part of a pretrained_cfg, also of a flat file.
_NOT_PREPROCESSING = frozenset(
    {'architecture', 'num_features', 'num_classes', 'global_pool', 'model_args', 'timm_attn', 'label_names'}
    | {'label_descriptions'}
)


@dataclass(frozen=True)
class Config:
    """A config.json that passed the checks.

    Args:
        architecture: A registered model of ours, or a ResNet of timm's.
        num_classes: Size of the head.
        model_args: Constructor arguments without `num_classes`.
        pretrained_cfg: Preprocessing and provenance, with nothing that points elsewhere.
        about: Our own section: status, provenance, training, evaluation, and the sha256 of the weights it belongs to.
        raw: The whole file as parsed; a flat one in the form that timm writes now.
    """

    architecture: str
    num_classes: int
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)


def parse_config(data: bytes, where: str = CONFIG) -> dict[str, Any]:
    """Reads the bytes of a config.json into a dict.

    Args:
        data: The file.
        where: Its name for the message.

    Raises:
        HubFileError: It is too large, no UTF-8, no JSON object, or too deep.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise HubFileError(f'{where} has {len(data)} bytes; at most {MAX_CONFIG_BYTES} are read.')
    try:
        found = json.loads(data.decode('utf-8'), object_pairs_hook=no_repeats, parse_constant=no_constant)
    except (ValueError, RecursionError) as e:
        raise HubFileError(f'{where} is no JSON that can be used: {type(e).__name__}: {str(e)[:200]}') from e
    if not isinstance(found, dict):
        raise HubFileError(f'{where} must hold a JSON object, but holds a {type(found).__name__}.')
    return found


def encode_config(config: Mapping[str, Any]) -> bytes:
    """A config as the bytes of config.json.

    Args:
        config: Plain JSON.
    """
    return (json.dumps(config, indent=2, ensure_ascii=False) + '\n').encode()


def _check(where: str, values: Any, table: Mapping[str, tuple[Check, str]]) -> None:
    if not isinstance(values, dict):
        raise HubFileError(f'{where} must be an object, but is a {type(values).__name__}.')
    if unknown := sorted(set(values) - set(table)):
        raise HubFileError(f'{where} holds {unknown}, which is not allowed here. Allowed: {sorted(table)}')
    for name, value in values.items():
        check, rule = table[name]
        if not check(value):
            raise HubFileError(f'{where}.{name} (={str(value)[:80]!r}) must be {rule}.')


def _known_architecture(name: Any) -> bool:
    if not isinstance(name, str) or not timm.is_model(name):
        return False
    module = timm.model_entrypoint(name).__module__
    return module == 'timm.models.resnet' or module.startswith('timm_attn.models.')


def _check_attentions(args: dict[str, Any], about: Any, where: str) -> None:
    """Refuses attentions that are not here, and says which package has them."""
    packages = about.get('attentions') if isinstance(about, dict) else None
    for row in args.get('injections') or [args]:
        name = row.get('attn', 'cbam')
        try:
            get_attn(name)
        except ValueError as e:
            package = packages.get(name) if isinstance(packages, dict) else None
            known = isinstance(package, str) and re.fullmatch(r'[\w.-]{1,128}', package)
            source = f" It comes with the package '{package}': install it, and import it first" if known else ''
            hint = f'{source} (timm-attn --import MODULE ...).' if known else ''
            raise HubFileError(f'{where}: {e}{hint}') from e


def _pretrained_cfg(found: dict[str, Any], where: str) -> Any:
    """The part of a config that timm's loader takes for a model's pretrained_cfg."""
    if 'pretrained_cfg' in found:
        return found['pretrained_cfg']
    # An old, flat file: timm takes all of it.
    flat = {k: v for k, v in found.items() if k not in _NOT_PREPROCESSING}
    if 'labels' in flat:
        flat.setdefault('label_names', flat.pop('labels'))
    if unknown := sorted(set(flat) - set(PRETRAINED_CFG) - _ELSEWHERE):
        raise HubFileError(f'{where} has no pretrained_cfg, so that all of it is taken for one; it holds {unknown}.')
    return flat


def check_config(found: dict[str, Any], where: str = CONFIG) -> Config:
    """Checks a parsed config.json field by field.

    Args:
        found: The parsed file.
        where: Its name for the message.

    Raises:
        HubFileError: Names the first field that is not as it must be. Nothing was built.
    """
    architecture = found.get('architecture')
    if not _known_architecture(architecture):
        raise HubFileError(
            f'{where}: architecture (={str(architecture)[:80]!r}) must be a model of timm_attn or a ResNet of timm; '
            "see timm.list_models('*resnet*') after import timm_attn."
        )
    assert isinstance(architecture, str)
    args = found.get('model_args', {})
    injected = architecture == 'injected'
    _check(f'{where}: model_args', args, INJECTED_ARGS if injected else MODEL_ARGS)
    if injected:
        _check_attentions(args, found.get('timm_attn'), where)
    cfg = _pretrained_cfg(found, where)
    if isinstance(cfg, dict):
        if away := sorted(k for k in _ELSEWHERE & set(cfg) if cfg[k]):
            raise HubFileError(
                f'{where}: pretrained_cfg points elsewhere with {away}; weights come from {WEIGHTS} only.'
            )
        cfg = {k: v for k, v in cfg.items() if k not in _ELSEWHERE}
    _check(f'{where}: pretrained_cfg', cfg, PRETRAINED_CFG)
    if cfg.get('architecture', architecture) != architecture:
        raise HubFileError(f'{where}: pretrained_cfg.architecture differs from architecture (={architecture!r}).')
    places = {
        'num_classes': found.get('num_classes'),
        'model_args.num_classes': args.get('num_classes'),
        'pretrained_cfg.num_classes': cfg.get('num_classes'),
    }
    counts = {k: v for k, v in places.items() if v is not None}
    for name, value in counts.items():
        check, rule = MODEL_ARGS['num_classes']
        if not check(value):
            raise HubFileError(f'{where}: {name} (={str(value)[:80]!r}) must be {rule}.')
    if len(set(counts.values())) != 1:
        raise HubFileError(f'{where}: num_classes must be given, once or everywhere the same; got {counts}.')
    num_classes = next(iter(counts.values()))
    cfg = {k: v for k, v in cfg.items() if k not in ('architecture', 'num_classes')}
    names = found.get('label_names', cfg.pop('label_names', None))
    descriptions = found.get('label_descriptions', cfg.pop('label_descriptions', None))
    try:
        if names is not None:
            cfg['label_names'] = names = normalise_labels(names, num_classes)
        if descriptions := normalise_descriptions(descriptions, names):
            cfg['label_descriptions'] = descriptions
    except ValueError as e:
        raise HubFileError(f'{where}: {e}') from e
    about = check_about(found.get('timm_attn'), where)
    args = {k: v for k, v in args.items() if k != 'num_classes'}
    chans, size = args.get('in_chans', 3), cfg.get('input_size')
    if size is not None and size[0] != chans:
        raise HubFileError(f'{where}: pretrained_cfg.input_size (={size}) must start with in_chans (={chans}).')
    if 'pretrained_cfg' not in found:
        # In the form that timm writes, so that whatever else stands in a flat file is no trouble to its reader.
        inner = {k: v for k, v in cfg.items() if k not in ('label_names', 'label_descriptions')}
        found = {k: v for k, v in found.items() if k in _NOT_PREPROCESSING} | {'pretrained_cfg': inner}
        found |= {k: v for k, v in cfg.items() if k in ('label_names', 'label_descriptions')}
    return Config(architecture, num_classes, args, cfg, about, found)


@lru_cache(maxsize=32)
def _build_meta(architecture: str, num_classes: int, args: str) -> Any:
    with torch.device('meta'):
        return timm.create_model(architecture, num_classes=num_classes, **json.loads(args))


def build_meta(config: Config, where: str = CONFIG) -> ResNet:
    """The model that a config describes, on the meta device: shapes, but no memory. It is shared: do not change it.

    Args:
        config: A checked config.
        where: The file's name for the message.

    Raises:
        HubFileError: The model's constructor refuses the arguments, or the result is beyond any model of the family.
    """
    try:
        model = _build_meta(config.architecture, config.num_classes, json.dumps(config.model_args, sort_keys=True))
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AssertionError) as e:
        raise HubFileError(
            f'{where}: {config.architecture} cannot be built with model_args {config.model_args}: {e}'
        ) from e
    if (count := sum(p.numel() for p in model.parameters())) > MAX_PARAMETERS:
        raise HubFileError(
            f'{where}: model_args ask for {count:.3g} parameters; at most {MAX_PARAMETERS:.0e} are built.'
        )
    _check_names(config, model, where)
    return model


def layer_names(model: Any) -> dict[str, str]:
    """Names of the first convolution and of the classifier, which timm adapts when the caller asks for other sizes.

    Args:
        model: The model.
    """
    head = model.get_classifier()
    names = dict(model.named_modules())
    convs = [name for name, m in names.items() if isinstance(m, nn.Conv2d)]
    return {
        'first_conv': convs[0],
        'classifier': next((name for name, m in names.items() if m is head), ''),
    }


def _check_names(config: Config, model: nn.Module, where: str) -> None:
    # Any other name would be a way to have layers of the trunk replaced by random ones.
    own = timm.get_pretrained_cfg(config.model_args.get('base', config.architecture))
    for field_name, name in layer_names(model).items():
        found = config.pretrained_cfg.get(field_name)
        allowed = getattr(own, field_name, None)
        if found not in (None, name, list(allowed) if isinstance(allowed, tuple) else allowed):
            raise HubFileError(f'{where}: pretrained_cfg.{field_name} (={found!r}) must be {name!r}.')

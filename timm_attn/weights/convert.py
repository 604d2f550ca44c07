"""Foreign checkpoints under the keys of our models."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Attention, did_you_mean, gain_keys, get_attn, list_attn, read_gain
from .check import check_tensors, check_values
from .sources import SOURCES, own
from .sources.base import PLAIN, Shape, Source, Target
from .unwrap import Unwrapped, some, unwrap
from .warm_start import check_can_start, warm_start

_BUILDING = ('pretrained', 'checkpoint_path', 'features_only', 'pretrained_cfg', 'pretrained_cfg_overlay')
# What `detect` calls a checkpoint under the model's own keys.
OWN = 'own'


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint and what it was.

    Attributes:
        weights: Under our keys.
        source: Its source, with the net where one was named.
        kind: 'ema' or 'raw' where the checkpoint said so, see `Unwrapped`.
        warm: They are a plain ResNet's, with neutral attention.
    """

    weights: dict[str, Tensor]
    source: str
    kind: str
    warm: bool


def list_sources() -> list[str]:
    """The names that `convert(source=...)` knows, sorted; one whose equal keys are several nets may end in /NET."""
    return sorted({name for s in SOURCES for name in (s.name, *(a for names in s.alias.values() for a in names))})


def net_of_sha1(sha1: str) -> str | None:
    """The source and net of a released file that is known by its sha1, None for others.

    Args:
        sha1: Of the file inside an archive, or of the file itself.
    """
    return next((f'{s.name}/{s.known_sha1[sha1]}' for s in SOURCES if sha1 in s.known_sha1), None)


def target_of(model: nn.Module, name: str | None = None) -> Target:
    """What converters need to know about a model.

    Args:
        model: A model, on the meta device or not.
        name: Its registered name; taken from its config by default.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    gains = gain_keys(model)
    return Target(
        name=name or cfg.get('architecture') or type(model).__name__,
        attn=getattr(model, 'attn', None),
        attn_args=getattr(model, 'attn_args', None) or {},
        shapes={k: tuple(v.shape) for k, v in model.state_dict().items() if k not in gains},
        sites=tuple(f'{n}.' for n, m in model.named_modules() if isinstance(m, Attention)),
        gains=gains,
    )


def detect(state_dict: Mapping[str, Tensor], target: Target, source: str | None = None) -> tuple[Source, str]:
    """The source whose keys a state dict has, and the attention that they belong to.

    Args:
        state_dict: Without wrappers.
        target: The model, for checkpoints that have its own names.
        source: What the caller calls it.

    Returns:
        The source, and the attention: 'own' for the model's own names, 'plain' for a net without attention.

    Raises:
        ValueError: The keys are those of no source, or far too many.
    """
    if len(state_dict) > 10 * len(target.shapes) + 1000:
        raise ValueError(
            f'The checkpoint has {len(state_dict)} tensors ({some(state_dict, 3)}), and {target.name} '
            f'{len(target.shapes)}: it is another network.'
        )
    found = [(s, attn) for s in SOURCES if (attn := s.attn_of(state_dict))]
    for known, attn in found:
        if attn != PLAIN:
            return known, attn
    # An attention without weights leaves no mark: then only the caller can tell its net from a plain one.
    marked = source == own.SOURCE.name or target.attn is None
    if any(k in target.gains or (k in target.shapes and (marked or k.startswith(target.sites))) for k in state_dict):
        return next((s for s in SOURCES if target.attn in s.own_names), own.SOURCE), OWN
    if found:
        return found[0]
    hint = ''
    stems = {k.partition('.')[0] for k in state_dict}
    if len(stems) == 1 and (stem := stems.pop()) not in {k.partition('.')[0] for k in target.shapes}:
        hint = f" All stand under '{stem}.': if that holds the network, pass prefix='{stem}.' (--prefix {stem}.)."
    raise ValueError(
        f'The keys ({some(state_dict, 3)}) are those of no known source: {", ".join(list_sources())}.{hint}'
    )


def _check_source(source: str | None, found: Source, attn: str, target: Target) -> str:
    """The name under which the source goes from here on."""
    names = {found.name, own.SOURCE.name} if attn == OWN else found.names_of(attn)
    default = own.SOURCE.name if attn == OWN else found.name
    family, slash, net = source.partition('/') if source is not None else (default, '', '')
    if family not in list_sources():
        meant = did_you_mean(family, list_sources())
        raise ValueError(f"Unknown source '{source}'.{meant} Expected one of: {', '.join(list_sources())}.")
    if family not in names:
        raise ValueError(f'source (={source!r}) does not fit: the keys are those of {" or ".join(sorted(names))}.')
    if slash and not found.nets:
        with_nets = ', '.join(sorted({s.name for s in SOURCES if s.nets}))
        raise ValueError(f"Unknown source '{source}'. A net is named for {with_nets} only: 'pytorchcv/seresnet50b'.")
    if slash and not re.fullmatch(found.nets, net):
        raise ValueError(f"Unknown source '{source}'. Expected a net such as 'pytorchcv/seresnet50b'.")
    # A source without rules has checks that refuse it whatever the model.
    if found.rules and attn not in (PLAIN, OWN, target.attn):
        raise ValueError(
            f"The checkpoint is a net with '{attn}' ({found.name}), and {target.name} has "
            f"{repr(target.attn) if target.attn else 'no attention'}: convert it for a model with '{attn}'."
        )
    if attn == PLAIN and not target.attn:
        raise ValueError(f'The checkpoint is a plain ResNet ({found.name}), and {target.name} is none.')
    return source or default


def _placed(key: str, shapes: Mapping[str, Shape]) -> str:
    """Our key with the number of the child behind the stage's last block in the place of END."""
    match = re.match(r'(layer\d)\.END\.', key)
    if not match:
        return key
    children = [int(m[1]) for k in shapes if (m := re.match(rf'{match[1]}\.(\d+)\.', k))]
    return key.replace('.END.', f'.{max(children)}.') if children else key


def translate(state_dict: Mapping[str, Tensor], source: Source, target: Target) -> tuple[dict[str, Tensor], list[str]]:
    """Applies a source's rules, and fills what is equal where the source has nothing.

    Args:
        state_dict: The source's, without wrappers.
        source: Its description.
        target: The model.

    Returns:
        Our keys, whether or not the model has them, and what could not be renamed, in words.
    """
    found: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    problems = []
    for key, value in state_dict.items():
        if source.constants and re.search(source.constants, key):
            continue
        ours = _placed(source.rename(key), target.shapes)
        if ours in found:
            problems.append(f"'{key}' and '{origin[ours]}' both become '{ours}'")
            continue
        shape = target.shapes.get(ours)
        for pattern, change in source.values:
            # What is larger than the model's is no weight of it, and may be too large to touch.
            if shape is not None and value.numel() <= math.prod(shape) and re.search(pattern, key):
                value = change(value, shape)
        found[ours], origin[ours] = value, key
    if source.zeros and not any(re.search(source.zeros, k) for k in found):
        like = next(iter(found.values()))
        for key, shape in target.shapes.items():
            if re.search(source.zeros, key):
                found[key] = torch.zeros(shape, dtype=like.dtype)
    for key in target.shapes:
        # Files older than torch 0.4.1 do not count batches.
        if key.endswith('.num_batches_tracked') and key not in found:
            found[key] = torch.tensor(0)
    return found, problems


def check_fit(
    found: Mapping[str, Tensor],
    target: Target,
    name: str,
    free: frozenset[str] = frozenset(),
    problems: list[str] | None = None,
) -> None:
    """Compares keys and shapes with the model's; no value is read.

    Args:
        found: Under our keys.
        target: The model.
        name: Of the source, for the message.
        free: Keys that may be absent, more, or of another shape.
        problems: What is wrong already.

    Raises:
        ValueError: Names every unused, missing and misshapen key, or a gain that is none.
    """
    for key in target.gains & found.keys():
        read_gain(found[key], key)
    unused = [k for k in found if k not in target.shapes and k not in free and k not in target.gains]
    missing = [k for k in target.shapes if k not in found and k not in free]
    misshapen = {
        k: (tuple(v.shape), target.shapes[k])
        for k, v in found.items()
        if k in target.shapes and k not in free and tuple(v.shape) != target.shapes[k]
    }
    lines = list((problems or ())[:100])
    if unused:
        lines.append(f'{len(unused)} unused keys: {some(unused)}')
    if missing:
        lines.append(f'{len(missing)} missing keys: {some(missing)}')
    if misshapen:
        text = some(f'{k} is {was}, the model needs {needs}' for k, (was, needs) in misshapen.items())
        lines.append(f'{len(misshapen)} keys of another shape: {text}')
    if not lines:
        return
    hints = [*_hints(misshapen, missing), *_option_hints(found, target)]
    raise ValueError(
        f"The checkpoint (source '{name}') does not fit {target.name}. "
        + '; '.join(lines)
        + '.'
        + ''.join(f' {h}.' for h in hints)
    )


def _hints(misshapen: Mapping[str, tuple[Shape, Shape]], missing: list[str]) -> list[str]:
    """What the caller could pass to have a model whose head and stem fit."""
    hints = []
    if 'fc.weight' in missing:
        hints.append('If it has no head, pass num_classes=0')
    for key, (was, needs) in misshapen.items():
        if key == 'fc.weight' and was[1:] == needs[1:]:
            hints.append(f'For its head pass num_classes={was[0]}')
        elif key == 'conv1.weight' and len(was) == len(needs) == 4:
            if was[2:] != needs[2:]:
                stem = '7x7 stem: pass cifar_stem=False' if was[2] == 7 else '3x3 stem: pass cifar_stem=True'
                hints.append(f'It has a {stem}')
            if was[1] != needs[1]:
                hints.append(f'For its images pass in_chans={was[1]}')
    return hints


def _option_hints(found: Mapping[str, Tensor], target: Target) -> list[str]:
    """What the attention's class reads off the shapes of its modules, where it is not what the model has."""
    if target.attn not in list_attn():
        return []
    cls = get_attn(target.attn).cls
    # Options are given once, or once for each stage.
    theirs: dict[str, dict[str, str]] = {}
    ours: dict[str, dict[str, str]] = {}
    for site in target.sites:
        stage = site.partition('.')[0]
        shapes = {k.removeprefix(site): v.shape for k, v in found.items() if k.startswith(site)}
        needed = {k.removeprefix(site): v for k, v in target.shapes.items() if k.startswith(site)}
        for options, text in ((theirs, cls.options_of(shapes)), (ours, cls.options_of(needed))):
            for option, value in text.items():
                options.setdefault(option, {}).setdefault(stage, value)
    hints = []
    for option, stages in theirs.items():
        values = list(stages.values())
        if list(map(Fraction, values)) != list(map(Fraction, ours.get(option, {}).values())):
            one = len(set(map(Fraction, values))) == 1
            value = values[0] if one else f'[{", ".join(values)}]'
            hints.append(f"It has attn_args={{'{option}': {value}}}")
    return hints


def _reordered(found: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    return {k: found[k] for k in keys if k in found} | dict(found)


def convert_for(
    unwrapped: Unwrapped,
    model: nn.Module,
    source: str | None = None,
    *,
    name: str | None = None,
    free: frozenset[str] = frozenset(),
) -> Conversion:
    """What `convert` does, for a model that exists: it is read, not changed.

    Args:
        unwrapped: The weights.
        model: The model whose keys are wanted; its attention's own values start a warm start.
        source: One of `list_sources()`, found from the keys by default.
        name: Registered name of the model, for messages.
        free: Keys that may be absent, more, or of another shape.

    Raises:
        ValueError: As `convert`.
    """
    plain = unwrapped.state_dict
    check_tensors(plain)
    target = target_of(model, name)
    found, attn = detect(plain, target, source)
    shown = _check_source(source, found, attn, target)
    for check in found.checks:
        check(plain, target, shown)
    expected = model.state_dict()
    warm = attn == PLAIN
    if warm:
        try:
            check_can_start(model, plain)
        except ValueError as e:
            if any(k.startswith(target.sites) for k in target.shapes):
                raise
            # Its own nets have a plain one's keys.
            raise ValueError(f"{e} If these are the weights of {target.name} itself, pass source='timm_attn'.") from e
        base = {k: v for k, v in target.shapes.items() if not k.startswith(target.sites)}
        target = replace(target, shapes=base, gains=frozenset())
    ours, problems = translate(plain, found, target)
    check_fit(ours, target, shown, free, problems)
    check_values(ours, expected)
    if warm:
        ours = warm_start(ours, model)
    return Conversion(_reordered(ours, expected), shown, unwrapped.kind, warm)


def convert_checkpoint(
    checkpoint: Mapping[str, Any],
    model_name: str,
    source: str | None = None,
    *,
    weights: str | None = None,
    prefix: str | None = None,
    **model_args: Any,
) -> Conversion:
    """What `convert` does, with what the checkpoint was.

    Args:
        checkpoint: As for `convert`.
        model_name: As for `convert`.
        source: As for `convert`.
        weights: As for `convert`.
        prefix: As for `convert`.
        **model_args: As for `convert`.

    Raises:
        ValueError: As `convert`.
    """
    import timm

    unasked = [a for a in _BUILDING if a in model_args]
    if unasked:
        raise ValueError(f'convert builds no weights: leave out {", ".join(unasked)}.')
    if ':' in model_name or not timm.is_model(model_name):
        meant = did_you_mean(model_name, timm.list_models())
        raise ValueError(
            f"Unknown model '{model_name}'.{meant} Expected one such as 'cbam_resnet50': see timm-attn list."
        )
    model = timm.create_model(model_name, device='meta', **model_args)
    if not hasattr(model, 'attn'):
        raise ValueError(f"'{model_name}' is timm's own model: convert for one of this package, see timm-attn list.")
    unwrapped = unwrap(checkpoint, weights, prefix)
    name = model_name.partition('.')[0]
    _, attn = detect(unwrapped.state_dict, target_of(model, name), source)
    if attn == PLAIN and getattr(model, 'attn', None):
        # A warm start needs the attention's first values; the same ones at every call.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(model_name, **model_args)
    return convert_for(unwrapped, model, source, name=name)


def convert(
    state_dict: Mapping[str, Any],
    model_name: str,
    source: str | None = None,
    *,
    weights: str | None = None,
    prefix: str | None = None,
    **model_args: Any,
) -> dict[str, Tensor]:
    """Renames a foreign checkpoint to the keys of a registered model, strictly; the input is not changed.

    Values stay what they are but for what is equal: a linear layer as a 1x1 convolution, zero biases for an SE without
    biases, a shorter ECA kernel padded with zeros, timm's CBAM kernel flipped from [mean, max] to [max, mean]. A plain
    ResNet gives a warm start, which a log line says: see `warm_start`.

    Args:
        state_dict: A state dict, or a training checkpoint that holds one, such as those of timm, torchvision and
            Lightning: wrappers, and prefixes that all keys have, are taken off.
        model_name: A registered model of this package, such as 'cbam_resnet50'.
        source: Where the keys come from, one of `timm-attn convert --help`. Found from the keys by default. Only two
            need it: pytorchcv's SE bottleneck nets ('pytorchcv/seresnet50b'), and nets of this package whose attention
            has no weights ('timm_attn').
        weights: 'ema' or 'raw', of a checkpoint that holds averaged weights beside raw ones; None takes the averaged
            ones, which a log line says.
        prefix: Take only the keys that begin with it, such as 'backbone.', without it.
        **model_args: Arguments of `timm.create_model` for a model with another head, stem or attention, such as
            num_classes=10, in_chans=1, cifar_stem=True, attn_args={...}.

    Returns:
        A state dict that `timm.create_model(model_name, **model_args)` loads strictly.

    Raises:
        ValueError: The model is none of ours, the source is unknown or does not fit, the checkpoint is another network
            that its keys would fit (the stride in the first 1x1 convolution, SK-ResNet* for SKNet, ...), weights are
            no floating-point numbers, or not finite in the model's type, variances are negative, there are none, or
            keys are unused, missing or misshapen: all of them are listed.
    """
    return convert_checkpoint(state_dict, model_name, source, weights=weights, prefix=prefix, **model_args).weights

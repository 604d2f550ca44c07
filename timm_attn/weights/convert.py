"""Foreign checkpoints under the keys of our models."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Attention, gain_keys, read_gain
from .read import check_finite
from .sources import SOURCES, TIMM
from .sources.base import Shape, Source, Target
from .warm_start import check_can_start, warm_start

# What holds the weights in a training checkpoint; averaged ones are better, and timm prefers them too.
_WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
_PREFIXES = ('_orig_mod.', 'module.')
_BUILDING = ('pretrained', 'checkpoint_path', 'features_only', 'pretrained_cfg', 'pretrained_cfg_overlay')


def list_sources() -> list[str]:
    """The names that `convert(source=...)` knows, sorted; pytorchcv's may be followed by /NET."""
    return sorted({s.name for s in SOURCES} | {'torchvision', 'timm_attn'})


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without the prefixes of torch.compile and DataParallel.

    Args:
        checkpoint: A state dict, or a dict that holds one as 'state_dict', 'model', 'state_dict_ema' or 'model_ema'.

    Raises:
        ValueError: There is no tensor, something else stands among them, or two keys become one.
    """
    found = checkpoint
    while name := next((w for w in _WRAPPERS if isinstance(found.get(w), Mapping)), None):
        found = found[name]
    if not any(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f'The checkpoint holds no weights: its entries are {list(map(str, found)) or "none"}.')
    other = {k: type(v).__name__ for k, v in found.items() if not isinstance(v, Tensor)}
    if other:
        raise ValueError(f'A state dict holds tensors only; this one has also: {other}.')
    plain: dict[str, Tensor] = {}
    for key, value in found.items():
        short = str(key)
        while prefix := next((p for p in _PREFIXES if short.startswith(p)), None):
            short = short[len(prefix) :]
        if short in plain:
            raise ValueError(f"Without its prefix, '{key}' has the name of another key.")
        plain[short] = value
    return plain


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


def detect(state_dict: Mapping[str, Tensor], target: Target) -> tuple[Source, str | None]:
    """The source whose keys a state dict has, and the attention that they belong to.

    Args:
        state_dict: Without wrappers.
        target: The model, for checkpoints that have its own names.

    Returns:
        The source, and the attention: 'own' for the model's own names, None for a net without attention.

    Raises:
        ValueError: The keys are those of no source.
    """
    for source in SOURCES:
        if attn := source.attn_of(state_dict):
            return source, attn
    if any(k in target.gains or (k in target.shapes and k.startswith(target.sites)) for k in state_dict):
        return TIMM, 'own'
    plain = target.attn is None and any(k in target.shapes for k in state_dict)
    if plain or 'layer1.0.conv1.weight' in state_dict:
        return TIMM, None
    raise ValueError(
        f'The keys ({", ".join(list(state_dict)[:3])}, ...) are those of no known source: {", ".join(list_sources())}.'
    )


def _check_source(source: str | None, found: Source, attn: str | None, target: Target) -> str:
    """The name under which the source goes from here on."""
    names = {found.name, *found.alias.get(attn or 'plain', ())}
    if attn == 'own':
        # timm's SE and ECA have our names.
        names = {'timm_attn', 'timm'} if target.attn in ('se', 'eca') else {'timm_attn'}
    default = 'timm_attn' if attn == 'own' else found.name
    family = source.partition('/')[0] if source else default
    if family not in list_sources():
        raise ValueError(f"Unknown source '{source}'. Expected one of: {', '.join(list_sources())}.")
    if family not in names:
        raise ValueError(f'source (={source!r}) does not fit: the keys are those of {" or ".join(sorted(names))}.')
    if source and '/' in source and family != 'pytorchcv':
        raise ValueError(f"Unknown source '{source}'. A net is named for pytorchcv only: 'pytorchcv/seresnet50b'.")
    if source and '/' in source and not re.fullmatch(r'pytorchcv/((bam_|cbam_|se)?resnet|sknet)\d+b?', source):
        raise ValueError(f"Unknown source '{source}'. Expected a net such as 'pytorchcv/seresnet50b'.")
    if attn not in (None, 'own', target.attn):
        raise ValueError(
            f"The checkpoint is a net with '{attn}' ({found.name}), and {target.name} has "
            f"{repr(target.attn) if target.attn else 'no attention'}: convert it for a model with '{attn}'."
        )
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
        ours = _placed(source.rename(key), target.shapes)
        if ours in found:
            problems.append(f"'{key}' and '{origin[ours]}' both become '{ours}'")
            continue
        shape = target.shapes.get(ours)
        for pattern, change in source.values:
            if shape is not None and re.search(pattern, key):
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
    """Compares keys and shapes with the model's.

    Args:
        found: Under our keys.
        target: The model.
        name: Of the source, for the message.
        free: Keys that may be absent, more, or of another shape.
        problems: What is wrong already.

    Raises:
        ValueError: Names every unused, missing and misshapen key, or a gain that is none.
    """
    for key in target.gains & set(found):
        read_gain(found[key], key)
    unused = [k for k in found if k not in target.shapes and k not in free and k not in target.gains]
    missing = [k for k in target.shapes if k not in found and k not in free]
    misshapen = {
        k: (tuple(v.shape), target.shapes[k])
        for k, v in found.items()
        if k in target.shapes and k not in free and tuple(v.shape) != target.shapes[k]
    }
    lines = list(problems or ())
    if unused:
        lines.append(f'{len(unused)} unused keys: {", ".join(unused)}')
    if missing:
        lines.append(f'{len(missing)} missing keys: {", ".join(missing)}')
    if misshapen:
        text = ', '.join(f'{k} is {was}, the model needs {needs}' for k, (was, needs) in misshapen.items())
        lines.append(f'{len(misshapen)} keys of another shape: {text}')
    if not lines:
        return
    hints = _hints(misshapen, found, target)
    raise ValueError(
        f"The checkpoint (source '{name}') does not fit {target.name}. "
        + '; '.join(lines)
        + '.'
        + ''.join(f' {h}.' for h in hints)
    )


def _hints(misshapen: Mapping[str, tuple[Shape, Shape]], found: Mapping[str, Tensor], target: Target) -> list[str]:
    """What the caller could pass to have a model that fits."""
    hints = []
    for key, (was, needs) in misshapen.items():
        if key == 'fc.weight' and was[1:] == needs[1:]:
            hints.append(f'For its head pass num_classes={was[0]}')
        elif key == 'conv1.weight' and len(was) == len(needs) == 4:
            if was[2:] != needs[2:]:
                stem = '7x7 stem: pass cifar_stem=False' if was[2] == 7 else '3x3 stem: pass cifar_stem=True'
                hints.append(f'It has a {stem}')
            if was[1] != needs[1]:
                hints.append(f'For its images pass in_chans={was[1]}')
    attention = [k for k in misshapen if re.match(r'layer\d\.\d+\.(se\.|fc1\.)', k)]
    if attention and target.attn == 'eca':
        sizes = [_stage_kernel(found, k) for k in range(1, 5)]
        hints.append(f"For its kernels pass attn_args={{'kernel_size': {sizes}}}")
    elif (
        attention
        and target.attn in ('triplet', 'cbam')
        and (k := next((k for k in attention if k.endswith('conv.weight')), None))
    ):
        hints.append(f"For its kernels pass attn_args={{'kernel_size': {misshapen[k][0][-1]}}}")
    for name in ('fc1', 'conv1'):
        key = next((k for k in attention if k.endswith(f'.{name}.weight')), None)
        if key and name == 'fc1' and (was := misshapen[key][0])[1] == misshapen[key][1][1]:
            hints.append(f"It has {was[0]} hidden channels of {was[1]}: attn_args={{'rd_ratio': {was[0]}/{was[1]}}}")
        if key and name == 'conv1' and target.attn == 'gam':
            full = found[key.replace('conv1', 'fc1')].shape[1] if key.replace('conv1', 'fc1') in found else None
            if full:
                hints.append(f"It has attn_args={{'groups': {full // misshapen[key][0][1]}}}")
    return hints


def _stage_kernel(found: Mapping[str, Tensor], stage: int) -> int | None:
    weight = found.get(f'layer{stage}.0.se.conv.weight')
    return None if weight is None else weight.shape[-1]


def _reordered(found: Mapping[str, Tensor], target: Target) -> dict[str, Tensor]:
    return {k: found[k] for k in target.shapes if k in found} | {
        k: v for k, v in found.items() if k not in target.shapes
    }


def convert_for(
    state_dict: Mapping[str, Any],
    model: nn.Module,
    source: str | None = None,
    *,
    name: str | None = None,
    free: frozenset[str] = frozenset(),
) -> dict[str, Tensor]:
    """What `convert` does, for a model that exists: it is read, not changed.

    Args:
        state_dict: A checkpoint, wrapped or not.
        model: The model whose keys are wanted; its attention's own values start a warm start.
        source: One of `list_sources()`, found from the keys by default.
        name: Registered name of the model, for messages.
        free: Keys that may be absent, more, or of another shape.

    Raises:
        ValueError: As `convert`.
    """
    plain = unwrap(state_dict)
    check_finite(plain)
    target = target_of(model, name)
    found, attn = detect(plain, target)
    shown = _check_source(source, found, attn, target)
    for check in found.checks:
        check(plain, target, shown)
    if attn is None and target.attn:
        check_can_start(model, plain)
        base = replace(target, shapes={k: v for k, v in target.shapes.items() if not k.startswith(target.sites)})
        plain |= {k: torch.tensor(0) for k in base.shapes if k.endswith('.num_batches_tracked') and k not in plain}
        check_fit(plain, base, shown, free)
        return _reordered(warm_start(plain, model), target)
    ours, problems = translate(plain, found, target)
    check_fit(ours, target, shown, free, problems)
    return _reordered(ours, target)


def convert(
    state_dict: Mapping[str, Any], model_name: str, source: str | None = None, **model_args: Any
) -> dict[str, Tensor]:
    """Renames a foreign checkpoint to the keys of a registered model, strictly; the input is not changed.

    Values stay what they are but for what is equal: a linear layer as a 1x1 convolution, zero biases for an SE without
    biases, a shorter ECA kernel padded with zeros, timm's CBAM kernel flipped from [mean, max] to [max, mean]. A plain
    ResNet of timm or torchvision gives a warm start, which a log line says: see `warm_start`.

    Args:
        state_dict: A state dict or a training checkpoint that holds one; `module.` and `_orig_mod.` are taken off.
        model_name: A registered model of this package, such as 'cbam_resnet50'.
        source: Where the keys come from, one of: cadene (always refused), ecanet, gam, gsop, insight, jongchan,
            moskomule, pytorchcv or pytorchcv/NET, srm, timm, timm_attn, torchvision, triplet. Found from the keys by
            default; only pytorchcv's SE bottleneck nets need it ('pytorchcv/seresnet50b').
        **model_args: Arguments of `timm.create_model` for a model with another head, stem or attention, such as
            num_classes=10, in_chans=1, cifar_stem=True, attn_args={...}.

    Returns:
        A state dict that `timm.create_model(model_name, **model_args)` loads strictly.

    Raises:
        ValueError: The model is none of ours, the source is unknown or does not fit, the checkpoint is another network
            that its keys would fit (the stride in the first 1x1 convolution, SK-ResNet* for SKNet, ...), weights are
            NaN or infinite, there are none, or keys are unused, missing or misshapen: all of them are listed.
    """
    import timm

    unasked = [a for a in _BUILDING if a in model_args]
    if unasked:
        raise ValueError(f'convert builds no weights: leave out {", ".join(unasked)}.')
    if ':' in model_name or not timm.is_model(model_name):
        raise ValueError(f"Unknown model '{model_name}'. Expected one such as 'cbam_resnet50': see timm-attn list.")
    model = timm.create_model(model_name, device='meta', **model_args)
    if not hasattr(model, 'attn'):
        raise ValueError(f"'{model_name}' is timm's own model: convert for one of this package, see timm-attn list.")
    name = model_name.partition('.')[0]
    _, attn = detect(unwrap(state_dict), target_of(model, name))
    if attn is None and getattr(model, 'attn', None):
        # A warm start needs the attention's first values; the same ones at every call.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(model_name, **model_args)
    return convert_for(state_dict, model, source, name=name)

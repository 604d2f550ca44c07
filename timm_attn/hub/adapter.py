"""Adapters: what injection added to a model, without the base that everybody can have from its own source.

An adapter has adapter.safetensors (attention, and the head where it is another than the base's), config.json with the
base's name and a digest of its weights, and README.md. There is no model.safetensors, so no other loader takes it for a
whole model.
"""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..injection import injections
from ..models import injected_args
from ..weights.fetch import fetching
from .client import HubFileError, as_hub_error, timeouts
from .config import Config
from .header import check_names, check_shapes, check_weights, some
from .rules import ADAPTER

Base = nn.Module | str | os.PathLike[str] | None


def digest(state_dict: Mapping[str, Tensor]) -> str:
    """sha256 of tensors by name: the same for the same numbers, whatever file they came from."""
    found = hashlib.sha256()
    for key in sorted(state_dict):
        value = state_dict[key].detach().cpu().contiguous()
        found.update(f'{key} {value.dtype} {tuple(value.shape)}\n'.encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _base_state(name: str, args: Mapping[str, Any], base: Base) -> dict[str, Tensor]:
    """The base's weights: a model's, a file's, or those that timm has under the name."""
    if isinstance(base, nn.Module):
        return dict(base.state_dict())
    overlay = None if base is None else {'file': os.fspath(base)}
    try:
        with timeouts(), fetching(name, True, None, overlay):
            model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **args)
            return dict(model.state_dict())
    except Exception as e:
        # What `fetching` advises is for models that need all their weights.
        cause = e.__cause__ if isinstance(e, ConnectionError) and isinstance(e.__cause__, Exception) else e
        text = str(as_hub_error(cause, name) or f'{type(cause).__name__}: {" ".join(str(cause).split())[:300]}')
    where = f"'{os.fspath(base)}'" if base is not None else 'its source'
    # Not in the except block: what the Hub's client raised may quote the token.
    raise ValueError(
        f"The base '{name}' of an adapter cannot be had from {where} ({text}). Offline, pass base=, a model or a file "
        'with its weights; where nothing takes one, such as `timm-attn compare`, give it a whole model: what '
        'timm_attn.load(DIRECTORY, base=...) returns, saved by timm_attn.save.'
    )


def _base_args(model_args: Mapping[str, Any]) -> dict[str, Any]:
    flat = {k: v for k, v in model_args.items() if k not in _OF_INJECTION}
    return {**(model_args.get('base_args') or {}), **flat}


_OF_INJECTION = frozenset(
    {'base', 'base_args', 'attn', 'attn_args', 'at', 'where', 'fmt', 'start', 'example', 'injections'}
)


def _own_keys(model: Any, keys: list[str]) -> tuple[set[str], set[str]]:
    """Keys of the injected attention, and of the head."""
    sites = tuple(f'{site}.' for row in injections(model) for site in row['sites'])
    found = model.get_classifier()
    heads = found if isinstance(found, list | tuple) else [found]
    names = tuple(f'{name}.' for name, m in model.named_modules() if any(m is h for h in heads))
    return {k for k in keys if k.startswith(sites)}, {k for k in keys if names and k.startswith(names)}


def split(model: nn.Module, state_dict: Mapping[str, Tensor], base: Base) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What an adapter of a model holds, and what its config says of the base.

    Args:
        model: A model that `inject` changed.
        state_dict: Its weights, on the CPU.
        base: The base as it was, a model or a file; None has timm fetch it.

    Returns:
        The tensors, and 'base', the 'sha256' of its weights and the 'numbers' in the adapter.

    Raises:
        ValueError: Nothing was injected, or a tensor of the base has moved.
    """
    if not injections(model):
        raise ValueError(
            f'{type(model).__name__} holds no attention that timm_attn.inject put there: there is no adapter to save.'
        )
    args = injected_args(model)
    state = _base_state(args['base'], _base_args(args), base)
    attention, head = _own_keys(model, sorted({*state_dict, *state}))
    same = {
        k for k, v in state_dict.items() if k in state and v.dtype == state[k].dtype and torch.equal(v, state[k].cpu())
    }
    moved = sorted((set(state_dict) | set(state)) - same - attention - head)
    if moved:
        raise ValueError(
            f'{len(moved)} tensors of the base {args["base"]} have moved, and an adapter holds attention and head '
            f'only: {some(moved, 6)}. Train with timm_attn.freeze_backbone(model), which keeps running statistics '
            'too, or save the whole model with adapter=False.'
        )
    kept = {k: state_dict[k] for k in sorted(attention | (head - same)) if k in state_dict}
    check_weights(kept, model, ADAPTER)
    rest = {k: state_dict[k] for k in set(state_dict) - set(kept)}
    return kept, {'base': args['base'], 'sha256': digest(rest), 'numbers': sum(v.numel() for v in kept.values())}


def check_adapter_names(names: list[str], model: nn.Module, where: str = ADAPTER) -> None:
    """Compares the names of an adapter's tensors with a model's attention and head.

    Args:
        names: Names in the file.
        model: The model.
        where: The file's name for the message.

    Raises:
        HubFileError: A tensor of the base is among them, or one of an attention is missing.
    """
    expected = sorted(model.state_dict())
    attention, head = _own_keys(model, [*expected, *names])
    if foreign := sorted(set(names) - attention - head):
        raise HubFileError(f'{where} holds tensors of the base, which an adapter must not: {some(foreign, 6)}')
    check_names([*names, *(k for k in expected if k not in attention and k not in names)], model, where)


def complete(config: Config, meta: nn.Module, own: Mapping[str, Tensor], base: Base, where: str) -> dict[str, Tensor]:
    """All weights of an adapter's model.

    Args:
        config: The adapter's config.
        meta: What it builds, on the meta device.
        own: The adapter's tensors.
        base: The base's weights, a model or a file; None has timm fetch them.
        where: Which adapter, for messages.

    Raises:
        ValueError: The base cannot be had.
        HubFileError: It is another than the adapter was made on.
    """
    name = config.model_args.get('base', 'resnet18')
    state = _base_state(name, _base_args(config.model_args), base)
    headless = {k for k in state if k not in own and k not in meta.state_dict()} if config.num_classes == 0 else set()
    rest = {k: v.detach().cpu() for k, v in state.items() if k not in own and k not in headless}
    expected = config.about['adapter']['sha256']
    if (found := digest(rest)) != expected:
        raise HubFileError(
            f"The weights of the base '{name}' are not those that the adapter {where} was made on (sha256 "
            f'{found[:12]}..., expected {expected[:12]}...): its source has changed, or another `base` was given.'
        )
    weights = {**rest, **own}
    check_names(list(weights), meta, where)
    check_shapes(weights, meta, where)
    return weights

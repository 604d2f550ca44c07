"""Adapters: what injection added to a model, without the base that everybody can have from its own source.

An adapter folder holds adapter.safetensors (attention, and the head where it is another than the base's), config.json
with the base's name and a digest of its weights, and README.md. There is no model.safetensors, so no other loader takes
the folder for a whole model.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from ..files import read_within, settle
from ..injection import injections
from ..models import injected_args
from .client import HubFileError
from .config import MAX_CONFIG_BYTES, Config, check_config, encode_config, parse_config
from .header import check_weights, sha256_of, some
from .rules import CARD, CONFIG, MAX_HEADER_BYTES

ADAPTER = 'adapter.safetensors'
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
    source: dict[str, Any] = {} if base is None else {'pretrained_cfg_overlay': {'file': os.fspath(base)}}
    try:
        return dict(timm.create_model(name, pretrained=True, **args, **source).state_dict())
    except (OSError, RuntimeError, ValueError) as e:
        where = f"'{os.fspath(base)}'" if base is not None else 'its source'
        raise ValueError(
            f"The base '{name}' of an adapter cannot be had from {where} ({type(e).__name__}: {str(e)[:300]}). "
            'Offline, pass base=, a model or a file with its weights.'
        ) from e


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


def adapter_files(
    model: nn.Module, state_dict: dict[str, Tensor], config: dict[str, Any], base: Base
) -> dict[str, bytes]:
    """The files of an adapter folder, config.json last; `save(model, folder, adapter=True)` writes them.

    Args:
        model: A model that `inject` changed.
        state_dict: Its weights, on the CPU.
        config: Its config.
        base: The base as it was, a model or a file; None has timm fetch it.

    Raises:
        ValueError: Nothing was injected, or a tensor of the base has moved.
    """
    if not injections(model):
        raise ValueError(
            f'{type(model).__name__} holds no attention that timm_attn.inject put there: there is no adapter to save.'
        )
    args = injected_args(model)
    state = _base_state(args['base'], _base_args(args), base)
    attention, head = _own_keys(model, list(state_dict))
    same = {
        k for k, v in state_dict.items() if k in state and v.dtype == state[k].dtype and torch.equal(v, state[k].cpu())
    }
    moved = sorted((set(state_dict) | set(state)) - same - attention - head)
    if moved:
        raise ValueError(
            f'{len(moved)} tensors of the base {args["base"]} have moved, and an adapter holds attention and head '
            f'only: '
            f'{some(moved, 6)}. Train with timm_attn.freeze_backbone(model), which keeps running statistics too, or '
            'save the whole model with adapter=False.'
        )
    kept = {k: state_dict[k] for k in sorted(attention | (head - same))}
    check_weights(kept, model, ADAPTER)
    record = {'base': args['base'], 'sha256': digest({k: state_dict[k] for k in set(state_dict) - set(kept)})}
    data = safetensors.torch.save(kept, {'format': 'pt'})
    config['timm_attn'] = {**config.get('timm_attn', {}), 'adapter': record, 'weights_sha256': sha256_of(data)}
    check_config(parse_config(encode_config(config)))
    return {ADAPTER: data, CARD: _card(config, args, kept).encode(), CONFIG: encode_config(config)}


def _card(config: Mapping[str, Any], args: Mapping[str, Any], kept: Mapping[str, Tensor]) -> str:
    numbers = sum(v.numel() for v in kept.values())
    attns = ', '.join(dict.fromkeys(row['attn'] for row in args.get('injections') or [args]))
    return (
        '---\nlibrary_name: timm\npipeline_tag: image-classification\ntags:\n- timm\n- timm_attn\n- adapter\n---\n\n'
        f'# Adapter: {attns} for {args["base"]}\n\n'
        f'{numbers} numbers: the attention, and the head of {config["num_classes"]} classes where it is not '
        "the base's. "
        f'The base, `{args["base"]}`, is fetched from its own source and its weights are compared with a digest.\n\n'
        "```python\nimport timm_attn\n\nmodel = timm_attn.load('FOLDER')\n```\n"
    )


def load(directory: str | os.PathLike[str], *, base: Base = None) -> nn.Module:
    """Loads a folder that `save` wrote: a whole model, or an adapter, for which the base is fetched and compared.

    Args:
        directory: The folder.
        base: For an adapter: the base's weights, a model or a file, where its source cannot be reached.

    Raises:
        ValueError: The base cannot be had, or `base` was given for a whole model.
        HubFileError: A file was refused, or the base is another than the adapter was made on.
    """
    folder = Path(directory)
    if not os.path.lexists(folder / ADAPTER) and not any(folder.glob(f'.commit.*/*{ADAPTER}')):
        from .load import open_model

        if base is not None:
            raise ValueError(f"'{folder}' is no adapter but a whole model: leave out `base`.")
        return open_model(f'local-dir:{folder}')
    settle(folder)
    config = check_config(parse_config(_read(folder, CONFIG, MAX_CONFIG_BYTES)), f'{folder / CONFIG}')
    record = config.about.get('adapter')
    if config.architecture != 'injected' or not isinstance(record, dict) or not isinstance(record.get('sha256'), str):
        raise HubFileError(f"'{folder / CONFIG}' does not say which base its adapter is for.")
    return _load_adapter(folder, config, record['sha256'], base)


def _read(folder: Path, name: str, max_bytes: int) -> bytes:
    try:
        return read_within(folder, name, max_bytes)
    except (ValueError, FileNotFoundError) as e:
        raise HubFileError(str(e)) from e


def _load_adapter(folder: Path, config: Config, sha256: str, base: Base) -> nn.Module:
    # The base may be any size, the adapter's size is that of a few layers.
    path = folder / ADAPTER
    data = _read(folder, ADAPTER, MAX_HEADER_BYTES + (2 << 30))
    try:
        own = safetensors.torch.load(data)
    except Exception as e:
        raise HubFileError(f"'{path}' is no safetensors file, or cut short: {str(e)[:200]}") from e
    args = dict(config.model_args)
    name = args.get('base', 'resnet18')
    model: Any = timm.create_model('injected', num_classes=config.num_classes, **args)
    check_weights(own, model, str(path))
    state = _base_state(name, _base_args(args), base)
    expected = model.state_dict()
    attention, head = _own_keys(model, sorted(set(expected) | set(own)))
    if foreign := sorted(set(own) - attention - head):
        raise HubFileError(f"'{path}' holds tensors of the base, which an adapter must not: {some(foreign, 6)}")
    rest = {k: v for k, v in state.items() if k not in own and not (k in head and config.num_classes == 0)}
    if (found := digest(rest)) != sha256:
        raise HubFileError(
            f"The weights of the base '{name}' are not those that the adapter in '{folder}' was made on (sha256 "
            f'{found[:12]}..., expected {sha256[:12]}...): its source has changed, or another `base` was given.'
        )
    try:
        model.load_state_dict({**rest, **own})
    except RuntimeError as e:
        raise HubFileError(f"'{path}' does not fit the model of {CONFIG}: {' '.join(str(e).split())[:500]}") from e
    if config.about.get('weights_sha256', sha := sha256_of(data)) != sha:
        raise HubFileError(f"'{folder / CONFIG}' belongs to another adapter: '{path}' has the sha256 {sha}.")
    cfg = {**config.pretrained_cfg, 'architecture': 'injected', 'num_classes': config.num_classes}
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **cfg}
    return model

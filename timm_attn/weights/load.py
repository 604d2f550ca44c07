"""What timm calls between reading a checkpoint and loading it into one of our models."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import file_hash
from .check import check_tensors, check_values
from .convert import check_fit, convert_for, detect, net_of_sha1, target_of
from .sources.base import Target
from .tags import Tag, find_tag
from .unwrap import unwrap


def _check_download(tag: Tag, cfg: dict[str, Any], cache_dir: str | os.PathLike[str] | None) -> None:
    """Compares the file that timm fetched and unpacked with the checksum in its name's table.

    Raises:
        ValueError: It is another file.
    """
    if not tag.sha or cfg.get('url') != tag.url or cfg.get('file') or cfg.get('state_dict') or cfg.get('hf_hub_id'):
        return
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / 'checkpoints'
    path = folder / Path(tag.url).name.removesuffix('.zip')
    if path.is_file() and (got := file_hash(path, 'sha1')) != tag.sha:
        raise ValueError(
            f"'{path}' has sha1 {got}, and {tag.url} is known to hold {tag.sha}: delete it and the .zip beside it, and "
            'load again.'
        )


def _free(model: nn.Module, cfg: dict[str, Any], target: Target, found: dict[str, Tensor]) -> frozenset[str]:
    """Keys that timm itself adapts, or drops for a new head, after this function."""
    head = {f'{cfg.get("classifier") or "fc"}.{part}' for part in ('weight', 'bias')}
    stem = f'{cfg.get("first_conv") or "conv1"}.weight'
    free = set()
    if getattr(model, 'num_classes', None) != cfg.get('num_classes') or not head & set(target.shapes):
        free |= head
    weight, wanted = found.get(stem), target.shapes.get(stem)
    if weight is not None and wanted is not None and weight.ndim == 4:
        source_channels = (cfg.get('input_size') or (3,))[0]
        if weight.shape[1] == source_channels and weight.shape[2:] == wanted[2:] and wanted[1] != source_channels:
            free.add(stem)
    return frozenset(free)


def checkpoint_filter_fn(
    state_dict: dict[str, Any], model: nn.Module, cache_dir: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Converts a checkpoint for a model that timm is about to load it into; timm's `pretrained_filter_fn`.

    A model folder of this package and a Hub repository with a config of its own hold our keys and are loaded as they
    are. Everything else goes through `convert`'s rules, so that also a file given by `pretrained_cfg_overlay` may be a
    foreign checkpoint, or a plain ResNet for a warm start.

    Args:
        state_dict: What timm has read.
        model: The model.
        cache_dir: Where timm put a download, for its checksum.

    Raises:
        ValueError: As `convert`, or a download that is not the released file.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    target = target_of(model)
    # 'checked' are the tensors of a folder or repository that the hub room has read.
    if cfg.get('source') in ('hf-hub', 'local-dir', 'checked'):
        own = dict(state_dict)
        check_tensors(own)
        free = _free(model, cfg, target, own)
        if free:  # timm loads without strictness then
            check_fit(own, target, 'timm_attn', free)
        expected = model.state_dict()
        if own.keys() <= expected.keys() | target.gains | free:  # else timm says what is wrong
            check_values(own, expected)
        return own
    tag = find_tag(target.name, cfg.get('tag'))
    if tag is not None:
        _check_download(tag, cfg, cache_dir)
    unwrapped = unwrap(state_dict)
    plain = unwrapped.state_dict
    found, attn = detect(plain, target)
    source = None
    if tag is not None and '/' in tag.source and tag.source.partition('/')[0] == found.name and attn == target.attn:
        # The tag says which of two nets with equal keys it holds, unless a file's checksum knows better.
        file = cfg.get('file')
        net = net_of_sha1(file_hash(file, 'sha1')) if file and Path(file).is_file() else None
        source = net or tag.source
    renamed = {found.rename(k): v for k, v in plain.items()}
    return convert_for(unwrapped, model, source, free=_free(model, cfg, target, renamed)).weights

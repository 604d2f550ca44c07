"""Weights that timm fetches: where they cannot be had, one line says within seconds what to do."""

import socket
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.models._builder import resolve_pretrained_cfg

# In seconds. huggingface_hub tries for more than 20 before it gives up.
PATIENCE = 5.0
_FILES = ('model.safetensors', 'pytorch_model.bin')


@contextmanager
def fetching(
    name: str, pretrained: bool, cfg: Any = None, overlay: Any = None, cache_dir: Any = None
) -> Iterator[None]:
    """Explains why weights cannot be fetched, where timm inside the block tries to.

    Args:
        name: The model that timm builds, with its tag or without.
        pretrained: Whether it loads weights; else nothing is done.
        cfg: `pretrained_cfg` as timm was given it.
        overlay: `pretrained_cfg_overlay`, likewise.
        cache_dir: `cache_dir`, likewise.

    Raises:
        ConnectionError: The source cannot be reached, or has no such weights, and no copy lies in the cache.
    """
    # A name with a source before it, such as local-dir:, is one that timm resolves anew.
    source = resolve_pretrained_cfg(name, cfg, overlay).to_dict() if pretrained and ':' not in name else {}
    local = source.get('file') or source.get('state_dict') or source.get('source') in ('local-dir', 'checked')
    address = '' if local else _address(source)
    try:
        if address and not _cached(source, cache_dir):
            _connect(address)
        yield
    except (URLError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, Unreachable) as e:
        if not address:
            raise
        reason = next(iter(str(e).splitlines()), '') or type(e).__name__
        raise ConnectionError(
            f'The weights of {name} cannot be had from {address} ({reason}). Connect (HTTPS_PROXY names a proxy, '
            'HF_ENDPOINT a mirror of the Hub), or give a file that you have: '
            f"timm.create_model('{name}', pretrained=True, pretrained_cfg_overlay=dict(file='PATH'))."
        ) from e


class Unreachable(Exception):
    """No connection to the host that has the weights, or to the proxy before it."""


def _address(cfg: Mapping[str, Any]) -> str:
    if cfg.get('hf_hub_id'):
        return f'{constants.ENDPOINT}/{cfg["hf_hub_id"]}'
    return cfg.get('url') or ''


def _cached(cfg: Mapping[str, Any], cache_dir: Any) -> bool:
    if cfg.get('hf_hub_id'):
        repo, _, revision = cfg['hf_hub_id'].partition('@')
        files = [cfg['hf_hub_filename']] if cfg.get('hf_hub_filename') else _FILES
        found = (huggingface_hub.try_to_load_from_cache(repo, f, cache_dir, revision or None) for f in files)
        return any(isinstance(f, str) for f in found)
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / 'checkpoints'
    return (folder / Path(urlsplit(cfg['url']).path).name).is_file()


def _connect(address: str) -> None:
    """Opens a connection to the host, or to the proxy that stands before it, and closes it again."""
    if constants.HF_HUB_OFFLINE:
        return  # huggingface_hub says so itself, at once
    parts = urlsplit(address)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ''):
        parts = urlsplit(proxy if '//' in proxy else f'//{proxy}', scheme='http')
    if not parts.hostname or parts.scheme not in ('http', 'https'):
        return  # a SOCKS proxy or a file: whoever opens it says what is wrong
    port = parts.port or (443 if parts.scheme == 'https' else 80)
    try:
        socket.create_connection((parts.hostname, port), PATIENCE).close()
    except OSError as e:
        raise Unreachable(f'no connection to {parts.hostname}:{port}: {e.strerror or e}') from e

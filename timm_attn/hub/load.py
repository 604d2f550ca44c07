"""Models from the Hub: nothing is built and no weight read before config, checksum and header are in order."""

import os
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from huggingface_hub import HfApi
from torch import nn

from .client import hub_api, retry, timeouts
from .config import MAX_CONFIG_BYTES, Config, build_meta, check_config, layer_names, parse_config
from .download import Snapshot, fetch, remember, resolve
from .folder import copy_files
from .header import check_header, check_weights, read_header
from .rules import CARD, CONFIG, MAX_CARD_BYTES, WEIGHTS, check_repo_id

# Arguments of timm.create_model that would load something else, or less.
_UNDOING = frozenset(
    {
        'pretrained',
        'pretrained_cfg',
        'pretrained_cfg_overlay',
        'pretrained_strict',
        'checkpoint_path',
        'model_name',
    }
)


def _fetch_model(
    api: HfApi, repo_id: str, revision: str | None, cache_dir: str | os.PathLike[str] | None
) -> tuple[Snapshot, Config, nn.Module, Path]:
    snapshot = resolve(api, repo_id, revision, (CONFIG, WEIGHTS, CARD), cache_dir)
    where = f"{CONFIG} of '{repo_id}' at {snapshot.commit[:12]}"
    path = fetch(api, snapshot, CONFIG, max_bytes=MAX_CONFIG_BYTES, cache_dir=cache_dir)
    config = check_config(parse_config(path.read_bytes(), where), where)
    meta = build_meta(config, where)
    # No dtype that is read has more than 8 bytes a number, and a header has at most 25 MB.
    largest = 8 * sum(v.numel() for v in meta.state_dict().values()) + 25_000_000
    path = fetch(api, snapshot, WEIGHTS, max_bytes=largest, cache_dir=cache_dir)
    check_header(read_header(path), meta, f"{WEIGHTS} of '{repo_id}' at {snapshot.commit[:12]}")
    return snapshot, config, meta, path


def _parse_source(repo_id: str, revision: str | None) -> tuple[str, str | None]:
    name = repo_id.removeprefix('hf-hub:').removeprefix('hf_hub:')
    name, _, at = name.partition('@')
    if at and revision is not None and at != revision:
        raise ValueError(f'Two revisions were given: {at!r} in {repo_id!r}, and revision={revision!r}.')
    return check_repo_id(name), revision or at or None


def load_from_hub(
    repo_id: str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Loads a model from the Hub without trusting what the repository says.

    The revision is resolved to a commit once. config.json is checked against a schema, model.safetensors against the
    sha256 that the Hub keeps, its header against the model that the config describes, and its numbers for NaN. Nothing
    but safetensors is ever read, and nothing is left at its random start but a head that the caller gave another size.
    When the Hub cannot be reached, a model in the cache is used, checked in the same way, and a warning says so.

    Args:
        repo_id: 'NAMESPACE/NAME'; 'hf-hub:NAMESPACE/NAME@REVISION' is understood too.
        revision: A branch, tag or commit; None is 'main'. A commit pins the model.
        token: A token for private repositories; None is the one that is logged in, False none.
        cache_dir: The client's cache; None is its own place.
        **kwargs: For `timm.create_model`: `num_classes`, `in_chans`, `features_only`, `drop_rate`, ...

    Returns:
        The model; `model.pretrained_cfg['hf_hub_id']` names the commit it came from.

    Raises:
        ValueError: `repo_id` is no repository, or an argument could undo the checks.
        HubFileError: A file of the repository was refused.
        HubError: The Hub or the way to it failed and the cache cannot help.
    """
    repo_id, revision = _parse_source(repo_id, revision)
    if undoing := sorted(_UNDOING & set(kwargs)):
        raise ValueError(f'{undoing} cannot be given here: the weights are those of {repo_id}.')
    api = hub_api(token)
    with timeouts():
        snapshot, config, meta, path = retry(
            'load', repo_id, api.token, lambda: _fetch_model(api, repo_id, revision, cache_dir)
        )
    check_weights(safetensors.torch.load_file(path), f"{WEIGHTS} of '{repo_id}' at {snapshot.commit[:12]}")
    remember(snapshot, cache_dir)
    return _build(config, meta, path, f'{repo_id}@{snapshot.commit}', kwargs)


def _build(config: Config, meta: nn.Module, weights: Path, source: str, kwargs: dict[str, Any]) -> nn.Module:
    # The file has all keys and shapes of the model in the config, so that what timm leaves out from here on is exactly
    # what the caller's own arguments replace: the head for other classes, the first convolution for other channels.
    cfg = {
        **config.pretrained_cfg,
        **layer_names(meta),
        'architecture': config.architecture,
        'num_classes': config.num_classes,
        'file': str(weights.parent),
        'source': 'local-dir',
    }
    model: Any = timm.create_model(
        config.architecture, pretrained=True, pretrained_cfg=cfg, **{**config.model_args, **kwargs}
    )
    cfg = {k: v for k, v in model.pretrained_cfg.items() if k != 'file'}
    model.pretrained_cfg = model.default_cfg = {**cfg, 'hf_hub_id': source, 'source': 'hf-hub'}
    return model


def pull(
    repo_id: str,
    directory: str | os.PathLike[str],
    *,
    revision: str | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str:
    """Copies a model from the Hub into a folder, with all the checks of `load_from_hub`.

    Args:
        repo_id: 'NAMESPACE/NAME'.
        directory: The folder; `timm.create_model('local-dir:...', pretrained=True)` reads it.
        revision: A branch, tag or commit; None is 'main'.
        overwrite: Replace files that exist.
        token: As for `load_from_hub`.
        cache_dir: As for `load_from_hub`.

    Returns:
        The commit.

    Raises:
        ValueError: `repo_id` is no repository, or files exist.
        HubFileError: A file of the repository was refused.
        HubError: The Hub or the way to it failed and the cache cannot help.
    """
    repo_id, revision = _parse_source(repo_id, revision)
    api = hub_api(token)

    def work() -> tuple[Snapshot, dict[str, Path]]:
        snapshot, _, _, weights = _fetch_model(api, repo_id, revision, cache_dir)
        check_weights(safetensors.torch.load_file(weights), f"{WEIGHTS} of '{repo_id}'")
        config = fetch(api, snapshot, CONFIG, max_bytes=MAX_CONFIG_BYTES, cache_dir=cache_dir)
        files = {WEIGHTS: weights, CONFIG: config}
        if CARD in snapshot.files:
            files[CARD] = fetch(api, snapshot, CARD, max_bytes=MAX_CARD_BYTES, cache_dir=cache_dir)
        return snapshot, files

    with timeouts():
        snapshot, files = retry('pull', repo_id, api.token, work)
    remember(snapshot, cache_dir)
    copy_files(files, directory, overwrite)
    return snapshot.commit

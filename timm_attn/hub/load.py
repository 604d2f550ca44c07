"""Models from the Hub: nothing is built and no weight read before config, checksum and header are in order."""

import os
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi
from torch import nn

from ..files import atomic_files
from ..weights.check import check_values
from .adapter import Base, complete
from .card import render_card
from .client import HubFileError, hub_api, retry, timeouts
from .config import MAX_CONFIG_BYTES, build_meta, check_config, encode_config, layer_names, parse_config
from .download import Snapshot, fetch, remember, resolve
from .folder import MODEL_FILES, ModelFiles, check_model, old_card, open_folder, write_model
from .rules import ADAPTER, CARD, CONFIG, MAX_CARD_BYTES, WEIGHTS, check_repo_id

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
    api: HfApi, repo_id: str, revision: str | None, cache_dir: str | os.PathLike[str] | None, card: bool = False
) -> tuple[Snapshot, ModelFiles]:
    snapshot = resolve(api, repo_id, revision, (CONFIG, WEIGHTS, ADAPTER, CARD), cache_dir)
    where = f"of '{repo_id}' at {snapshot.commit[:12]}"
    config = fetch(api, snapshot, CONFIG, max_bytes=MAX_CONFIG_BYTES, cache_dir=cache_dir)
    found = check_config(parse_config(config, f'{CONFIG} {where}'), f'{CONFIG} {where}')
    meta, kind = build_meta(found), ADAPTER if 'adapter' in found.about else WEIGHTS
    # No dtype that is read has more than 8 bytes a number, and a header has at most 25 MB.
    largest = 8 * sum(v.numel() for v in meta.state_dict().values()) + 25_000_000
    weights = fetch(api, snapshot, kind, max_bytes=largest, cache_dir=cache_dir)
    model = check_model(config, weights, where, kind)
    if card and CARD in snapshot.files:
        model.files[CARD] = fetch(api, snapshot, CARD, max_bytes=MAX_CARD_BYTES, cache_dir=cache_dir)
    return snapshot, model


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
    base: Base = None,
    **kwargs: Any,
) -> nn.Module:
    """Loads a model from the Hub without trusting what the repository says.

    The revision is resolved to a commit once. config.json is checked against a schema, model.safetensors against the
    sha256 that the Hub keeps, its header against the model that the config describes, and its numbers for NaN. Nothing
    but safetensors is ever read, and nothing is left at its random start but a head that the caller gave another size.
    When the Hub cannot be reached, a model in the cache is used, checked in the same way, and a warning says so.
    Of an adapter, the base is fetched from its own source and compared with the digest in the adapter's config.

    Args:
        repo_id: 'NAMESPACE/NAME'; 'hf-hub:NAMESPACE/NAME@REVISION' is understood too.
        revision: A branch, tag or commit; None is 'main'. A commit pins the model.
        token: A token for private repositories; None is the one that is logged in, False none.
        cache_dir: The client's cache; None is its own place.
        base: For an adapter: the base's weights, a model or a file, where its source cannot be reached.
        **kwargs: For `timm.create_model`: `num_classes`, `in_chans`, `features_only`, `drop_rate`, ...

    Returns:
        The model; `model.pretrained_cfg['hf_hub_id']` names the commit it came from.

    Raises:
        ValueError: `repo_id` is no repository, or an argument could undo the checks.
        HubFileError: A file of the repository was refused, or the base is another than an adapter was made on.
        HubError: The Hub or the way to it failed and the cache cannot help.
    """
    repo_id, revision = _parse_source(repo_id, revision)
    _check_kwargs(kwargs, repo_id)
    return open_model(f'hf-hub:{repo_id}', revision=revision, token=token, cache_dir=cache_dir, base=base, **kwargs)


def load(directory: str | os.PathLike[str], *, base: Base = None, **kwargs: Any) -> nn.Module:
    """Loads a folder that `save` wrote: a whole model, or an adapter, for which the base is fetched and compared.

    Args:
        directory: The folder.
        base: For an adapter: the base's weights, a model or a file, where its source cannot be reached.
        **kwargs: For `timm.create_model`: `num_classes`, `in_chans`, `features_only`, `drop_rate`, ...

    Raises:
        ValueError: The base cannot be had, or `base` was given for a whole model.
        HubFileError: A file was refused, or the base is another than the adapter was made on.
    """
    return open_model(f'local-dir:{os.fspath(directory)}', base=base, **kwargs)


def open_model(
    source: str | os.PathLike[str], *, pretrained: bool = True, base: Base = None, **kwargs: Any
) -> nn.Module:
    """Loads a model from wherever it is, with all checks of `load_from_hub`: the one door for foreign files.

    Args:
        source: A model folder ('out/x' or 'local-dir:out/x'), or a repository ('me/x' or 'hf-hub:me/x@REVISION').
        pretrained: False gives a model of the same architecture with random weights; all checks are made.
        base: For an adapter: the base's weights, a model or a file; None has timm fetch them.
        **kwargs: For `timm.create_model`: `num_classes`, `in_chans`, `features_only`, `drop_rate`, ...; for a
            repository also those of `load_from_hub`.

    Returns:
        The model.

    Raises:
        ValueError: `source` is neither folder nor repository, or an argument could undo the checks.
        HubFileError: A file was refused.
        HubError: The Hub or the way to it failed and the cache cannot help.
    """
    text = os.fspath(source)
    _check_kwargs(kwargs, text)
    folder = Path(text.removeprefix('local-dir:'))
    if text.startswith('local-dir:') or folder.is_dir():
        if not folder.is_dir():
            raise HubFileError(f"'{folder}' is no folder: write a model there with timm_attn.save(model, directory).")
        return _build(open_folder(folder), kwargs, {'file': str(folder), 'source': 'local-dir'}, pretrained, base)
    repo_id, revision = _parse_source(text, kwargs.pop('revision', None))
    api, cache_dir = hub_api(kwargs.pop('token', None)), kwargs.pop('cache_dir', None)
    with timeouts():
        snapshot, model = retry('load', repo_id, api.token, lambda: _fetch_model(api, repo_id, revision, cache_dir))
    remember(snapshot, cache_dir)
    origin = {'hf_hub_id': f'{repo_id}@{snapshot.commit}', 'source': 'hf-hub'}
    return _build(model, kwargs, origin, pretrained, base)


def _check_kwargs(kwargs: dict[str, Any], source: str) -> None:
    if undoing := sorted(_UNDOING & set(kwargs)):
        raise ValueError(f'{undoing} cannot be given here: the weights are those of {source}.')


def _build(
    files: ModelFiles, kwargs: dict[str, Any], source: dict[str, str], pretrained: bool, base: Base
) -> nn.Module:
    # The file has all keys and shapes of the model in the config, so that what timm leaves out from here on is exactly
    # what the caller's own arguments replace: the head for other classes, the first convolution for other channels.
    config, weights = files.config, files.weights
    if files.kind == ADAPTER and pretrained:
        weights = complete(config, files.meta, weights, base, files.where)
    elif base is not None:
        what = 'a model with random weights' if files.kind == ADAPTER else 'no adapter but a whole model'
        raise ValueError(f'{files.where[3:]} is {what}: leave out `base`.')
    if dtype := kwargs.get('dtype'):
        try:
            check_values(weights, {k: v.to(dtype) for k, v in files.meta.state_dict().items()})
        except ValueError as e:
            raise HubFileError(f'{files.kind}: {e}') from e
    cfg = {
        **config.pretrained_cfg,
        **layer_names(files.meta),
        'architecture': config.architecture,
        'num_classes': config.num_classes,
        'state_dict': weights,
        'source': 'checked',
    }
    model: Any = timm.create_model(
        config.architecture, pretrained=pretrained, pretrained_cfg=cfg, **{**config.model_args, **kwargs}
    )
    cfg = {k: v for k, v in model.pretrained_cfg.items() if k != 'state_dict'}
    model.pretrained_cfg = model.default_cfg = {**cfg, **source}
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

    with timeouts():
        snapshot, model = retry(
            'pull', repo_id, api.token, lambda: _fetch_model(api, repo_id, revision, cache_dir, card=True)
        )
    remember(snapshot, cache_dir)
    # A flat config.json in the form that timm's own reader takes whatever stands in it.
    if 'pretrained_cfg' not in parse_config(model.files[CONFIG]):
        model.files[CONFIG] = encode_config(model.config.raw)
    folder = Path(directory)
    with atomic_files(folder, MODEL_FILES) as (prepared, cut_off):
        if overwrite and CARD not in model.files and (old := old_card(folder)) is not None:
            # What it says of another model must not stay, and what somebody wrote into it must not go.
            model.files[CARD] = render_card(model.config, weights=model.files[model.kind], old=old).encode()
        write_model(model.files, folder, prepared, overwrite, cut_off)
    return snapshot.commit

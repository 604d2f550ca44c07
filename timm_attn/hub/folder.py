"""A model as a folder that timm, the Hub and people can read: model.safetensors, config.json, README.md."""

import json
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ..files import atomic_files, read_within, settle
from ..injection import injections
from ..layers import package_of
from ..models import injected_args
from ..version import package_version
from .adapter import check_adapter_names, split
from .card import check_card, render_card
from .client import HubFileError
from .config import MAX_CONFIG_BYTES, Config, build_meta, check_config, encode_config, parse_config
from .header import read_weights, sha256_of
from .records import (
    STATUSES,
    Evaluation,
    Provenance,
    Training,
    add_evaluation,
    normalise_descriptions,
    normalise_evaluation,
    normalise_labels,
)
from .rules import ADAPTER, CARD, CONFIG, MAX_CARD_BYTES, WEIGHTS

# The order in which the files of a model take their places; without the last one, nobody reads the others.
MODEL_FILES = (WEIGHTS, ADAPTER, CARD, CONFIG)
Labels = Sequence[str] | Mapping[Any, str]
EvaluationLike = Evaluation | Mapping[str, Any] | Sequence[Evaluation | Mapping[str, Any]] | None
# What a folder may hold besides the three files and is pushed with them: pictures that a card shows, and the recipe.
_EXTRAS = ('*.png', 'recipe.yaml')
_MAX_EXTRA_BYTES = 10 << 20
# Arguments of timm's factory that are no part of the architecture, or would weaken a later load.
_NOT_ARCHITECTURE = (
    'num_classes',
    'pretrained_strict',
    'pretrained_filter_fn',
    'features_only',
    'out_indices',
    'scriptable',
    'fused',
)
# What the config of a checkpoint says about that checkpoint, and a model trained further must not inherit.
_OF_THE_SOURCE = ('tag', 'license', 'origin_url', 'description', 'notes', 'paper_ids', 'paper_name')


def unwrap(model: nn.Module) -> nn.Module:
    """Takes off torch.compile, DataParallel and DistributedDataParallel.

    Args:
        model: A model, wrapped or not.
    """
    while True:
        if isinstance(inner := getattr(model, '_orig_mod', None), nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = cast(nn.Module, model.module)
        else:
            return model


def portable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Weights as safetensors wants them: on the CPU, contiguous, in memory of their own, under the model's plain keys.

    Args:
        model: A model in any memory layout, with compiled parts or not.

    Raises:
        ValueError: Weights are on the meta device.
    """
    found = {}
    seen: set[int] = set()
    for name, value in unwrap(model).state_dict().items():
        if value.is_meta:
            raise ValueError(f"'{name}' is on the meta device: give the model its weights before saving it.")
        value = value.detach().cpu().contiguous()
        if value.numel() and value.data_ptr() in seen:
            value = value.clone()
        seen.add(value.data_ptr())
        found[name.replace('_orig_mod.', '')] = value
    return found


def _serialise(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    # safetensors writes metadata in the order of a hash map that differs between runs; sorted, the same model is the
    # same file, and a second push finds nothing to do.
    data = safetensors.torch.save(tensors)
    length = struct.unpack('<Q', data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header.pop('__metadata__', None)
    header = {'__metadata__': dict(sorted(metadata.items())), **header}
    text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
    text += b' ' * (-len(text) % 8)
    return struct.pack('<Q', len(text)) + text + data[8 + length :]


def _plain(value: Any, where: str) -> Any:
    """JSON's types only, with everything else refused by name."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as e:
        raise ValueError(f'{where} must be plain JSON (texts, finite numbers, lists, objects): {e}') from e


def _never_trained(state_dict: Mapping[str, Tensor]) -> bool:
    # One step in training mode moves every running mean; a loaded checkpoint has moved ones.
    means = [v for k, v in state_dict.items() if k.endswith('running_mean')]
    return bool(means) and not any(v.any() for v in means)


def _status(status: str | None, about: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> str | None:
    if status is not None and status not in STATUSES:
        raise ValueError(f'status (={status!r}) must be one of: {", ".join(STATUSES)}.')
    if status is None and (about.get('training') or about.get('evaluation')):
        return 'trained'
    if status is None and about.get('provenance', {}).get('source_url'):
        return 'converted'
    return 'random' if status is None and _never_trained(state_dict) else status


def _labels(cfg: Mapping[str, Any], label_names: Labels | None, num_classes: int) -> dict[str, Any]:
    """Names of the classes and their descriptions, which stay with the names that they are about."""
    own = cfg.get('label_names')
    names = own if label_names is None and own and len(own) == num_classes else label_names
    if names is None:
        return {}
    names = normalise_labels(names, num_classes)
    found: dict[str, Any] = {'label_names': names}
    same = own and len(own) == num_classes and normalise_labels(own, num_classes) == names
    if same and (descriptions := normalise_descriptions(cfg.get('label_descriptions'), names)):
        found['label_descriptions'] = descriptions
    return found


def make_config(
    model: nn.Module,
    *,
    status: str | None = None,
    about: Mapping[str, Any] | None = None,
    label_names: Labels | None = None,
    license: str | None = None,
    data_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The config.json of a model: timm's own, with `model_args` free of `num_classes`, and a section of ours.

    `num_classes` stands at the top level only, where timm looks too, so that other tools can ask for another head.

    Args:
        model: A model that timm can create by name.
        status: One of `STATUSES`, None where it is not known.
        about: Our section: provenance, training, evaluation, versions, sha256 of the weights.
        label_names: Names of the classes by index; a mapping has the indices as its keys.
        license: Licence of the weights.
        data_config: Preprocessing the weights were trained with, as timm's data config.

    Raises:
        ValueError: timm cannot create the model by name, or something is no JSON.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    name = cfg.get('architecture')
    if not name or not timm.is_model(name):
        raise ValueError(
            f'A {type(model).__name__} that timm.create_model did not make has no name to rebuild it by: '
            "save a model from timm.create_model, such as 'cbam_resnet50', or one that attention was injected into."
        )
    own: dict[str, Any] = {'pretrained_cfg': {}, **_labels(cfg, label_names, getattr(model, 'num_classes', 0))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        save_config_for_hf(model, str(path), model_config=own, data_config=dict(data_config) if data_config else None)
        config = json.loads(path.read_text(encoding='utf-8'))
    # A model that timm's factory did not tell its arguments (timm < 1.0.31) still knows the ones that shape its
    # attention.
    args = dict(config.pop('model_args', {}))
    if getattr(model, 'attn_args', None) and 'attn_args' in args:
        args['attn_args'] = _plain(model.attn_args, 'attn_args')
    if injections(model):
        config['architecture'], args = 'injected', _plain(injected_args(model), 'the arguments of inject')
        args['base_args'] = {k: v for k, v in args.get('base_args', {}).items() if k not in _NOT_ARCHITECTURE}
    args = {k: v for k, v in args.items() if k not in _NOT_ARCHITECTURE and v not in (None, {})}
    exported = config.pop('pretrained_cfg')
    if status not in ('converted', 'warm start'):
        exported = {k: v for k, v in exported.items() if k not in _OF_THE_SOURCE}
    # The labels have their place at the top level.
    exported = {k: v for k, v in exported.items() if k not in ('label_names', 'label_descriptions', 'num_classes')}
    if license:
        exported['license'] = license
    if args:
        config['model_args'] = args
    config['pretrained_cfg'] = exported
    section = {'status': status, **(about or {})}
    # Attentions of other packages, and which: whoever loads the model needs them.
    section['attentions'] = {row['attn']: p for row in injections(model) if (p := package_of(row['attn']))}
    config['timm_attn'] = {k: v for k, v in section.items() if v}
    return _plain(config, CONFIG)


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter: bool = False,
    base: Any = None,
    overwrite: bool = False,
    card: bool = True,
    eval_results: EvaluationLike = None,
    label_names: Labels | None = None,
    provenance: Provenance | Mapping[str, Any] | None = None,
    training: Training | Mapping[str, Any] | None = None,
    status: str | None = None,
    license: str | None = None,
    data_config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model as a folder that `timm.create_model('local-dir:...', pretrained=True)` reads.

    The folder holds model.safetensors, config.json as `timm.models.save_for_hf` writes it, and README.md, the model
    card. Other files in it stay as they are, and so does what somebody wrote into the card outside the marked sections.

    Args:
        model: A model that timm can create by name; wrapped by torch.compile or DistributedDataParallel, on a GPU, or
            in channels_last as it may be.
        directory: The folder.
        adapter: Write only what `inject` added, and the head where it is another than the base's, as
            adapter.safetensors; `load` fetches the base. Refused where a weight or running statistic of the base has
            moved.
        base: For an adapter: the base's weights, a model or a file; None has timm fetch them.
        overwrite: Replace the three files where they exist.
        card: Write README.md.
        eval_results: What was measured: an `Evaluation`, a mapping of its fields, or a list of them. Without it the
            card names no accuracy.
        label_names: Names of the classes by index; a mapping has the indices as its keys. Without them those that the
            model was loaded with, if it still has as many classes.
        provenance: Where the weights come from: a `Provenance` or a mapping of its fields.
        training: How they were trained: a `Training` or a mapping of its fields.
        status: One of `STATUSES`; found from the other arguments where it can be.
        license: Licence of the weights, such as 'apache-2.0'; None leaves it out.
        data_config: Preprocessing the weights were trained with, as timm's data config.

    Returns:
        The folder.

    Raises:
        ValueError: The files exist, the model cannot be rebuilt from a config, or a record has an unknown
            field. Nothing was written.
        HubFileError: The weights hold NaN, or do not fit what the config builds.
    """
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"'{folder}' is a file; a folder is written here: choose another name.")
    model = unwrap(model)
    state_dict = portable_state_dict(model)
    origin = Provenance.of(provenance).to_dict()
    metadata = {'format': 'pt'} | ({'timm_attn': json.dumps(origin, sort_keys=True)} if origin else {})
    record: dict[str, Any] = {}
    name, tensors = (ADAPTER, {}) if adapter else (WEIGHTS, state_dict)
    if adapter:
        tensors, record = split(model, state_dict, base)
    weights = _serialise(tensors, metadata)
    about: dict[str, Any] = {
        'provenance': origin,
        'training': Training.of(training).to_dict(),
        'evaluation': normalise_evaluation(eval_results),
        'versions': {
            'timm_attn': package_version(),
            'timm': timm.__version__,
            'torch': torch.__version__.split('+')[0],
            'safetensors': safetensors.__version__,
        },
        'weights_sha256': sha256_of(weights),
        'adapter': record,
    }
    status = _status(status, about, state_dict)
    license = license or origin.get('license')
    config = make_config(
        model, status=status, about=about, label_names=label_names, license=license, data_config=data_config
    )
    try:
        check_model(encode_config(config), weights, kind=name)
    except HubFileError as e:
        if 'does not fit' not in str(e):
            raise
        raise HubFileError(
            f'{e}. A model changed after timm.create_model made it cannot be rebuilt from its name: create the one '
            'that has these layers, such as cbam_resnet50.'
        ) from e
    with atomic_files(folder, MODEL_FILES) as (prepared, cut_off):
        files = {name: weights, CONFIG: encode_config(config)}
        if card:
            files[CARD] = render_card(config, weights=weights, old=old_card(folder)).encode()
        write_model(files, folder, prepared, overwrite, cut_off)
    return folder


def old_card(folder: Path) -> str | None:
    """The card that a folder has, None where it has none.

    Args:
        folder: The folder.

    Raises:
        HubFileError: It cannot be read without losing words, or leads elsewhere.
    """
    return decode_card(_read(folder, CARD, MAX_CARD_BYTES)) if os.path.lexists(folder / CARD) else None


def decode_card(data: bytes) -> str:
    """The text of a card.

    Args:
        data: README.md.

    Raises:
        HubFileError: It is no UTF-8, so that words would be lost.
    """
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError as e:
        raise HubFileError(f'{CARD} is no UTF-8 ({e}): save it as UTF-8, so that nothing of it is lost.') from e


def write_model(
    files: Mapping[str, bytes], folder: Path, prepared: Path, overwrite: bool, cut_off: bool = False
) -> None:
    """Prepares the files of a model to take their places in a folder, inside `atomic_files`.

    Where an earlier process was cut off with exactly these files, nothing is left to do.

    Args:
        files: Name -> content.
        folder: The folder.
        prepared: What `atomic_files` yielded.
        overwrite: Replace files that exist.
        cut_off: What `atomic_files` yielded.

    Raises:
        ValueError: A file exists, or the weights of another kind do.
    """
    kinds = {WEIGHTS, ADAPTER} & set(files)
    if other := [n for n in (WEIGHTS, ADAPTER) if kinds and n not in kinds and os.path.lexists(folder / n)]:
        raise ValueError(
            f"'{folder}' holds {other[0]}, which would be taken for this model's: choose another folder, or move it."
        )
    taken = [n for n in files if os.path.lexists(folder / n)]
    if taken and not overwrite:
        if cut_off and all(_holds(folder / n, data) for n, data in files.items()):
            return
        raise ValueError(
            f"'{folder}' already holds {', '.join(taken)}; choose another folder, or pass overwrite=True (--overwrite)."
        )
    for name, data in files.items():
        (prepared / name).write_bytes(data)


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


@dataclass(frozen=True)
class ModelFiles:
    """A model as files that were read once and checked: what is checked is what is used.

    Args:
        config: The checked config.
        meta: What it builds, on the meta device.
        weights: Tensors by name; of an adapter, only its own.
        files: Name -> content.
        kind: The name of the file with the weights.
        where: Where they are, for messages.
    """

    config: Config
    meta: nn.Module
    weights: dict[str, Tensor]
    files: dict[str, bytes]
    kind: str = WEIGHTS
    where: str = ''


def check_model(config: bytes, weights: bytes, where: str = '', kind: str = WEIGHTS) -> ModelFiles:
    """Checks the two files that make a model or an adapter, and that they belong together.

    Args:
        config: config.json.
        weights: model.safetensors or adapter.safetensors.
        where: Where they are, for messages.
        kind: The name of the latter.

    Raises:
        HubFileError: One is malformed, or does not fit the other.
    """
    at = f' {where}' if where else ''
    found = check_config(parse_config(config, f'{CONFIG}{at}'), f'{CONFIG}{at}')
    meta = build_meta(found, f'{CONFIG}{at}')
    adapter = found.about.get('adapter')
    if kind == ADAPTER and not (adapter and injections(meta)):
        raise HubFileError(f'{CONFIG}{at} does not say which base its adapter is for.')
    if adapter and adapter['base'] != found.model_args.get('base', 'resnet18'):
        raise HubFileError(f'{CONFIG}{at} names two bases: timm_attn.adapter.base differs from model_args.base.')
    if kind != ADAPTER and adapter:
        raise HubFileError(f"{CONFIG}{at} is an adapter's, but {kind} holds a whole model: keep one of the two.")
    tensors = read_weights(weights, meta, f'{kind}{at}', check_adapter_names if adapter else None)
    expected = found.about.get('weights_sha256')
    if expected is not None and expected != (actual := sha256_of(weights)):
        raise HubFileError(
            f'{CONFIG}{at} belongs to other weights: it names the sha256 {expected}, and {kind} has {actual}. '
            'One of the two was replaced without the other: write both again.'
        )
    return ModelFiles(found, meta, tensors, {CONFIG: config, kind: weights}, kind, where)


def open_folder(directory: str | os.PathLike[str]) -> ModelFiles:
    """Reads a model folder once, and checks it as strictly as a repository from the Hub.

    A save that was cut off is brought to its end first. Links that lead out of the folder are refused.

    Args:
        directory: A folder with model.safetensors (or adapter.safetensors) and config.json.

    Raises:
        HubFileError: A file is missing, malformed, or does not fit the others.
    """
    folder = Path(directory)
    config, missed, vanished = b'', [], 0
    while True:
        _finish(folder)
        lone = os.path.lexists(folder / ADAPTER) and not os.path.lexists(folder / WEIGHTS)
        kind = ADAPTER if lone else WEIGHTS
        if missing := [n for n in (CONFIG, kind) if not os.path.lexists(folder / n)]:
            # Another process's save may be under way: twice in a row, with a settled folder between, is no chance.
            if missing == missed:
                raise HubFileError(
                    f"'{folder}' has no {' and no '.join(missing)}: write it with timm_attn.save(model, directory)."
                )
            missed = missing
            continue
        missed = []
        try:
            before, config = config, _read(folder, CONFIG, MAX_CONFIG_BYTES)
            weights = _read(folder, kind)
            try:
                model = check_model(config, weights, f"of '{folder}'", kind)
                break
            except HubFileError:
                # Somebody may have replaced the model between the two reads: then there is another config.json now.
                if before == config or _read(folder, CONFIG, MAX_CONFIG_BYTES) == config:
                    raise
        except _Vanished:
            vanished += 1
            if vanished == _PATIENCE:
                raise
    extras = [p.name for pattern in _EXTRAS for p in sorted(folder.glob(pattern))]
    for name in [CARD, *extras] if os.path.lexists(folder / CARD) else extras:
        model.files[name] = _read(folder, name, MAX_CARD_BYTES if name == CARD else _MAX_EXTRA_BYTES)
    return model


class _Vanished(HubFileError):
    """A file was there a moment ago: a save by another process is under way."""


_PATIENCE = 100  # reads of a folder in whose midst a file vanished


def _finish(folder: Path) -> None:
    try:
        settle(folder)
    except OSError as e:
        raise HubFileError(
            f"'{folder}' was being written when that was cut off, and cannot be brought into order ({e}): "
            'run the same command again.'
        ) from e


def _read(folder: Path, name: str, max_bytes: int | None = None) -> bytes:
    try:
        return read_within(folder, name, max_bytes)
    except FileNotFoundError:
        raise _Vanished(f"'{folder}' has no {name}: it was there a moment ago; run the same command again.") from None
    except ValueError as e:
        raise HubFileError(str(e)) from e


def read_folder(directory: str | os.PathLike[str]) -> tuple[Config, dict[str, Path]]:
    """Reads and checks a model folder as strictly as one from the Hub.

    Args:
        directory: A folder with model.safetensors (or adapter.safetensors) and config.json.

    Returns:
        The checked config, and the files to push by their names.

    Raises:
        HubFileError: A file is missing, malformed, or does not fit the others.
    """
    model = open_folder(directory)
    return model.config, {name: Path(directory) / name for name in model.files}


def card_of_folder(
    directory: str | os.PathLike[str], *, source: str | None = None, eval_results: Any = None, write: bool = True
) -> str:
    """Renders the card of a model folder again, keeping what somebody wrote outside the marked sections.

    Args:
        directory: A folder that `save` wrote.
        source: What the snippets load; None is the folder itself.
        eval_results: New evaluation records, which go into config.json too.
        write: Write README.md; False only returns it.

    Raises:
        HubFileError: The folder is no model folder.
    """
    model, folder = open_folder(directory), Path(directory)
    raw = add_evaluation(model.config.raw, eval_results)
    files = {CONFIG: encode_config(raw)} if raw != model.config.raw else {}
    old = decode_card(model.files[CARD]) if CARD in model.files else None
    text = render_card(raw, weights=model.files[model.kind], source=source, old=old)
    check_card(text)
    if write:
        with atomic_files(folder, MODEL_FILES) as (prepared, _):
            write_model({**files, CARD: text.encode()}, folder, prepared, overwrite=True)
    return text

"""A model as a folder that timm, the Hub and people can read: model.safetensors, config.json, README.md."""

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ..files import atomic_write
from ..injection import injections
from ..layers import gain_keys, package_of
from ..models import injected_args
from ..version import package_version
from .adapter import save_adapter
from .card import check_card, render_card
from .client import HubFileError
from .config import Config, build_meta, check_config, encode_config, parse_config
from .header import check_header, check_weights, read_header
from .records import add_evaluation, normalise_evaluation
from .rules import CARD, CONFIG, WEIGHTS

STATUSES = ('trained', 'converted', 'warm start', 'random')
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
    """Weights as safetensors wants them: on the CPU, contiguous, each with memory of its own, under the model's plain
    keys.

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


def make_config(
    model: nn.Module,
    *,
    status: str | None = None,
    about: Mapping[str, Any] | None = None,
    label_names: Sequence[str] | Mapping[str, str] | None = None,
    license: str | None = None,
    data_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The config.json of a model: timm's own, with `model_args` free of `num_classes`, and a section of ours.

    `num_classes` stands at the top level only, where timm looks too, so that other tools can ask for another head.

    Args:
        model: A model that timm can create by name.
        status: One of `STATUSES`, None where it is not known.
        about: Our section: provenance, training, evaluation, versions.
        label_names: Names of the classes by index.
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
    own = {'pretrained_cfg': {}}
    if label_names is not None:
        labels = dict(label_names) if isinstance(label_names, Mapping) else list(label_names)
        own['label_names'] = cast(Any, labels)
    elif cfg.get('label_names') and len(cfg['label_names']) == getattr(model, 'num_classes', None):
        own['label_names'] = cfg['label_names']
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
    eval_results: Any = None,
    label_names: Sequence[str] | Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
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
        adapter: Write only what `inject` added, and the head where it is another than the base's; `load` fetches the
            base. Refused where a weight or running statistic of the base has moved.
        base: For an adapter: the base's weights, a model or a file; None has timm fetch them.
        overwrite: Replace the three files where they exist.
        card: Write README.md.
        eval_results: What was measured: a dict with 'dataset', optional 'dataset_id', 'split', 'n', 'protocol',
            'source_name', 'source_url', and 'metrics' {name: value in percent}, or a list of such dicts. Without it
            the card names no accuracy.
        label_names: Names of the classes by index.
        provenance: Where the weights come from: 'source', 'source_url', 'sha256', 'license', 'datasets', 'base_model',
            ...
        training: How they were trained: 'data', 'epochs', 'optimizer', 'seed', 'hardware', 'seconds', ...
        status: 'trained', 'converted', 'warm start' or 'random'; found from the other arguments where it can be.
        license: Licence of the weights, such as 'apache-2.0'; None leaves it out.
        data_config: Preprocessing the weights were trained with, as timm's data config.

    Returns:
        The folder.

    Raises:
        ValueError: The files exist, the model cannot be rebuilt from a config, or a record is not plain JSON. Nothing
            was written.
        HubFileError: The weights hold NaN, or do not fit what the config builds.
    """
    folder = Path(directory)
    names = [] if adapter else [WEIGHTS, CONFIG, *([CARD] if card else [])]
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"'{folder}' is a file; a folder is written here: choose another name.")
    if not overwrite and (taken := [n for n in names if (folder / n).exists()]):
        raise ValueError(f"'{folder}' already holds {', '.join(taken)}; choose another folder, or pass overwrite=True.")
    model = unwrap(model)
    state_dict = portable_state_dict(model)
    check_weights(state_dict, gains=frozenset(k.replace('_orig_mod.', '') for k in gain_keys(model)))
    origin: dict[str, Any] = _plain(dict(provenance or {}), 'provenance')
    about: dict[str, Any] = {
        'provenance': origin,
        'training': _plain(dict(training or {}), 'training'),
        'evaluation': normalise_evaluation(eval_results),
        'versions': {
            'timm_attn': package_version(),
            'timm': timm.__version__,
            'torch': torch.__version__.split('+')[0],
            'safetensors': safetensors.__version__,
        },
    }
    status = _status(status, about, state_dict)
    license = license or origin.get('license')
    config = make_config(
        model, status=status, about=about, label_names=label_names, license=license, data_config=data_config
    )
    if adapter:
        return save_adapter(model, state_dict, config, folder, base, overwrite)
    checked = _own_config(config)
    meta = build_meta(checked)
    metadata = {'format': 'pt'}
    if origin:
        metadata['timm_attn'] = json.dumps(origin, sort_keys=True)
    folder.mkdir(parents=True, exist_ok=True)
    data = _serialise(state_dict, metadata)
    with tempfile.TemporaryDirectory(prefix='.save.', dir=folder) as temporary:
        weights = Path(temporary) / WEIGHTS
        weights.write_bytes(data)
        try:
            check_header(read_header(weights), meta)
        except HubFileError as e:
            raise HubFileError(
                f'{e}. A model changed after timm.create_model made it cannot be rebuilt from its name: create the '
                f'one that has '
                'these layers, such as cbam_resnet50.'
            ) from e
        old = (folder / CARD).read_text(encoding='utf-8') if (folder / CARD).exists() else None
        text = render_card(config, weights=weights, old=old) if card else ''
        with atomic_write(folder / CONFIG) as path:
            path.write_bytes(encode_config(config))
        os.replace(weights, folder / WEIGHTS)
    # mkstemp's files are for their owner only; a model is as readable as anything else that is written here.
    if card:
        with atomic_write(folder / CARD) as path:
            path.write_text(text, encoding='utf-8')
    return folder


def _own_config(config: dict[str, Any]) -> Config:
    return check_config(parse_config(encode_config(config)))


def read_folder(directory: str | os.PathLike[str]) -> tuple[Config, dict[str, Path]]:
    """Reads and checks a model folder as strictly as one from the Hub.

    Args:
        directory: A folder with model.safetensors and config.json.

    Returns:
        The checked config, and the files to push by their names.

    Raises:
        HubFileError: A file is missing, malformed, or does not fit the others.
    """
    folder = Path(directory)
    if missing := [n for n in (CONFIG, WEIGHTS) if not (folder / n).is_file()]:
        raise HubFileError(
            f"'{folder}' has no {' and no '.join(missing)}: write it with timm_attn.save(model, directory)."
        )
    config = check_config(parse_config(_bounded(folder / CONFIG)), f'{folder / CONFIG}')
    meta = build_meta(config)
    check_header(read_header(folder / WEIGHTS), meta)
    check_weights(safetensors.torch.load_file(folder / WEIGHTS), gains=gain_keys(meta))
    files = {n: folder / n for n in (CONFIG, WEIGHTS, CARD) if (folder / n).is_file()}
    for pattern in _EXTRAS:
        for path in sorted(folder.glob(pattern)):
            if path.stat().st_size > _MAX_EXTRA_BYTES:
                raise HubFileError(
                    f'{path} has more than {_MAX_EXTRA_BYTES >> 20} MiB: make it smaller or move it away.'
                )
            files[path.name] = path
    return config, files


def _bounded(path: Path) -> bytes:
    with path.open('rb') as file:
        return file.read((1 << 20) + 1)


def copy_files(files: Mapping[str, Path], directory: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Copies checked files into a folder, each under a temporary name first.

    Args:
        files: Name in the folder -> file.
        directory: The folder.
        overwrite: Replace files that exist.

    Raises:
        ValueError: A file exists.
    """
    folder = Path(directory)
    if not overwrite and (taken := [n for n in files if (folder / n).exists()]):
        raise ValueError(f"'{folder}' already holds {', '.join(taken)}; choose another folder, or pass --overwrite.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in files.items():
        with atomic_write(folder / name) as path:
            shutil.copyfile(source, path)
    return folder


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
    config, files = read_folder(directory)
    raw = add_evaluation(config.raw, eval_results)
    old = files[CARD].read_text(encoding='utf-8') if CARD in files else None
    text = render_card(raw, weights=files[WEIGHTS], source=source, old=old)
    check_card(text)
    if write:
        if raw != config.raw:
            with atomic_write(Path(directory) / CONFIG) as path:
                path.write_bytes(encode_config(raw))
        with atomic_write(Path(directory) / CARD) as path:
            path.write_text(text, encoding='utf-8')
    return text

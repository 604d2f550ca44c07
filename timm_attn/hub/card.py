"""The model card: facts from the config, the weights file and the model itself, rendered into card.md.

Everything is computed or recorded, nothing typed by hand: parameters, MACs and activations come from the model,
accuracy from an evaluation record, the citation from the attention's registry entry. What is not known is left out.
The same input gives the same text.
"""

import bisect
import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import timm
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from timm.models import ResNet

from ..injection import injections
from ..layers import get_attn
from ..measure import count
from ..version import pip_source
from .client import HubFileError
from .config import MODEL_ARGS, Config, build_meta, check_config
from .records import METRIC_NAMES, STATUSES
from .rules import ADAPTER, CARD, CONFIG, WEIGHTS, Check, list_of, or_null, text

_TEMPLATE = Path(__file__).with_name('card.md')
_PROJECT = 'timm_attn'
_SECTIONS = ('summary', 'details', 'usage', 'training', 'evaluation', 'limits', 'files', 'citation')
# More than any card needs; YAML in pure Python reads some 100 KB a second.
_MAX_YAML, _MAX_DEPTH = 1 << 16, 16
_MARKER = re.compile(r'<!-- timm_attn:(begin|end) (\w+) -->')

# Identifiers the Hub takes for `license` (validate-yaml has the last word); 'other' needs license_name and
# license_link.
_LICENSES = frozenset(
    'apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd '
    'bsd-2-clause bsd-3-clause '
    'bsd-3-clause-clear cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 '
    'cc-by-nc-3.0 '
    'cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 '
    'cdla-sharing-1.0 '
    'cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl '
    'gpl gpl-2.0 '
    'gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 '
    'ncsa unlicense zlib '
    'pddl unknown other'.split()
)
_DATASETS = {'imagenet-1k': 'ILSVRC/imagenet-1k', 'imagenet': 'ILSVRC/imagenet-1k', 'digits': 'sklearn/digits'}
_NO_STATUS = '**Status: not recorded.** Nobody noted how these weights were made.'
_PROVENANCE = {
    'source': 'Weights from',
    'source_url': 'Source',
    'sha256': 'sha256 of the source',
    'sha1': 'sha1 of the source',
    'max_abs_diff': 'Largest difference to the source in a logit',
    'stated': 'Stated accuracy',
}
_BIBTEX = {
    'resnet': '@inproceedings{he2016resnet,\n  title={Deep Residual Learning for Image Recognition},\n'
    '  author={Kaiming He and Xiangyu Zhang and Shaoqing Ren and Jian Sun},\n  booktitle={CVPR},\n  year={2016},\n'
    '  url={https://arxiv.org/abs/1512.03385}\n}',
    'timm': '@misc{rw2019timm,\n  title={PyTorch Image Models},\n  author={Ross Wightman},\n  year={2019},\n'
    '  url={https://github.com/huggingface/pytorch-image-models}\n}',
}
_MEASURED = {'co2_eq_emissions'}


# What would begin a link, an image, code, HTML or a table cell.
_MARKDOWN = re.compile(r'[\\`\[\]!|]')


def _text(value: Any) -> str:
    """A foreign value as one line of plain text: no HTML, no markers, no links or pictures, no table cells."""
    text = str(value) if not isinstance(value, float) else f'{value:g}'
    return _MARKDOWN.sub(r'\\\g<0>', ' '.join(text.split())).replace('&', '&amp;').replace('<', '&lt;')


def _link(value: Any) -> str:
    plain = str(value)
    return f'<{plain}>' if re.fullmatch(r'https?://[\w./%~@:=?&+,#-]+', plain) else _text(value)


def _listing(values: Mapping[str, Any]) -> str:
    lines = []
    for key, value in values.items():
        label = _text(str(key).replace('_', ' '))
        if isinstance(value, Mapping):
            value = ', '.join(f'{_text(k)} {_text(v)}' for k, v in value.items())
        elif isinstance(value, list | tuple):
            value = ', '.join(_text(v) for v in value)
        else:
            value = _link(value)
        if value != '':
            lines.append(f'- **{label[:1].upper()}{label[1:]}:** {value}')
    return '\n'.join(lines)


def _millions(value: int) -> str:
    return f'{value / 1e6:.2f} M' if value >= 1e5 else f'{value / 1e6:.4f} M'


def _giga(value: int) -> str:
    return f'{value / 1e9:.2f} G' if value >= 1e8 else f'{value / 1e6:.2f} M'


@lru_cache(maxsize=64)
def _facts(architecture: str, num_classes: int, args: str, input_size: tuple[int, ...]) -> dict[str, Any]:
    """What the model itself says, from the meta device."""
    config = Config(architecture, num_classes, cast(Any, yaml.safe_load(args)))
    model: Any = build_meta(config)
    try:
        facts: dict[str, Any] = count(model, input_size)
    except RuntimeError as e:
        raise HubFileError(
            f'{CONFIG}: {architecture} cannot take images of {input_size} (channels, rows, columns): {e}'
        ) from e
    facts['attn'] = getattr(model, 'attn', None)
    facts['attn_args'] = dict(getattr(model, 'attn_args', None) or {})
    facts['num_features'] = getattr(model, 'head_hidden_size', None) or model.num_features
    facts['features'] = []
    if isinstance(model, ResNet):
        # Every stride of these networks rounds up.
        facts['features'] = [
            (1, stage['num_chs'], *(-(-size // stage['reduction']) for size in input_size[1:]))
            for stage in cast(Any, model.feature_info)
        ]
    plain = re.sub(r'^[a-z]+_(?=resne)', '', architecture)
    plain = 'simple_cnn' if architecture.startswith('simple_cnn_') else plain
    shared = {k: v for k, v in config.model_args.items() if k not in ('attn_args', 'attn_after', 'last_stride')}
    if done := injections(model):
        facts['attn'], facts['attn_args'] = done[0]['attn'], done[0]['attn_args']
        facts['injections'] = [_injection(row) for row in done]
        plain = config.model_args.get('base', 'resnet18').split('.')[0]
        shared = {**(shared.get('base_args') or {}), **{k: v for k, v in shared.items() if k in MODEL_ARGS}}
    # cifar_stem is a keyword of ours, which timm's plain ResNets do not have.
    if plain != architecture and timm.is_model(plain) and 'cifar_stem' not in shared:
        facts['plain'] = plain
        facts['plain_counts'] = _plain_counts(plain, num_classes, yaml.safe_dump(shared), input_size)
    return facts


def _injection(row: Mapping[str, Any]) -> str:
    """One injection in words."""
    sites = list(row['sites'])
    span = sites[0] if len(sites) == 1 else f'{sites[0]} to {sites[-1]}'
    return f'{row["attn"]} at {len(sites)} places ({span}), where={row["where"]}, start={row["start"]}'


@lru_cache(maxsize=64)
def _plain_counts(architecture: str, num_classes: int, args: str, input_size: tuple[int, ...]) -> dict[str, int]:
    return count(build_meta(Config(architecture, num_classes, cast(Any, yaml.safe_load(args)))), input_size)


def _dataset_id(record: Mapping[str, Any]) -> str:
    name = str(record['dataset'])
    return str(record.get('dataset_id') or _DATASETS.get(name.lower()) or re.sub(r'[^\w.-]+', '-', name.lower()))


def _eval_results(records: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type='image-classification',
            dataset_type=_dataset_id(record),
            dataset_name=str(record['dataset']),
            dataset_split=record.get('split'),
            metric_type='accuracy' if name.lower() in METRIC_NAMES or 'top' in name.lower() else name.lower(),
            metric_value=value,
            metric_name=METRIC_NAMES.get(name.lower(), name),
            source_name=record.get('source_name'),
            source_url=record.get('source_url'),
        )
        for record in records
        for name, value in record['metrics'].items()
    ]


def _evaluation(records: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for record in records:
        rows = ['| metric | value |', '|---|---|']
        rows += [f'| {_text(METRIC_NAMES.get(k.lower(), k))} | {_text(v)} |' for k, v in record['metrics'].items()]
        rest = {k: v for k, v in record.items() if k not in ('dataset', 'dataset_id', 'metrics')}
        parts.append('\n\n'.join([f'On {_text(record["dataset"])}:', '\n'.join(rows), _listing(rest)]).strip())
    return '\n\n'.join(parts)


def attention_tags(attn: str) -> list[str]:
    """What kinds of attention an attention is, in the words of the Hub's tags.

    Args:
        attn: One of `list_attn()`.
    """
    cls = get_attn(attn).cls
    axes = {axis for gate in cls.kinds.values() for axis in gate.axes}
    kinds = {'channel-attention': 'C' in axes, 'spatial-attention': bool(axes & {'H', 'W'})}
    return list(dict.fromkeys([*(k for k, it_is in kinds.items() if it_is), *cls.keywords]))


def _metadata(config: Config, name: str, facts: Mapping[str, Any], old: Mapping[str, Any]) -> ModelCardData:
    about = config.about
    provenance = about.get('provenance', {})
    records = about.get('evaluation', [])
    attn = facts['attn']
    license = config.pretrained_cfg.get('license') or provenance.get('license')
    if license is not None and str(license).lower() not in _LICENSES:
        license, extra = 'other', {'license_name': str(license), 'license_link': provenance.get('license_link')}
    else:
        extra = {}
    tags = ['timm', _PROJECT, 'resnet' if 'resne' in config.architecture else 'cnn']
    if attn:
        tags += ['attention', *attention_tags(attn), attn]
    datasets = [d for d in provenance.get('datasets', []) if isinstance(d, str)]
    datasets += [_dataset_id(r) for r in records if '/' in _dataset_id(r) and _dataset_id(r) not in datasets]
    base = provenance.get('base_model')
    adapter = about.get('adapter')
    if adapter:
        tags.append('adapter')
        base = base or getattr(timm.get_pretrained_cfg(config.model_args.get('base', 'resnet18')), 'hf_hub_id', None)
    ours: dict[str, Any] = {
        'license': str(license).lower() if license else None,
        **extra,
        'library_name': 'timm',
        'pipeline_tag': 'image-classification',
        'datasets': list(dict.fromkeys(datasets)) or None,
        'metrics': ['accuracy'] if records else None,
        'base_model': base,
        'base_model_relation': ('adapter' if adapter else 'finetune') if base else None,
        **{k: about['training'][k] for k in _MEASURED if k in about.get('training', {})},
    }
    ours = {k: v for k, v in ours.items() if v is not None}
    # Ours replace, a human's stay; accuracy without a record of these weights goes.
    kept = {k: v for k, v in old.items() if k not in ours and k not in ('model-index', 'model_name', 'tags', 'metrics')}
    more = [t for t in old.get('tags') or [] if isinstance(t, str) and t not in tags]
    results = {'model_name': name, 'eval_results': _eval_results(records)} if records else {}
    return ModelCardData(tags=[*tags, *more], **results, **ours, **kept)


def _image_code(config: Config, input_size: Sequence[int]) -> tuple[str, str]:
    if input_size[0] not in (1, 3):
        return '', f'x = torch.randn(1, {", ".join(map(str, input_size))})  # your images'
    mode = 'RGB' if input_size[0] == 3 else 'L'
    lines = (
        'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)',
        f"x = transform(Image.open('photo.jpg').convert('{mode}'))[None]  # (1, {', '.join(map(str, input_size))})",
    )
    return 'from PIL import Image\n', '\n'.join(lines)


def _load_code(source: str, adapter: bool) -> str:
    """The call that loads the model, up to where more keywords may follow."""
    if not adapter:
        return f'timm.create_model({source!r}, pretrained=True'
    # timm does not know where the base comes from.
    if source.startswith('hf-hub:'):
        return f'timm_attn.load_from_hub({source.removeprefix("hf-hub:")!r}'
    return f'timm_attn.load({source.removeprefix("local-dir:")!r}'


def _details(config: Config, facts: Mapping[str, Any], input_size: Sequence[int]) -> str:
    cfg, about = config.pretrained_cfg, config.about
    provenance = about.get('provenance', {})
    found: dict[str, Any] = {'Type': 'image classification', 'Architecture': config.architecture}
    if facts['attn']:
        spec = get_attn(facts['attn'])
        found['Attention'] = f'{spec.cls.__name__} ({facts["attn"]})'
        if 'resne' in config.architecture:
            found['Attention'] += f', {spec.place}'
        if facts['attn_args']:
            found['Attention options'] = facts['attn_args']
    if 'injections' in facts:
        found['Base'] = config.model_args.get('base', 'resnet18')
        found['Injected'] = '; '.join(facts['injections'])
    if adapter := config.about.get('adapter'):
        found['Adapter'] = (
            f"{adapter.get('numbers', 'the')} numbers: the attention, and the head where it is not the base's. The "
            f'base comes from its own source; its weights must have the digest {adapter["sha256"]}'
        )
    found['Classes'] = config.num_classes
    found['Parameters'] = _millions(facts['params'])
    found['MACs'] = f'{_giga(facts["macs"])} (convolutions and matrix products)'
    found['Activations'] = _millions(facts['activations'])
    if 'plain' in facts:
        plain = facts['plain_counts']
        found[f'Over {facts["plain"]}'] = (
            f'{facts["params"] / plain["params"] * 100 - 100:+.2f} % parameters, '
            f'{facts["macs"] / plain["macs"] * 100 - 100:+.2f} % MACs'
        )
    found['Image size'] = ' x '.join(map(str, input_size))
    if cfg.get('test_input_size') and list(cfg['test_input_size']) != list(input_size):
        found['Test image size'] = ' x '.join(map(str, cfg['test_input_size']))
    labels = {'interpolation': 'Interpolation', 'crop_pct': 'Crop', 'mean': 'Mean', 'std': 'Deviation'}
    found.update({label: cfg[key] for key, label in labels.items() if key in cfg})
    if facts['attn']:
        spec = get_attn(facts['attn'])
        found['Paper'] = spec.paper
        found['Code followed'] = spec.code or None
    found.update({label: provenance[key] for key, label in _PROVENANCE.items() if key in provenance})
    found['Licence of the weights'] = cfg.get('license') or provenance.get('license')
    return _listing({k: v for k, v in found.items() if v is not None})


def _limits(config: Config, facts: Mapping[str, Any]) -> str:
    about = config.about
    status = about.get('status')
    lines = ['For research, teaching and as a start for fine-tuning on image classification.']
    if about.get('evaluation'):
        lines.append('Measured on the data named under evaluation only; expect other numbers on other images.')
    else:
        lines.append('Nothing was measured for this card, so it states no accuracy.')
    if status == 'warm start':
        lines.append(
            'The attention has not been trained: its maps are constant, and it is no evidence for or against attention.'
        )
    if status == 'random':
        lines.append('Its predictions are noise.')
    datasets = [*about.get('provenance', {}).get('datasets', []), *map(_dataset_id, about.get('evaluation', []))]
    if 'imagenet' in ' '.join(datasets).lower():
        lines.append(
            'ImageNet-1k over-represents the web photographs, animals and objects of its time, and has wrong labels; '
            'a network trained '
            "on it leans on texture and inherits these biases. The data set's own terms ask for non-commercial "
            'research.'
        )
    lines.append(
        'Not for identifying people, nor for decisions about safety, health or rights. Like all such networks it can '
        'be fooled by '
        'small changes of its input and is sure of itself on images unlike its training data.'
    )
    return '\n'.join(f'- {line}' for line in lines)


def _files(config: Config, weights: bytes | None) -> str:
    if weights is None:
        return ''
    name = ADAPTER if 'adapter' in config.about else WEIGHTS
    lines = f'- **`{name}`:** {len(weights)} bytes, sha256 `{hashlib.sha256(weights).hexdigest()}`'
    if versions := config.about.get('versions'):
        lines += '\n' + _listing({'Written with': versions})
    return f'{lines}\n\nsafetensors only: there is no pickle here, and none is needed.'


def _citation(facts: Mapping[str, Any]) -> str:
    entries = [get_attn(facts['attn']).bibtex] if facts['attn'] else []
    entries += [_BIBTEX['resnet'], _BIBTEX['timm']]
    return '\n\n'.join(f'```bibtex\n{entry}\n```' for entry in entries)


def _summary(config: Config, facts: Mapping[str, Any]) -> tuple[str, str]:
    attn = facts['attn']
    base = facts.get('plain', 'ResNet' if 'resne' in config.architecture else 'small CNN')
    what = f'A {base} with {get_attn(attn).title!r} attention' if attn else f'A {config.architecture}'
    if attn:
        what = f'{base} with the attention of "{get_attn(attn).title}"'
    status = config.about.get('status')
    provenance = config.about.get('provenance', {})
    source = _text(provenance.get('source') or provenance.get('source_url') or 'the named source')
    line = f'**Status: {status}.** {STATUSES[status].format(source=source)}' if status else _NO_STATUS
    records = config.about.get('evaluation', [])
    best = [
        f'{_text(METRIC_NAMES.get(k.lower(), k))} {_text(v)} on {_text(r["dataset"])}'
        for r in records
        for k, v in r['metrics'].items()
    ]
    what = f'Adapter: {what[0].lower()}{what[1:]}' if 'adapter' in config.about else what
    summary = f'{what}, for {config.num_classes} classes' + (f': {", ".join(best[:2])}.' if best else '.')
    return summary, line


def render_card(
    config: Mapping[str, Any] | Config,
    *,
    weights: bytes | None = None,
    source: str | None = None,
    old: str | None = None,
    name: str | None = None,
) -> str:
    """Renders the card of a model.

    Args:
        config: A parsed config.json, whose 'timm_attn' section holds status, provenance, training and evaluation.
        weights: The bytes of model.safetensors, for their number and sha256.
        source: What the snippets give to `timm.create_model`: 'hf-hub:me/x', a name with a tag; None is the folder of
            the card.
        old: The card so far; what stands outside the marked sections and extra metadata are kept.
        name: Title of the card; by default the repository's name, or the architecture.

    Returns:
        The text of README.md.

    Raises:
        HubFileError: The config breaks a rule.
    """
    checked = config if isinstance(config, Config) else check_config(dict(config))
    chans = checked.model_args.get('in_chans', 3)
    cfg = checked.pretrained_cfg
    own = timm.get_pretrained_cfg(checked.architecture)
    size = cfg.get('input_size') or (own.input_size if own else (3, 224, 224))
    input_size = (chans, *size[1:])
    facts = _facts(checked.architecture, checked.num_classes, yaml.safe_dump(checked.model_args), input_size)
    source = source or 'local-dir:.'
    repo = source.removeprefix('hf-hub:')
    if name is None:
        name = repo.split('/')[-1].split('@')[0] if source.startswith('hf-hub:') else checked.architecture
    old_text = old if old is not None else ''
    metadata, body = split_card(old_text)
    summary, status = _summary(checked, facts)
    shape = ', '.join(map(str, input_size))
    image_import, image = _image_code(checked, input_size)
    data = _metadata(checked, name, facts, metadata)
    top = min(5, checked.num_classes)
    text = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        metadata=data.to_yaml(),
        name=_text(name),
        summary=summary,
        status=status,
        details=_details(checked, facts, input_size),
        package=pip_source(),
        safe=source.startswith('hf-hub:'),
        load=_load_code(source, 'adapter' in checked.about),
        repo=repr(repo),
        folder_note=' (run it in this folder)' if source == 'local-dir:.' else '',
        image_import=image_import,
        image=image,
        classes=checked.num_classes,
        show_top=f'print(probabilities.topk({top}))' if top else 'print(probabilities.shape)',
        features='\n'.join(f'# {s}' for s in facts['features']),
        input_shape=f'1, {shape}',
        batch_shape=f'2, {shape}',
        num_features=facts['num_features'],
        attention=bool(facts['attn']),
        training=_listing(checked.about.get('training', {})),
        evaluation=_evaluation(checked.about.get('evaluation', [])),
        limits=_limits(checked, facts),
        files=_files(checked, weights),
        citation=_citation(facts),
    ).content
    fresh = re.sub(r'\n{3,}', '\n\n', text).rstrip() + '\n'
    return merge_card(fresh, body) if old_text.strip() else fresh


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and body of a card. A first block that is no YAML mapping is part of the body: a rule and words.

    Args:
        text: README.md.

    Raises:
        HubFileError: The metadata are no YAML, or more than a card needs; nothing of them is dropped.
    """
    text = text.replace('\r\n', '\n')
    found = REGEX_YAML_BLOCK.search(text)
    metadata = _load_yaml(found.group(2)) if found else None
    if found is None or not isinstance(metadata, dict):
        return {}, text
    _check_metadata(metadata)
    return metadata, text[found.end() :]


def _load_yaml(block: str) -> Any:
    """YAML from anybody, in bounded time: no aliases, which may stand for billions of values, and little depth."""
    depth = 0
    try:
        if len(block) > _MAX_YAML:
            raise ValueError(f'it has {len(block)} characters; at most {_MAX_YAML} are read')
        for event in yaml.parse(block, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH or isinstance(event, yaml.AliasEvent):
                raise ValueError('it has aliases (*name), or more than 16 levels')
        return yaml.safe_load(block)
    # What its constructors raise on odd scalars, such as a date with a 13th month, is of many kinds.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as e:
        raise HubFileError(
            f'The metadata at the top of {CARD} cannot be read as YAML ({" ".join(str(e).split())[:300]}): repair '
            'them, so that nothing is lost.'
        ) from e


def _is_plain(v: Any) -> bool:
    """Whether YAML gives a value back as it is."""
    if isinstance(v, dict):
        return all(isinstance(k, str) and _is_plain(x) for k, x in v.items())
    return all(map(_is_plain, v)) if isinstance(v, list) else isinstance(v, str | int | float | date | None)


# What the Hub is known to ask of metadata (validate-yaml has the last word).
_TEXTS = or_null(list_of(lambda v: isinstance(v, str) and v != '', 0, 1 << 16))
_METADATA: dict[str, tuple[Check, str]] = {
    'tags': (_TEXTS, 'a list of texts'),
    'datasets': (lambda v: _TEXTS(v) or isinstance(v, str), 'a list of texts'),
    'metrics': (_TEXTS, 'a list of texts'),
    'base_model': (lambda v: _TEXTS(v) or isinstance(v, str), 'a text or a list of texts'),
    'license': (or_null(text(128)), 'a text'),
    'license_name': (or_null(text(4096)), 'a text'),
    'license_link': (or_null(text(4096)), 'a text'),
    'library_name': (or_null(text(128)), 'a text'),
    'pipeline_tag': (or_null(text(128)), 'a text'),
}
_NO_FIELDS = frozenset({'self', 'ignore_metadata_errors', 'eval_results', 'model_name'})


def _check_metadata(data: dict[Any, Any]) -> None:
    for key, value in data.items():
        if not isinstance(key, str) or key in _NO_FIELDS:
            raise HubFileError(f'{CARD}: {str(key)[:80]!r} is no name of a field of metadata.')
        check, rule = _METADATA.get(key, (_is_plain, 'plain values'))
        if not check(value):
            raise HubFileError(f'{CARD}: {key} (={str(value)[:80]!r}) must be {rule}.')


def _marked(text: str) -> list[tuple[str, int, int]]:
    """The marked sections of a card: name, start and stop, in one pass. A mark without its partner is mere text."""
    marks = list(_MARKER.finditer(text))
    ends: dict[str, list[int]] = {}
    for mark in marks:
        if mark.group(1) == 'end':
            ends.setdefault(mark.group(2), []).append(mark.end())
    found, stop = [], 0
    for mark in marks:
        if mark.group(1) == 'begin' and mark.start() >= stop:
            name = mark.group(2)
            following = ends.get(name, [])
            if (i := bisect.bisect(following, mark.end())) < len(following):
                stop = following[i]
                found.append((name, mark.start(), stop))
    return found


def merge_card(fresh: str, body: str) -> str:
    """Puts fresh sections into a body that somebody may have edited.

    Args:
        fresh: A rendered card.
        body: The old card without its metadata. Marked sections are replaced where they stand, those that are new
            follow the section before them, those that no longer apply go; everything else stays.
    """
    sections = {name: fresh[start:stop] for name, start, stop in _marked(fresh)}
    head = fresh[: fresh.index('<!-- timm_attn:begin')]
    placed: list[str] = []
    parts, end = [], 0
    for name, start, stop in _marked(body):
        parts += [body[end:start], '' if name in placed else sections.get(name, '')]
        placed.append(name)
        end = stop
    body = ''.join([*parts, body[end:]])
    before = None
    for name in _SECTIONS:
        if name not in sections:
            continue
        if name not in placed:
            text = sections[name]
            if before is None and not placed:
                body = f'{body.strip()}\n\n{text}\n'
            elif before is None:
                body = f'{text}\n\n{body.lstrip()}'
            else:
                end = body.index(f'<!-- timm_attn:end {before} -->') + len(f'<!-- timm_attn:end {before} -->')
                body = f'{body[:end]}\n\n{text}{body[end:]}'
            placed.append(name)
        before = name
    return head + re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'


def check_card(text: str) -> None:
    """Checks a card's metadata by the rules the Hub is known to have, before anything is sent.

    Args:
        text: README.md.

    Raises:
        HubFileError: Names the field.
    """
    data, _ = split_card(text)
    if not data:
        raise HubFileError(f'{CARD} must start with a YAML block of metadata.')
    try:
        ModelCard(text)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise HubFileError(f'The metadata of {CARD} cannot be read: {e}') from e
    license = data.get('license')
    if license is not None and license not in _LICENSES:
        raise HubFileError(
            f"{CARD}: license (={license!r}) is none the Hub knows; use 'other' with license_name and license_link."
        )
    if license == 'other' and not (data.get('license_name') and data.get('license_link')):
        raise HubFileError(
            f"{CARD}: license 'other' needs license_name and license_link: give "
            f"provenance={{'license': ..., 'license_link': ...}}."
        )

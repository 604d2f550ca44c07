"""The table of pretrained tags: what `pretrained=True` and every `name.tag` loads, and what the README lists."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from timm.models import get_pretrained_cfg

from ..layers import get_attn, is_registered
from .sources import SOURCES

_PCV = 'https://github.com/osmr/imgclsmob/releases/download'
_TIMM_RESULTS = 'timm results-imagenet.csv'
_PREPROCESSING = (
    'input_size',
    'pool_size',
    'interpolation',
    'crop_pct',
    'crop_mode',
    'mean',
    'std',
    'test_input_size',
    'test_crop_pct',
)
# PIL resize 256, crop 224: the protocol of pytorchcv's table and of the authors' own repositories.
RESIZE_256: Mapping[str, Any] = MappingProxyType(
    dict(
        input_size=(3, 224, 224),
        interpolation='bilinear',
        crop_pct=0.875,
        crop_mode='center',
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
)


@dataclass(frozen=True)
class Tag:
    """Weights of a registered model.

    Attributes:
        model: The registered name.
        tag: The tag, `timm.create_model(f'{model}.{tag}', pretrained=True)`.
        status: 'trained', or 'warm': a plain ResNet's weights with neutral attention.
        url: Address of the file; empty where the Hub has it.
        hf_hub_id: Repository on the Hugging Face Hub; empty where `url` is the place.
        licence: Of the weights, as its source states it.
        source: What `convert(source=...)` is called with.
        top1: ImageNet-1k accuracy in percent as `stated_by` states it; that of the plain ResNet for warm starts.
        stated_by: Who states it, and at which image size.
        sha: sha1 of the weights file (the one inside an archive); empty where its host verifies its own files.
        preprocessing: Of images, in the words of timm's config.
    """

    model: str
    tag: str
    status: str
    licence: str
    source: str
    top1: float
    stated_by: str
    url: str = ''
    hf_hub_id: str = ''
    sha: str = ''
    preprocessing: Mapping[str, Any] = field(default_factory=dict, repr=False)


def _pcv(model: str, net: str, top1_error: float, release: str, err5: str, sha1: str) -> Tag:
    return Tag(
        model,
        'pcv_in1k',
        'trained',
        'mit',
        f'pytorchcv/{net}',
        round(100 - top1_error, 2),
        'pytorchcv, 224 px',
        url=f'{_PCV}/{release}/{net}-{err5}-{sha1[:8]}.pth.zip',
        sha=sha1,
        preprocessing=RESIZE_256,
    )


def _fca(depth: int, top1: float) -> Tag:
    # No checksum is stated: keys, shapes and the waves in the file are what is checked.
    url = f'https://github.com/cfzd/FcaNet/releases/download/v1.0/fca{depth}.pth'
    return Tag(
        f'fca_resnet{depth}',
        'fcanet_in1k',
        'trained',
        'mit',
        'fcanet',
        top1,
        'the authors, 224 px',
        url=url,
        preprocessing=RESIZE_256,
    )


def _timm_cfg(name: str) -> dict[str, Any]:
    cfg = get_pretrained_cfg(name)
    found = {} if cfg is None else dataclasses.asdict(cfg)
    return {k: found[k] for k in _PREPROCESSING if found.get(k) is not None}


def _timm(model: str, tag: str, net: str, top1: float) -> Tag:
    return Tag(
        model,
        tag,
        'trained',
        'apache-2.0',
        'timm',
        top1,
        f'{_TIMM_RESULTS}, 224 px',
        hf_hub_id=f'timm/{net}.{tag}',
        preprocessing=_timm_cfg(f'{net}.{tag}'),
    )


# Accuracy of timm's plain ResNets with the tag that it has at every depth.
_PLAIN = {18: 71.504, 34: 76.42, 50: 80.382, 101: 81.494, 152: 81.998}


def _warm(model: str) -> Tag | None:
    """The warm start of a model 'ATTN_resnetDEPTH', None where its attention has none."""
    attn, _, depth = model.rpartition('_resnet')
    if not is_registered(attn) or not depth.isdigit() or int(depth) not in _PLAIN or get_attn(attn).cls.no_warm_start:
        return None
    net = f'resnet{depth}.a1_in1k'
    return Tag(
        model,
        f'resnet{depth}_a1_in1k',
        'warm',
        'apache-2.0',
        'timm',
        _PLAIN[int(depth)],
        f'{_TIMM_RESULTS}, 224 px, of {net}',
        hf_hub_id=f'timm/{net}',
        preprocessing=_timm_cfg(net),
    )


# A model's first row is its default. `cfgs_of` adds the warm starts of the models that are registered.
TAGS: list[Tag] = [
    _pcv('cbam_resnet50', 'cbam_resnet50', 20.17, 'v0.0.537', '0505', 'd8cf8488efb97afecd6b3287a3ca9fa093fc3127'),
    _pcv('bam_resnet50', 'bam_resnet50', 20.91, 'v0.0.499', '0547', 'a04adf3c93f56836509f66668aa90360c9688eb8'),
    _pcv('se_resnet18', 'seresnet18', 28.18, 'v0.0.355', '0961', '022123a5e88c9917e63165f5b5a7808a606d452a'),
    _timm('se_resnet50', 'a1_in1k', 'seresnet50', 80.012),
    _timm('se_resnet50', 'a2_in1k', 'seresnet50', 80.102),
    _timm('se_resnet50', 'a3_in1k', 'seresnet50', 77.036),
    _timm('se_resnet50', 'ra2_in1k', 'seresnet50', 80.26),
    _pcv('se_resnet50', 'seresnet50b', 20.79, 'v0.0.387', '0539', '459e6871e944d1c7102ee9c055ea428b8d9a168c'),
    _pcv('se_resnet101', 'seresnet101b', 19.70, 'v0.0.460', '0487', 'b83a20fd2ad9a32e0fe5cb3daef45aac03ea3194'),
    _timm('sk_resnext50_32x4d', 'ra_in1k', 'skresnext50_32x4d', 80.168),
    _fca(34, 75.02),
    _fca(50, 78.57),
    _fca(101, 79.63),
    _fca(152, 80.02),
]


def tags_of(model: str) -> list[Tag]:
    """The tags of a model, its default first.

    Args:
        model: The registered name.
    """
    return [t for t in TAGS if t.model == model]


def find_tag(model: str, tag: str | None) -> Tag | None:
    """The row of a tag, None where there is none.

    Args:
        model: The registered name.
        tag: The tag.
    """
    return next((t for t in TAGS if (t.model, t.tag) == (model, tag)), None)


def _description(tag: Tag) -> str:
    if tag.status == 'warm':
        return f'Warm start: {tag.hf_hub_id.removeprefix("timm/")} with untrained, neutral attention; equal logits.'
    return f'Trained weights of {tag.source}, converted by name.'


def cfgs_of(names: Sequence[str], **facts: Any) -> dict[str, Any]:
    """The configs of models for timm's `generate_default_cfgs`; those that can start warm get a tag for it.

    Args:
        names: Registered names; one without a row in `TAGS` gets the tag 'untrained'.
        **facts: What these models' configs say that differs from a ResNet's, such as pool_size=(14, 14).
    """
    base = dict(RESIZE_256, url='', num_classes=1000, pool_size=(7, 7), first_conv='conv1', classifier='fc') | facts
    cfgs = {}
    for name in names:
        warm = _warm(name)
        if warm is not None and warm not in TAGS:
            TAGS.append(warm)
        for tag in tags_of(name):
            cfgs[f'{name}.{tag.tag}'] = (
                base
                | dict(tag.preprocessing)
                | dict(
                    url=tag.url,
                    hf_hub_id=tag.hf_hub_id or None,
                    license=tag.licence,
                    origin_url=home_of(tag.source),
                    description=_description(tag),
                )
            )
        if not tags_of(name):
            cfgs[f'{name}.untrained'] = base
    return cfgs


def home_of(source: str) -> str:
    """The repository of a source, empty where none is known.

    Args:
        source: As `convert(source=...)` takes it.
    """
    return next((s.home for s in SOURCES if s.name == source.partition('/')[0]), '')


def weights_table() -> str:
    """All tags as a Markdown table: model and tag, trained or warm, accuracy and who states it, licence, source."""
    header = ('model.tag', 'weights', 'top-1 (stated by)', 'licence', 'source')
    rows = [
        (
            f'`{t.model}.{t.tag}`' + (' (default)' if tags_of(t.model)[0] == t else ''),
            'trained' if t.status == 'trained' else 'warm start',
            f'{t.top1:g} ({t.stated_by})',
            t.licence,
            f'[{t.source}]({t.url})' if t.url else f'[{t.hf_hub_id}](https://huggingface.co/{t.hf_hub_id})',
        )
        for t in TAGS
    ]
    lines = [' | '.join(header), ' | '.join('---' for _ in header), *(' | '.join(r) for r in rows)]
    return '\n'.join(f'| {line} |' for line in lines)

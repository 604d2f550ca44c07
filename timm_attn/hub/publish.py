"""The collection: every trained tag of the weights table, converted, with its card, in a namespace of one's own."""

import fnmatch
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from ..files import atomic_write
from ..weights.tags import TAGS, Tag
from .card import check_card, render_card
from .client import HubError
from .config import check_config
from .push import push_to_hub
from .records import Provenance

_logger = logging.getLogger(__name__)
# Licences that let anybody pass the weights on, given that the card names them.
_FREE = frozenset({'apache-2.0', 'mit', 'bsd-2-clause', 'bsd-3-clause', 'cc0-1.0', 'cc-by-4.0', 'isc', 'unlicense'})
_CONFIG_KEYS = (
    'input_size',
    'test_input_size',
    'interpolation',
    'crop_pct',
    'test_crop_pct',
    'crop_mode',
    'mean',
    'std',
)


@dataclass(frozen=True)
class Published:
    """What became of one tag.

    Args:
        name: model.tag.
        repo_id: The repository; empty where the tag was left out.
        outcome: 'pushed', 'up to date', 'would be pushed', 'skipped' or 'failed'.
        commit: The commit that holds it.
        note: Why it was skipped or failed.
    """

    name: str
    repo_id: str
    outcome: str
    commit: str = ''
    note: str = ''


def provenance_of(tag: Tag) -> Provenance:
    """Where the weights of a tag come from, for config.json and the card.

    Args:
        tag: A row of the weights table.
    """
    hub = f'https://huggingface.co/{tag.hf_hub_id}' if tag.hf_hub_id else ''
    return Provenance(
        source=tag.hf_hub_id or tag.source,
        source_url=tag.url or hub or None,
        sha1=tag.sha or None,
        license=tag.licence,
        datasets=['ILSVRC/imagenet-1k'] if tag.tag.endswith('in1k') else None,
        stated=f'{tag.top1:g} % top-1 on ImageNet-1k (stated by {tag.stated_by}); not measured for this card',
    )


def card_of_tag(tag: Tag) -> str:
    """The card of a tag as `timm.create_model('model.tag', pretrained=True)` gives it, without its weights at hand.

    Args:
        tag: A row of the weights table.
    """
    name = f'{tag.model}.{tag.tag}'
    cfg: Any = timm.get_pretrained_cfg(name)
    found = {k: getattr(cfg, k) for k in _CONFIG_KEYS if getattr(cfg, k) is not None}
    config = {
        'architecture': tag.model,
        'num_classes': cfg.num_classes,
        'pretrained_cfg': {
            **{k: list(v) if isinstance(v, tuple) else v for k, v in found.items()},
            'tag': tag.tag,
            'license': tag.licence,
        },
        'timm_attn': {
            'status': 'warm start' if tag.status == 'warm' else 'converted',
            'provenance': provenance_of(tag).to_dict(),
        },
    }
    text = render_card(check_config(config, name), source=name, name=name)
    check_card(text)
    return text


def published_tags(tags: Iterable[Tag] = TAGS) -> list[Tag]:
    """The tags that are worth a repository of their own: trained ones, no warm starts."""
    return [t for t in tags if t.status == 'trained']


def write_tag_cards(directory: str | os.PathLike[str], tags: Iterable[Tag] = TAGS) -> list[Path]:
    """Writes the card of every trained tag as model_cards/model.tag.md, and the index README.md.

    Args:
        directory: The folder.
        tags: Rows of the weights table.
    """
    texts = {f'{t.model}.{t.tag}.md': card_of_tag(t) for t in published_tags(tags)}
    texts['README.md'] = index_of_tags(tags)
    for name, text in texts.items():
        with atomic_write(Path(directory) / name) as temporary:
            temporary.write_text(text, encoding='utf-8')
    return [Path(directory) / name for name in texts]


def index_of_tags(tags: Iterable[Tag] = TAGS) -> str:
    """The index of model_cards/: one line for each trained tag.

    Args:
        tags: Rows of the weights table.
    """
    lines = ['# Model cards', '', 'The cards that `timm-attn publish` puts on the Hub with the trained weights, as']
    lines += ['`timm-attn card model_cards --tags` renders them.', '', '| card | weights from | top-1 | licence |']
    lines += ['|---|---|---|---|']
    for t in published_tags(tags):
        name = f'{t.model}.{t.tag}'
        lines.append(f'| [{name}]({name}.md) | {t.source} | {t.top1:g} ({t.stated_by}) | {t.licence} |')
    return '\n'.join(lines) + '\n'


def _publish(tag: Tag, repo_id: str, private: bool, token: str | None) -> Published:
    name = f'{tag.model}.{tag.tag}'
    try:
        model = timm.create_model(name, pretrained=True)
        result = push_to_hub(
            model,
            repo_id,
            private=private,
            token=token,
            commit_message=f'Add {name}',
            status='converted',
            provenance=provenance_of(tag),
            license=tag.licence,
        )
    except (HubError, ValueError, RuntimeError, OSError) as e:
        _logger.warning('%s: %s', name, e)
        return Published(name, repo_id, 'failed', note=' '.join(str(e).split()))
    _logger.info('%s', result)
    return Published(name, repo_id, 'pushed' if result.changed else 'up to date', result.commit)


def publish(
    namespace: str,
    *,
    only: str | None = None,
    dry_run: bool = False,
    private: bool = False,
    token: str | None = None,
) -> list[Published]:
    """Converts every trained tag of the weights table and pushes it with its card, provenance and licence.

    Warm starts are left out, as they are no trained attention models, and so is what its licence does not let anybody
    pass on. One that fails does not stop the others. After an interruption the same call goes on: what is there already
    is neither sent nor committed again.

    Args:
        namespace: User or organisation.
        only: Shell pattern that 'model.tag' must match.
        dry_run: Push nothing.
        private: Whether repositories that are created are private.
        token: A token with write access; None is the one that is logged in.

    Returns:
        One row for each tag that `only` matches.

    Raises:
        ValueError: `only` matches no tag.
    """
    rows = []
    for tag in TAGS:
        name = f'{tag.model}.{tag.tag}'
        if only is not None and not fnmatch.fnmatchcase(name, only):
            continue
        repo_id = f'{namespace}/{name}'
        if tag.status != 'trained':
            rows.append(Published(name, '', 'skipped', note='a warm start is no trained attention model'))
        elif tag.licence not in _FREE:
            rows.append(
                Published(name, '', 'skipped', note=f"its licence '{tag.licence}' is none that lets one pass it on")
            )
        elif dry_run:
            rows.append(Published(name, repo_id, 'would be pushed', note=f'{tag.licence}, from {tag.source}'))
        else:
            rows.append(_publish(tag, repo_id, private, token))
    if not rows:
        names = ', '.join(f'{t.model}.{t.tag}' for t in TAGS)
        raise ValueError(f"--only '{only}' matches no tag. There are: {names}")
    return rows


def table(rows: Iterable[Published]) -> str:
    """The outcome as a Markdown table.

    Args:
        rows: What `publish` returned.
    """
    lines = ['| tag | repository | outcome | commit | note |', '|---|---|---|---|---|']
    lines += [f'| {r.name} | {r.repo_id} | {r.outcome} | {r.commit[:12]} | {r.note} |' for r in rows]
    return '\n'.join(lines)

"""`timm-attn explain`: pictures of where models look, and of what their attentions do over a folder."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..files import atomic_dir, atomic_write
from ..layers import Gate
from ..optional import require
from .draw import Explanation, Summary, class_separation, draw_explanation, draw_summary, save_figure
from .gates import Kinds, gate_kinds, gates_only, unwrapped, watch
from .grad_cam import grad_cam
from .health import GateHealth, GateStats
from .images import class_of, endings, find_images, open_image, skipped_line
from .model import image_transform, is_untrained, label_names, load_model, shown_image
from .panels import gate_vector, telling_kind


@dataclass(frozen=True)
class LabelledImage:
    """An image that is no file, such as one of a named data set.

    Attributes:
        name: What its picture is called, without ending.
        image: The image.
        label: Its class, if known.
    """

    name: str
    image: Image.Image
    label: str | None = None


def explain_image(
    model: nn.Module, image: Image.Image, *, title: str = '', crop: bool = True, cam: bool = True
) -> Explanation:
    """Everything about one image: what the model saw, its best labels, the gates and Grad-CAM.

    Args:
        model: A model with a classifier, in eval mode. One without attention has labels and Grad-CAM only.
        image: The image; upright, of any size and mode.
        title: What the picture shall be called.
        crop: As for `image_transform`.
        cam: Compute Grad-CAM.

    Returns:
        What `draw_explanation` draws.

    Raises:
        ValueError: The model has no classifier, takes no images, or gives no finite output.
    """
    model = unwrapped(model)
    labels = label_names(model)
    if not labels:
        raise ValueError(f'{type(model).__name__} has no classifier, so there is no label to explain.')
    x = image_transform(model, crop=crop)(image)
    first = next(model.parameters())
    x = x.to(first.device, first.dtype)
    kinds, maps = gate_kinds(model), {}
    with torch.no_grad():
        logits = watch(model, x, maps.__setitem__) if kinds else model(x)
    if not logits.isfinite().all():
        raise ValueError(f'{type(model).__name__} gives no finite output for this image: its weights are broken.')
    chance = logits[0].float().softmax(0)
    best = chance.topk(min(5, len(chance)))
    top = [(labels[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    heat = grad_cam(model, x, int(best.indices[0])) if cam else None
    return Explanation(shown_image(model, x), maps, kinds, top, title, heat, is_untrained(model))


def explain(
    images: Sequence[str | Path | LabelledImage],
    source: str | Sequence[str],
    out: str | Path,
    *,
    pretrained: bool = True,
    crop: bool = True,
    pictures: int = 20,
    cam: bool = True,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Writes a picture per image, and for two or more images summary.png and summary.json.

    Of several models, each picture shows all, one below the other and with one scale for each kind of gate; the
    summaries are called summary-MODEL then. A model without attention has no summary.png.

    Args:
        images: Files, folders and images. Folders are searched with all folders below; the first folder below the one
            given is an image's class.
        source: The model, as `load_model` takes it, or several.
        out: Folder to write, all of it or nothing.
        pretrained: Load the weights of registered models.
        crop: As for `image_transform`.
        pictures: Draw at most so many images; the summary counts all.
        cam: Draw Grad-CAM.
        overwrite: Replace a folder that is not empty.

    Returns:
        For each image and model: 'image', 'class' (or None), 'model', 'untrained', 'label', 'probability', 'picture'
        (or None).

    Raises:
        ValueError: An image, a model or the folder will not do; the message says which and why.
        ImportError: matplotlib is missing.
    """
    sources = [source] if isinstance(source, str) else list(dict.fromkeys(source))
    if not sources:
        raise ValueError('No model is given: name at least one.')
    items, skipped = _gather(images)
    require('matplotlib', 'lab')
    models = {s: load_model(s, pretrained=pretrained) for s in sources}
    folders = {s: _Folder(gate_kinds(m)) for s, m in models.items()}
    rows: list[dict[str, Any]] = []
    with atomic_dir(out, overwrite) as written:
        for n, (item, name) in enumerate(zip(items, _picture_names([i.name for i in items]), strict=True)):
            drawn, image = n < pictures, item.read()
            shown = []
            for s, model in models.items():
                e = explain_image(model, image, title=f'{s}: {item.name}', crop=crop, cam=cam and drawn)
                shown.append(e)
                folders[s].add(e, item.label)
                rows.append(
                    {
                        'image': item.source,
                        'class': item.label,
                        'model': s,
                        'untrained': e.untrained,
                        'label': e.top[0][0],
                        'probability': round(e.top[0][1], 4),
                        'picture': str(Path(out) / name) if drawn else None,
                    }
                )
            if drawn:
                save_figure(draw_explanation(*shown), written / name)
        if len(items) > 1:
            for s, name in zip(sources, _summary_names(sources), strict=True):
                _write_summary(folders[s].summary(s, skipped), [r for r in rows if r['model'] == s], written / name)
    return rows


@dataclass(frozen=True)
class _Item:
    """An image to explain: its file's name, where it is from, how it is read."""

    name: str
    source: str
    label: str | None
    read: Callable[[], Image.Image]


def _gather(sources: Sequence[str | Path | LabelledImage]) -> tuple[list[_Item], Counter[str]]:
    """All images, and what was left out of folders, by reason.

    Raises:
        ValueError: A path does not exist, or a folder holds no image.
    """
    items: list[_Item] = []
    skipped: Counter[str] = Counter()
    for source in sources:
        if isinstance(source, LabelledImage):
            items.append(_Item(source.name, source.name, source.label, lambda image=source.image: image))
            continue
        root = Path(source)
        if not os.path.lexists(root):
            raise ValueError(f"'{root}' does not exist: give images or folders of images.")
        paths = [root]
        if root.is_dir():
            (paths,), left_out = find_images(root)
            skipped += left_out
            if not paths:
                raise ValueError(f"'{root}' holds no image ({', '.join(sorted(endings()))}). {skipped_line(left_out)}")
        for path in paths:
            label = class_of(path, root) if path != root else None
            items.append(_Item(_printable(path.name), _printable(str(path)), label, lambda path=path: open_image(path)))
    if not items:
        raise ValueError('There is nothing to explain: give images or folders of images.')
    return items, skipped


def _printable(name: str) -> str:
    # A name of a file is bytes, which need not be text.
    return name.encode('utf-8', 'replace').decode()


class _Folder:
    """Gathers what the summary of one model shows, one image at a time.

    Args:
        kinds: `gate_kinds` of the model.
    """

    def __init__(self, kinds: Mapping[str, Kinds]) -> None:
        self.kinds = kinds
        self.classes: list[str] = []
        self.known = 0
        self.untrained = False
        self.vectors: dict[str, list[Tensor]] = {}
        self.gates: dict[str, Gate] = {}
        self.stats: dict[tuple[str, str], GateStats] = {}
        self.shapes: dict[tuple[str, str], set[torch.Size]] = {}

    def add(self, e: Explanation, label: str | None) -> None:
        self.classes.append(label or e.top[0][0])
        self.known += label is not None
        self.untrained = e.untrained
        for site, gates in e.maps.items():
            kind = telling_kind(gates, self.kinds[site])
            self.gates[site] = self.kinds[site][kind]
            self.vectors.setdefault(site, []).append(gate_vector(gates[kind], self.gates[site].axes)[0])
            real = gates_only(gates, self.kinds[site])
            for kind, gate in (real or gates).items():
                key = (site, kind)
                shapes = self.shapes.setdefault(key, set())
                shapes.add(gate.shape)
                if len(shapes) == 1:
                    self.stats.setdefault(key, GateStats(bool(real))).update(gate)

    def summary(self, source: str, skipped: Counter[str]) -> Summary:
        health: dict[str, dict[str, GateHealth]] = {}
        left_out = [f'{site} {kind}' for (site, kind), shapes in self.shapes.items() if len(shapes) > 1]
        for (site, kind), stats in self.stats.items():
            if len(self.shapes[site, kind]) == 1:
                health.setdefault(site, {})[kind] = stats.health()
        notes = []
        if left_out:
            notes.append(
                f'Images differ in size, so {len(left_out)} kinds of maps have no statistics over images: '
                'leave out --no-crop for those.'
            )
        if self.known < len(self.classes):
            notes.append('Classes are folders where there are any, else the first predicted label.')
        if not self.kinds:
            notes.append('This model has no attention, so there is no gate to count.')
        if skipped:
            notes.append(skipped_line(skipped))
        # What has one length for images of all sizes can be compared between them.
        vectors = {n: torch.stack(v) for n, v in self.vectors.items() if len({len(each) for each in v}) == 1}
        title = f'{source}: {len(self.classes)} images, {len(set(self.classes))} classes'
        return Summary(title, self.classes, vectors, health, notes, self.gates, self.untrained)


def _write_summary(s: Summary, rows: list[dict[str, Any]], path: Path) -> None:
    """Writes `path`.json, and `path`.png where there are gates."""
    if s.vectors:
        save_figure(draw_summary(s), path.with_name(f'{path.name}.png'))
    text = json.dumps(_summary_json(s, rows), indent=2, ensure_ascii=False)
    with atomic_write(path.with_name(f'{path.name}.json')) as temporary:
        temporary.write_text(f'{text}\n', encoding='utf-8')


def _summary_json(s: Summary, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        'title': s.title,
        'untrained': s.untrained,
        'notes': s.notes,
        'images': rows,
        'health': {
            site: {kind: {**asdict(h), 'verdict': h.verdict} for kind, h in kinds.items()}
            for site, kinds in s.health.items()
        },
        'class_separation': {site: class_separation(v, s.classes) for site, v in s.vectors.items()},
    }


def _picture_names(names: Sequence[str]) -> list[str]:
    """A PNG's name for each image; images of one name are told apart by a number."""
    stems = [re.sub(r'[^\w.-]+', '_', Path(name).stem)[:60] or 'image' for name in names]
    # Summaries lie beside the pictures.
    return [f'{n}.png' for n in _told_apart([f'image-{s}' if s.lower().startswith('summary') else s for s in stems])]


def _summary_names(sources: Sequence[str]) -> list[str]:
    """'summary' for one model, 'summary-MODEL' for each of several."""
    if len(sources) == 1:
        return ['summary']
    return _told_apart([f'summary-{re.sub(r"[^A-Za-z0-9_.-]+", "_", s).strip("._")[-60:]}' for s in sources])


def _told_apart(names: Sequence[str]) -> list[str]:
    taken: set[str] = set()
    result = []
    for name in names:
        unique, n = name, 1
        while unique.lower() in taken:  # Some file systems take 'One' and 'one' for the same.
            n += 1
            unique = f'{name}-{n}'
        taken.add(unique.lower())
        result.append(unique)
    return result

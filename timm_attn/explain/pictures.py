"""`timm-attn explain`: pictures of where a model looks, and of what its attentions do over a folder."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor, nn

from ..files import atomic_dir, atomic_write
from ..hub.folder import read_folder
from ..hub.load import load_from_hub
from ..layers import attn_sites
from ..optional import require
from .draw import Explanation, Summary, class_separation, draw_explanation, draw_summary, gate_vector, save_figure
from .gates import Gates, Kinds, attention_maps, gate_kinds, gates_only
from .health import GateHealth, GateStats

MAX_PIXELS = 80_000_000


def load_model(source: str, *, pretrained: bool = True) -> nn.Module:
    """A model by whatever name the user has for it, in eval mode on the CPU.

    Args:
        source: A folder with config.json, a Hub repository ('me/cbam' or 'hf-hub:me/cbam'), or a registered model.
        pretrained: Load weights; a folder or repository always does.

    Raises:
        ValueError: It is none of the three, or a folder whose files are damaged or do not fit each other.
    """
    path = Path(source.removeprefix('local-dir:'))
    if path.is_dir():
        read_folder(path)
        return timm.create_model(f'local-dir:{path}', pretrained=True).eval()
    if source.startswith('hf-hub:') or source.count('/') == 1:
        return load_from_hub(source.removeprefix('hf-hub:')).eval()
    if not timm.is_model(source):
        raise ValueError(
            f"'{source}' is no folder, no Hub repository (owner/name) and no registered model: see timm-attn list."
        )
    return timm.create_model(source, pretrained=pretrained).eval()


def image_transform(model: nn.Module, *, crop: bool = True) -> Callable[[Image.Image], Tensor]:
    """The evaluation transform of a model, from an image to a batch of one.

    Args:
        model: A timm model; its pretrained_cfg says size, crop and normalisation.
        crop: Cut out the centre as for evaluation; otherwise the whole image, its short side at the model's size.

    Raises:
        ValueError: The model takes neither grey nor colour images.
    """
    config = resolve_model_data_config(model)
    mean, std, channels = _statistics(model)
    config.update(mean=mean, std=std)
    steps: list[Any] = cast(Any, create_transform(**config, is_training=False)).transforms
    if not crop:
        # Left whole: of timm's crop modes, 'center' would cut and 'squash' distort. The last two steps make a tensor
        # and normalise it.
        steps = [_Short(min(config['input_size'][-2:])), *steps[-2:]]

    def transform(image: Image.Image) -> Tensor:
        x: Any = image.convert('L' if channels == 1 else 'RGB')
        for step in steps:
            x = step(x)
        return x[None]  # (1, C, H, W)

    return transform


class _Short:
    """Resizes the short side, keeping the shape; sides are multiples of 32, the stride of a ResNet."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        scale = self.size / min(image.size)
        step = 32 if self.size >= 64 else 1
        width, height = (max(step, round(side * scale / step) * step) for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)


def shown_image(model: nn.Module, x: Tensor) -> np.ndarray:
    """What a model saw, as an image: undoes the normalisation.

    Args:
        model: The model whose transform made x.
        x: (1, C, H, W).

    Returns:
        (H, W, 3), or (H, W) for grey images, in [0, 1].
    """
    mean, std, _ = _statistics(model)
    image = x[0].cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    array = image.clamp(0, 1).permute(1, 2, 0).numpy()
    return array[..., 0] if array.shape[2] == 1 else array


def label_names(model: nn.Module) -> list[str]:
    """Names of a model's classes: its own, ImageNet's for 1000 classes, else 'class 0' and so on."""
    count = getattr(model, 'num_classes', 0)
    names = list((getattr(model, 'pretrained_cfg', None) or {}).get('label_names') or [])
    if len(names) == count:
        return [str(n) for n in names]
    if count == 1000:
        info = ImageNetInfo()
        return [info.index_to_description(i) for i in range(count)]
    return [f'class {i}' for i in range(count)]


def open_image(path: str | Path) -> Image.Image:
    """Reads an image, upright.

    Raises:
        ValueError: It is no readable image, or one of more than 80 million pixels; the message holds the path.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"'{path}' has {image.width} x {image.height} pixels: shrink it first.")
            return ImageOps.exif_transpose(image).convert('RGB')
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as e:
        raise ValueError(f"'{path}' is no readable image ({e}).") from e


def grad_cam(model: nn.Module, x: Tensor, label: int) -> np.ndarray | str:
    """Grad-CAM of the package grad-cam on the last stage, leaving the model as it was.

    Args:
        model: A timm model with `feature_info`, in eval mode.
        x: (1, C, H, W).
        label: Class to explain.

    Returns:
        (H, W) in [0, 1], or in words why there is none.
    """
    try:
        require('pytorch_grad_cam', 'lab', pip_name='grad-cam')
    except ImportError as e:
        return str(e)
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    info = getattr(model, 'feature_info', None)
    stage = info[-1]['module'] if info else ''
    if not stage:
        return f'{type(model).__name__} names no stages (feature_info), so the last one is unknown.'
    with _frozen(model), GradCAM(model=model, target_layers=[model.get_submodule(stage)]) as cam:
        # grad-cam's annotation asks for modules where its own targets are none.
        targets: list[Any] = [ClassifierOutputTarget(label)]
        # The parameters take no gradient, so the input has to.
        found = cam(x.detach().clone().requires_grad_(), targets)[0]
    return np.nan_to_num(found)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient inside, and modes and gradients are the old ones afterwards."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training]
    gradients = [p.grad for p in model.parameters()]
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
        for m in training:
            m.training = True
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g


def find_images(sources: Sequence[str | Path]) -> list[tuple[Path, str | None]]:
    """Image files with their class, where folders tell it.

    Args:
        sources: Files, and folders that are searched with all folders below; the folder an image lies in, below the
            one given, is its class.

    Raises:
        ValueError: A path does not exist, or a folder holds no image.
    """
    found: list[tuple[Path, str | None]] = []
    endings = get_img_extensions(as_set=True)
    for source in map(Path, sources):
        if source.is_file():
            found.append((source, None))
        elif source.is_dir():
            inside = sorted(p for p in source.rglob('*') if p.suffix.lower() in endings and p.is_file())
            if not inside:
                raise ValueError(f"'{source}' holds no image ({', '.join(sorted(endings))}).")
            found += [(p, p.parent.name if p.parent != source else None) for p in inside]
        else:
            raise ValueError(f"'{source}' does not exist: give images or folders of images.")
    return found


def explain_image(
    model: nn.Module, image: Image.Image, *, title: str = '', crop: bool = True, cam: bool = True
) -> Explanation:
    """Everything about one image: what the model saw, its best labels, the gates and Grad-CAM.

    Args:
        model: A model with a classifier, in eval mode on the CPU; one without attention has Grad-CAM only.
        image: The image; upright, of any size and mode.
        title: What the picture shall be called.
        crop: As for `image_transform`.
        cam: Compute Grad-CAM.

    Returns:
        What `draw_explanation` draws.

    Raises:
        ValueError: The model has no classifier, or takes no images.
    """
    labels = label_names(model)
    if not labels:
        raise ValueError(f'{type(model).__name__} has no classifier, so there is no label to explain.')
    x = image_transform(model, crop=crop)(image)
    with torch.inference_mode():
        chance = model(x)[0].softmax(0)
    best = chance.topk(min(5, len(chance)))
    top = [(labels[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    seen = grad_cam(model, x, int(best.indices[0])) if cam else None
    maps = attention_maps(model, x) if attn_sites(model) else {}
    return Explanation(shown_image(model, x), maps, gate_kinds(model), top, title, seen)


def explain(
    images: Sequence[str | Path],
    source: str,
    out: str | Path,
    *,
    pretrained: bool = True,
    crop: bool = True,
    pictures: int = 20,
    cam: bool = True,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Writes a picture per image, and for two or more images summary.png and summary.json.

    Args:
        images: Files and folders, as `find_images` takes them.
        source: The model, as `load_model` takes it.
        out: Folder to write, all of it or nothing.
        pretrained: Load the weights of a registered model.
        crop: As for `image_transform`.
        pictures: Draw at most so many images; the summary counts all.
        cam: Draw Grad-CAM.
        overwrite: Replace a folder that is not empty.

    Returns:
        For each image: 'image', 'class' (or None), 'label', 'probability', 'picture' (or None).

    Raises:
        ValueError: An image, the model or the folder will not do; the message says which and why.
        ImportError: matplotlib is missing.
    """
    found = find_images(images)
    require('matplotlib', 'lab')
    model = load_model(source, pretrained=pretrained)
    folder = _Folder()
    rows: list[dict[str, Any]] = []
    with atomic_dir(out, overwrite) as written:
        names = _picture_names([p for p, _ in found])
        for (path, group), name in zip(found, names, strict=True):
            drawn = len(rows) < pictures
            e = explain_image(model, open_image(path), title=f'{source}: {path.name}', crop=crop, cam=cam and drawn)
            folder.add(e.maps, e.kinds, group or e.top[0][0], known=group is not None)
            if drawn:
                save_figure(draw_explanation(e), written / name)
            rows.append(
                {
                    'image': str(path),
                    'class': group,
                    'label': e.top[0][0],
                    'probability': round(e.top[0][1], 4),
                    'picture': str(Path(out) / name) if drawn else None,
                }
            )
        if len(rows) > 1:
            summary = folder.summary(source)
            save_figure(draw_summary(summary), written / 'summary.png')
            with atomic_write(written / 'summary.json') as temporary:
                temporary.write_text(json.dumps(_summary_json(summary, rows), indent=2, ensure_ascii=False) + '\n')
    return rows


class _Folder:
    """Gathers what the summary shows, one image at a time."""

    def __init__(self) -> None:
        self.classes: list[str] = []
        self.known = 0
        self.vectors: dict[str, list[Tensor]] = {}
        self.stats: dict[tuple[str, str], GateStats] = {}
        self.shapes: dict[tuple[str, str], set[torch.Size]] = {}

    def add(self, maps: Mapping[str, Gates], kinds: Mapping[str, Kinds], group: str, known: bool) -> None:
        self.classes.append(group)
        self.known += known
        for site, gates in maps.items():
            self.vectors.setdefault(site, []).append(gate_vector(gates, kinds[site])[0])
            real = gates_only(gates, kinds[site])
            for kind, gate in (real or gates).items():
                key = (site, kind)
                shapes = self.shapes.setdefault(key, set())
                shapes.add(gate.shape)
                if len(shapes) == 1:
                    self.stats.setdefault(key, GateStats(bool(real))).update(gate)

    def summary(self, source: str) -> Summary:
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
        title = f'{source}: {len(self.classes)} images, {len(set(self.classes))} classes'
        return Summary(title, self.classes, {n: torch.stack(v) for n, v in self.vectors.items()}, health, notes)


def _summary_json(s: Summary, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        'title': s.title,
        'notes': s.notes,
        'images': rows,
        'health': {
            site: {kind: {**asdict(h), 'verdict': h.verdict} for kind, h in kinds.items()}
            for site, kinds in s.health.items()
        },
        'class_separation': {site: class_separation(v, s.classes) for site, v in s.vectors.items()},
    }


def _picture_names(paths: Sequence[Path]) -> list[str]:
    """A PNG name for each image; images of one name are told apart by a number."""
    taken = {'summary.png'}
    names = []
    for path in paths:
        name, n = f'{path.stem}.png', 1
        while name in taken:
            n += 1
            name = f'{path.stem}-{n}.png'
        taken.add(name)
        names.append(name)
    return names


def _statistics(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Mean and deviation of each input channel, and the number of channels."""
    config = resolve_model_data_config(model)
    channels = getattr(model, 'in_chans', None) or config['input_size'][0]
    if channels not in (1, 3):
        raise ValueError(f'{type(model).__name__} takes {channels} channels; only grey (1) and colour (3) are images.')
    mean, std = tuple(config['mean']), tuple(config['std'])
    if len(mean) != channels:
        mean, std = ((sum(v) / len(v),) * channels for v in (mean, std))
    return mean, std, channels

"""Images for the lab: scikit-learn's digits, torchvision's small data sets, or a folder with one folder per class.

Whatever the source, a `Data` holds two `Images` that timm's `create_loader` takes, so that transforms, collation and
prefetching are timm's.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data
from PIL import Image, UnidentifiedImageError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.readers.reader_image_folder import find_images_and_targets

from ..optional import require

DATA = ('digits', 'fashion-mnist', 'cifar10', 'cifar100')
_EVAL_FOLDERS = ('validation', 'val', 'test')  # The first that exists is the evaluation split of an image folder.


class Images(torch.utils.data.Dataset):
    """Labelled images, decoded when asked for.

    Args:
        items: Arrays (H, W) or (H, W, 3) of bytes, or paths of image files.
        targets: The class of each item.
        mode: 'L' for one channel, 'RGB' for three.
    """

    def __init__(self, items: Sequence[np.ndarray | Path], targets: Sequence[int], mode: str):
        self.items = items
        self.targets = [int(t) for t in targets]
        self.mode = mode
        self.transform: Callable[[Image.Image], Any] | None = None  # Set by timm's create_loader.

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.image(index)
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def image(self, index: int) -> Image.Image:
        """Decodes one image.

        Raises:
            ValueError: The file is no readable image; the message holds its path.
        """
        item = self.items[index]
        if isinstance(item, np.ndarray):
            return Image.fromarray(item).convert(self.mode)
        try:
            with Image.open(item) as image:
                return image.convert(self.mode)
        except (OSError, SyntaxError) as e:
            raise ValueError(f"'{item}' is no readable image ({e}): repair or remove it.") from e

    def first(self, count: int) -> 'Images':
        """The first `count` images, in turn from each class so that all classes stay."""
        seen: dict[int, int] = {}
        rank = []
        for i, target in enumerate(self.targets):
            rank.append((seen.setdefault(target, 0), i))
            seen[target] += 1
        chosen = sorted(i for _, i in sorted(rank)[:count])
        return Images([self.items[i] for i in chosen], [self.targets[i] for i in chosen], self.mode)


@dataclass(frozen=True)
class Data:
    """A data set for one comparison.

    Args:
        name: What the user calls it.
        train: Images to learn from.
        val: Images to measure on.
        classes: Name of each class.
        img_size: Usual side in pixels.
        mean: Per channel, in [0, 1].
        std: Per channel, in [0, 1].
        augment: Keyword arguments of timm's `create_loader` for the training images.
    """

    name: str
    train: Images
    val: Images
    classes: list[str]
    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: dict[str, Any] = field(default_factory=dict)

    @property
    def in_chans(self) -> int:
        return 1 if self.train.mode == 'L' else 3

    def reduced(self, train: int, val: int) -> 'Data':
        """The same data with fewer images, for a trial."""
        return replace(self, train=self.train.first(train), val=self.val.first(val))

    def fingerprint(self) -> str:
        """A digest of labels and images (of a folder: names and sizes), the same wherever the folder lies."""
        digest = hashlib.sha256()
        for images in (self.train, self.val):
            for item, target in zip(images.items, images.targets, strict=True):
                if isinstance(item, np.ndarray):
                    digest.update(np.ascontiguousarray(item).tobytes())
                else:
                    digest.update(f'{item.parent.name}/{item.name}:{item.stat().st_size}'.encode())
                digest.update(b':%d;' % target)
            digest.update(b'|')
        return digest.hexdigest()[:16]


def load_data(name: str, *, data_dir: str | Path | None = None, download: bool = False) -> Data:
    """Loads a data set by name, or a folder of images.

    Args:
        name: 'digits' (inside scikit-learn), 'fashion-mnist', 'cifar10', 'cifar100', or the path of a folder with
            `train` and `validation` (or `val`, `test`) folders or directly with one folder per class, of which a
            fifth is then kept for measuring.
        data_dir: Where torchvision's data sets lie or go.
        download: Fetch what is missing.

    Raises:
        ValueError: The name is unknown, the files are absent, or the folder holds no two classes of readable images.
    """
    if name == 'digits':
        return _digits()
    root = Path(data_dir) if data_dir else Path.home() / '.cache' / 'timm_attn' / 'data'
    if name == 'fashion-mnist':
        return _fashion_mnist(root, download)
    if name in ('cifar10', 'cifar100'):
        return _cifar(name, root, download)
    if Path(name).is_dir():
        return _folder(Path(name))
    raise ValueError(f"Unknown data '{name}': expected one of {', '.join(DATA)}, or a folder that exists.")


def split(targets: Sequence[int], fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Splits indices by class, so that each class gives the same part.

    Args:
        targets: The class of each item.
        fraction: The part that goes to the second list, at least one item of each class.
        seed: Decides which.

    Raises:
        ValueError: A class has one item only.
    """
    rng = np.random.default_rng(seed)
    labels = np.asarray(targets)
    held = []
    for c in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == c))
        if len(members) < 2:
            raise ValueError(f'Class {c} has one image only; two are needed, one to learn from and one to measure on.')
        held += members[: max(1, round(fraction * len(members)))].tolist()
    chosen = set(held)
    return [i for i in range(len(labels)) if i not in chosen], sorted(held)


def _digits() -> Data:
    bunch = require('sklearn.datasets', 'lab', 'scikit-learn').load_digits()
    images = [np.round(i * (255 / 16)).astype(np.uint8) for i in bunch.images]  # (8, 8), 17 grey levels
    train, val = split(bunch.target, fraction=1 / 3)
    return Data(
        name='digits',
        # Three equal channels, so that the trained model takes ordinary pictures.
        train=Images([images[i] for i in train], bunch.target[train], 'RGB'),
        val=Images([images[i] for i in val], bunch.target[val], 'RGB'),
        classes=[str(c) for c in range(10)],
        img_size=32,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        augment=dict(hflip=0.0, color_jitter=None, scale=(0.7, 1.0), ratio=(0.85, 1.18)),
    )


def _fashion_mnist(root: Path, download: bool) -> Data:
    sets = require('torchvision.datasets', 'lab', 'torchvision')
    train, val = (_torchvision(sets.FashionMNIST, 'fashion-mnist', root, t, download) for t in (True, False))
    return Data(
        name='fashion-mnist',
        train=Images(list(train.data.numpy()), train.targets.tolist(), 'L'),
        val=Images(list(val.data.numpy()), val.targets.tolist(), 'L'),
        classes=list(train.classes),
        img_size=28,
        mean=(0.2860,),
        std=(0.3530,),
        augment=dict(no_aug=True),
    )


def _cifar(name: str, root: Path, download: bool) -> Data:
    binary = root / {'cifar10': 'cifar-10-batches-bin', 'cifar100': 'cifar-100-binary'}[name]
    if binary.is_dir():
        (x, y), (x_val, y_val), classes = _cifar_binary(name, binary)
    else:
        sets = require('torchvision.datasets', 'lab', 'torchvision')
        cls = {'cifar10': sets.CIFAR10, 'cifar100': sets.CIFAR100}[name]
        train, val = (_torchvision(cls, name, root, t, download) for t in (True, False))
        x, y, x_val, y_val, classes = train.data, train.targets, val.data, val.targets, train.classes
    stats = {
        'cifar10': ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        'cifar100': ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    }
    return Data(
        name=name,
        train=Images(list(x), y, 'RGB'),
        val=Images(list(x_val), y_val, 'RGB'),
        classes=list(classes),
        img_size=32,
        mean=stats[name][0],
        std=stats[name][1],
        augment=dict(hflip=0.5, color_jitter=None, scale=(0.6, 1.0)),
    )


def _torchvision(cls: Callable[..., Any], name: str, root: Path, train: bool, download: bool) -> Any:
    try:
        return cls(root=str(root), train=train, download=download)
    except (RuntimeError, OSError) as e:
        why = ' '.join(str(e).split())
        if download:
            raise ValueError(f"Could not fetch {name} into '{root}' ({why}): check the network.") from e
        raise ValueError(f"No {name} in '{root}' ({why}): give its folder by --data-dir, or pass --download.") from e


def _cifar_binary(name: str, folder: Path) -> tuple[tuple[np.ndarray, list[int]], tuple[np.ndarray, list[int]], list]:
    """Reads the 'binary version' of https://www.cs.toronto.edu/~kriz/cifar.html, which needs no unpickling."""
    files, labels, meta = {
        'cifar10': (([f'data_batch_{i}.bin' for i in range(1, 6)], ['test_batch.bin']), 1, 'batches.meta.txt'),
        'cifar100': ((['train.bin'], ['test.bin']), 2, 'fine_label_names.txt'),
    }[name]
    parts = []
    for names in files:
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise ValueError(f"'{folder}' lacks {', '.join(missing)} of {name}'s binary version.")
        raw = np.concatenate([np.fromfile(folder / n, dtype=np.uint8) for n in names])
        if len(raw) == 0 or len(raw) % (labels + 3072):
            raise ValueError(f"The files {', '.join(names)} in '{folder}' are no whole number of {name} records.")
        records = raw.reshape(-1, labels + 3072)
        images = records[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (N, 32, 32, 3)
        parts.append((np.ascontiguousarray(images), records[:, labels - 1].tolist()))  # The fine label is the last.
    count = {'cifar10': 10, 'cifar100': 100}[name]
    known = (folder / meta).read_text().split() if (folder / meta).is_file() else []
    return parts[0], parts[1], known if len(known) == count else [str(c) for c in range(count)]


def _folder(root: Path) -> Data:
    if (root / 'train').is_dir():
        held = next((root / n for n in _EVAL_FOLDERS if (root / n).is_dir()), None)
        if held is None:
            raise ValueError(f"'{root}' has a 'train' folder, but none of {', '.join(_EVAL_FOLDERS)} to measure on.")
        train, classes = _samples(root / 'train')
        val, val_classes = _samples(held, classes)
        if unknown := sorted(set(val_classes) - set(classes)):
            raise ValueError(f"'{held}' has classes that '{root / 'train'}' has not: {', '.join(unknown)}.")
    else:
        samples, classes = _samples(root)
        try:
            chosen, kept = split([t for _, t in samples], fraction=0.2)
        except ValueError as e:
            raise ValueError(f"'{root}' ({', '.join(classes)}): {e}") from e
        train, val = [samples[i] for i in chosen], [samples[i] for i in kept]
    return Data(
        name=root.resolve().name,
        train=Images([p for p, _ in train], [t for _, t in train], 'RGB'),
        val=Images([p for p, _ in val], [t for _, t in val], 'RGB'),
        classes=list(classes),
        img_size=224,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        augment=dict(hflip=0.5, scale=(0.35, 1.0)),
    )


def _samples(root: Path, class_to_idx: dict[str, int] | None = None) -> tuple[list[tuple[Path, int]], dict[str, int]]:
    found, classes = find_images_and_targets(str(root))
    if not found:
        raise ValueError(f"'{root}' holds no images; expected one folder per class with images in it.")
    if class_to_idx is None and len(classes) < 2:
        raise ValueError(f"'{root}' holds one class only ({', '.join(map(repr, classes))}); two or more are needed.")
    if '' in classes:
        raise ValueError(f"'{root}' holds images outside of class folders, such as '{_outside(found, root)}'.")
    names = {index: name for name, index in classes.items()}
    numbers = class_to_idx or classes
    samples = [(Path(p), numbers.get(names[t], -1)) for p, t in found]
    for path, _ in samples:
        try:
            # Reads the header only: a damaged body is found, and named, when the image is first decoded.
            Image.open(path).close()
        except (UnidentifiedImageError, OSError) as e:
            raise ValueError(f"'{path}' is no readable image ({e}): repair or remove it.") from e
    return samples, classes


def _outside(found: list[tuple[str, int]], root: Path) -> Path:
    return next(Path(p) for p, _ in found if Path(p).parent == root)

"""Images for the lab: scikit-learn's digits, torchvision's small data sets, or a folder with one folder per class.

Whatever the source, a `Data` holds two `Images` that timm's `create_loader` takes, so that transforms, collation and
prefetching are timm's.
"""

import gzip
import hashlib
import logging
import math
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset

from ..explain.images import check_image, class_of, endings, find_images, hidden, natural, open_image, skipped_line
from ..layers import did_you_mean
from ..optional import require

_logger = logging.getLogger(__name__)

DATA = ('digits', 'fashion-mnist', 'cifar10', 'cifar100')
_DEBIAN = Path('/usr/share/datasets/fashion-mnist')  # Where the package dataset-fashion-mnist puts its files.
_FASHION = 'T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot'.split(',')
_HELD = ('val', 'valid', 'validation', 'dev', 'test')
_SPLITS = {'train': 'train', 'training': 'train', 'test': 'test', 'testing': 'test'} | dict.fromkeys(_HELD[:-1], 'val')


def stream_seed(*of: object) -> int:
    """A seed that is a function of what names it, such as seed, epoch and the index of an image."""
    return int.from_bytes(hashlib.sha256('/'.join(map(str, of)).encode()).digest()[:4], 'big')


@contextmanager
def randomness_of(*of: object) -> Iterator[None]:
    """Random numbers that are a function of `of` inside the block; outside they go on as if none had been drawn."""
    before = rng_state()
    seed = stream_seed(*of)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for the GPU's numbers too.
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        set_rng_state(before)


def rng_state() -> tuple[Any, ...]:
    """The random numbers of torch on the CPU, NumPy and Python."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def set_rng_state(state: tuple[Any, ...]) -> None:
    """Goes back to a state that `rng_state` gave."""
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])


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
        self.stream: tuple[int, int] | None = None  # Seed and epoch, set by a run before it draws.
        self.stacked = False  # Whether `__getitems__` gives batches; see `stacks`.

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.image(index)
        if self.transform is None:
            return image, self.targets[index]
        if self.stream is None:
            return self.transform(image), self.targets[index]
        # Whoever decodes this image, and after which others: its augmentation is the same.
        with randomness_of(*self.stream, index):
            return self.transform(image), self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """The samples of a batch, for torch's loader; where they are `stacked`, as two tensors."""
        if not self.stacked:
            return [self[i] for i in indices]
        items: Any = self.items
        x = np.stack([items[i] for i in indices])  # (N, H, W) or (N, H, W, 3)
        x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(x)), torch.tensor([self.targets[i] for i in indices])

    def stacks(self, side: int) -> bool:
        """Whether all items are arrays of this side and mode, which a mere resizing and cropping leaves as they are.

        Then Pillow and the transforms of each image can be left out, which cost more than a small network's step.
        """
        shape = (side, side) if self.mode == 'L' else (side, side, 3)
        return all(isinstance(i, np.ndarray) and i.dtype == np.uint8 and i.shape == shape for i in self.items)

    def image(self, index: int) -> Image.Image:
        """Decodes one image, upright and in eight bits.

        Raises:
            ValueError: The file is no readable image; the message holds its path.
        """
        item = self.items[index]
        image = Image.fromarray(item) if isinstance(item, np.ndarray) else open_image(item)
        return image.convert(self.mode)

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
        measured: Which images `val` holds, for people: a folder's name, or how it was drawn.
        skipped: Files that are left out, counted by reason.
    """

    name: str
    train: Images
    val: Images
    classes: list[str]
    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: dict[str, Any] = field(default_factory=dict)
    measured: str = 'held out'
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def in_chans(self) -> int:
        """Channels of an image: 1 for grey ones, else 3."""
        return 1 if self.train.mode == 'L' else 3

    def reduced(self, train: int, val: int) -> 'Data':
        """The same data with at most so many images, in turn from each class."""
        if train < 1 or val < 1:
            raise ValueError(f'Images to learn from (={train}) and to measure on (={val}) must be at least 1 each.')
        measured = self.measured + (f', {val} of its {len(self.val)} images' if val < len(self.val) else '')
        return replace(self, train=self.train.first(train), val=self.val.first(val), measured=measured)

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


def load_data(
    name: str | Path,
    *,
    data_dir: str | Path | None = None,
    download: bool = False,
    val_dir: str | Path | None = None,
    test_dir: str | Path | None = None,
) -> Data:
    """Loads a data set by name, or a folder of images.

    In a folder of images, the class is the first folder below the root or below the split. Splits are folders named
    train, one of val, valid, validation and dev, and test, in any case; measured on is val, and test where there is no
    val. Without splits a fifth of each class is kept for measuring.

    Args:
        name: 'digits' (inside scikit-learn), 'fashion-mnist', 'cifar10', 'cifar100', one of timm's names of
            torchvision's small sets, such as 'torch/kmnist', or the path of a folder.
        data_dir: Where the named data sets lie or go.
        download: Fetch what is missing.
        val_dir: Folder of the images to measure on, for a folder of images.
        test_dir: The same, measured on where there is no `val_dir`.

    Raises:
        ValueError: The name is unknown, the files are absent, or the folder holds no two classes of readable images.
    """
    if (val_dir or test_dir) and name in DATA:
        raise ValueError(f"'{name}' has splits of its own: val_dir and test_dir are for a folder of images.")
    if name == 'digits':
        return _digits()
    root = Path(data_dir) if data_dir else Path.home() / '.cache' / 'timm_attn' / 'data'
    if name == 'fashion-mnist':
        if download:
            sets = require('torchvision.datasets', 'lab', 'torchvision')
            for train in (True, False):
                _torchvision(sets.FashionMNIST, 'fashion-mnist', root, train, download)
        return _fashion_mnist([root] if data_dir else [root, _DEBIAN])
    if name in ('cifar10', 'cifar100'):
        return _cifar(str(name), root, download)
    if str(name).startswith('torch/'):
        return _of_timm(str(name), root, download)
    if Path(name).is_dir():
        data = _folder(Path(name), *(Path(d) if d else None for d in (val_dir, test_dir)))
        _logger.info(
            '%s: %d images to learn from; measured on %d: %s. %s',
            name,
            len(data.train),
            len(data.val),
            data.measured,
            skipped_line(data.skipped),
        )
        return data
    raise ValueError(
        f"Unknown data '{name}'.{did_you_mean(name, DATA)} Expected one of {', '.join(DATA)}, or a folder that exists."
    )


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
        measured='a third of each class, drawn once',
    )


def _fashion_mnist(folders: Sequence[Path]) -> Data:
    """Reads the authors' four files, packed or not, wherever torchvision, Debian or a user puts them."""
    places = [f / part for f in folders for part in ('', 'raw', 'FashionMNIST/raw', 'FashionMNIST', 'fashion-mnist')]
    for place in places:
        if _idx_path(place, 'train', 'images') is not None:
            break
    else:
        sought = ' or '.join(f"'{f}'" for f in folders)
        raise ValueError(
            f"No fashion-mnist in {sought}: install Debian's package "
            '(apt-get install dataset-fashion-mnist), give the folder of its four files by --data-dir, or pass '
            '--download.'
        )
    (x, y), (x_val, y_val) = (_idx_pair(place, part) for part in ('train', 't10k'))
    return Data(
        name='fashion-mnist',
        train=Images(list(x), y.tolist(), 'L'),
        val=Images(list(x_val), y_val.tolist(), 'L'),
        classes=list(_FASHION),
        img_size=28,
        mean=(0.2860,),
        std=(0.3530,),
        augment=dict(no_aug=True),
        measured='its test set, t10k',
    )


def _idx_path(folder: Path, part: str, kind: str) -> Path | None:
    rank = {'images': 3, 'labels': 1}[kind]
    names = [f'{part}-{kind}{dot}idx{rank}-ubyte{end}' for dot in '-.' for end in ('', '.gz')]
    return next((folder / n for n in names if (folder / n).is_file()), None)


def _idx_pair(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,) of one split."""
    arrays = []
    for kind in ('images', 'labels'):
        path = _idx_path(folder, part, kind)
        if path is None:
            raise ValueError(f"'{folder}' lacks the file {part}-{kind}-idx*-ubyte (or .gz) of Fashion-MNIST.")
        arrays.append(read_idx(path))
    images, labels = arrays
    if images.shape[1:] != (28, 28) or labels.ndim != 1 or len(images) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"'{folder}': the {part} files hold images {images.shape} and labels {labels.shape}; expected (N, 28, 28) "
            'and (N,): fetch them again.'
        )
    if labels.max() >= len(_FASHION):
        raise ValueError(f"'{folder}': a label of {part} is {labels.max()}, and Fashion-MNIST has classes 0 to 9.")
    return images, labels


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, packed by gzip or not.

    Args:
        path: The file.

    Raises:
        ValueError: It is damaged, or holds something else; the message holds its path.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b'\x1f\x8b' else raw
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"'{path}' cannot be read ({e}): fetch it again.") from e
    # Two zero bytes, 8 for unsigned bytes, the number of dimensions; then each size, big-endian.
    rank = raw[3] if raw[:3] == b'\0\0\x08' and len(raw) > 3 else 0
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], 'big') for i in range(rank)]
    if not rank or len(raw) != 4 + 4 * rank + math.prod(shape):
        raise ValueError(f"'{path}' is no whole IDX file of bytes ({len(raw)} bytes, sizes {shape}): fetch it again.")
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


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
        measured='its test set',
    )


def _torchvision(cls: Callable[..., Any], name: str, root: Path, train: bool, download: bool) -> Any:
    try:
        return cls(root=str(root), train=train, download=download)
    except (RuntimeError, OSError) as e:
        why = ' '.join(str(e).split())
        if download:
            raise ValueError(f"Could not fetch {name} into '{root}' ({why}): check the network.") from e
        raise ValueError(f"No {name} in '{root}' ({why}): give its folder by --data-dir, or pass --download.") from e


def _of_timm(name: str, root: Path, download: bool) -> Data:
    """Torchvision's sets by timm's names, those that are arrays in memory: torch/mnist, torch/kmnist, ..."""
    try:
        parts: list[Any] = [
            create_dataset(name, root=str(root), split=split, download=download) for split in ('train', 'validation')
        ]
        arrays = [(np.asarray(part.data), [int(t) for t in part.targets]) for part in parts]
    except (RuntimeError, OSError, AttributeError, AssertionError) as e:
        raise ValueError(
            f"No {name} of arrays in '{root}' ({' '.join(str(e).split())}): give its folder by --data-dir, or pass "
            '--download; of a set that is no array, write a folder with one folder per class.'
        ) from e
    (x, y), (x_val, y_val) = arrays
    pixels = x.reshape(-1, 1 if x.ndim == 3 else x.shape[-1]) / 255
    return Data(
        name=name,
        train=Images(list(x), y, 'L' if x.ndim == 3 else 'RGB'),
        val=Images(list(x_val), y_val, 'L' if x.ndim == 3 else 'RGB'),
        classes=[str(c) for c in parts[0].classes],
        img_size=x.shape[1],
        mean=tuple(pixels.mean(0).round(4).tolist()),
        std=tuple(pixels.std(0).round(4).tolist()),
        augment=dict(no_aug=True),
        measured='its test set',
    )


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


def _folder(root: Path, val_dir: Path | None, test_dir: Path | None) -> Data:
    name = root.resolve().name
    children = _split_folders(root)
    by_hand = {'val': val_dir, 'test': test_dir}
    if any(by_hand.values()):
        roots = {'train': children.get('train', root)} | {k: v for k, v in by_hand.items() if v}
    elif 'train' in children:
        roots = children
        if len(roots) == 1:
            raise ValueError(
                f"'{root}' has a '{roots['train'].name}' folder, but none of {', '.join(_HELD)} to measure on: "
                'name one by --val-dir.'
            )
    elif children:
        found = ', '.join(f"'{c.name}'" for c in children.values())
        raise ValueError(f"'{root}' has {found}, but no 'train' folder to learn from: name the parts by --val-dir.")
    else:
        roots = {'train': root}
    for folder in roots.values():
        if not folder.is_dir():
            raise ValueError(f"'{folder}' is no folder: expected one folder per class in it.")
    parts, skipped = find_images(*roots.values(), within=None if any(by_hand.values()) else root)
    images = dict(zip(roots, parts, strict=True))
    for child in root.iterdir() if len(roots) > 1 and roots['train'] != root else ():
        if child.is_dir() and not hidden(child.name) and child.resolve() not in {r.resolve() for r in roots.values()}:
            skipped[f"folder '{child.name}' beside the splits"] += 1
    classes = _classes(roots['train'], images['train'])
    train = _labelled(roots['train'], images['train'], classes)
    if len(roots) > 1:
        key = 'val' if 'val' in roots else 'test'
        held = roots[key]
        measured = held.name if roots['train'] != root and held.parent == root else str(held)
        val = _labelled(held, images[key], classes)
        for other in roots.keys() - {'train', key}:
            skipped[f"image in '{roots[other].name}', which is not measured on"] += len(images[other])
    else:
        try:
            chosen, kept = split([t for _, t in train], fraction=0.2)
        except ValueError as e:
            raise ValueError(f"'{root}' ({', '.join(classes)}): {e}") from e
        train, val = [train[i] for i in chosen], [train[i] for i in kept]
        measured = 'a fifth of each class, drawn once'
    for path, _ in (*train, *val):
        check_image(path)
    return Data(
        name=name,
        train=Images([p for p, _ in train], [t for _, t in train], 'RGB'),
        val=Images([p for p, _ in val], [t for _, t in val], 'RGB'),
        classes=list(classes),
        img_size=224,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        augment=dict(hflip=0.5, scale=(0.35, 1.0)),
        measured=measured,
        skipped=dict(sorted(skipped.items())),
    )


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders that are splits by their names: 'train', 'val', 'test', where they are there."""
    found: dict[str, Path] = {}
    for child in sorted(root.iterdir()):
        split = _SPLITS.get(child.name.lower())
        if split is None or not child.is_dir():
            continue
        if split in found:
            raise ValueError(
                f"'{root}' has '{found[split].name}' and '{child.name}', which mean the same: rename or remove one."
            )
        if not child.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"'{child}' is a link that leads out of the folder: name the parts by --val-dir.")
        found[split] = child
    return found


def _classes(root: Path, images: Sequence[Path]) -> dict[str, int]:
    """Class names in natural order, the first folders below the root."""
    if not images:
        raise ValueError(f"'{root}' holds no images ({' '.join(sorted(endings()))}); expected one folder per class.")
    used = {class_of(p, root) for p in images}
    if None in used:
        outside = next(p for p in images if p.parent == root)
        raise ValueError(f"'{root}' holds images outside of class folders, such as '{outside}'.")
    names = sorted((c for c in used if c is not None), key=natural)
    if len(names) < 2:
        raise ValueError(f"'{root}' holds one class only ({', '.join(map(repr, names))}); two or more are needed.")
    folders = {p.name for p in root.iterdir() if p.is_dir() and not p.is_symlink() and not hidden(p.name)}
    if empty := sorted(folders - used):
        raise ValueError(
            f"'{root}' has folders without an image that is read: {', '.join(empty)}: remove or fill them."
        )
    return {name: i for i, name in enumerate(names)}


def _labelled(root: Path, images: Sequence[Path], classes: dict[str, int]) -> list[tuple[Path, int]]:
    if not images:
        raise ValueError(f"'{root}' holds no images ({' '.join(sorted(endings()))}); expected one folder per class.")
    labelled = [(p, class_of(p, root)) for p in images]
    if outside := [p for p, c in labelled if c is None]:
        raise ValueError(f"'{root}' holds images outside of class folders, such as '{outside[0]}'.")
    if unknown := sorted({c for _, c in labelled if c is not None} - classes.keys()):
        raise ValueError(f"'{root}' has classes that the training images have not: {', '.join(unknown)}.")
    return [(p, classes[c]) for p, c in labelled if c is not None]

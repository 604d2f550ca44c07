"""Image files and folders of them, read in one way for training, explaining and the demo."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 80_000_000
# Formats that Pillow knows by name but draws by another program, or holds a stub for.
_NO_RASTER = {'EPS', 'WMF', 'MPEG', 'BUFR', 'GRIB', 'HDF5'}
_GREY = ('1', 'L', 'LA', 'La')


def endings() -> set[str]:
    """The endings of file names that Pillow reads as images, in lower case with their dot."""
    known = Image.registered_extensions()  # Also loads Pillow's plugins.
    return {ending for ending, kind in known.items() if kind in Image.OPEN and kind not in _NO_RASTER}


def open_image(path: str | Path) -> Image.Image:
    """Reads an image: upright, eight bits a channel, in mode 'L' where it is grey and 'RGB' where not.

    16-bit images keep their upper eight bits. Of 32-bit and float images the range is that of the values: [0, 1],
    [0, 255] and [0, 65535] are taken as such, anything else from the least to the greatest. Transparency is dropped.

    Args:
        path: An ordinary file, or a link to one.

    Raises:
        ValueError: It is no readable image, or one of more than 80 million pixels; the message holds the path.
    """
    try:
        with _opened(path) as image:
            return plain(image)
    except Exception as e:  # On a damaged file, Pillow's decoders raise whatever comes.
        raise _unreadable(path, e) from e


def check_image(path: str | Path) -> None:
    """Reads the header only: a damaged body is found, and named, when the image is first decoded.

    Raises:
        ValueError: As `open_image`.
    """
    try:
        _opened(path).close()
    except Exception as e:
        raise _unreadable(path, e) from e


def plain(image: Image.Image) -> Image.Image:
    """The same picture upright, in mode 'L' or 'RGB', as `open_image` gives it.

    Args:
        image: Of any mode.

    Raises:
        ValueError: It holds values that are not finite.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ('L', 'RGB'):
        return image.copy()
    if image.mode in _GREY:
        return image.convert('L')
    if image.mode[0] in 'IF':
        return Image.fromarray(_bytes(np.asarray(image), deep=image.mode.startswith('I;16')))
    if image.mode == 'LAB':
        from PIL import ImageCms

        profiles: list = [ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB')]
        converted = ImageCms.profileToProfile(image, *profiles, outputMode='RGB')
        assert converted is not None  # In place is not asked for.
        return converted
    if image.mode in ('P', 'PA'):  # Straight to 'RGB', Pillow warns of transparency that it drops.
        return image.convert('RGBA').convert('RGB')
    return image.convert('RGB')


def _bytes(values: np.ndarray, deep: bool) -> np.ndarray:
    """Brings numbers of more than eight bits, (H, W), to bytes."""
    if not np.isfinite(values).all():
        raise ValueError('it holds NaN or infinite values')
    low, high = float(values.min()), float(values.max())
    if deep or (low >= 0 and 255 < high <= 65535):
        return (values.astype(np.uint16) >> 8).astype(np.uint8)
    if low >= 0 and high <= 1 and values.dtype.kind == 'f':
        scaled = values.astype(np.float64) * 255
    elif low >= 0 and high <= 255:
        scaled = values.astype(np.float64)
    else:
        scaled = (values.astype(np.float64) - low) * (255 / (high - low or 1))
    return np.rint(scaled).astype(np.uint8)


def _opened(path: str | Path) -> Image.Image:
    if not Path(path).is_file():  # A pipe would be waited for, and a device has no end.
        raise ValueError('it is no ordinary file' if os.path.lexists(path) else 'there is no such file')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # The limit below is lower.
        image = Image.open(path)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f'{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}: shrink it')
    return image


def _unreadable(path: str | Path, error: Exception) -> ValueError:
    return ValueError(f"'{path}' is no readable image ({error}): repair or remove it.")


def find_images(*roots: str | Path, within: str | Path | None = None) -> tuple[list[list[Path]], Counter[str]]:
    """Image files below folders, each file once.

    Hidden entries are passed over. A link is followed where it leads to something inside the same folder that was not
    found without it; pipes and devices are never opened.

    Args:
        *roots: Folders. A file that is reachable from several belongs to the first.
        within: The folder that links may lead to; each root for itself by default.

    Returns:
        For each root its images in natural order, and how many entries were left out, by reason.
    """
    skipped: Counter[str] = Counter()
    walks = [_Walk(Path(root), within or root, skipped) for root in roots]
    seen: set[str] = set()
    for walk in walks:  # What is there without a link comes first, so that a link to it is the second way to it.
        walk.visit([str(walk.root)], seen)
    for walk in walks:
        walk.follow(seen)
    return [sorted(w.found, key=lambda p: [natural(part) for part in p.parts]) for w in walks], skipped


def natural(name: str) -> tuple[list[int | str], str]:
    """Sorts 'c2' before 'c10', as timm does."""
    parts = re.split(r'(\d+)', name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


class _Walk:
    def __init__(self, root: Path, within: str | Path, skipped: Counter[str]) -> None:
        self.root = root
        self.real = os.path.realpath(within)
        self.skipped = skipped
        self.endings = endings()
        self.found: list[Path] = []
        self.links: list[str] = []

    def visit(self, folders: list[str], seen: set[str]) -> None:
        while folders:
            folder = folders.pop()
            real = os.path.realpath(folder)
            if real in seen:
                self.skipped['link to what is there already'] += 1
                continue
            seen.add(real)
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda e: e.name):
                    if hidden(entry.name):
                        self.skipped['hidden (.*, __MACOSX)'] += 1
                    elif entry.is_symlink():
                        self.links.append(entry.path)
                    elif entry.is_dir():
                        folders.append(entry.path)
                    else:
                        self._file(entry.path, entry.is_file(), seen)

    def follow(self, seen: set[str]) -> None:
        while self.links:
            path = self.links.pop(0)
            real = os.path.realpath(path)
            if not Path(real).is_relative_to(self.real):
                self.skipped['link that leads out of the folder'] += 1
            elif os.path.isdir(real):
                self.visit([path], seen)
            elif not os.path.lexists(real):
                self.skipped['link to nothing'] += 1
            else:
                self._file(path, os.path.isfile(real), seen)

    def _file(self, path: str, ordinary: bool, seen: set[str]) -> None:
        ending = os.path.splitext(path)[1].lower()
        real = os.path.realpath(path)
        if not ordinary:
            self.skipped['pipe, device or socket'] += 1
        elif ending not in self.endings:
            self.skipped[f'no image by its ending ({ending or "none"})'] += 1
        elif real in seen:
            self.skipped['link to what is there already'] += 1
        else:
            seen.add(real)
            self.found.append(Path(path))


def hidden(name: str) -> bool:
    """Whether a name is that of a hidden entry, which is no class and no image."""
    return name.startswith('.') or name == '__MACOSX'


def skipped_line(skipped: Counter[str] | dict[str, int]) -> str:
    """What was left out, as a sentence; empty where nothing was."""
    return f'Left out: {", ".join(f"{n} x {why}" for why, n in sorted(skipped.items()))}.' if skipped else ''


def class_of(path: Path, root: Path) -> str | None:
    """The first folder below the root that a file lies in, None where it lies in the root itself."""
    parts: Sequence[str] = path.relative_to(root).parts
    return parts[0] if len(parts) > 1 else None

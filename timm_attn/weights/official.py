"""Weights that the authors host themselves: where they are, what they are, and how to fetch them.

They are never hosted again by this package. Nobody has verified the downloads here: addresses, licences and accuracies
are as the authors' READMEs state them. Each source's file lists its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..optional import require
from .sources import SOURCES

DRIVE = 'https://drive.google.com/uc?id='


@dataclass(frozen=True)
class Official:
    """One file of its authors.

    Attributes:
        name: What stands behind 'official/'.
        model: The registered model that it fits.
        source: What `convert(source=...)` is called with.
        place: Google Drive id, or an address.
        home: The authors' repository.
        licence: As stated there; None where nothing is.
        top1: ImageNet-1k accuracy in percent as stated there; None where nothing is.
        model_args: Arguments of the model.
    """

    name: str
    model: str
    source: str
    place: str
    home: str
    licence: str | None
    top1: float | None
    model_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The address of the file."""
        return self.place if '://' in self.place else f'{DRIVE}{self.place}'


OFFICIAL: tuple[Official, ...] = tuple(
    Official(file.name, file.model, source.name, file.place, source.home, source.licence, file.top1, file.model_args)
    for source in SOURCES
    for file in source.files
)


def get_official(name: str) -> Official:
    """The row of a name.

    Args:
        name: With or without 'official/'.

    Raises:
        ValueError: There is none; the message names all.
    """
    short = name.removeprefix('official/')
    found = next((o for o in OFFICIAL if o.name == short), None)
    if found is None:
        names = ', '.join(o.name for o in OFFICIAL)
        raise ValueError(f"Unknown file '{name}'. Expected official/ and one of: {names}.")
    return found


def fetch(official: Official, directory: str | Path) -> Path:
    """Downloads a file of its authors with gdown, from Google Drive or another address.

    Args:
        official: The row.
        directory: Where the file goes.

    Returns:
        The file.

    Raises:
        ImportError: gdown is not installed.
        RuntimeError: The download failed: no connection, a quota, a file that is no longer shared.
    """
    gdown = require('gdown', 'weights')
    path = Path(directory) / f'{official.name}.pth'
    try:
        got = gdown.download(url=official.url, output=str(path), quiet=True, use_cookies=False)
    except Exception as e:  # gdown has exceptions of its own and lets those of requests through
        raise RuntimeError(
            f'{official.url} could not be downloaded: {e}. Fetch it with a browser and give its path to timm-attn '
            f'convert --model {official.model} --source {official.source}.'
        ) from e
    if got is None or not path.is_file():
        raise RuntimeError(f'{official.url} gave no file: it may no longer be shared, or its daily quota is used up.')
    return path

"""Weights that the authors host themselves: where they are, what they are, and how to fetch them.

They are never hosted again by this package. Nobody has verified the downloads here: addresses, licences and accuracies
are as the authors' READMEs state them, and triplet_resnet18_k3 is suspected to hold another net (landskape-ai issue
16), which the conversion would refuse.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..optional import require

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


_JONGCHAN = 'https://github.com/Jongchan/attention-module'
_ECANET = 'https://github.com/BangguWu/ECANet'
_TRIPLET = 'https://github.com/landskape-ai/triplet-attention'
_INSIGHT = 'https://github.com/implus/PytorchInsight'
_MOSKOMULE = 'https://github.com/moskomule/senet.pytorch'
_K3 = {'attn_args': {'kernel_size': 3}}

OFFICIAL: tuple[Official, ...] = (
    Official(
        'cbam_resnet50', 'cbam_resnet50', 'jongchan', '1mvAVvhLR_2XY_bPYxh-SEz4vDmGzSArO', _JONGCHAN, 'mit', 77.622
    ),
    Official('bam_resnet50', 'bam_resnet50', 'jongchan', '1auVf70gfL0ol40bvaX5rlbpn9cKIxhAL', _JONGCHAN, 'mit', 76.860),
    Official('eca_resnet18', 'eca_resnet18', 'ecanet', '1LMRFRTyzVifGBi2MUpTuYEWW44S8mwyl', _ECANET, 'mit', 70.92),
    Official('eca_resnet34', 'eca_resnet34', 'ecanet', '15LV5Jkea3GPzvLP5__H7Gg88oNQUxBDE', _ECANET, 'mit', 74.21),
    Official('eca_resnet50', 'eca_resnet50', 'ecanet', '1670rce333c_lyMWFzBlNZoVUvtxbCF_U', _ECANET, 'mit', 77.42),
    Official('eca_resnet101', 'eca_resnet101', 'ecanet', '1b5FQ8yDFnZ_UhvWT9txmjI_LjbKkgnvC', _ECANET, 'mit', 78.65),
    Official('eca_resnet152', 'eca_resnet152', 'ecanet', '1_bYnaOg9ptsILC_iC7uQ5Izv-u2rjYG5', _ECANET, 'mit', 78.92),
    Official(
        'triplet_resnet18_k3',
        'triplet_resnet18',
        'triplet',
        '1p3_s2kA5NFWqCtp4zvZdc91_2kEQhbGD',
        _TRIPLET,
        'mit',
        70.33,
        _K3,
    ),
    Official(
        'triplet_resnet18_k7',
        'triplet_resnet18',
        'triplet',
        '1jIDfA0Psce10L06hU0Rtz8t7s2U1oqLH',
        _TRIPLET,
        'mit',
        71.09,
    ),
    Official(
        'triplet_resnet50_k3',
        'triplet_resnet50',
        'triplet',
        '1W6aDE6wVNY9NwgcM7WMx_vRhG2-ZiMur',
        _TRIPLET,
        'mit',
        76.12,
        _K3,
    ),
    Official(
        'triplet_resnet50_k7',
        'triplet_resnet50',
        'triplet',
        '1ptKswHzVmULGbE3DuX6vMCjEbqwUvGiG',
        _TRIPLET,
        'mit',
        77.48,
    ),
    Official(
        'moskomule_se_resnet50',
        'se_resnet50',
        'moskomule',
        f'{_MOSKOMULE}/releases/download/archive/seresnet50-60a8950a85b2b.pkl',
        _MOSKOMULE,
        'mit',
        77.06,
    ),
    Official(
        'insight_se_resnet101', 'se_resnet101', 'insight', '1MOGkkqs6v_LCgO6baGDmcFYbuOkwZjK9', _INSIGHT, None, 78.468
    ),
    Official(
        'insight_sk_resnet50', 'sk_resnet50', 'insight', '1DGYWPeKc7dyJ9i-zPJcPPa2engExPOnJ', _INSIGHT, None, 77.538
    ),
    Official(
        'insight_sk_resnet101', 'sk_resnet101', 'insight', '1WB7HXx-cvUIxFRe-M61XZIzUN0a3nsbF', _INSIGHT, None, 78.792
    ),
    Official(
        'insight_cbam_resnet50', 'cbam_resnet50', 'insight', '1Q5gIKPARrZzDbCPZHpuj9tqXs06c2YZN', _INSIGHT, None, 77.626
    ),
    Official(
        'insight_cbam_resnet101',
        'cbam_resnet101',
        'insight',
        '1UHLt3C59M1fRta6i9iLsj-RvIbKusgQN',
        _INSIGHT,
        None,
        78.354,
    ),
    Official(
        'insight_bam_resnet50', 'bam_resnet50', 'insight', '1K5iAUAIF_yRyC2pIiA65F8Ig0x4NzOqk', _INSIGHT, None, 76.898
    ),
    Official(
        'insight_bam_resnet101', 'bam_resnet101', 'insight', '15EUQ6aAoXzPm1YeAH4ZqnF3orEr0dB8f', _INSIGHT, None, 78.218
    ),
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

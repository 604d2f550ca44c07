"""Multi-spectral channel attention (FcaNet).

Paper: FcaNet: Frequency Channel Attention Networks (ICCV 2021), https://arxiv.org/abs/2012.11879
Code:  https://github.com/cfzd/FcaNet @aa5fb63

SE whose mean over the map is one of 16 waves of the discrete cosine transform, each for its run of C / 16 channels. As
in the code, the transform is orthonormal, so that the run of the mean holds d times the mean. The code stores the waves
in its state dict; here they are computed, so that no cast can round them. It pools maps of other sizes to d x d by
`adaptive_avg_pool2d`, which has no deterministic backward pass on CUDA; here the waves are spread over the bins, which
is the same sum.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.fx
from torch import Tensor, nn

from ._base import Attention, Gate, rd_ratio_of, reduced_channels
from ._gate import gated
from ._precision import upcast
from ._registry import register_attn

# The 16 frequencies of the released nets, "top16", of a 7 x 7 map: along rows, and along columns.
ROWS: tuple[int, ...] = (0, 0, 6, 0, 0, 1, 1, 4, 5, 1, 3, 0, 0, 0, 3, 2)
COLUMNS: tuple[int, ...] = (0, 1, 0, 5, 2, 0, 2, 0, 0, 6, 0, 4, 6, 3, 5, 2)


@torch.fx.wrap
def waves(frequencies: list[int], size: int, length: int, like: Tensor) -> Tensor:
    """cos(pi u (t + 1/2) / d), normalised, spread over the pixels of `adaptive_avg_pool` from `length` to d = `size`.

    Args:
        frequencies: u, for a 7 x 7 map.
        size: d; frequencies are those of 7 x 7 times d // 7.
        length: Pixels along the side, H or W.
        like: Where the result is placed, and its type.

    Returns:
        (len(frequencies), length).
    """
    u = torch.arange(7, device=like.device)[:, None] * (size // 7)
    t = torch.arange(size, device=like.device)
    # The angle counts steps of pi / 2d; taking whole turns out of it as integers keeps float32 exact.
    angle = (u * (2 * t + 1)) % (4 * size)  # (7, d)
    wave = (angle.to(like.dtype) * (math.pi / (2 * size))).cos() * ((1 + (u > 0)).to(like.dtype) / size).sqrt()
    # Bin t covers the pixels from floor(t * length / d) to ceil((t + 1) * length / d), and divides by their number.
    pixel = torch.arange(length, device=like.device)
    first, end = t * length // size, ((t + 1) * length + size - 1) // size
    inside = (pixel >= first[:, None]) & (pixel < end[:, None])  # (d, length)
    share = inside.to(like.dtype) / (end - first)[:, None]
    spread = (wave[:, :, None] * share).sum(1)  # (7, length)
    return torch.stack([spread[f] for f in frequencies])


@register_attn(
    'fca',
    placement='block',
    equation='y = x s(W2 relu(W1 z)), z_c = one DCT frequency of channel c',
    title='FcaNet: Frequency Channel Attention Networks',
    authors='Qin, Zequn and Zhang, Pengyi and Wu, Fei and Li, Xi',
    year=2021,
    venue='ICCV',
    paper='https://arxiv.org/abs/2012.11879',
    code='https://github.com/cfzd/FcaNet',
    licence='MIT',
)
class FCA(Attention):
    """Gates each channel by a two-layer function of one frequency of each channel's map.

    Args:
        channels: Channels C of the (N, C, H, W) input.
        rd_ratio: Hidden width over C.
        dct_size: Side d of the map that the frequencies are those of, whatever the input's size. The released nets
            have 56, 28, 14 and 7 in their four stages.

    Raises:
        ValueError: 16 does not divide the channels, `rd_ratio` leaves no hidden channel, or `dct_size` is below 7,
            where all frequencies would be 0.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {'channel': Gate('C', 'channel')}
    recomputable = True
    __constants__ = ('dct_size',)

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        dct_size: int = 7,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(neutral_gate=0.5)
        if channels < 1 or channels % len(ROWS):
            raise ValueError(f'channels (={channels}) must be divisible by the {len(ROWS)} frequencies.')
        if dct_size < 7:
            raise ValueError(f'dct_size (={dct_size}) must be at least 7: below, all frequencies would be 0.')
        self.dct_size, self.rows, self.columns = dct_size, list(ROWS), list(COLUMNS)
        hidden = reduced_channels(channels, rd_ratio)
        self.fc1 = nn.Linear(channels, hidden, bias=False, **dd)
        self.fc2 = nn.Linear(hidden, channels, bias=False, **dd)

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        nn.init.zeros_(self.fc2.weight)

    def spectrum(self, x: Tensor) -> Tensor:
        """One frequency of the cosine transform for each channel: (N, C)."""
        q = upcast(x).unflatten(1, (16, -1))  # (N, 16, C / 16, H, W)
        rows = waves(self.rows, self.dct_size, x.shape[2], q)  # (16, H)
        columns = waves(self.columns, self.dct_size, x.shape[3], q)  # (16, W)
        basis = rows[:, None, :, None] * columns[:, None, None, :]  # (16, 1, H, W)
        return (q * basis).sum((3, 4)).flatten(1)  # (N, C)

    def channel_gate(self, x: Tensor) -> Tensor:
        """The gate of channels (N, C, 1, 1)."""
        z = self.spectrum(x).to(x.dtype)
        return self.fc2(self.fc1(z).relu()).sigmoid()[:, :, None, None]  # (N, C, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return gated(x, [self.channel_gate(x)], self.gain)

    @classmethod
    def options_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        return rd_ratio_of(shapes)

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        return {'channel': self.channel_gate(x).flatten(1)}

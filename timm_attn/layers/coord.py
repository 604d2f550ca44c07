"""Coordinate attention.

Paper: Coordinate Attention for Efficient Mobile Network Design (CVPR 2021), https://arxiv.org/abs/2103.02907
Code:  https://github.com/houqb/CoordAttention @7619bea

As in the code, rows and columns pass one BatchNorm together, and the nonlinearity is hard-swish. timm's `coord` is
another module: other widths, no biases.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import Attention, Gate
from ._gate import crossed, mean
from ._registry import register_attn


@register_attn(
    'coord',
    placement='block',
    equation='y = x s(W_h u_h) s(W_w u_w), u = hswish(BN(W [mean over columns ; mean over rows]))',
    title='Coordinate Attention for Efficient Mobile Network Design',
    authors='Hou, Qibin and Zhou, Daquan and Feng, Jiashi',
    year=2021,
    venue='CVPR',
    paper='https://arxiv.org/abs/2103.02907',
    code='https://github.com/houqb/CoordAttention',
    licence='MIT',
)
class CoordAttention(Attention):
    """Gates each row and each column of each channel by the means along rows and columns.

    Args:
        channels: Channels C of the (N, C, H, W) input.
        rd_ratio: Hidden width over C.
        min_width: Least hidden width.

    Raises:
        ValueError: `rd_ratio` or `min_width` is not positive.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {
        'hc': Gate('HC', 'rows x channels'),
        'cw': Gate('CW', 'channels x columns'),
    }
    recomputable = True

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 32,
        min_width: int = 8,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(neutral_gate=0.25)
        if rd_ratio <= 0 or min_width < 1:
            raise ValueError(f'rd_ratio (={rd_ratio:g}) and min_width (={min_width}) must be positive.')
        hidden = max(min_width, int(channels * rd_ratio + 1e-6))
        self.conv1 = nn.Conv2d(channels, hidden, 1, **dd)
        self.bn1 = nn.BatchNorm2d(hidden, **dd)
        self.conv_h = nn.Conv2d(hidden, channels, 1, **dd)
        self.conv_w = nn.Conv2d(hidden, channels, 1, **dd)

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        for conv in (self.conv_h, self.conv_w):
            nn.init.zeros_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def row_and_column_gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gates of rows (N, C, H, 1) and of columns (N, C, 1, W)."""
        h, w = x.shape[2], x.shape[3]
        strip = torch.cat([mean(x, [3]), mean(x, [2])], dim=2).unsqueeze(3)  # (N, C, H + W, 1)
        u = F.hardswish(self.bn1(self.conv1(strip)))  # (N, hidden, H + W, 1)
        u_h, u_w = u.split([h, w], dim=2)
        a_w = self.conv_w(u_w).sigmoid().transpose(2, 3)
        return self.conv_h(u_h).sigmoid(), a_w  # (N, C, H, 1), (N, C, 1, W)

    def forward(self, x: Tensor) -> Tensor:
        a_h, a_w = self.row_and_column_gates(x)
        return crossed(x, a_h, a_w * self.gain)

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """'hc' (N, H, C) and 'cw' (N, C, W)."""
        a_h, a_w = self.row_and_column_gates(x)
        return {'hc': a_h.squeeze(3).transpose(1, 2), 'cw': a_w.squeeze(2)}

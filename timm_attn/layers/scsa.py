"""Spatial and channel synergistic attention.

Paper: SCSA: Exploring the Synergistic Effects Between Spatial and Channel Attention (Neurocomputing 2025),
       https://arxiv.org/abs/2407.05128
Code:  https://github.com/HZAI-ZJNU/SCSA @8c46866

The official networks have it in the middle of each block; here it stands where SE does. The code fails on maps smaller
than its window; here the window shrinks with them. Energies and softmax are taken in float32.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import Attention, Gate
from ._gate import GateConv, attend, attention_matrix, crossed, mean, window_means
from ._norm import GroupNorm
from ._precision import upcast
from ._registry import register_attn


@torch.fx.wrap
def _cells(x: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Means of windows side by side, of the whole map where it is smaller than one.

    Args:
        x: (N, C, H, W).
        window: Side of the windows.

    Returns:
        (N, C, rows, columns), and which of them count (rows, columns), as numbers: a remainder does not.
    """
    h, w = x.shape[2], x.shape[3]
    if not torch.jit.is_scripting() and torch.compiler.is_compiling():
        # Further windows that do not count: a number of windows that may be 1 on one map and not on the next is no
        # size of a tensor to a compiler.
        pad = (0, 2 * window - 1, 0, 2 * window - 1)
        inside = F.avg_pool2d(F.pad(x.new_ones(1, 1, h, w), pad), window)  # share of each window in the map
        y = F.avg_pool2d(F.pad(x, pad), window) / inside.clamp(min=1 / (2 * window * window))
    else:
        y = window_means(x, window)
    row, column = torch.arange(y.shape[2], device=x.device), torch.arange(y.shape[3], device=x.device)
    rows, columns = ((row + 1) * window <= h) | (row == 0), ((column + 1) * window <= w) | (column == 0)
    return y, (rows[:, None] & columns).to(x.dtype)


class CellNorm(nn.GroupNorm):
    """A GroupNorm of one group over the cells that count.

    Args:
        channels: Channels C of the (N, C, rows, columns) input.
    """

    def __init__(
        self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(1, channels, device=device, dtype=dtype)

    def forward(self, input: Tensor, counts: Tensor) -> Tensor:
        n = counts.sum() * input.shape[1]
        mean = (input * counts).sum((1, 2, 3), keepdim=True) / n  # (N, 1, 1, 1)
        centred = (input - mean) * counts
        var = centred.square().sum((1, 2, 3), keepdim=True) / n
        y = centred * (var + self.eps).rsqrt() * self.weight[:, None, None] + self.bias[:, None, None]
        return y * counts


@register_attn(
    'scsa',
    placement='block',
    equation='x1 = x s(GN(conv1d rows)) s(GN(conv1d columns)); y = x1 s(mean(softmax(q kᵀ / sqrt d) v)) over channels',
    title='SCSA: Exploring the Synergistic Effects Between Spatial and Channel Attention',
    authors='Si, Yunzhong and Xu, Huiying and Zhu, Xinzhong and Zhang, Wenhao and Dong, Yao and others',
    year=2025,
    venue='Neurocomputing',
    paper='https://arxiv.org/abs/2407.05128',
    code='https://github.com/HZAI-ZJNU/SCSA',
    licence='Apache-2.0',
)
class SCSA(Attention):
    """Gates rows and columns by their neighbours' means, then channels by self-attention among channels.

    Args:
        channels: Channels C of the (N, C, H, W) input.
        num_heads: Heads that share the channels.
        window_size: Side of the windows whose means the self-attention sees; less on smaller maps.

    Raises:
        ValueError: 4 or `num_heads` does not divide the channels, or `window_size` is not positive.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {
        'channel': Gate('C', 'channel'),
        'hc': Gate('HC', 'rows x channels'),
        'cw': Gate('CW', 'channels x columns'),
        'matrix': Gate('KCC', 'channel to channel', multiplies=False),
    }
    recomputable = True
    keywords = ('self-attention',)
    __constants__ = ('num_heads', 'window_size')

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        window_size: int = 7,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(neutral_gate=0.125)
        if channels < 4 or channels % 4:
            raise ValueError(f'channels (={channels}) must be divisible by 4, one part for each kernel.')
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f'num_heads (={num_heads}) must divide the channels (={channels}).')
        if window_size < 1:
            raise ValueError(f'window_size (={window_size}) must be positive.')
        self.num_heads, self.window_size = num_heads, window_size
        self.scale = (channels // num_heads) ** -0.5
        part = channels // 4
        self.conv3 = nn.Conv1d(part, part, 3, padding=1, groups=part, **dd)
        self.conv5 = nn.Conv1d(part, part, 5, padding=2, groups=part, **dd)
        self.conv7 = nn.Conv1d(part, part, 7, padding=3, groups=part, **dd)
        self.conv9 = nn.Conv1d(part, part, 9, padding=4, groups=part, **dd)
        self.norm_h = GroupNorm(4, channels, **dd)
        self.norm_w = GroupNorm(4, channels, **dd)
        self.norm = CellNorm(channels, **dd)
        self.q = GateConv(channels, channels, 1, groups=channels, bias=False, **dd)
        self.k = GateConv(channels, channels, 1, groups=channels, bias=False, **dd)
        self.v = GateConv(channels, channels, 1, groups=channels, bias=False, **dd)

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        for norm in (self.norm_h, self.norm_w):
            nn.init.zeros_(norm.weight)
            nn.init.zeros_(norm.bias)
        nn.init.zeros_(self.v.weight)

    def neighbours(self, strip: Tensor) -> Tensor:  # (N, C, L)
        """A strip convolved over its length, with a kernel of its own for each quarter of the channels."""
        a, b, c, d = strip.chunk(4, 1)
        return torch.cat([self.conv3(a), self.conv5(b), self.conv7(c), self.conv9(d)], 1)

    def row_and_column_gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gates of rows (N, C, H, 1) and of columns (N, C, 1, W)."""
        a_h = self.norm_h(self.neighbours(mean(x, [3]))).sigmoid()  # (N, C, H)
        a_w = self.norm_w(self.neighbours(mean(x, [2]))).sigmoid()  # (N, C, W)
        return a_h.to(x.dtype)[:, :, :, None], a_w.to(x.dtype)[:, :, None]

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values of channels (N, heads, d, cells), and how many cells count."""
        y, counts = _cells(upcast(x), self.window_size)
        y = self.norm(y, counts).to(self.q.weight.dtype)  # (N, C, rows, columns), 0 where none counts
        heads = (self.num_heads, -1)
        q = self.q(y).flatten(2).unflatten(1, heads)  # (N, heads, d, cells)
        k = self.k(y).flatten(2).unflatten(1, heads)
        v = self.v(y).flatten(2).unflatten(1, heads)
        return q, k, v, counts.sum()

    def channel_gate(self, q: Tensor, k: Tensor, v: Tensor, cells: Tensor) -> Tensor:
        """The gate of channels (N, C, 1, 1), in the precision of the self-attention."""
        o = attend(q, k, v, self.scale).sum(3) / cells  # (N, heads, d)
        return o.sigmoid().flatten(1)[:, :, None, None]  # (N, C, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a_h, a_w = self.row_and_column_gates(x)
        q, k, v, cells = self.qkv(crossed(x, a_h, a_w))
        channel = self.channel_gate(q, k, v, cells).to(x.dtype)
        # Gates meet each other before x, so that small numbers of half precision come back whole from the identity.
        return crossed(x, a_h * (channel * self.gain), a_w)

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """'hc' (N, H, C), 'cw' (N, C, W), 'matrix' (N, heads, d, d) and 'channel' (N, C)."""
        a_h, a_w = self.row_and_column_gates(x)
        q, k, v, cells = self.qkv(crossed(x, a_h, a_w))
        channel = self.channel_gate(q, k, v, cells).to(x.dtype).flatten(1)
        matrix = attention_matrix(q, k, self.scale)
        return {'channel': channel, 'hc': a_h.squeeze(3).transpose(1, 2), 'cw': a_w.squeeze(2), 'matrix': matrix}

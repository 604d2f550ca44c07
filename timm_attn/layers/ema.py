"""Efficient multi-scale attention.

Paper: Efficient Multi-Scale Attention Module with Cross-Spatial Learning (ICASSP 2023),
       https://arxiv.org/abs/2305.13563
Code:  https://github.com/YOLOonMe/EMA-attention-module @afc37ec

Written from the equations, since the code states no licence. No ResNet with it is released; here it stands where SE
does. Copies with 8 groups are common; this has the paper's 32.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ._base import Attention, Gate
from ._gate import crossed, gated, mean
from ._norm import GroupNorm
from ._precision import matmul_upcast, upcast
from ._registry import register_attn


@register_attn(
    'ema',
    placement='block',
    equation='y = x s(softmax(mean v1) v2 + softmax(mean v2) v1) by groups, v1 = GN(x s(u_h) s(u_w)), v2 = conv3(x)',
    title='Efficient Multi-Scale Attention Module with Cross-Spatial Learning',
    authors='Ouyang, Daliang and He, Su and Zhang, Guozhong and Luo, Mingzhu and Guo, Huaiyong and others',
    year=2023,
    venue='ICASSP',
    paper='https://arxiv.org/abs/2305.13563',
    code='https://github.com/YOLOonMe/EMA-attention-module',
    licence='none stated',
)
class EMA(Attention):
    """Gates the pixels of each group of channels by two branches that weight each other's channels.

    Args:
        channels: Channels C of the (N, C, H, W) input.
        groups: Groups of consecutive channels, which share all weights.

    Raises:
        ValueError: `groups` does not divide the channels.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {'spatial': Gate('CHW', 'spatial, by group')}
    recomputable = True
    __constants__ = ('groups',)

    def __init__(
        self,
        channels: int,
        groups: int = 32,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(neutral_gate=0.5)
        if groups < 1 or channels < 1 or channels % groups:
            raise ValueError(f'groups (={groups}) must divide the channels (={channels}).')
        self.groups = groups
        width = channels // groups
        self.conv1x1 = nn.Conv2d(width, width, 1, **dd)
        self.gn = GroupNorm(width, width, **dd)  # of one channel each
        self.conv3x3 = nn.Conv2d(width, width, 3, padding=1, **dd)

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        nn.init.zeros_(self.gn.weight)
        nn.init.zeros_(self.gn.bias)
        nn.init.zeros_(self.conv3x3.weight)
        if self.conv3x3.bias is not None:
            nn.init.zeros_(self.conv3x3.bias)

    def group_gate(self, x: Tensor) -> Tensor:
        """One gate of pixels for each group of channels: (N, g, 1, H, W)."""
        h, w = x.shape[2], x.shape[3]
        v = x.unflatten(1, (self.groups, -1)).flatten(0, 1)  # (N g, c, H, W)
        strip = torch.cat([mean(v, [3]), mean(v, [2])], dim=2).unsqueeze(3)  # (N g, c, H + W, 1)
        u_h, u_w = self.conv1x1(strip).sigmoid().split([h, w], dim=2)
        v1 = self.gn(crossed(v, u_h, u_w.transpose(2, 3)))  # (N g, c, H, W)
        v2 = self.conv3x3(v)  # (N g, c, H, W)
        w1 = mean(upcast(v1), [2, 3]).softmax(1).unsqueeze(1)  # (N g, 1, c)
        w2 = mean(upcast(v2), [2, 3]).softmax(1).unsqueeze(1)
        t = matmul_upcast(w1, v2.flatten(2)) + matmul_upcast(w2, v1.flatten(2))  # (N g, 1, M)
        gate = t.sigmoid().to(x.dtype).unflatten(0, (-1, self.groups))  # (N, g, 1, M)
        return gate.unflatten(3, (h, w))  # (N, g, 1, H, W)

    def forward(self, x: Tensor) -> Tensor:
        v = x.unflatten(1, (self.groups, -1))  # (N, g, c, H, W)
        return gated(v, [self.group_gate(x)], self.gain).flatten(1, 2)

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """'spatial' (N, C, H, W): one map a group, repeated for its channels."""
        return {'spatial': self.group_gate(x).expand(-1, -1, x.shape[1] // self.groups, -1, -1).flatten(1, 2)}

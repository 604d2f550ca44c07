"""Style-based Recalibration Module.

Paper: SRM: A Style-based Recalibration Module for Convolutional Neural Networks (ICCV 2019),
       https://arxiv.org/abs/1903.10829
Code:  https://github.com/hyunjaelee410/style-based-recalibration-module @f6221c7 (no licence: written from the
       equations)

Two departures: the statistics are taken in float32, and a 1 x 1 map has variance 0, where the released code divides
by zero and poisons its running statistics.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ._base import Attention, Gate
from ._gate import gated, mean
from ._precision import upcast
from ._registry import register_attn


@register_attn(
    'srm',
    placement='block',
    equation='y = x s(BN(w1 mean x + w2 std x))',
    title='SRM: A Style-based Recalibration Module for Convolutional Neural Networks',
    authors='Lee, HyunJae and Kim, Hyo-Eun and Nam, Hyeonseob',
    year=2019,
    venue='ICCV',
    paper='https://arxiv.org/abs/1903.10829',
    code='https://github.com/hyunjaelee410/style-based-recalibration-module',
    licence='none stated',
)
class SRM(Attention):
    """Gates each channel by its own mean and standard deviation.

    `cfc` starts at 0, so every gate starts at 0.5, and is trained without weight decay, as released.
    In training its BatchNorm needs a batch of at least 2.

    Args:
        channels: Channels C of the (N, C, H, W) input.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {'channel': Gate('C', 'channel')}
    no_weight_decay = ('cfc',)
    statistics = ('mean', 'var')

    def __init__(
        self,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(neutral_gate=0.5)
        self.cfc = nn.Parameter(torch.zeros(channels, 2, **dd))
        self.bn = nn.BatchNorm2d(channels, **dd)

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        nn.init.zeros_(self.cfc)
        nn.init.zeros_(self.bn.bias)

    def gate_of(self, mean: Tensor, var: Tensor) -> Tensor:  # (N, C) both
        """The gate of channels, from their means and variances."""
        z = mean * self.cfc[:, 0] + (var + 1e-5).sqrt() * self.cfc[:, 1]  # (N, C)
        return self.bn(z[:, :, None, None].to(self.cfc.dtype)).sigmoid()  # (N, C, 1, 1)

    def channel_gate(self, x: Tensor) -> Tensor:
        """The gate of channels (N, C, 1, 1)."""
        m = x.shape[2] * x.shape[3]
        u = upcast(x)
        centre = mean(u, [2, 3], keepdim=True)  # (N, C, 1, 1)
        # The squared distance to the mean: torch.var is several times slower on CPU, and keeps as much for backward.
        # The operator itself, since mse_loss() compares sizes, which torch.jit.trace cannot follow.
        var = torch.ops.aten.mse_loss(u, centre.expand_as(u), 0).sum((2, 3))  # (N, C)
        # Unbiased. One element has no spread, and 1 // m keeps the divisor from being 0.
        return self.gate_of(centre.flatten(1), var / (m - 1 + 1 // m)).to(x.dtype)  # (N, C, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return gated(x, [self.channel_gate(x)], self.gain)

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        return {'channel': self.channel_gate(x).flatten(1)}

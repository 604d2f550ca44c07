"""Bottleneck Attention Module.

Paper: BAM: Bottleneck Attention Module (BMVC 2018), https://arxiv.org/abs/1807.06514
Code:  https://github.com/Jongchan/attention-module @459efad

The released weights multiply the two branches, s(Mc * Ms), and have no BatchNorm at the branches' ends; that is the
default. The paper's sum, s(Mc + Ms) with BatchNorms there, is `combine='add'`. The released pooling kernel takes H for
both sides and fails on tall maps; here the mean is global.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ._base import Attention, Gate, check_choice, rd_ratio_of, reduced_channels
from ._gate import jointly_gated, mean
from ._registry import register_attn


@register_attn(
    'bam',
    placement='stage',
    equation='y = x (1 + s(Mc(mean x) Ms(x)))',
    title='BAM: Bottleneck Attention Module',
    authors='Park, Jongchan and Woo, Sanghyun and Lee, Joon-Young and Kweon, In So',
    year=2018,
    venue='BMVC',
    paper='https://arxiv.org/abs/1807.06514',
    code='https://github.com/Jongchan/attention-module',
    licence='MIT',
)
class BAM(Attention):
    """Multiplies by 1 + s(Mc * Ms), a channel branch and a dilated spatial branch, between two stages.

    In training its BatchNorm over (N, C // r) needs a batch of at least 2.

    Args:
        channels: Channels C of the (N, C, H, W) input.
        rd_ratio: Width of both branches over C.
        dilation: Dilation of the two 3x3 convolutions.
        combine: 'mul' as released, or 'add' as in the paper.

    Raises:
        ValueError: `rd_ratio` leaves no hidden channel, or `combine` is neither.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {
        'spatial': Gate('HW', 'spatial branch', multiplies=False),
        'gate': Gate('CHW', 'joint gate'),
        'channel': Gate('C', 'channel branch', multiplies=False),
    }
    __constants__ = ('add',)

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        dilation: int = 4,
        combine: str = 'mul',
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(neutral_gate=1.5)
        check_choice('combine', combine, ('mul', 'add'))
        hidden = reduced_channels(channels, rd_ratio)
        self.add = combine == 'add'

        self.fc1 = nn.Linear(channels, hidden, **dd)
        self.bn1 = nn.BatchNorm2d(hidden, **dd)
        self.fc2 = nn.Linear(hidden, channels, **dd)

        self.conv_reduce = nn.Conv2d(channels, hidden, 1, **dd)
        self.bn_reduce = nn.BatchNorm2d(hidden, **dd)
        self.conv_dil1 = nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation, **dd)
        self.bn_dil1 = nn.BatchNorm2d(hidden, **dd)
        self.conv_dil2 = nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation, **dd)
        self.bn_dil2 = nn.BatchNorm2d(hidden, **dd)
        self.conv_final = nn.Conv2d(hidden, 1, 1, **dd)
        if self.add:
            self.bn_channel = nn.BatchNorm2d(channels, **dd)
            self.bn_spatial = nn.BatchNorm2d(1, **dd)

        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
            if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None:
                nn.init.zeros_(m.bias)

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        # One factor of a product is enough, and were both 0, neither would get a gradient.
        last = (self.bn_channel, self.bn_spatial) if self.add else (self.conv_final,)
        for m in last:
            nn.init.zeros_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    def channel_branch(self, x: Tensor) -> Tensor:
        """What the channels add to the joint gate, before the sigmoid: (N, C, 1, 1)."""
        # BatchNorms of maps of one pixel: timm freezes, splits and synchronises those of maps.
        z = self.bn1(self.fc1(mean(x, [2, 3]))[:, :, None, None]).relu()  # (N, C // r, 1, 1)
        z = self.fc2(z.flatten(1))[:, :, None, None]  # (N, C, 1, 1)
        return self.bn_channel(z) if self.add else z

    def spatial_branch(self, x: Tensor) -> Tensor:
        """What the pixels add to the joint gate, before the sigmoid: (N, 1, H, W)."""
        u = self.bn_reduce(self.conv_reduce(x)).relu()  # (N, C // r, H, W)
        u = self.bn_dil1(self.conv_dil1(u)).relu()
        u = self.bn_dil2(self.conv_dil2(u)).relu()
        u = self.conv_final(u)  # (N, 1, H, W)
        if self.add:
            u = self.bn_spatial(u)
        return u

    def forward(self, x: Tensor) -> Tensor:
        # Both branches meet in a gate for each number of the map.
        return jointly_gated(x, self.channel_branch(x), self.spatial_branch(x), self.add, self.gain)

    @classmethod
    def options_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        return rd_ratio_of(shapes)

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """The two branches before they are joined, and the joint gate: 'channel', 'spatial', 'gate' (N, C, H, W)."""
        mc, ms = self.channel_branch(x), self.spatial_branch(x)
        joint = (mc + ms if self.add else mc * ms).sigmoid()
        return {'channel': mc.flatten(1), 'spatial': ms.squeeze(1), 'gate': joint}

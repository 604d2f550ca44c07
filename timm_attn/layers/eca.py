"""Efficient Channel Attention.

Paper: ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks (CVPR 2020),
       https://arxiv.org/abs/1910.03151
Code:  https://github.com/BangguWu/ECANet @b332f6b

The paper computes the kernel from C; the released ResNets were trained with other sizes (3, 5, 5, 7 at depth 50), so
the registered models pass those.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ._base import Attention, Gate, check_odd, kernel_size_of
from ._gate import gated, mean
from ._registry import register_attn


@register_attn(
    'eca',
    placement='block',
    equation='y = x s(conv1d(mean x))',
    title='ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks',
    authors='Wang, Qilong and Wu, Banggu and Zhu, Pengfei and Li, Peihua and Zuo, Wangmeng and Hu, Qinghua',
    year=2020,
    venue='CVPR',
    paper='https://arxiv.org/abs/1910.03151',
    code='https://github.com/BangguWu/ECANet',
    licence='MIT',
)
class ECA(Attention):
    """Gates each channel by a 1-D convolution over the means of its neighbours.

    Args:
        channels: Channels C of the (N, C, H, W) input.
        kernel_size: Neighbours each gate sees, odd; None takes the paper's function of C.

    Raises:
        ValueError: `kernel_size` is even.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {'channel': Gate('C', 'channel')}
    statistics = ('mean',)

    def __init__(
        self,
        channels: int,
        kernel_size: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(neutral_gate=0.5)
        if kernel_size is None:
            t = int((math.log2(channels) + 1) / 2)  # gamma = 2, b = 1
            kernel_size = t if t % 2 else t + 1
        check_odd(kernel_size)
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False, **dd)

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        nn.init.zeros_(self.conv.weight)

    def gate_of(self, mean: Tensor) -> Tensor:  # (N, C)
        """The gate of channels, from their means."""
        z = self.conv(mean.unsqueeze(1))  # (N, 1, C)
        return z.sigmoid().squeeze(1)[:, :, None, None]  # (N, C, 1, 1)

    def channel_gate(self, x: Tensor) -> Tensor:
        """The gate of channels (N, C, 1, 1)."""
        return self.gate_of(mean(x, [2, 3]))  # (N, C, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return gated(x, [self.channel_gate(x)], self.gain)

    @classmethod
    def options_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        return kernel_size_of(shapes)

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        return {'channel': self.channel_gate(x).flatten(1)}

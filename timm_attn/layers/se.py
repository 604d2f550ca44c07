"""Squeeze-and-Excitation.

Paper: Squeeze-and-Excitation Networks (CVPR 2018), https://arxiv.org/abs/1709.01507
Code:  https://github.com/hujie-frank/SENet @0262d43 (with biases), https://github.com/moskomule/senet.pytorch
       @8cb2669 (without)

The hidden width is C // r with no rounding, as in both; timm's `SEModule` rounds to a multiple of 8, so its nets of
depth 18 and 34 are other nets. Keys are timm's.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ._base import Attention, Gate, rd_ratio_of, reduced_channels
from ._gate import GateConv, gated, mean
from ._registry import register_attn


@register_attn(
    'se',
    placement='block',
    equation='y = x s(W2 relu(W1 mean x))',
    title='Squeeze-and-Excitation Networks',
    authors='Hu, Jie and Shen, Li and Albanie, Samuel and Sun, Gang and Wu, Enhua',
    year=2018,
    venue='CVPR',
    paper='https://arxiv.org/abs/1709.01507',
    code='https://github.com/hujie-frank/SENet',
    licence='Apache-2.0',
)
class SqueezeExcite(Attention):
    """Gates each channel by a two-layer function of all channel means.

    Args:
        channels: Channels C of the (N, C, H, W) input.
        rd_ratio: Hidden width over C; 1 keeps the width.
        bias: Biases in both layers, as the Caffe release; without them it is moskomule's and the ECA paper's SE.

    Raises:
        ValueError: `rd_ratio` leaves no hidden channel.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {'channel': Gate('C', 'channel')}
    statistics = ('mean',)

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(neutral_gate=0.5)
        hidden = reduced_channels(channels, rd_ratio)
        self.fc1 = GateConv(channels, hidden, 1, bias=bias, **dd)
        self.fc2 = GateConv(hidden, channels, 1, bias=bias, **dd)
        for fc in (self.fc1, self.fc2):
            nn.init.kaiming_normal_(fc.weight, mode='fan_out', nonlinearity='relu')

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        nn.init.zeros_(self.fc2.weight)
        if self.fc2.bias is not None:
            nn.init.zeros_(self.fc2.bias)

    def gate_of(self, mean: Tensor) -> Tensor:  # (N, C)
        """The gate of channels, from their means."""
        return self.fc2(self.fc1(mean[:, :, None, None]).relu()).sigmoid()  # (N, C, 1, 1)

    def channel_gate(self, x: Tensor) -> Tensor:
        """The gate of channels (N, C, 1, 1)."""
        return self.gate_of(mean(x, [2, 3]))  # (N, C, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return gated(x, [self.channel_gate(x)], self.gain)

    @classmethod
    def options_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        return rd_ratio_of(shapes)

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        return {'channel': self.channel_gate(x).flatten(1)}

"""Convolutional Block Attention Module.

Paper: CBAM: Convolutional Block Attention Module (ECCV 2018), https://arxiv.org/abs/1807.06521
Code:  https://github.com/Jongchan/attention-module @459efad

Where the two differ, this follows the code: the spatial gate pools [max, mean] (the paper: [mean, max]) and has a
BatchNorm, with momentum 0.01 and a weight that starts at 0.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ._base import Attention, Gate, GateForm, check_choice, check_odd, kernel_size_of, rd_ratio_of, reduced_channels
from ._gate import GateConv, gated, pooled
from ._registry import register_attn

ORDERS = ('channel-spatial', 'spatial-channel', 'parallel')


@register_attn(
    'cbam',
    placement='block',
    equation='x1 = x s(MLP(mean x) + MLP(max x)); y = x1 s(BN(conv7[max_c x1, mean_c x1]))',
    title='CBAM: Convolutional Block Attention Module',
    authors='Woo, Sanghyun and Park, Jongchan and Lee, Joon-Young and Kweon, In So',
    year=2018,
    venue='ECCV',
    paper='https://arxiv.org/abs/1807.06521',
    code='https://github.com/Jongchan/attention-module',
    licence='MIT',
)
class CBAM(Attention):
    """Gates channels by their mean and maximum, then pixels by the mean and maximum over channels.

    In training, a single 1 x 1 map is too little for the spatial BatchNorm (torch's ValueError).

    Args:
        channels: Channels C of the (N, C, H, W) input.
        rd_ratio: Hidden width of the channel gate over C.
        kernel_size: Kernel of the spatial gate, odd.
        spatial: Use the spatial gate.
        channel: Use the channel gate.
        mlp_bias: Biases in the channel gate.
        order: 'channel-spatial' as released, where the spatial gate sees what the channel gate let through;
            'spatial-channel'; or 'parallel', where both see the input.

    Raises:
        ValueError: `rd_ratio` leaves no hidden channel, `kernel_size` is even, both gates are off, `order` is unknown,
            or it is given for a single gate.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {'spatial': Gate('HW', 'spatial'), 'channel': Gate('C', 'channel')}
    recomputable = True
    __constants__ = ('channel', 'order', 'spatial')

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        kernel_size: int = 7,
        spatial: bool = True,
        channel: bool = True,
        mlp_bias: bool = True,
        order: str = 'channel-spatial',
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        if not (spatial or channel):
            raise ValueError('CBAM with spatial=False and channel=False has no gate left: switch one on.')
        check_choice('order', order, ORDERS)
        if order != ORDERS[0] and not (spatial and channel):
            raise ValueError(f'order (={order!r}) is that of two gates, but spatial={spatial} and channel={channel}.')
        super().__init__(neutral_gate=0.5 ** (channel + spatial))
        self.channel, self.spatial, self.order = channel, spatial, order
        if channel:
            hidden = reduced_channels(channels, rd_ratio)
            self.fc1 = nn.Linear(channels, hidden, bias=mlp_bias, **dd)
            self.fc2 = nn.Linear(hidden, channels, bias=mlp_bias, **dd)
            if mlp_bias:
                nn.init.zeros_(self.fc1.bias)
                nn.init.zeros_(self.fc2.bias)
        if spatial:
            check_odd(kernel_size)
            self.conv = GateConv(2, 1, kernel_size, padding=kernel_size // 2, bias=False, **dd)
            self.bn = nn.BatchNorm2d(1, momentum=0.01, **dd)
            nn.init.kaiming_normal_(self.conv.weight, mode='fan_out', nonlinearity='relu')
            nn.init.zeros_(self.bn.weight)

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        if self.channel:
            nn.init.zeros_(self.fc2.weight)
            if self.fc2.bias is not None:
                nn.init.zeros_(self.fc2.bias)
        if self.spatial:
            nn.init.zeros_(self.bn.weight)
            nn.init.zeros_(self.bn.bias)

    def gate_of(self, mean: Tensor, peak: Tensor) -> Tensor:  # (N, C) both
        """The gate of channels, from their means and maxima."""
        z = self.fc2(self.fc1(torch.stack([mean, peak])).relu()).sum(0)  # one pass through the MLP for both
        return z.sigmoid()[:, :, None, None]  # (N, C, 1, 1)

    def channel_gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input and its gate of channels (N, C, 1, 1)."""
        x, mean, peak = pooled(x, [2, 3])
        return x, self.gate_of(mean, peak)  # (N, C, 1, 1)

    def gate_of_pixels(self, pooled: Tensor) -> Tensor:  # (N, 2, H, W)
        """The gate of pixels, from the maxima and means over channels."""
        return self.bn(self.conv(pooled)).sigmoid()  # (N, 1, H, W)

    def gate_form(self) -> GateForm | None:
        """What the gates follow from, for fused blocks; None in another order than the paper's."""
        if self.order != ORDERS[0]:
            return None
        return GateForm(('mean', 'peak') if self.channel else (), (1,) if self.spatial else ())

    def gates_of_pools(self, pools: list[Tensor]) -> list[Tensor]:
        """The gates of planes, from what `gate_form` says is pooled."""
        return [self.gate_of_pixels(pools[0])]

    def spatial_gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input and its gate of pixels (N, 1, H, W)."""
        x, mean, peak = pooled(x, [1], keepdim=True)
        return x, self.gate_of_pixels(torch.cat([peak, mean], dim=1))  # (N, 1, H, W)

    def by_channel(self, x: Tensor, gain: float) -> Tensor:
        x, gate = self.channel_gate(x)
        return gated(x, [gate], gain)

    def by_pixel(self, x: Tensor, gain: float) -> Tensor:
        x, gate = self.spatial_gate(x)
        return gated(x, [gate], gain)

    def forward(self, x: Tensor) -> Tensor:
        if not self.spatial:
            return self.by_channel(x, self.gain)
        if not self.channel:
            return self.by_pixel(x, self.gain)
        if self.order == 'parallel':
            x, channel = self.channel_gate(x)
            x, spatial = self.spatial_gate(x)
            return gated(x, [channel * (spatial * self.gain)])
        if self.order == 'spatial-channel':
            return self.by_channel(self.by_pixel(x, 1.0), self.gain)
        return self.by_pixel(self.by_channel(x, 1.0), self.gain)

    @classmethod
    def options_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        return rd_ratio_of(shapes) | kernel_size_of(shapes)

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        found, of = {}, {'channel': self.channel_gate, 'spatial': self.spatial_gate}
        for kind in ('spatial', 'channel') if self.order == 'spatial-channel' else ('channel', 'spatial'):
            if self.channel if kind == 'channel' else self.spatial:
                x, gate = of[kind](x)
                found[kind] = gate.flatten(1) if kind == 'channel' else gate.squeeze(1)
                if self.order != 'parallel':
                    x = x * gate
        return found

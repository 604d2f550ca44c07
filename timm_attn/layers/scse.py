"""Concurrent spatial and channel squeeze and excitation (scSE).

Paper: Recalibrating Fully Convolutional Networks with Spatial and Channel 'Squeeze & Excitation' Blocks (TMI 2019),
       https://arxiv.org/abs/1808.08127; its first form, the sum: https://arxiv.org/abs/1803.02579
Code:  https://github.com/ai-med/squeeze_and_excitation @acdd26e

As in the code and the journal paper, the larger of the two gated maps is taken, element by element: where x is negative
that is the one of the smaller gate. segmentation_models_pytorch adds them and has a hidden width of C / 16; that is
`fuse='add', rd_ratio=1/16`.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ._base import Attention, Gate, check_choice, rd_ratio_of, reduced_channels
from ._gate import gated, larger, mean
from ._registry import register_attn


@register_attn(
    'scse',
    placement='block',
    equation='y = max(x s(W2 relu(W1 mean x)), x s(w x))',
    title="Recalibrating Fully Convolutional Networks with Spatial and Channel 'Squeeze & Excitation' Blocks",
    authors='Roy, Abhijit Guha and Navab, Nassir and Wachinger, Christian',
    year=2019,
    venue='IEEE TMI',
    paper='https://arxiv.org/abs/1808.08127',
    code='https://github.com/ai-med/squeeze_and_excitation',
    licence='MIT',
)
class SCSE(Attention):
    """Takes the larger of two maps: one gated by channel, as SE does, one gated by pixel.

    Args:
        channels: Channels C of the (N, C, H, W) input.
        rd_ratio: Hidden width of the channel gate over C. The registered models have 1/16, an eighth of the weights.
        fuse: 'max' as released, or 'add'.

    Raises:
        ValueError: `rd_ratio` leaves no hidden channel, or `fuse` is unknown.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {'spatial': Gate('HW', 'spatial'), 'channel': Gate('C', 'channel')}
    recomputable = True
    __constants__ = ('add',)

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 2,
        fuse: str = 'max',
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        check_choice('fuse', fuse, ('max', 'add'))
        self_add = fuse == 'add'
        super().__init__(neutral_gate=1.0 if self_add else 0.5)
        self.add = self_add
        hidden = reduced_channels(channels, rd_ratio)
        self.fc1 = nn.Linear(channels, hidden, **dd)
        self.fc2 = nn.Linear(hidden, channels, **dd)
        self.conv = nn.Conv2d(channels, 1, 1, **dd)

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        for layer in (self.fc2, self.conv):
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def channel_gate(self, x: Tensor) -> Tensor:
        """The gate of channels (N, C, 1, 1)."""
        return self.fc2(self.fc1(mean(x, [2, 3])).relu()).sigmoid()[:, :, None, None]  # (N, C, 1, 1)

    def spatial_gate(self, x: Tensor) -> Tensor:
        """The gate of pixels (N, 1, H, W)."""
        return self.conv(x).sigmoid()  # (N, 1, H, W)

    def forward(self, x: Tensor) -> Tensor:
        a, g = self.channel_gate(x), self.spatial_gate(x)
        if self.add:
            return gated(x, [a, g], self.gain)
        # In the neutral state all elements are ties, of which maximum() gives half the gradient to either side.
        return larger(x, a * self.gain, g * self.gain)

    @classmethod
    def options_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        return rd_ratio_of(shapes)

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        return {'channel': self.channel_gate(x).flatten(1), 'spatial': self.spatial_gate(x).squeeze(1)}

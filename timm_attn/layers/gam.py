"""Global Attention Mechanism.

Paper: Global Attention Mechanism: Retain Information to Enhance Channel-Spatial Interactions (2021),
       https://arxiv.org/abs/2112.05561
Code:  none by the authors is known; https://github.com/northBeggar/Plug-and-Play @96c81b4 circulates (no licence:
       written from the equations)

The default is r = 16 with a sigmoid on the channel gate, which the paper's figure shows and whose size at depth 50
agrees with the paper's. The circulating code has r = 4 and no channel sigmoid (`channel_gate=None`); its grouped form
shuffles the gate map (`groups=4, shuffle='gate'`), which pairs gates with other channels, where the paper shuffles
between the convolutions. `channel=False`, `spatial=False` and `max_pool=True` are the paper's ablations; it gives no
kernel for the pooling, here 3 x 3 with stride 1 before the spatial part.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import Attention, Gate, check_choice, rd_ratio_of, reduced_channels
from ._gate import channels_to_end, channels_to_front, first_rows, gated, with_rows
from ._registry import register_attn


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Deals the channels of each group out to all groups, (N, C, H, W) -> (N, C, H, W)."""
    n, c, h, w = x.shape
    return x.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


@register_attn(
    'gam',
    placement='block',
    equation='x1 = x s(MLP over channels of each pixel); y = x1 s(BN(conv7(relu(BN(conv7 x1)))))',
    title='Global Attention Mechanism: Retain Information to Enhance Channel-Spatial Interactions',
    authors='Liu, Yichao and Shao, Zongru and Hoffmann, Nico',
    year=2021,
    venue='arXiv:2112.05561',
    paper='https://arxiv.org/abs/2112.05561',
    code='https://github.com/northBeggar/Plug-and-Play',
    licence='none stated',
)
class GAM(Attention):
    """Gates by a two-layer function of the channels at each pixel, then by two 7x7 convolutions; nothing is pooled.

    Args:
        channels: Channels C of the (N, C, H, W) input.
        rd_ratio: Hidden width of both gates over C.
        groups: Groups of both 7x7 convolutions.
        shuffle: Where grouped channels are shuffled: 'hidden', 'gate' or None.
        channel_gate: 'sigmoid', or None to multiply by the function itself.
        channel: Use the channel gate.
        spatial: Use the spatial gate.
        max_pool: Take a 3x3 maximum before the spatial gate's convolutions.

    Raises:
        ValueError: `rd_ratio` leaves no hidden channel, `groups` does not divide both widths, both gates are off, or
            `shuffle` or `channel_gate` is none of its choices.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {'spatial': Gate('CHW', 'spatial'), 'channel': Gate('CHW', 'channel')}
    recomputable = True
    __constants__ = ('channel', 'channel_gate', 'groups', 'max_pool', 'shuffle', 'spatial')

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        groups: int = 1,
        shuffle: str | None = 'hidden',
        channel_gate: str | None = 'sigmoid',
        channel: bool = True,
        spatial: bool = True,
        max_pool: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        check_choice('shuffle', shuffle, ('hidden', 'gate', None))
        check_choice('channel_gate', channel_gate, ('sigmoid', None))
        if not (spatial or channel):
            raise ValueError('GAM with spatial=False and channel=False has no gate left: switch one on.')
        hidden = reduced_channels(channels, rd_ratio)
        if groups < 1 or channels % groups or hidden % groups:
            raise ValueError(
                f'groups (={groups}) must divide the channels (={channels}) and the hidden width (={hidden}).'
            )
        # Without the sigmoid, the neutral channel gate is its last bias, 1.
        super().__init__(neutral_gate=(0.5 if channel and channel_gate else 1.0) * (0.5 if spatial else 1.0))
        self.channel, self.spatial, self.max_pool = channel, spatial, max_pool
        self.channel_gate = channel_gate
        self.groups = groups
        self.shuffle = shuffle if shuffle and groups > 1 else ''
        if channel:
            self.fc1 = nn.Linear(channels, hidden, **dd)
            self.fc2 = nn.Linear(hidden, channels, **dd)
        if spatial:
            self.conv1 = nn.Conv2d(channels, hidden, 7, padding=3, groups=groups, **dd)
            self.bn1 = nn.BatchNorm2d(hidden, **dd)
            self.conv2 = nn.Conv2d(hidden, channels, 7, padding=3, groups=groups, **dd)
            self.bn2 = nn.BatchNorm2d(channels, **dd)

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        if self.channel:
            nn.init.zeros_(self.fc2.weight)
            nn.init.constant_(self.fc2.bias, 0.0 if self.channel_gate else 1.0)
        if self.spatial:
            nn.init.zeros_(self.bn2.weight)
            nn.init.zeros_(self.bn2.bias)

    def pixel_gate(self, x: Tensor) -> Tensor:
        """The gate by channels, of each pixel on its own: (N, C, H, W)."""
        a = channels_to_front(self.fc2(self.fc1(channels_to_end(x)).relu()))  # (N, C, H, W)
        return a if self.channel_gate is None else a.sigmoid()

    def spatial_gate(self, x: Tensor) -> Tensor:
        """The gate by neighbourhoods, of each channel: (N, C, H, W)."""
        if self.max_pool:
            x = F.max_pool2d(x, 3, stride=1, padding=1)
        rows = x.shape[2]
        u = first_rows(self.conv1(with_rows(x, self.conv1.weight)), rows)
        u = self.bn1(u).relu()  # (N, C // r, H, W)
        if self.shuffle == 'hidden':
            u = channel_shuffle(u, self.groups)
        u = first_rows(self.conv2(with_rows(u, self.conv2.weight)), rows)
        u = self.bn2(u).sigmoid()  # (N, C, H, W)
        if self.shuffle == 'gate':
            u = channel_shuffle(u, self.groups)
        return u

    def forward(self, x: Tensor) -> Tensor:
        if not self.spatial:
            return gated(x, [self.pixel_gate(x)], self.gain)
        if self.channel:
            x = gated(x, [self.pixel_gate(x)])
        return gated(x, [self.spatial_gate(x)], self.gain)

    @classmethod
    def options_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        options = rd_ratio_of(shapes)
        if 'fc1.weight' in shapes and 'conv1.weight' in shapes:
            options['groups'] = str(shapes['fc1.weight'][1] // shapes['conv1.weight'][1])
        return options

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """'channel' and 'spatial', both (N, C, H, W), since neither is pooled."""
        found = {}
        if self.channel:
            found['channel'] = self.pixel_gate(x)
            x = x * found['channel']
        if self.spatial:
            found['spatial'] = self.spatial_gate(x)
        return found

"""Spatial group-wise enhance.

Paper: Spatial Group-wise Enhance: Improving Semantic Feature Learning in Convolutional Networks (2019),
       https://arxiv.org/abs/1905.09646
Code:  https://github.com/implus/PytorchInsight @2864528

Written from the equations, since the code states no licence. Statistics are taken in float32, since they overflow in
float16. A map of one pixel is normalised to 0, where the code gives NaN; a constant map has gradients of 0.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ._base import Attention, Gate
from ._gate import gated, mean, weighted_sum
from ._precision import upcast
from ._registry import register_attn


@register_attn(
    'sge',
    placement='block',
    equation='y = x s(w t + b), t = standardised over the map: x in each group times its mean',
    title='Spatial Group-wise Enhance: Improving Semantic Feature Learning in Convolutional Networks',
    authors='Li, Xiang and Hu, Xiaolin and Yang, Jian',
    year=2019,
    venue='arXiv',
    paper='https://arxiv.org/abs/1905.09646',
    code='https://github.com/implus/PytorchInsight',
    licence='none stated',
)
class SGE(Attention):
    """Gates the pixels of each group of channels by how much they look like the group's mean over the map.

    `weight` starts at 0 and `bias` at 1, so every gate starts at s(1) = 0.73.

    Args:
        channels: Channels C of the (N, C, H, W) input.
        groups: Groups of consecutive channels.

    Raises:
        ValueError: `groups` does not divide the channels.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {'spatial': Gate('CHW', 'spatial, by group')}
    recomputable = True
    __constants__ = ('groups',)

    def __init__(
        self,
        channels: int,
        groups: int = 64,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(neutral_gate=0.5)
        if groups < 1 or channels < 1 or channels % groups:
            raise ValueError(f'groups (={groups}) must divide the channels (={channels}).')
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(1, groups, 1, 1, **dd))
        self.bias = nn.Parameter(torch.ones(1, groups, 1, 1, **dd))

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def group_gate(self, x: Tensor) -> Tensor:
        """One gate of pixels for each group of channels: (N, g, 1, H, W)."""
        m = x.shape[2] * x.shape[3]
        v = upcast(x).unflatten(1, (self.groups, -1))  # (N, g, c, H, W)
        q = weighted_sum(v, mean(v, [3, 4], keepdim=True))  # (N, g, H, W)
        q = q - q.mean((2, 3), keepdim=True)
        # Unbiased; one pixel has no spread, and 1 // m keeps the divisor from being 0.
        var = q.square().sum((2, 3), keepdim=True) / (m - 1 + 1 // m)  # (N, g, 1, 1)
        # The root has no gradient at 0: there, of 1 instead, and taken out of the sum.
        flat = var == 0
        std = var.masked_fill(flat, 1.0).sqrt().masked_fill(flat, 0.0)
        t = q / (std + 1e-5)
        gate = (t * self.weight + self.bias).sigmoid()  # (N, g, H, W)
        return gate.to(x.dtype).unsqueeze(2)  # (N, g, 1, H, W)

    def forward(self, x: Tensor) -> Tensor:
        v = x.unflatten(1, (self.groups, -1))  # (N, g, c, H, W)
        return gated(v, [self.group_gate(x)], self.gain).flatten(1, 2)

    @classmethod
    def options_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        return {'groups': str(shapes['weight'][1])} if 'weight' in shapes else {}

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """'spatial' (N, C, H, W): one map a group, repeated for its channels."""
        return {'spatial': self.group_gate(x).expand(-1, -1, x.shape[1] // self.groups, -1, -1).flatten(1, 2)}

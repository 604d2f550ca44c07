"""Gated channel transformation.

Paper: Gated Channel Transformation for Visual Recognition (CVPR 2020), https://arxiv.org/abs/1909.11519
Code:  https://github.com/z-x-yang/GCT @68983ed

Another paper of the same acronym, Gaussian Context Transformer (CVPR 2021), is another module. The released network has
one before each convolution; here it stands where SE does. Sums of squares are taken in float32, since they overflow in
float16.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ._base import Attention, Gate, check_choice
from ._gate import gated
from ._precision import upcast
from ._registry import register_attn


@register_attn(
    'gct',
    placement='block',
    equation='y = x (1 + tanh(gamma e / rms_c(e) + beta)), e = alpha |x|_2',
    title='Gated Channel Transformation for Visual Recognition',
    authors='Yang, Zongxin and Zhu, Linchao and Wu, Yu and Yang, Yi',
    year=2020,
    venue='CVPR',
    paper='https://arxiv.org/abs/1909.11519',
    code='https://github.com/z-x-yang/GCT',
    licence='none stated',
)
class GCT(Attention):
    """Gates each channel by its norm over the map, relative to the norms of all channels.

    `gamma` and `beta` start at 0, which makes it the identity; `beta` is trained without weight decay, as released.

    Args:
        channels: Channels C of the (N, C, H, W) input.
        mode: 'l2', or 'l1': sums of absolute values in place of roots of sums of squares.

    Raises:
        ValueError: `mode` is unknown.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {'channel': Gate('C', 'channel')}
    recomputable = True
    no_weight_decay = ('beta',)
    __constants__ = ('l1',)

    def __init__(
        self,
        channels: int,
        mode: str = 'l2',
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(neutral_gate=1.0)
        check_choice('mode', mode, ('l2', 'l1'))
        self.l1 = mode == 'l1'
        self.alpha = nn.Parameter(torch.ones(1, channels, 1, 1, **dd))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1, **dd))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1, **dd))

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def channel_gate(self, x: Tensor) -> Tensor:
        """The gate of channels (N, C, 1, 1)."""
        u, alpha, gamma = upcast(x), upcast(self.alpha), upcast(self.gamma)
        if self.l1:
            e = alpha * u.abs().sum((2, 3), keepdim=True)  # (N, C, 1, 1)
            n = gamma / (e.abs().mean(1, keepdim=True) + 1e-5)
        else:
            e = alpha * (u.square().sum((2, 3), keepdim=True) + 1e-5).sqrt()  # (N, C, 1, 1)
            n = gamma / (e.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return (1 + (e * n + self.beta).tanh()).to(x.dtype)  # (N, C, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return gated(x, [self.channel_gate(x)], self.gain)

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        return {'channel': self.channel_gate(x).flatten(1)}

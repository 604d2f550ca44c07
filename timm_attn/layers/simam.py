"""SimAM.

Paper: SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks (ICML 2021),
       https://proceedings.mlr.press/v139/yang21o.html
Code:  https://github.com/ZjjConan/SimAM @ae98f43

Written from the equations, since the code states no licence. It stands between each block's second convolution and its
BatchNorm, as in the published networks, which have `e_lambda=0.1`; the code's default is 1e-4. Squares are taken in
float32, since they overflow in float16. A map of one pixel has no spread, where the code gives NaN.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ._base import Attention, Gate
from ._gate import gated, mean
from ._precision import upcast
from ._registry import register_attn


@register_attn(
    'simam',
    placement='conv2',
    equation='y = x s((x - mean)² / (4 (var + lambda)) + 1/2)',
    title='SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks',
    authors='Yang, Lingxiao and Zhang, Ru-Yuan and Li, Lida and Xie, Xiaohua',
    year=2021,
    venue='ICML',
    paper='https://proceedings.mlr.press/v139/yang21o.html',
    code='https://github.com/ZjjConan/SimAM',
    licence='none stated',
)
class SimAM(Attention):
    """Gates each value by its squared distance to its channel's mean, without parameters.

    Its gates lie between s(1/2) = 0.62 and 1, so it has no neutral state.

    Args:
        channels: Channels C of the (N, C, H, W) input.
        e_lambda: What the variance is raised by.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {'gate': Gate('CHW', 'gate')}
    recomputable = True
    keywords = ('parameter-free',)
    no_warm_start = 'SimAM has no warm start: it has no weights, so no state in which it changes nothing.'
    __constants__ = ('e_lambda',)

    def __init__(
        self,
        channels: int,
        e_lambda: float = 1e-4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(neutral_gate=None)
        if e_lambda <= 0:
            raise ValueError(f'e_lambda (={e_lambda:g}) must be positive, so that a constant map is not divided by 0.')
        self.e_lambda = e_lambda

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        raise ValueError(
            "SimAM has no weights, so no state in which it multiplies by a constant: use start='paper', which does "
            'change what a network computes.'
        )

    def pixel_gate(self, x: Tensor) -> Tensor:
        """The gate of each value, by its distance to the mean of its channel: (N, C, H, W)."""
        m = x.shape[2] * x.shape[3]
        u = upcast(x)
        d = (u - mean(u, [2, 3], keepdim=True)).square()  # (N, C, H, W)
        # Unbiased; one pixel has no spread, and 1 // m keeps the divisor from being 0.
        v = d.sum((2, 3), keepdim=True) / (m - 1 + 1 // m)  # (N, C, 1, 1)
        return gated(d, [1 / (4 * (v + self.e_lambda))]).add_(0.5).sigmoid_().to(x.dtype)  # (N, C, H, W)

    def forward(self, x: Tensor) -> Tensor:
        return gated(x, [self.pixel_gate(x)], self.gain)

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        return {'gate': self.pixel_gate(x)}

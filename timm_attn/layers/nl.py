"""Non-local block.

Paper: Non-local Neural Networks (CVPR 2018), https://arxiv.org/abs/1711.07971
Code:  https://github.com/open-mmlab/mmcv @a8073c7, `NonLocal2d(norm_cfg=dict(type='BN'))`, which is the block of the
       authors' Caffe2 code (CC BY-NC 4.0) but for a bias before its BatchNorm

Embedded Gaussian, energies divided by the root of the hidden width, BatchNorm whose weight starts at 0. The attention
is a matrix of pixels by pixels, taken in float32: at 224 x 224 it has 9.8 million entries an image in the first stage
of a ResNet, so the registered models have one block, on 14 x 14 maps.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ._base import Attention, Gate
from ._precision import matmul_upcast
from ._registry import register_attn


@register_attn(
    'nl',
    placement='one_block',
    equation='y = x + BN(W softmax(theta(x)ᵀ phi(x) / sqrt h) g(x)), tokens are pixels',
    title='Non-local Neural Networks',
    authors='Wang, Xiaolong and Girshick, Ross and Gupta, Abhinav and He, Kaiming',
    year=2018,
    venue='CVPR',
    paper='https://arxiv.org/abs/1711.07971',
    code='https://github.com/open-mmlab/mmcv',
    licence='Apache-2.0',
)
class NonLocal(Attention):
    """Self-attention whose tokens are pixels, added to its input through a BatchNorm that starts at 0.

    In training, a single 1 x 1 map is too little for the BatchNorm (torch's ValueError).

    Args:
        channels: Channels C of the (N, C, H, W) input.
        rd_ratio: Width of queries, keys and values over C; at least 1 channel.

    Raises:
        ValueError: `rd_ratio` is not positive.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {'spatial': Gate('HW', 'attention received', multiplies=False)}
    recomputable = True
    pairs_of_pixels = True
    keywords = ('self-attention',)

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(neutral_gate=1.0)
        if rd_ratio <= 0:
            raise ValueError(f'rd_ratio (={rd_ratio:g}) must be positive.')
        hidden = max(int(channels * rd_ratio + 1e-6), 1)
        self.scale = hidden**-0.5
        self.theta = nn.Conv2d(channels, hidden, 1, **dd)
        self.phi = nn.Conv2d(channels, hidden, 1, **dd)
        self.g = nn.Conv2d(channels, hidden, 1, **dd)
        self.conv_out = nn.Conv2d(hidden, channels, 1, bias=False, **dd)
        self.bn = nn.BatchNorm2d(channels, **dd)
        for conv in (self.theta, self.phi, self.g):
            nn.init.normal_(conv.weight, std=0.01)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        nn.init.kaiming_normal_(self.conv_out.weight, mode='fan_out', nonlinearity='relu')
        nn.init.zeros_(self.bn.weight)

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        nn.init.zeros_(self.bn.weight)
        nn.init.zeros_(self.bn.bias)

    def matrix(self, x: Tensor) -> Tensor:
        """How much of each pixel each pixel takes: (N, M queries, M keys)."""
        theta, phi = self.theta(x).flatten(2), self.phi(x).flatten(2)  # (N, h, M)
        return (matmul_upcast(theta.transpose(1, 2), phi) * self.scale).softmax(2)  # (N, M queries, M keys)

    def forward(self, x: Tensor) -> Tensor:
        g = self.g(x)  # (N, h, H, W)
        t = matmul_upcast(g.flatten(2), self.matrix(x).transpose(1, 2))  # (N, h, M)
        t = t.to(g.dtype).unflatten(2, (x.shape[2], x.shape[3]))  # (N, h, H, W)
        y = x + self.bn(self.conv_out(t)).to(x.dtype)
        # The gain is 1 but in models that scale what their slots give out: no pass over memory for the others.
        return y if self.factor == 1.0 else y * self.gain

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """'spatial' (N, H, W): what all pixels together take from each; it sums to 1."""
        return {'spatial': self.matrix(x).mean(1).unflatten(1, (x.shape[2], x.shape[3]))}

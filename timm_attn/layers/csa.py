"""Channel self-attention.

Paper: XCiT: Cross-Covariance Image Transformers (NeurIPS 2021), https://arxiv.org/abs/2106.09681, whose
       cross-covariance attention this is; the residual with a scale that starts at 0 is that of Dual Attention Network
       for Scene Segmentation (CVPR 2019), https://arxiv.org/abs/1809.02983
Code:  no ResNet with it is published; this module is the project's own and claims no paper's numbers. At
       `rd_ratio=1` its branch equals timm's `xcit.XCA`.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import Attention, Gate, reduced_channels
from ._precision import matmul_upcast, upcast
from ._registry import register_attn


@register_attn(
    'csa',
    placement='block',
    equation='y = x + gamma W softmax(tau q kᵀ) v, tokens are channels',
    title='XCiT: Cross-Covariance Image Transformers',
    authors='El-Nouby, Alaaeldin and Touvron, Hugo and Caron, Mathilde and others',
    year=2021,
    venue='NeurIPS',
    paper='https://arxiv.org/abs/2106.09681',
    code='',
)
class ChannelSelfAttention(Attention):
    """Self-attention whose tokens are channels, added to its input with a learned scale that starts at 0.

    Args:
        channels: Channels C of the (N, C, H, W) input.
        rd_ratio: Width of queries, keys and values over C.
        num_heads: Heads that share that width.

    Raises:
        ValueError: `rd_ratio` leaves no channel, or `num_heads` does not divide the width.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {'matrix': Gate('KCC', 'channel to channel', multiplies=False)}
    recomputable = True
    keywords = ('self-attention',)
    no_weight_decay = ('temperature',)

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 8,
        num_heads: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(neutral_gate=1.0)
        hidden = reduced_channels(channels, rd_ratio)
        if num_heads < 1 or hidden % num_heads:
            raise ValueError(f'num_heads (={num_heads}) must divide the width (={hidden}, channels times rd_ratio).')
        self.num_heads = num_heads
        self.qkv = nn.Conv2d(channels, 3 * hidden, 1, bias=False, **dd)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1, **dd))
        self.proj = nn.Conv2d(hidden, channels, 1, **dd)
        self.gamma = nn.Parameter(torch.zeros(1, **dd))

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        nn.init.zeros_(self.gamma)

    def qkv_tokens(self, x: Tensor) -> Tensor:
        """Queries, keys and values, whose tokens are channels: (N, 3, heads, c, M)."""
        return self.qkv(x).flatten(2).unflatten(1, (3, self.num_heads, -1))  # (N, 3, heads, c, M)

    def matrix(self, qkv: Tensor) -> Tensor:
        """How much of each channel each channel takes: (N, heads, c, c)."""
        q, k = F.normalize(upcast(qkv[:, 0]), dim=-1), F.normalize(upcast(qkv[:, 1]), dim=-1)
        energy = matmul_upcast(q, k.transpose(-2, -1)) * upcast(self.temperature)
        return energy.softmax(-1)  # (N, heads, c, c)

    def branch(self, x: Tensor) -> Tensor:
        """What self-attention adds to the input, before `gamma`: (N, C, H, W)."""
        qkv = self.qkv_tokens(x)
        y = matmul_upcast(self.matrix(qkv), qkv[:, 2]).to(qkv.dtype)  # (N, heads, c, M)
        y = y.flatten(1, 2).unflatten(2, (x.shape[2], x.shape[3]))  # (N, C * rd_ratio, H, W)
        return self.proj(y)  # (N, C, H, W)

    def forward(self, x: Tensor) -> Tensor:
        y = x + (self.gamma * self.branch(x)).to(x.dtype)
        # The gain is 1 but in models that scale what their slots give out: no pass over memory for the others.
        return y if self.factor == 1.0 else y * self.gain

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """'matrix' (N, heads, c, c): how much of each channel (column) each channel (row) takes."""
        return {'matrix': self.matrix(self.qkv_tokens(x))}

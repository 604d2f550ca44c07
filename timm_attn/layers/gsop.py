"""Global Second-order Pooling.

Paper: Global Second-order Pooling Convolutional Networks (CVPR 2019), https://arxiv.org/abs/1811.12006
Code:  https://github.com/ZilinGao/Global-Second-order-Pooling-Convolutional-Networks @662a699

The channel form of GSoP-Net1. As in the code, nothing nonlinear stands between the row-wise convolution and the last
one (its README says otherwise). The code centres by an M x M matrix; subtracting the row means is the same. The
covariance is taken in float32, since it overflows in float16.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ._base import Attention, Gate
from ._gate import gated, mean
from ._precision import matmul_upcast, no_autocast, upcast
from ._registry import register_attn


@register_attn(
    'gsop',
    placement='last_block',
    equation='y = x s(W conv_rows(BN(cov(relu(BN(W_d relu x))))))',
    title='Global Second-order Pooling Convolutional Networks',
    authors='Gao, Zilin and Xie, Jiangtao and Wang, Qilong and Li, Peihua',
    year=2019,
    venue='CVPR',
    paper='https://arxiv.org/abs/1811.12006',
    code='https://github.com/ZilinGao/Global-Second-order-Pooling-Convolutional-Networks',
    licence='MIT',
)
class GSoP(Attention):
    """Gates each channel by a function of the covariance of all (reduced) channels.

    Args:
        channels: Channels C of the (N, C, H, W) input.
        dim: Channels d that C is reduced to before the covariance.
        stride: Stride of that reduction; 2 in the first stage of the released nets.

    Raises:
        ValueError: `dim` or `stride` is not positive.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {
        'channel': Gate('C', 'channel'),
        'covariance': Gate('DD', 'covariance', multiplies=False),
    }
    recomputable = True
    no_warm_start = (
        'GSoP has no warm start: its last stage has stride 1, so its features are not those of a plain ResNet.'
    )

    def __init__(
        self,
        channels: int,
        dim: int = 128,
        stride: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(neutral_gate=0.5)
        if dim < 1 or stride < 1:
            raise ValueError(f'dim (={dim}) and stride (={stride}) must be positive.')
        self.conv_reduce = nn.Conv2d(channels, dim, 1, stride, **dd)
        self.bn_reduce = nn.BatchNorm2d(dim, **dd)
        self.bn_row = nn.BatchNorm2d(dim, **dd)
        self.conv_row = nn.Conv2d(dim, 4 * dim, (dim, 1), groups=dim, **dd)
        self.conv_expand = nn.Conv2d(4 * dim, channels, 1, **dd)
        for conv in (self.conv_reduce, self.conv_row, self.conv_expand):
            nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        nn.init.zeros_(self.conv_expand.weight)
        if self.conv_expand.bias is not None:
            nn.init.zeros_(self.conv_expand.bias)

    def covariance(self, x: Tensor) -> Tensor:
        """Covariance of the reduced channels over pixels: (N, d, d)."""
        t = self.bn_reduce(self.conv_reduce(x.relu())).relu()  # (N, d, H', W')
        t = upcast(t).flatten(2)  # (N, d, M)
        t = t - mean(t, [2], keepdim=True)
        return matmul_upcast(t, t.transpose(1, 2)) / t.shape[2]  # (N, d, d)

    def channel_gate(self, s: Tensor) -> Tensor:
        """The gate of channels (N, C, 1, 1), from their covariance."""
        v = self.bn_row(s.unsqueeze(3).to(self.bn_row.weight.dtype))  # (N, d, d, 1)
        # In float32, since an untrained bn_row lets a covariance through that overflows float16; TorchScript has no
        # autocast switch for any device.
        if torch.jit.is_scripting():
            return self.conv_expand(self.conv_row(v)).sigmoid()
        with no_autocast(v):
            return self.conv_expand(self.conv_row(v)).sigmoid()  # (N, C, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return gated(x, [self.channel_gate(self.covariance(x)).to(x.dtype)], self.gain)

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """'channel' (N, C) and 'covariance' (N, d, d)."""
        s = self.covariance(x)
        return {'channel': self.channel_gate(s).flatten(1), 'covariance': s}

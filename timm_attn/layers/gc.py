"""Global context block.

Paper: GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond (ICCVW 2019),
       https://arxiv.org/abs/1904.11492
Code:  https://github.com/xvjiarui/GCNet @029db54

timm's `gc` is another module: it multiplies, and its hidden width is C / 8. The official LayerNorm has weights of shape
(h, 1, 1), here (h,), which timm trains without weight decay.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ._base import Attention, Gate, check_choice, rd_ratio_of, reduced_channels
from ._gate import gated, mean
from ._precision import matmul_upcast, upcast
from ._registry import register_attn


class ContextMlp(nn.Module):
    """Linear - LayerNorm - ReLU - Linear, whose last layer starts at 0.

    Args:
        channels: Channels C of the (N, C) input.
        hidden: Hidden width.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden, **dd)
        self.norm = nn.LayerNorm(hidden, **dd)
        self.fc2 = nn.Linear(hidden, channels, **dd)
        self.init_zero()

    @torch.jit.ignore()
    def init_zero(self) -> None:
        """Zeroes the last layer, so that the context gives zeros."""
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, c: Tensor) -> Tensor:  # (N, C)
        return self.fc2(self.norm(self.fc1(c)).relu())[:, :, None, None]  # (N, C, 1, 1)


@register_attn(
    'gc',
    placement='block',
    equation='y = x + W2 relu(LN(W1 sum_p softmax(w x)_p x_p))',
    title='GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond',
    authors='Cao, Yue and Xu, Jiarui and Lin, Stephen and Wei, Fangyun and Hu, Han',
    year=2019,
    venue='ICCV Workshops',
    paper='https://arxiv.org/abs/1904.11492',
    code='https://github.com/xvjiarui/GCNet',
    licence='Apache-2.0',
)
class GlobalContext(Attention):
    """Adds to each channel a two-layer function of one mean over the map, weighted by a softmax over positions.

    Args:
        channels: Channels C of the (N, C, H, W) input.
        rd_ratio: Hidden width over C.
        pool: 'attn' weights positions by a softmax, 'avg' equally.
        fuse: 'add' the function of the context as released, 'mul' its sigmoid, or 'both': multiply, then add.

    Raises:
        ValueError: `rd_ratio` leaves less than 2 hidden channels (a LayerNorm over one value gives its bias, whatever
            the context), or `pool` or `fuse` is unknown.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {
        'spatial': Gate('HW', 'weight of each position', multiplies=False),
        'channel': Gate('C', 'channel'),
        'context': Gate('C', 'what is added', multiplies=False),
    }
    recomputable = True
    __constants__ = ('add', 'attn_pool', 'mul')

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        pool: str = 'attn',
        fuse: str = 'add',
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        check_choice('pool', pool, ('attn', 'avg'))
        check_choice('fuse', fuse, ('add', 'mul', 'both'))
        self_add, self_mul = fuse in ('add', 'both'), fuse in ('mul', 'both')
        super().__init__(neutral_gate=0.5 if self_mul else 1.0)
        hidden = reduced_channels(channels, rd_ratio)
        if hidden < 2:
            raise ValueError(
                f'channels (={channels}) times rd_ratio (={rd_ratio:g}) leaves one channel, and a LayerNorm over one '
                'value gives its bias, whatever the context: give more channels or a larger rd_ratio.'
            )
        self.add, self.mul, self.attn_pool = self_add, self_mul, pool == 'attn'
        if self.attn_pool:
            self.conv_attn = nn.Conv2d(channels, 1, 1, **dd)
            nn.init.kaiming_normal_(self.conv_attn.weight, mode='fan_in', nonlinearity='relu')
            if self.conv_attn.bias is not None:
                nn.init.zeros_(self.conv_attn.bias)
        if self.mul:
            self.mlp_scale = ContextMlp(channels, hidden, **dd)
        if self.add:
            self.mlp_add = ContextMlp(channels, hidden, **dd)

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        for mlp in self.children():
            if isinstance(mlp, ContextMlp):
                mlp.init_zero()

    def weights(self, x: Tensor) -> Tensor:
        """How much each pixel gives to the context: (N, 1, M), which sums to 1."""
        return upcast(self.conv_attn(x)).flatten(2).softmax(2)  # (N, 1, M)

    def context(self, x: Tensor) -> Tensor:
        """What all pixels say together: (N, C)."""
        if self.attn_pool:
            return matmul_upcast(x.flatten(2), self.weights(x).transpose(1, 2)).squeeze(2).to(x.dtype)  # (N, C)
        return mean(x, [2, 3])  # (N, C)

    def forward(self, x: Tensor) -> Tensor:
        c = self.context(x).to(x.dtype)
        y = x
        if self.mul:
            y = gated(y, [self.mlp_scale(c).sigmoid()], self.gain)
        if self.add:
            v = self.mlp_add(c)
            if self.mul:
                y = y + (v * self.gain).to(x.dtype)
            else:
                y = y + v.to(x.dtype)
                # The gain is 1 but in models that scale what their slots give out.
                if self.factor != 1.0:
                    y = y * self.gain
        return y

    @classmethod
    def options_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        return rd_ratio_of(shapes, 'mlp_add.fc1.weight') or rd_ratio_of(shapes, 'mlp_mul.fc1.weight')

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """'spatial' (N, H, W) sums to 1; 'channel' (N, C) multiplies; 'context' (N, C) is added."""
        found, c = {}, self.context(x)
        if self.attn_pool:
            found['spatial'] = self.weights(x).unflatten(2, (x.shape[2], x.shape[3])).squeeze(1)
        if self.mul:
            found['channel'] = self.mlp_scale(c).sigmoid().flatten(1)
        if self.add:
            found['context'] = self.mlp_add(c).flatten(1)
        return found

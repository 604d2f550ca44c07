"""Triplet Attention.

Paper: Rotate to Attend: Convolutional Triplet Attention Module (WACV 2021), https://arxiv.org/abs/2010.03045
Code:  https://github.com/landskape-ai/triplet-attention @2cf02fb

The code fixes the kernel at 7, although weights with 3 are published; here it is an option. The released code permutes
x for each branch; pooling over the named dimension gives the same gates, which are then summed before the one
multiplication.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ._base import Attention, Gate, GateForm, check_odd, kernel_size_of
from ._gate import GateConv, gated, pooled
from ._registry import register_attn


class PlaneGate(nn.Module):
    """s(BN(conv([max, mean]))) over one plane of the map.

    Args:
        kernel_size: Kernel of the convolution, odd.
        bn_weight: Start of the BatchNorm's weight; at 0 the gate starts at exactly 0.5.

    Raises:
        ValueError: `kernel_size` is even.
    """

    def __init__(
        self,
        kernel_size: int,
        bn_weight: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        check_odd(kernel_size)
        self.conv = GateConv(2, 1, kernel_size, padding=kernel_size // 2, bias=False, **dd)
        self.bn = nn.BatchNorm2d(1, momentum=0.01, **dd)
        nn.init.kaiming_normal_(self.conv.weight, mode='fan_out', nonlinearity='relu')
        nn.init.constant_(self.bn.weight, bn_weight)

    def forward(self, pooled: Tensor) -> Tensor:  # (N, 2, A, B)
        return self.bn(self.conv(pooled)).sigmoid()  # (N, 1, A, B)


@register_attn(
    'triplet',
    placement='block',
    equation='y = mean of x s(BN(conv7[max, mean])) over C x W, H x C and H x W planes',
    title='Rotate to Attend: Convolutional Triplet Attention Module',
    authors='Misra, Diganta and Nalamada, Trikay and Arasanipalai, Ajay Uppili and Hou, Qibin',
    year=2021,
    venue='WACV',
    paper='https://arxiv.org/abs/2010.03045',
    code='https://github.com/landskape-ai/triplet-attention',
    licence='MIT',
)
class TripletAttention(Attention):
    """Multiplies by the mean of three gates, over the (C, W), (H, C) and (H, W) planes.

    In training, a single 1 x 1 map is too little for its BatchNorms (torch's ValueError).

    Args:
        channels: Channels C of the (N, C, H, W) input; nothing in the module depends on it.
        kernel_size: Kernel of the three gates, odd.
        spatial: Use the (H, W) gate too; without it the two rotated ones are averaged.

    Raises:
        ValueError: `kernel_size` is even.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {
        'spatial': Gate('HW', 'spatial'),
        'hc': Gate('HC', 'rows x channels'),
        'cw': Gate('CW', 'channels x columns'),
    }
    recomputable = True
    __constants__ = ('spatial',)

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        spatial: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(neutral_gate=0.5)
        self.spatial = spatial
        self.cw = PlaneGate(kernel_size, 1.0, **dd)
        self.hc = PlaneGate(kernel_size, 1.0, **dd)
        if spatial:
            # The released initialisation zeroes what is named SpatialGate, which is this branch alone.
            self.hw = PlaneGate(kernel_size, 0.0, **dd)

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        for gate in self.children():
            if isinstance(gate, PlaneGate):
                nn.init.zeros_(gate.bn.weight)
                nn.init.zeros_(gate.bn.bias)

    def pooled(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The input, and its maxima and means along each axis: (N, 2, C, W), (N, 2, H, C) and (N, 2, H, W)."""
        x, mean, peak = pooled(x, [2])
        planes = [torch.stack([peak, mean], dim=1)]  # (N, 2, C, W)
        x, mean, peak = pooled(x, [3])
        planes.append(torch.stack([peak, mean], dim=1).transpose(2, 3))  # (N, 2, H, C)
        if self.spatial:
            x, mean, peak = pooled(x, [1])
            planes.append(torch.stack([peak, mean], dim=1))  # (N, 2, H, W)
        return x, planes

    def gate_form(self) -> GateForm:
        """What the gates follow from, for fused blocks."""
        return GateForm(dims=(2, 3, 1) if self.spatial else (2, 3))

    def gates_of_pools(self, pools: list[Tensor]) -> list[Tensor]:
        """The gates of planes, from what `gate_form` says is pooled."""
        # (N, C, 2, W) and (N, C, H, 2), as the planes (N, 2, C, W) and (N, 2, H, C)
        return self.gates_of([pools[0].transpose(1, 2), pools[1].transpose(1, 3), *pools[2:]])

    def gates_of(self, pooled: list[Tensor]) -> list[Tensor]:
        gates = [
            self.cw(pooled[0]).transpose(1, 2),  # (N, C, 1, W)
            self.hc(pooled[1]).permute(0, 3, 2, 1),  # (N, C, H, 1)
        ]
        if self.spatial:
            gates.append(self.hw(pooled[2]))  # (N, 1, H, W)
        return gates

    def forward(self, x: Tensor) -> Tensor:
        x, planes = self.pooled(x)
        return gated(x, self.gates_of(planes), self.gain / len(planes))

    @classmethod
    def options_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        return kernel_size_of(shapes, 'cw.conv.weight')

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """'cw' (N, C, W), 'hc' (N, H, C), and 'spatial' (N, H, W) of the unrotated branch."""
        gates = self.gates_of(self.pooled(x)[1])
        found = {'cw': gates[0].squeeze(2), 'hc': gates[1].squeeze(3).transpose(1, 2)}
        if self.spatial:
            found['spatial'] = gates[2].squeeze(1)
        return found

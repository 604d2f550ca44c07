"""Bytes kept for backward, exactly: they are the same on every machine."""

import pytest
import timm
import torch

import timm_attn
from timm_attn.bench import kept_bytes
from timm_attn.fusion import fuse

# Batch 2 of 64x64 in float32: eager, fused, and the target for fused over plain ResNet-50's.
KEPT = {
    'resnet50': (14_163_264, 12_016_960, 1.00),
    'se_resnet50': (18_137_920, 12_016_960, 1.00),
    'eca_resnet50': (18_130_368, 12_016_960, 1.00),
    'cbam_resnet50': (21_804_416, 12_016_960, 1.00),
    'srm_resnet50': (18_492_992, 12_016_960, 1.00),
    'bam_resnet50': (17_296_600, 12_934_464, 1.00),
    'triplet_resnet50': (26_660_896, 12_016_960, 1.05),
    'gsop_resnet50': (22_113_664, 13_638_976, 1.10),
    'gam_resnet50': (36_819_776, 12_016_960, 1.10),
    'sk_resnet50': (16_993_120, 12_948_288, 1.10),
    'csa_resnet50': (29_165_888, 12_016_960, 1.10),
}


def test_every_attention_is_counted() -> None:
    assert KEPT.keys() == {'resnet50', *(f'{name}_resnet50' for name in timm_attn.list_attn())}


@pytest.mark.parametrize('name', KEPT)
def test_kept_bytes_are_exact_and_meet_their_target(name: str) -> None:
    model, x = timm.create_model(name).train(), torch.zeros(2, 3, 64, 64)
    eager, fused, target = KEPT[name]
    assert kept_bytes(model, x) == eager
    assert kept_bytes(fuse(model, compile=False), x) == fused
    assert fused <= target * KEPT['resnet50'][0]


def test_kept_bytes_of_plain_resnet50_at_224_pixels() -> None:
    assert kept_bytes(timm.create_model('resnet50').train(), torch.zeros(2, 3, 224, 224)) == 170_835_264


def test_kept_bytes_count_what_a_closure_holds() -> None:
    held: list[torch.Tensor] = []

    class Holder(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            held.append(torch.zeros(250))
            return x * 2

    assert kept_bytes(Holder(), torch.zeros(100)) == 1000 + 400


def test_nothing_stays_after_backward() -> None:
    model, x = fuse(timm.create_model('cbam_resnet18'), compile=False).train(), torch.zeros(2, 3, 64, 64)

    class Step(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            model(x).sum().backward()
            model.zero_grad()
            return x.new_zeros(())

    # torch rounds no allocation on the CPU: what is left is the one number returned.
    assert kept_bytes(Step(), x) == 4

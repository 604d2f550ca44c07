"""Bytes kept for backward, exactly: they are the same on every machine."""

import pytest
import timm
import torch

import timm_attn
from timm_attn.fusion import fuse
from timm_attn.measure import kept_bytes, peak_bytes, traffic_bytes

# Batch 2 in float32: eager and fused at 64x64, fused at 224x224, and the target for that over plain ResNet-50's.
KEPT = {
    'resnet50': (14_163_264, 12_016_960, 142_331_200, 1.00),
    'se_resnet50': (18_016_960, 12_387_008, 142_701_248, 1.00),
    'eca_resnet50': (18_009_408, 12_379_456, 142_693_696, 1.00),
    'cbam_resnet50': (21_916_064, 12_681_632, 143_505_272, 1.00),
    'srm_resnet50': (18_372_032, 12_862_784, 143_177_024, 1.00),
    'bam_resnet50': (15_461_568, 13_315_264, 157_852_384, 1.00),
    'triplet_resnet50': (24_114_304, 18_490_304, 166_570_784, 1.00),
    'gsop_resnet50': (19_985_760, 13_849_920, 164_255_040, 1.10),
    'gam_resnet50': (36_819_648, 17_055_040, 204_047_680, 1.50),
    'sk_resnet50': (16_993_120, 12_980_384, 153_432_224, 1.10),
    'csa_resnet50': (29_165_888, 15_400_256, 183_776_576, 1.10),
    'coord_resnet50': (20_491_392, 13_422_704, 151_854_336, 1.00),
    'ema_resnet50': (31_451_456, 15_818_048, 187_174_208, 1.10),
    'fca_resnet50': (18_089_408, 12_338_752, 143_468_032, 1.00),
    'gc_resnet50': (17_912_992, 12_162_336, 142_578_456, 1.10),
    'gct_resnet50': (18_372_032, 12_375_568, 142_935_616, 1.10),
    'nl_resnet50': (14_697_800, 12_344_640, 146_345_280, 1.10),
    'scsa_resnet50': (23_336_848, 13_111_180, 158_949_824, 1.10),
    'scse_resnet50': (18_156_160, 12_405_504, 142_923_504, 1.10),
    'sge_resnet50': (19_645_888, 13_895_232, 163_770_432, 1.10),
    # Its gate stands behind conv2, whose output is kept beside the gated one.
    'simam_resnet50': (17_828_544, 12_918_080, 153_369_920, 1.10),
}
PLAIN = 170_835_264


def test_every_attention_is_counted() -> None:
    assert KEPT.keys() == {'resnet50', *(f'{name}_resnet50' for name in timm_attn.list_attn())}


@pytest.mark.parametrize('name', KEPT)
def test_kept_bytes_are_exact_and_meet_their_target(name: str) -> None:
    model = timm.create_model(name).train()
    eager, fused, fused_224, target = KEPT[name]
    small = torch.zeros(2, 3, 64, 64)
    assert kept_bytes(model, small) == eager
    fuse(model, compile=False)
    assert kept_bytes(model, small) == fused
    assert kept_bytes(model, torch.zeros(2, 3, 224, 224)) == fused_224
    assert fused_224 <= target * PLAIN


def test_kept_bytes_of_plain_resnet50_at_224_pixels() -> None:
    assert kept_bytes(timm.create_model('resnet50').train(), torch.zeros(2, 3, 224, 224)) == PLAIN


def test_kept_bytes_count_what_a_closure_holds() -> None:
    held: list[torch.Tensor] = []

    class Holder(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            held.append(torch.zeros(250))
            return x * 2

    assert kept_bytes(Holder(), torch.zeros(100)) == 1000 + 400


def test_moved_bytes_are_operands_and_results() -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.view(10, 10) * 2).t()

    # 100 floats: times 2 reads and writes them, the sum reads them and writes one; views move nothing. Backward: a
    # 1 like the sum, of which the sum's gradient is a view, which times 2 is read and written.
    x = torch.zeros(100, requires_grad=True)
    assert traffic_bytes(Twice(), x) == 4 * (200 + 101 + 2 + 200)


def test_fused_block_moves_and_holds_less_than_the_eager_one() -> None:
    model, x = timm.create_model('cbam_resnet18').train(), torch.zeros(2, 3, 64, 64)
    eager = traffic_bytes(model, x), peak_bytes(model, x)
    fuse(model, compile=False)
    assert traffic_bytes(model, x) < eager[0] and kept_bytes(model, x) < peak_bytes(model, x) < eager[1]


@pytest.mark.parametrize(
    ('name', 'blocks'),
    # Gates of statistics; a graph that keeps little, with a number of 4 bytes at either end; attention run again.
    [('cbam_resnet18', 0), ('coord_resnet18', 8), ('ema_resnet18', 0)],
)
def test_nothing_stays_after_backward(name: str, blocks: int) -> None:
    model, x = fuse(timm.create_model(name), compile=False).train(), torch.zeros(2, 3, 64, 64)

    class Step(torch.nn.Module):
        def __init__(self, backward: bool) -> None:
            super().__init__()
            self.backward = backward

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            loss = model(x).sum()
            if not self.backward:
                return loss.detach()
            loss.backward()
            model.zero_grad()
            return loss  # with what is left of its graph

    # torch rounds no allocation on the CPU.
    assert kept_bytes(Step(backward=True), x) == 4 + 8 * blocks
    assert kept_bytes(Step(backward=False), x) == 4

"""segmentation_models_pytorch: any registered model as an encoder, by its 'tu-' names."""

import pytest
import timm
import torch
from torch import nn

import timm_attn
from timm_attn.explain.gates import attention_maps

smp = pytest.importorskip(
    'segmentation_models_pytorch', reason='segmentation-models-pytorch is missing (extra ecosystem)'
)


def test_a_unet_with_a_cbam_encoder_learns_a_step() -> None:
    torch.manual_seed(0)
    model = smp.Unet('tu-cbam_resnet18', encoder_weights=None, classes=2, decoder_channels=(32, 16, 16, 8, 8))
    x, target = torch.randn(2, 3, 64, 96), torch.randint(0, 2, (2, 64, 96))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    attention = [p for name, p in model.encoder.named_parameters() if '.se.' in name]
    assert len(attention) == 8 * 7, 'every block of the encoder has a CBAM of seven parameters'
    assert all(p.grad is not None for p in attention)


def test_attention_maps_of_an_encoder_are_those_of_its_model() -> None:
    torch.manual_seed(0)
    model = timm.create_model('cbam_resnet18', num_classes=2, zero_init_last=False).eval()
    unet = smp.Unet('tu-cbam_resnet18', encoder_weights=None, classes=2, decoder_channels=(32, 16, 16, 8, 8)).eval()
    unet.encoder.model.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    maps, own = attention_maps(unet, x), attention_maps(model, x)
    assert list(maps) == [f'encoder.model.{site}' for site in own]
    for site, gates in own.items():
        for kind, gate in gates.items():
            torch.testing.assert_close(maps[f'encoder.model.{site}'][kind], gate)


def test_injection_reaches_the_encoder_of_a_unet_without_changing_its_output() -> None:
    unet = smp.Unet('resnet18', encoder_weights=None, classes=2, decoder_channels=(32, 16, 16, 8, 8)).eval()
    with pytest.raises(ValueError, match='has no empty attention slot'):
        # smp's own ResNets have no slots; its timm encoders have.
        timm_attn.inject(unet.encoder, 'cbam')
    unet = smp.Unet('tu-resnet18', encoder_weights=None, classes=2, decoder_channels=(32, 16, 16, 8, 8)).eval()
    for m in unet.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.5, 1)  # timm starts branches at 0, which hides any gate
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = unet(x)
        timm_attn.inject(unet.encoder.model, 'cbam')
        torch.testing.assert_close(unet(x), before, rtol=0, atol=0)


def test_attention_goes_into_encoder_and_decoder_of_smps_own_networks() -> None:
    torch.manual_seed(0)
    unet = smp.Unet('resnet18', encoder_weights=None, classes=2, decoder_channels=(32, 32, 32, 16, 16)).eval()
    for m in unet.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.75, 1.25)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = unet(x)
        timm_attn.inject(unet, 'se', at=[r'encoder\.layer\d\.\d', r'decoder\.blocks\.[0-3]'])
        assert torch.equal(unet(x), before)
        sites = timm_attn.attn_sites(unet)
        assert len(sites) == 8 + 4
        for attn in sites.values():
            gain, attn.gain = attn.gain, attn.gain * 1.5
            assert not torch.equal(unet(x), before)
            attn.gain = gain


@pytest.mark.parametrize('decoder', ['Unet', 'FPN'])
def test_injected_is_an_encoder_by_name(decoder: str) -> None:
    torch.manual_seed(0)
    model = getattr(smp, decoder)('tu-injected', encoder_weights=None, classes=2)
    attention = [p for name, p in model.encoder.named_parameters() if '.se.' in name]
    assert len(attention) == 8 * 7
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in attention)

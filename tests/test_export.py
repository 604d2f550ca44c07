"""Every attention through torch.export, ONNX and TorchScript: same numbers on sizes the export never saw."""

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_attn
from timm_attn.layers._base import Attention

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ('onnx', 'onnxscript', 'onnxruntime')),
    reason='onnx, onnxscript or onnxruntime is missing (extra export)',
)

# Square, wide, tall and odd; batches of one and more. None is the size of the export.
INPUTS = ((1, 64, 64), (3, 64, 128), (2, 160, 72), (1, 97, 131))
# Models that take options, or another family; of the others the smallest registered one.
RESNETS: dict[str, tuple[str, dict[str, Any]]] = {
    'gsop': ('gsop_resnet50', {'dim': 16}),
    'sk': ('sk_resnext50_32x4d', {}),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if timm.is_model(f'simple_cnn_{name}'):
        model = timm.create_model(f'simple_cnn_{name}', num_classes=5, attn_after=(1, 2))
    else:
        smallest = timm.list_models(f'{name}_resne*', module='attn_resnet')
        model_name, attn_args = RESNETS.get(name) or (smallest[0], {})
        # 64 groups of SGE want multiples of 64.
        model = timm.create_model(
            model_name, layers=(1, 1, 1, 1), channels=(64, 128, 192, 256), num_classes=5, attn_args=attn_args
        )
    for module in model.modules():
        if isinstance(module, Attention):
            module.gain = 1.5  # as injection would set it, a plain number that an export must not lose
            for p in module.parameters():
                nn.init.normal_(p, std=1.0 if p.ndim == 1 else (2 / p[0].numel()) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
    return spread(model.eval().requires_grad_(False))


def spread(model: nn.Module) -> nn.Module:
    """Scales the classifier so that logits differ by about 0.2 between images: of equal ones any format is right.

    Not by more, since features differ by a thousandth of their size in some nets, and the scale enlarges rounding too.
    """
    head = model.get_classifier()  # pyright: ignore[reportCallIssue]
    nn.init.normal_(head.weight)  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]
    nn.init.zeros_(head.bias)  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]
    out = model(images(16, 64, 64, seed=99))
    with torch.no_grad():
        head.weight *= (0.2 / out.std(0))[:, None]  # pyright: ignore[reportAttributeAccessIssue]
        head.bias -= 0.2 * out.mean(0) / out.std(0)  # pyright: ignore[reportAttributeAccessIssue]
    return model


def images(n: int, h: int, w: int, seed: int) -> Tensor:
    """Blobs of colour and some noise; pure noise looks the same everywhere to a net that pools."""
    g = torch.Generator().manual_seed(seed)
    blobs = nn.functional.interpolate(torch.randn(n, 3, 3, 4, generator=g), (h, w), mode='bilinear')
    return 2 * blobs + 0.3 * torch.randn(n, 3, h, w, generator=g)


def inputs() -> Iterator[Tensor]:
    for i, (n, h, w) in enumerate(INPUTS):
        yield images(n, h, w, seed=i)


def assert_close(out: Tensor, expected: Tensor) -> None:
    difference = (out - expected).abs()
    assert difference.max() <= 1e-4, f'max difference {difference.max():.2e}, mean {difference.mean():.2e}'


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    if not hasattr(torch.export.Dim, 'DYNAMIC'):
        pytest.skip(f'torch {torch.__version__} takes no Dim.DYNAMIC')
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    return torch.export.export(model, (torch.randn(2, 3, 96, 80),), dynamic_shapes=(free,))


@needs_onnx
@pytest.mark.parametrize('name', timm_attn.list_attn())
def test_torch_export_and_onnx_take_any_batch_and_size(name: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    model = build(name)
    program = exported(model)
    path = tmp_path / 'model.onnx'
    onnx_program = torch.onnx.export(program, dynamo=True, verbose=False)
    assert onnx_program is not None
    onnx_program.save(str(path))
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    (entry,) = session.get_inputs()
    assert [type(d) for d in entry.shape] == [str, int, str, str], f'batch, height and width are free: {entry.shape}'
    for x in inputs():
        expected = model(x)
        assert_close(program.module()(x), expected)
        assert_close(torch.from_numpy(session.run(None, {entry.name: x.numpy()})[0]), expected)


@pytest.mark.parametrize('name', timm_attn.list_attn())
def test_scripted_models_survive_a_file_and_take_any_batch_and_size(name: str) -> None:
    model = build(name)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for x in inputs():
        # The first two calls are profiled, the third runs what was optimised for their sizes.
        for _ in range(3 if x.shape[0] == 1 else 1):
            assert_close(loaded(x), model(x))


def test_an_exported_model_survives_a_file(tmp_path: Path) -> None:
    model = build('cbam')
    torch.export.save(exported(model), tmp_path / 'model.pt2')
    loaded = torch.export.load(tmp_path / 'model.pt2').module()
    for x in inputs():
        assert_close(loaded(x), model(x))


@needs_onnx
def test_injected_attention_with_identity_start_exports(tmp_path: Path) -> None:
    import onnxruntime

    plain = timm.create_model(
        'resnet18', layers=(1, 1, 1, 1), channels=(32, 32, 32, 32), num_classes=5, zero_init_last=False
    )
    spread(plain.eval().requires_grad_(False))
    (x,) = (x for x in inputs() if x.shape[0] == 3)
    before = plain(x)
    model = timm_attn.inject(plain, 'cbam').requires_grad_(False)
    onnx_program = torch.onnx.export(exported(model), dynamo=True, verbose=False)
    assert onnx_program is not None
    onnx_program.save(str(tmp_path / 'model.onnx'))
    session = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx'), providers=['CPUExecutionProvider'])
    assert_close(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), before)

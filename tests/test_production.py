"""int8 by the way of docs/production.md: what is named stays in float32, and the model stays itself."""

import importlib.util
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

for package in ('onnx', 'onnxscript', 'onnxruntime', 'sklearn'):
    pytest.importorskip(package, reason=f'{package} is missing (extra export)')


@pytest.mark.slow
def test_attention_can_stay_in_float32_while_the_rest_is_int8(tmp_path: Path) -> None:
    import onnx

    path = Path(__file__).resolve().parents[1] / 'benchmarks/production.py'
    spec = importlib.util.spec_from_file_location('_production', path)
    assert spec is not None and spec.loader is not None
    production = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = production
    spec.loader.exec_module(production)

    torch.manual_seed(0)
    small = {'layers': (1, 1, 1, 1), 'channels': (16, 16, 16, 16), 'num_classes': 5, 'in_chans': 1}
    model = timm.create_model('cbam_resnet18', cifar_stem=True, **small).eval().requires_grad_(False)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1)
    images = torch.randn(32, 1, 32, 32)
    convs = {}
    for keep in (False, True):
        folder = tmp_path / str(keep) / 'int8'
        folder.mkdir(parents=True)
        run = production.int8_static(model, folder, images, keep=keep)
        change = (run(images) - model(images)).abs().mean() / model(images).std()
        assert change < 0.2
        graph = onnx.load(folder / 'model.onnx').graph
        scales = {o for n in graph.node if n.op_type == 'DequantizeLinear' for o in n.output}
        convs[keep] = sum(n.op_type == 'Conv' and n.input[1] in scales for n in graph.node)
    # The stem, two in each of four blocks and their shortcuts; and the 7x7 of each CBAM.
    assert convs == {False: 13 + 4, True: 13}

"""Fused, compiled models in other orders, precisions, processes and under other compilers, and with NaN: what the
unfused model gives.
"""

import copy
import gc
import multiprocessing
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from timm_attn.fusion import fuse, kernels

from .support import build, check_equal, environment, images, step

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('compiler')]


def pair(name: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    eager = build(name, **kwargs)
    return fuse(copy.deepcopy(eager)), eager


@pytest.mark.parametrize('order', ['spatial-channel', 'parallel'])
def test_orders_of_cbam(order: str) -> None:
    fused, eager = pair('cbam_resnet18', attn_args={'order': order})
    check_equal(step(fused, images()), step(eager, images()), 1e-10)


@pytest.mark.parametrize('name', ['se_resnet18', 'scse_resnet18'])
def test_nan_is_where_it_is_unfused(name: str) -> None:
    fused, eager = pair(name, channels=(64, 96, 128, 160))
    fused.eval()
    eager.eval()  # in training, statistics of the batch hand it to all images
    x = images()
    x[1, 0, 20, 20] = torch.nan
    ours, theirs = step(fused, x), step(eager, x)
    assert theirs['output'][1].isnan().any() and theirs['output'][0].isfinite().all()
    for key, want in theirs.items():
        assert torch.equal(ours[key].isnan(), want.isnan()), key


def test_after_a_step_others_export_and_compile_the_unfused_model() -> None:
    fused, eager = pair('se_resnet18')
    check_equal(step(fused, images()), step(eager, images()), 1e-10)
    fused.load_state_dict(eager.eval().state_dict())
    fused.eval()
    x = images(n=2)
    with torch.no_grad():
        want = eager(x)
        for other in (
            torch.export.export(fused, (x,)).module(),
            torch.compile(fused, fullgraph=True, backend='aot_eager'),
        ):
            torch.testing.assert_close(other(x), want, rtol=0, atol=1e-12)
    torch._dynamo.reset()


def test_in_float64_after_a_step_in_float32() -> None:
    fused, eager = (m.float() for m in pair('se_resnet18'))
    for model in (fused, eager):
        step(model, images(torch.float32))
    fused.load_state_dict(eager.state_dict())
    ours, theirs = step(fused.double(), images()), step(eager.double(), images())
    assert {t.dtype for t in ours.values()} == {torch.float64, torch.int64}
    check_equal(ours, theirs, 1e-10)


def test_in_float16_gradients_are_as_near_to_those_of_float64_as_unfused() -> None:
    fused, eager = pair('se_resnet18')
    want = step(copy.deepcopy(eager), images())

    def errors(model: nn.Module) -> Tensor:
        found = step(model.half(), images(torch.float16))
        grads = [name for name in want if name.startswith('grad')]
        return torch.stack([(found[n].double() - want[n]).norm() / want[n].norm() for n in grads])

    ours, theirs = errors(fused), errors(eager)
    assert (ours <= 1.5 * theirs + 1e-3).all(), (ours / theirs).max()


def test_onnx_has_the_unfused_model(tmp_path: Path) -> None:
    runtime = pytest.importorskip('onnxruntime')
    fused, eager = (m.float() for m in pair('se_resnet18'))
    step(fused, images(torch.float32))
    fused.load_state_dict(eager.eval().state_dict())
    x = images(torch.float32, n=2)
    torch.onnx.export(fused.eval(), (x,), tmp_path / 'model.onnx', dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / 'model.onnx')
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), eager(x).detach(), rtol=1e-5, atol=1e-5)


def test_steps_leave_nothing_behind() -> None:
    fused, _ = pair('se_resnet18')

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    counts = []
    for _ in range(4):
        for _ in range(5):
            step(fused, images())
        counts.append(alive())
    assert len({*counts[1:]}) == 1, counts


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
@pytest.mark.filterwarnings('ignore:.*multi-threaded.*fork:DeprecationWarning')
def test_a_forked_process_goes_on_and_compiles() -> None:
    fused, eager = pair('se_resnet18')
    check_equal(step(fused, images()), step(eager, images()), 1e-10)

    def child() -> None:  # torch's autograd runs in no process forked after a backward pass
        with torch.no_grad():
            torch.testing.assert_close(fused.eval()(images(n=1)), eager.eval()(images(n=1)), rtol=0, atol=1e-10)

    before = len(kernels.norm.graphs)
    process = multiprocessing.get_context('fork').Process(target=child)
    process.start()
    process.join(300)
    assert process.exitcode == 0 and len(kernels.norm.graphs) == before


def test_two_processes_compile_at_once_into_one_empty_folder(tmp_path: Path) -> None:
    code = """
        import torch
        from timm_attn.fusion import kernels
        from timm_attn.fusion.kernels import Affine
        y, shortcut = torch.randn(2, 3, 8, 16, 12, dtype=torch.float64).unbind()
        one = torch.ones(8, dtype=torch.float64)
        def results(compiled):
            a, b, *more = kernels.norm(compiled, y, one, one, None, None, 1e-5, ('mean',))
            return [a, b, *kernels.gated_sum(compiled, Affine(y, a, b), None, Affine(shortcut))]
        gaps = [(ours - theirs).abs().max() for ours, theirs in zip(results(True), results(False), strict=True)]
        assert kernels.norm.graphs and kernels.gated_sum.graphs
        print('gap', max(gaps).item())
    """
    env = environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    both = [
        subprocess.Popen(
            [sys.executable, '-c', textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
        )
        for _ in range(2)
    ]
    for process in both:
        output, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
        assert float(output.split()[-1]) < 1e-12

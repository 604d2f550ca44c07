"""Fused, compiled models in other orders, precisions, processes and under other compilers, and with NaN: what the
unfused model gives.
"""

import copy
import gc
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from timm_attn.fusion import compile, fuse, kernels
from timm_attn.fusion.compile import Kernel, observe_kernels

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


def run(code: str, **env: str) -> str:
    """What a process of its own, with one thread, prints last."""
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment(**{'OMP_NUM_THREADS': '1', **env}),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
def test_a_forked_process_goes_on_and_compiles(tmp_path: Path) -> None:
    # torch itself waits for ever in a child: in autograd after a backward pass, in OpenMP with more than one thread.
    code = """
        import copy, multiprocessing, timm, torch, timm_attn
        from timm_attn.fusion import blocks, kernels
        blocks.SMALL = 0
        eager = timm.create_model('se_resnet18', num_classes=5, layers=(1, 1, 1, 1)).double()
        for m in eager.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.weight.data.uniform_(0.5, 1)
                m.running_var.uniform_(0.5, 2)
        fused = timm_attn.fuse(copy.deepcopy(eager))
        x = torch.randn(3, 3, 64, 48, dtype=torch.float64)
        for model in (fused, eager):
            model(x).sum().backward()
        before = len(kernels.norm.graphs)
        def child():
            for n in (3, 1):  # an image alone is another kind
                with torch.no_grad():
                    torch.testing.assert_close(fused.eval()(x[:n]), eager.eval()(x[:n]), rtol=0, atol=1e-10)
            assert len(kernels.norm.graphs) > before
        process = multiprocessing.get_context('fork').Process(target=child, daemon=True)
        process.start()
        process.join(120)
        assert len(kernels.norm.graphs) == before > 0
        print(process.exitcode)
    """
    assert run(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)) == '0'


def test_processes_share_what_is_compiled(tmp_path: Path) -> None:
    code = """
        import sys, torch
        from pathlib import Path
        from timm_attn.fusion import kernels
        from timm_attn.fusion.kernels import Affine
        x, shortcut = torch.randn(2, 3, 8, 16, 12, dtype=torch.float64).unbind()
        args = Affine(x), None, Affine(shortcut)
        def check():
            kernels.gated_sum.graphs.clear()
            gap = kernels.gated_sum(True, *args)[0] - kernels.gated_sum(False, *args)[0]
            assert gap.abs().max() < 1e-12 and kernels.gated_sum.graphs
        check()
        print('torch._inductor.compile_fx' in sys.modules)
    """
    env = {'TORCHINDUCTOR_CACHE_DIR': str(tmp_path)}
    with ThreadPoolExecutor() as pool:  # at once, into an empty folder
        assert 'True' in pool.map(lambda _: run(code, **env), range(2))
    more = """
        from torch._inductor import config
        assert 'torch._inductor.compile_fx' not in sys.modules
        files = lambda: {*Path(folder).glob('timm_attn/*.json')}
        kept = files()
        for file in kept:
            file.write_text(file.read_text()[:-9])  # as after a full disk
        check()
        assert 'torch._inductor.compile_fx' in sys.modules and files() == kept
        def added():
            before = files()
            check()
            (new,) = files() - before
            return new.read_text()
        torch.set_num_threads(2)
        assert 'omp parallel' in added() and not any('omp parallel' in file.read_text() for file in kept)
        with config.patch({'cpp.simdlen': 0}):
            assert 'Vectorized' not in added()
        print('done')
    """
    assert run(f'folder = {str(tmp_path)!r}\n' + textwrap.dedent(code) + textwrap.dedent(more), **env) == 'done'


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Nothing was compiled before. Gives the list of what is compiled from now on."""
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    for k in vars(kernels).values():
        if isinstance(k, Kernel):
            monkeypatch.setattr(k, 'graphs', {})
    graph, made = compile._graph, []

    def recorded(function: Any, key: Any, shape: Any) -> Any:
        made.append(key)
        return graph(function, key, shape)

    monkeypatch.setattr(compile, '_graph', recorded)
    return made


def test_a_first_step_compiles_its_kernels_side_by_side_and_shows_nothing_of_it(cold: list[Any]) -> None:
    fused, eager = (m.get_submodule('layer2.0') for m in pair('cbam_resnet18', drop_path_rate=0.5))
    x = torch.randn(3, 64, 20, 14, dtype=torch.float64)
    saved: list[Any] = []
    called: list[Any] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.shape)
        return t

    def seen(model: nn.Module) -> tuple[dict[str, Tensor], Tensor, list[Any], list[Any]]:
        torch.manual_seed(5)
        saved.clear()
        called.clear()
        with saved_tensors_hooks(pack, lambda t: t), observe_kernels(lambda k, *_: called.append(k)):
            found = step(model, x)
        return found, torch.get_rng_state(), [*saved], [*called]

    before = copy.deepcopy(fused.state_dict())
    first, state, *rest = seen(fused)
    made = len(cold)
    assert made == sum(len(k.graphs) for k in {*called})
    torch.manual_seed(5)
    check_equal(first, step(eager, x), 1e-10)
    fused.load_state_dict(before)
    again, state_again, *rest_again = seen(fused)
    check_equal(first, again, 0)
    assert torch.equal(state, state_again) and rest == rest_again and len(cold) == made


def test_all_kernels_of_a_step_are_written_in_its_forward_pass(cold: list[Any]) -> None:
    block = pair('cbam_resnet18')[0].get_submodule('layer2.0')
    y = block(torch.randn(3, 64, 20, 14, dtype=torch.float64, requires_grad=True))
    forward = len(cold)
    y.sum().backward()
    assert len(cold) == forward > 4


def test_a_block_that_cannot_be_copied_is_compiled_kernel_by_kernel(
    cold: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    fused, eager = (m.get_submodule('layer1.0') for m in pair('se_resnet18'))
    cast(Any, fused).lock = threading.Lock()
    x = torch.randn(3, 64, 20, 14, dtype=torch.float64)
    with caplog.at_level('DEBUG', 'timm_attn'):
        check_equal(step(fused, x), step(eager, x), 1e-10)
    assert 'could not be rehearsed (TypeError: cannot pickle' in caplog.text and cold


def test_what_another_thread_compiles_meanwhile_is_waited_for(cold: list[Any]) -> None:
    x = torch.randn(7)
    with compile._without_waiting(), ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: torch.compile(lambda t: t.sin() + 1)(x)).result()
    torch.testing.assert_close(found, x.sin() + 1)

"""What every attention promises, whoever wrote it: these tests run over `list_attn()`, so a new one is in at once."""

import copy
import io
import os
import pickle
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from timm_attn import create_attn, list_attn
from timm_attn.layers._base import Attention
from timm_attn.layers._registry import get_attn

C = 64
SMALLER = {'gsop': {'dim': 16}}  # the default of 128 only costs time
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, SMALLER.get(name, {})) for name in list_attn()),
    ('se', {'bias': False}),
    ('se', {'rd_ratio': 1}),
    ('cbam', {'spatial': False}),
    ('cbam', {'channel': False, 'kernel_size': 3}),
    ('cbam', {'order': 'spatial-channel'}),
    ('cbam', {'order': 'parallel'}),
    ('bam', {'combine': 'add'}),
    ('gam', {'rd_ratio': 1 / 4, 'groups': 4}),
    ('gam', {'rd_ratio': 1 / 4, 'groups': 4, 'shuffle': 'gate', 'channel_gate': None}),
    ('gam', {'channel': False, 'max_pool': True}),
    ('gam', {'spatial': False}),
    ('sk', {'form': 'sknet', 'stride': 2}),
    ('eca', {'kernel_size': 7}),
    ('gsop', {'dim': 16, 'stride': 2}),
    ('triplet', {'spatial': False, 'kernel_size': 3}),
    ('csa', {'num_heads': 4}),
    ('fca', {'rd_ratio': 1 / 4, 'dct_size': 14}),
    ('coord', {'rd_ratio': 1 / 4, 'min_width': 4}),
    ('gc', {'rd_ratio': 1 / 4, 'fuse': 'mul'}),
    ('gc', {'rd_ratio': 1 / 4, 'fuse': 'both', 'pool': 'avg'}),
    ('scse', {'rd_ratio': 1 / 16, 'fuse': 'add'}),
    ('gct', {'mode': 'l1'}),
    ('ema', {'groups': 8}),
    ('sge', {'groups': 8}),
    ('nl', {'rd_ratio': 1 / 8}),
    ('scsa', {'num_heads': 8, 'window_size': 3}),
    ('simam', {'e_lambda': 0.1}),
]
# One value a channel is no batch for a BatchNorm: torch raises. These see one at batch 1; those of ONE_PIXEL only when
# their map has one pixel too.
ONE_IMAGE = ('bam', 'srm', 'sk')
ONE_PIXEL = ('cbam', 'gam', 'triplet', 'gsop', 'nl')

# Powers of two: multiplying by them and by their inverse is exact.
EXACT = (0.125, 0.25, 0.5, 1)

each_attn = pytest.mark.parametrize('name', list_attn())
GATES = [(n, a) for n, a in VARIANTS if get_attn(n).placement != 'conv']
NEUTRAL = [(n, a) for n, a in GATES if create_attn(n, C, device='meta').neutral_gate is not None]


def _each(variants: list[tuple[str, dict[str, Any]]]) -> pytest.MarkDecorator:
    ids = ['-'.join([n, *(f'{k}={v}' for k, v in a.items())]) for n, a in variants]
    return pytest.mark.parametrize(('name', 'args'), variants, ids=ids)


each_variant, each_gate, each_neutral = _each(VARIANTS), _each(GATES), _each(NEUTRAL)


def build(name: str, args: dict[str, Any] | None = None, channels: int = C, **factory: Any) -> Attention:
    torch.manual_seed(0)
    return create_attn(name, channels, **(SMALLER.get(name, {}) if args is None else args), **factory)


def randomised(name: str, args: dict[str, Any] | None = None, channels: int = C, **factory: Any) -> Attention:
    """An attention after some training, as it were: no gate is constant, no running statistic is at its start."""
    attn = build(name, args, channels, **factory)
    with torch.no_grad():
        for key, tensor in attn.state_dict().items():
            if key.endswith('running_var'):
                tensor.uniform_(0.5, 1.5)
            elif key.endswith('running_mean') or key.endswith('bias'):
                tensor.normal_(0, 0.1)
            elif tensor.is_floating_point() and tensor.dim() > 1:
                tensor.normal_(0, tensor[0].numel() ** -0.5)
            elif tensor.is_floating_point():
                tensor.uniform_(0.75, 1.25)
    return attn


def example(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def gap(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert got.shape == want.shape
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


# Shapes and edge inputs.


@pytest.mark.parametrize('size', [(1, 9, 5), (3, 5, 9), (2, 1, 12), (1, 1, 1), (2, 1, 1), (1, 7, 7)], ids=str)
@each_variant
def test_any_map_keeps_its_shape(name: str, args: dict[str, Any], size: tuple[int, int, int]) -> None:
    attn = randomised(name, args).eval()
    n, h, w = size
    x = example(n, C, h, w)
    before = x.clone()
    y = attn(x)
    stride = args.get('stride', 1) if name == 'sk' else 1
    assert y.shape == (n, C, -(-h // stride), -(-w // stride))
    assert y.isfinite().all()
    assert torch.equal(x, before), 'the input was written to'


@each_variant
def test_one_pixel_trains_on_two_images(name: str, args: dict[str, Any]) -> None:
    attn = randomised(name, args).train()
    x = example(2, C, 1, 1).requires_grad_()
    y = attn(x)
    y.sum().backward()
    tensors = {'y': y, 'x.grad': x.grad, **dict(attn.named_buffers())}
    tensors |= {f'{k}.grad': p.grad for k, p in attn.named_parameters()}
    assert [k for k, t in tensors.items() if t is None or not t.isfinite().all()] == []


@pytest.mark.parametrize('size', [(5, 9), (1, 1)], ids=str)
@each_attn
def test_one_image_trains_unless_batch_statistics_forbid(name: str, size: tuple[int, int]) -> None:
    attn = randomised(name).train()
    x = example(1, C, *size).requires_grad_()
    if name in ONE_IMAGE or (name in ONE_PIXEL and size == (1, 1)):
        with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'):
            attn(x)
    else:
        attn(x).sum().backward()
        assert all(b.isfinite().all() for b in attn.buffers())


@each_attn
def test_constant_map_has_finite_gradients(name: str) -> None:
    """Zero variance, zero covariance: a square root or a norm without eps would give NaN."""
    attn = randomised(name).train()
    for x in (torch.zeros(2, C, 4, 5), torch.full((2, C, 4, 5), 3.0)):
        x.requires_grad_()
        attn(x).sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in attn.parameters())


@each_variant
def test_channels_last_stays_channels_last(name: str, args: dict[str, Any]) -> None:
    attn = randomised(name, args).eval()
    x = example(2, C, 6, 9)
    got = copy.deepcopy(attn).to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert gap(got, attn(x)) < 1e-5


@each_attn
def test_strided_input_gives_the_same_values(name: str) -> None:
    attn = randomised(name).eval()
    wide = example(2, 2 * C, 6, 9)
    for view in (wide[:, ::2, :, 1:8], wide[:, :C].transpose(2, 3)):
        assert not view.is_contiguous()
        assert gap(attn(view), attn(view.contiguous())) < 1e-5


# Precision.


@pytest.mark.parametrize('inputs', [torch.float32, None], ids=['float32 in', 'half in'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@each_attn
def test_autocast_takes_large_inputs(name: str, dtype: torch.dtype, inputs: torch.dtype | None) -> None:
    attn = randomised(name).train()
    x = (300 * example(4, C, 6, 9)).to(inputs or dtype)
    want = copy.deepcopy(attn)(x.float())
    leaf = x.clone().requires_grad_()
    with torch.autocast('cpu', dtype=dtype):
        y = attn(leaf)
    (y.float() / 300).mean().backward()
    assert y.isfinite().all()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attn.parameters())
    assert all(b.isfinite().all() for b in attn.buffers())
    error = (y.float() - want).abs().mean() / want.abs().mean()
    assert error < (0.03 if dtype == torch.bfloat16 else 0.005), f'mean error {error:.3g}'


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@each_attn
def test_half_precision_model_without_autocast(name: str, dtype: torch.dtype) -> None:
    attn = randomised(name).eval()
    x = (300 * example(2, C, 6, 9)).to(dtype)
    half = copy.deepcopy(attn).to(dtype)
    y = half(x)
    assert y.dtype == dtype
    assert y.isfinite().all()
    want = half.float()(x.float())
    # The energies of pixels are near 1e5 here: rounding a query makes the softmax choose another pixel.
    tolerance = 0.03 if dtype == torch.bfloat16 or name == 'nl' else 0.005
    assert (y.float() - want).abs().mean() / want.abs().mean() < tolerance


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_srm_statistics_are_float32_in_autocast(dtype: torch.dtype) -> None:
    """The mean of 96 maps of spread 300 is near 0: half-precision statistics would be off by much more than this."""
    attn = randomised('srm').eval()
    x = (1000 + 300 * example(2, C, 16, 16)).to(dtype)
    with torch.autocast('cpu', dtype=dtype):
        got = attn.gates(x)['channel']
    want = copy.deepcopy(attn).double().gates(x.double())['channel']
    assert want.std() > 0.01
    assert (got.double() - want).abs().max() < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_gsop_covariance_is_float32_in_autocast(dtype: torch.dtype) -> None:
    attn = build('gsop').eval()
    x = 3000 * example(2, C, 6, 9)
    with torch.autocast('cpu', dtype=dtype):
        got = attn.gates(x)['covariance']
        t = attn.get_submodule('bn_reduce')(attn.get_submodule('conv_reduce')(x.relu())).relu()
    assert got.dtype == torch.float32
    t = t.double().flatten(2)
    t = t - t.mean(2, keepdim=True)
    want = t @ t.mT / t.shape[2]
    assert want.max() > 2 * torch.finfo(torch.float16).max
    assert gap(got, want) < 1e-5


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_csa_softmax_is_float32_in_autocast(dtype: torch.dtype) -> None:
    attn = randomised('csa', {'num_heads': 2}).eval()
    with torch.autocast('cpu', dtype=dtype):
        got = attn.gates(300 * example(2, C, 6, 9))['matrix']
    assert got.dtype == torch.float32
    assert (got.sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@each_variant
def test_gradients_equal_finite_differences(name: str, args: dict[str, Any], train: bool) -> None:
    attn = randomised(name, args, dtype=torch.float64).train(train)
    names, values = [k for k, _ in attn.named_parameters()], list(attn.parameters())
    x = example(2, C, 3, 4, dtype=torch.float64).requires_grad_()

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(attn, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True, nondet_tol=0.0)


# Placement on devices, types, memory.


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
@each_variant
def test_every_tensor_is_placed(name: str, args: dict[str, Any], dtype: torch.dtype) -> None:
    attn = build(name, args, device='meta', dtype=dtype)
    tensors = [*attn.parameters(), *attn.buffers()]
    assert {t.device.type for t in tensors} == ({'meta'} if tensors else set())
    assert {t.dtype for t in tensors if t.is_floating_point()} == ({dtype} if tensors else set())
    y = attn.eval()(torch.empty(2, C, 8, 6, device='meta', dtype=dtype))
    assert y.device.type == 'meta' and y.dtype == dtype


@each_attn
def test_cast_module_computes_in_its_type(name: str) -> None:
    attn = randomised(name).to(torch.bfloat16).eval()
    assert {t.dtype for t in attn.state_dict().values() if t.is_floating_point()} <= {torch.bfloat16}
    assert attn(example(2, C, 4, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert attn.double()(example(2, C, 4, 5, dtype=torch.float64)).dtype == torch.float64


@each_variant
def test_output_can_be_added_to_in_place(name: str, args: dict[str, Any]) -> None:
    """timm's blocks do `x += shortcut` on it: an output that its own backward needs would raise."""
    attn = randomised(name, args).train()
    x = example(2, C, 4, 6).requires_grad_()
    attn(x).add_(1).sum().backward()
    other = x.detach().clone().requires_grad_()
    copied = randomised(name, args).train()
    (copied(other) + 1).sum().backward()
    assert x.grad is not None and other.grad is not None
    assert torch.equal(x.grad, other.grad)


@each_variant
def test_every_parameter_gets_a_gradient(name: str, args: dict[str, Any]) -> None:
    attn = randomised(name, args).eval()
    x = example(2, C, 6, 9).requires_grad_()
    (attn(x) * example(2, C, 6, 9)[:, :, :1, :1].sign()).sum().backward()
    zero = [k for k, p in attn.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert zero == []


@each_variant
def test_state_dict_copy_and_pickle_carry_the_module(name: str, args: dict[str, Any]) -> None:
    attn = randomised(name, args).eval()
    attn.gain = 0.75
    x = example(2, C, 4, 6)
    fresh = build(name, args).eval()
    fresh.load_state_dict(attn.state_dict())
    for other in (fresh, copy.deepcopy(attn), pickle.loads(pickle.dumps(attn))):
        assert torch.equal(other(x), attn(x))


# Compilers and exporters.


@pytest.fixture
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@each_variant
def test_compiles_to_one_graph(compiler: None, name: str, args: dict[str, Any], train: bool) -> None:
    attn = randomised(name, args).train(train)
    other = copy.deepcopy(attn)
    x, same = (example(2, C, 6, 9).requires_grad_() for _ in range(2))
    y = torch.compile(other, fullgraph=True, backend='aot_eager')(same)
    want = attn(x)
    assert gap(y, want) < 1e-6
    want.square().sum().backward()
    y.square().sum().backward()
    assert x.grad is not None and same.grad is not None
    assert gap(same.grad, x.grad) < 1e-5
    for key, buffer in attn.named_buffers():
        torch.testing.assert_close(other.get_buffer(key), buffer, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get('CXX', 'g++')) is None, reason='inductor needs a C++ compiler')
@pytest.mark.parametrize('name', ['srm', 'triplet'])
def test_compiles_with_inductor(compiler: None, name: str) -> None:
    attn = randomised(name).eval()
    x = example(2, C, 6, 9)
    with torch.no_grad():
        assert gap(torch.compile(attn, fullgraph=True)(x), attn(x)) < 1e-5


@each_variant
def test_autocast_compiles_to_one_graph(compiler: None, name: str, args: dict[str, Any]) -> None:
    attn = randomised(name, args).eval()
    x = example(2, C, 6, 9)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        assert gap(torch.compile(attn, fullgraph=True, backend='eager')(x), attn(x)) < 1e-2


@each_variant
def test_exports_with_dynamic_batch_and_size(name: str, args: dict[str, Any]) -> None:
    attn = randomised(name, args).eval()
    # At least 3, which a stride of 2 takes to 2: torch treats a size of 1 as a program of its own.
    dynamic = {0: Dim('n', min=1, max=64), 2: Dim('h', min=3, max=512), 3: Dim('w', min=3, max=512)}
    program = torch.export.export(attn, (example(2, C, 6, 10),), dynamic_shapes=(dynamic,)).module()
    for size in ((1, 13, 7), (3, 4, 4), (2, 6, 10)):
        x = example(size[0], C, *size[1:])
        assert gap(program(x), attn(x)) < 1e-5


@each_variant
def test_scripts(name: str, args: dict[str, Any]) -> None:
    attn = randomised(name, args)
    attn.gain = 0.75
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(attn), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for train in (False, True):
        attn.train(train)
        loaded.train(train)
        for size in ((2, 6, 9), (3, 4, 4)):
            x = example(size[0], C, *size[1:])
            assert gap(loaded(x), attn(x)) < 1e-5


@each_variant
def test_traces(name: str, args: dict[str, Any]) -> None:
    attn = randomised(name, args).eval()
    traced: Any = torch.jit.trace(attn, example(2, C, 6, 9))
    x = example(2, C, 6, 9) + 1
    assert gap(traced(x), attn(x)) < 1e-5


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@each_variant
def test_runs_with_deterministic_algorithms(deterministic: None, name: str, args: dict[str, Any]) -> None:
    grads: list[list[Tensor]] = []
    for _ in range(2):
        attn = randomised(name, args).train()
        x = example(2, C, 6, 9).requires_grad_()
        attn(x).square().sum().backward()
        grads.append([p.grad for p in (x, *attn.parameters()) if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# The neutral state and the gain.


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@each_neutral
def test_neutral_state_multiplies_by_the_neutral_gate(name: str, args: dict[str, Any], train: bool) -> None:
    attn = build(name, args).train(train)
    attn.init_neutral()
    x = 50 * example(3, C, 6, 9)
    assert attn.gain == 1 and attn.neutral_gate is not None
    torch.testing.assert_close(attn(x), x * attn.neutral_gate, rtol=1e-6, atol=0)
    if attn.neutral_gate in EXACT:
        assert torch.equal(attn(x), x * attn.neutral_gate)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_neutral
def test_inverse_gain_makes_it_the_identity(
    name: str, args: dict[str, Any], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    attn = build(name, args).to(dtype).eval()
    attn.init_neutral()
    assert attn.neutral_gate is not None
    attn.gain = 1 / attn.neutral_gate
    x = (50 * example(3, C, 6, 9)).to(dtype).contiguous(memory_format=layout)
    y = attn(x)
    assert y.dtype == dtype
    if attn.neutral_gate in EXACT or dtype != torch.float32:
        assert torch.equal(y, x)
    else:
        torch.testing.assert_close(y, x, rtol=1e-6, atol=0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@each_neutral
def test_identity_survives_autocast_with_large_inputs(name: str, args: dict[str, Any], dtype: torch.dtype) -> None:
    """A statistic that overflows is infinite, and 0 * inf is NaN."""
    attn = build(name, args).eval()
    attn.init_neutral()
    assert attn.neutral_gate is not None
    attn.gain = 1 / attn.neutral_gate
    for x in (300 * example(3, C, 6, 9), (300 * example(3, C, 6, 9)).to(dtype)):
        with torch.autocast('cpu', dtype=dtype):
            y = attn(x)
        assert gap(y, x) <= (0 if attn.neutral_gate in EXACT else torch.finfo(dtype).eps)


@each_gate
def test_gain_multiplies_the_gate(name: str, args: dict[str, Any]) -> None:
    attn = randomised(name, args).eval()
    x = example(2, C, 6, 9)
    one = attn(x)
    attn.gain = 3.0
    torch.testing.assert_close(attn(x), 3 * one, rtol=1e-5, atol=1e-5)
    assert 'gain=3' in repr(attn)


@each_neutral
def test_neutral_start_learns_in_two_steps(name: str, args: dict[str, Any]) -> None:
    """The last layer moves in the first step, which lets a gradient through to all of it in the second."""
    attn = build(name, args).eval()
    attn.init_neutral()
    x, ct = example(2, C, 6, 9), example(2, C, 6, 9).flip(0)
    (attn(x) * ct).sum().backward()
    with torch.no_grad():
        moved = [k for k, p in attn.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
        assert moved
        for p in attn.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad / p.grad.norm().clamp(min=1e-6)
    attn.zero_grad()
    (attn(x) * ct).sum().backward()
    assert [k for k, p in attn.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


# The gates themselves.


def _gated(name: str, args: dict[str, Any], x: Tensor, gates: dict[str, Tensor]) -> Tensor:
    """The output rebuilt from what `gates` returns."""
    y = x
    if name == 'bam':
        return x * (1 + gates['gate'])
    if name == 'scse':
        a, g = gates['channel'][:, :, None, None], gates['spatial'][:, None]
        return x * (a + g) if args.get('fuse') == 'add' else torch.maximum(x * a, x * g)
    if name in ('coord', 'scsa'):
        y = y * gates['cw'][:, :, None] * gates['hc'].transpose(1, 2)[..., None]
    if name == 'triplet':
        parts = [gates['cw'][:, :, None], gates['hc'].transpose(1, 2)[:, :, :, None]]
        if 'spatial' in gates:
            parts.append(gates['spatial'][:, None])
        return sum((x * p for p in parts), torch.zeros_like(x)) / len(parts)
    if 'channel' in gates:
        y = y * (gates['channel'] if name == 'gam' else gates['channel'][:, :, None, None])
    if 'spatial' in gates and name != 'gc':
        y = y * (gates['spatial'] if gates['spatial'].dim() == 4 else gates['spatial'][:, None])
    if 'gate' in gates:
        y = y * gates['gate']
    return y + gates['context'][:, :, None, None] if 'context' in gates else y


@each_variant
def test_gates_are_those_of_the_forward_pass(name: str, args: dict[str, Any]) -> None:
    attn = randomised(name, args).eval()
    attn.gain = 1.0
    n, h, w = 2, 5, 9
    x = example(n, C, h, w)
    heads = args.get('num_heads', 1)
    shapes = {
        'channel': (n, C, h, w) if name == 'gam' else (n, C),
        'spatial': (n, C, h, w) if name in ('gam', 'ema', 'sge') else (n, h, w),
        'context': (n, C),
        'gate': (n, C, h, w),
        'branch': (n, 2, C),
        'covariance': (n, 16, 16),
        'matrix': (n, heads, *2 * ((8 if name == 'csa' else C) // heads,)),
        'cw': (n, C, w),
        'hc': (n, h, C),
    }
    gates = attn.gates(x)
    assert gates
    assert {k: tuple(v.shape) for k, v in gates.items()} == {k: shapes[k] for k in gates}
    if name in ('sk', 'csa'):
        kind, dim = ('branch', 1) if name == 'sk' else ('matrix', -1)
        torch.testing.assert_close(gates[kind].sum(dim), torch.ones_like(gates[kind].sum(dim)))
    elif name == 'nl':  # whose map says where the sum it adds comes from
        torch.testing.assert_close(gates['spatial'].sum((1, 2)), torch.ones(n))
    else:
        torch.testing.assert_close(_gated(name, args, x, gates), attn(x))
    attn.gain = 3.0
    assert all(torch.equal(v, gates[k]) for k, v in attn.gates(x).items()), 'gates() must not hold the gain'


# Errors.


@pytest.mark.parametrize('name', ['se', 'cbam', 'bam', 'gam', 'csa', 'gc', 'scse'])
def test_no_hidden_channel_left_raises(name: str) -> None:
    with pytest.raises(ValueError, match=r'channels \(=8\).*rd_ratio \(=0\.0625\).*at least 16 channels'):
        create_attn(name, 8, rd_ratio=1 / 16)


def test_least_channels_of_the_error_is_the_least() -> None:
    for rd_ratio, least in ((1 / 16, 16), (0.3, 4), (1 / 3, 3)):
        create_attn('se', least, rd_ratio=rd_ratio)
        with pytest.raises(ValueError, match=f'at least {least} channels'):
            create_attn('se', least - 1, rd_ratio=rd_ratio)


@pytest.mark.parametrize('rd_ratio', [0, -0.5])
def test_rd_ratio_must_be_positive(rd_ratio: float) -> None:
    with pytest.raises(ValueError, match='positive rd_ratio'):
        create_attn('se', 64, rd_ratio=rd_ratio)


INVALID: list[tuple[str, int, dict[str, Any], str]] = [
    ('gam', 64, {'groups': 3}, r'groups \(=3\) must divide the channels \(=64\)'),
    ('gam', 64, {'groups': 8}, r'groups \(=8\).*hidden width \(=4\)'),
    ('gam', 64, {'groups': 0}, r'groups \(=0\)'),
    ('gam', 64, {'shuffle': 'gates'}, r"shuffle \(='gates'\).*'hidden', 'gate', None"),
    ('gam', 64, {'channel_gate': 'relu'}, r"channel_gate \(='relu'\).*'sigmoid', None"),
    ('gam', 64, {'channel': False, 'spatial': False}, 'no gate left'),
    ('cbam', 64, {'channel': False, 'spatial': False}, 'no gate left'),
    ('cbam', 64, {'kernel_size': 6}, r'kernel_size \(=6\) must be odd'),
    ('triplet', 64, {'kernel_size': 4}, r'kernel_size \(=4\) must be odd'),
    ('eca', 64, {'kernel_size': 2}, r'kernel_size \(=2\) must be odd'),
    ('eca', 64, {'kernel_size': -1}, r'kernel_size \(=-1\) must be odd and positive'),
    ('bam', 64, {'combine': 'sum'}, r"combine \(='sum'\).*'mul', 'add'"),
    ('sk', 48, {}, r'channels \(=48\) must be divisible by the 32 groups'),
    ('sk', 64, {'form': 'skresnet'}, r"form \(='skresnet'\).*'sk_resnet', 'sknet'"),
    ('csa', 64, {'num_heads': 3}, r'num_heads \(=3\) must divide the width \(=8'),
    ('gsop', 64, {'dim': 0}, r'dim \(=0\)'),
    ('cbam', 64, {'order': 'both'}, r"order \(='both'\).*'channel-spatial', 'spatial-channel', 'parallel'"),
    ('cbam', 64, {'order': 'parallel', 'spatial': False}, r"order \(='parallel'\) is that of two gates"),
    ('fca', 72, {}, r'channels \(=72\) must be divisible by the 16 frequencies'),
    ('fca', 8, {}, r'channels \(=8\) must be divisible by the 16 frequencies'),
    ('fca', 64, {'dct_size': 6}, r'dct_size \(=6\) must be at least 7'),
    ('coord', 64, {'min_width': 0}, r'min_width \(=0\) must be positive'),
    ('coord', 64, {'rd_ratio': 0}, r'rd_ratio \(=0\).*must be positive'),
    ('gc', 16, {}, r'channels \(=16\) times rd_ratio \(=0\.0625\) leaves one channel'),
    ('gc', 64, {'pool': 'max'}, r"pool \(='max'\).*'attn', 'avg'"),
    ('gc', 64, {'fuse': 'max'}, r"fuse \(='max'\).*'add', 'mul', 'both'"),
    ('scse', 1, {}, r'channels \(=1\).*at least 2 channels'),
    ('scse', 64, {'fuse': 'mul'}, r"fuse \(='mul'\).*'max', 'add'"),
    ('gct', 64, {'mode': 'l3'}, r"mode \(='l3'\).*'l2', 'l1'"),
    ('ema', 48, {}, r'groups \(=32\) must divide the channels \(=48\)'),
    ('ema', 16, {}, r'groups \(=32\) must divide the channels \(=16\)'),
    ('sge', 96, {}, r'groups \(=64\) must divide the channels \(=96\)'),
    ('sge', 64, {'groups': 0}, r'groups \(=0\) must divide'),
    ('nl', 64, {'rd_ratio': 0}, r'rd_ratio \(=0\) must be positive'),
    ('scsa', 66, {}, r'channels \(=66\) must be divisible by 4'),
    ('scsa', 64, {'num_heads': 3}, r'num_heads \(=3\) must divide the channels \(=64\)'),
    ('scsa', 64, {'window_size': 0}, r'window_size \(=0\) must be positive'),
    ('simam', 64, {'e_lambda': 0}, r'e_lambda \(=0\) must be positive'),
]


@pytest.mark.parametrize(('name', 'channels', 'args', 'match'), INVALID)
def test_options_that_do_not_fit_raise(name: str, channels: int, args: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        create_attn(name, channels, **args)


def test_simam_says_that_it_has_no_neutral_state() -> None:
    attn = create_attn('simam', 8)
    assert attn.neutral_gate is None
    with pytest.raises(ValueError, match=r"no state in which it multiplies by a constant: use start='paper'"):
        attn.init_neutral()


def test_half_precision_module_keeps_fcas_waves() -> None:
    """They are computed in float32, where a buffer would have been rounded: runs of 16-bit waves are 1e-3 away."""
    attn: Any = randomised('fca', {'dct_size': 56}).eval()
    x = example(1, C, 56, 56, dtype=torch.bfloat16)
    got = copy.deepcopy(attn).bfloat16().spectrum(x)
    assert got.dtype == torch.float32
    assert gap(got, copy.deepcopy(attn).double().spectrum(x.double())) < 1e-6


def test_sge_and_simam_of_one_pixel_are_the_constants_of_their_equations() -> None:
    x = example(2, C, 1, 1)
    sge = randomised('sge')
    gate = sge.get_parameter('bias').flatten().sigmoid()  # t = 0; 64 groups of one channel
    torch.testing.assert_close(sge(x), x * gate[:, None, None])
    torch.testing.assert_close(build('simam')(x), x * torch.tensor(0.5).sigmoid())


def test_gct_of_weak_maps_takes_the_sum_of_squares() -> None:
    """Where maps are weak, the mean in place of the sum is not hidden by the norm over channels: eps is not small."""
    attn = randomised('gct').double().eval()
    x = 1e-3 * example(2, C, 5, 9, dtype=torch.float64)
    alpha, gamma, beta = (attn.get_parameter(k).detach() for k in ('alpha', 'gamma', 'beta'))

    def gated(square: Tensor) -> Tensor:
        e = alpha * (square + 1e-5).sqrt()
        return x * (1 + (e * gamma / (e.square().mean(1, keepdim=True) + 1e-5).sqrt() + beta).tanh())

    assert gap(attn(x), gated(x.square().sum((2, 3), keepdim=True))) < 1e-12
    assert gap(attn(x), gated(x.square().mean((2, 3), keepdim=True))) > 1e-3


def test_unknown_attention_names_the_choices() -> None:
    with pytest.raises(
        ValueError, match=r"Unknown attention 'cbamm'\. Did you mean 'cbam'.*\? Expected one of: bam, cbam, "
    ):
        create_attn('cbamm', 64)


@each_attn
def test_unknown_option_names_the_accepted_ones(name: str) -> None:
    with pytest.raises(TypeError, match=rf"'{name}' has no option 'reduction'.* Accepted") as caught:
        create_attn(name, 64, reduction=16)
    accepted = {option for n, args in VARIANTS for option in args if n == name}
    assert [option for option in accepted if option not in str(caught.value)] == []


@each_attn
def test_wrong_channel_count_raises(name: str) -> None:
    attn = build(name).eval()
    if name in ('eca', 'triplet', 'simam'):  # nothing in them depends on the channel count
        assert attn(torch.randn(2, C + 32, 4, 4)).shape[1] == C + 32
        return
    with pytest.raises((RuntimeError, ValueError), match=f'{C}|must match|expected'):
        attn(torch.randn(2, C + 32, 4, 4))


@each_attn
def test_wrong_rank_raises(name: str) -> None:
    attn = build(name).eval()
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        attn(torch.randn(2, C))


def test_modules_are_modules() -> None:
    for name in list_attn():
        attn = build(name)
        assert isinstance(attn, nn.Module)
        assert isinstance(attn, get_attn(name).cls)
        assert attn.gain == 1.0

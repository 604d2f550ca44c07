"""Every kind of model doing what timm's users do with models: features, compilers, layouts, precision, odd sizes.

timm's own test suite runs on all registered models elsewhere (tests/timm_suite); this is what it leaves out.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.export import Dim
from torchvision.models.feature_extraction import create_feature_extractor

from timm_attn import list_attn
from timm_attn.layers import attn_sites

# One small model for each attention: a tenth of the depth and a quarter of the width.
THIN: dict[str, Any] = {'layers': (1, 1, 1, 1), 'channels': (32, 64, 96, 128)}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    **{a: (f'{a}_resnet18', THIN) for a in list_attn() if a not in ('sk', 'gsop', 'fca')},
    # Two hidden units, 32 // 16, are easily both dead.
    **{a: (f'{a}_resnet18', {**THIN, 'attn_args': {'rd_ratio': 1 / 4}}) for a in ('se', 'cbam', 'bam', 'gam', 'gc')},
    'fca': ('fca_resnet34', {**THIN, 'attn_args': {'rd_ratio': 1 / 4}}),
    'sge': ('sge_resnet18', {**THIN, 'attn_args': {'groups': 8}}),
    'ema': ('ema_resnet18', {**THIN, 'attn_args': {'groups': 8}}),
    'sk': ('sk_resnet50', THIN),
    'sknet': ('sk_resnext50_32x4d', THIN),
    'gsop': ('gsop_resnet50', {**THIN, 'attn_args': {'dim': 16}}),
    'gam_groups': ('gam_resnet50', THIN),
    'simple_cnn': ('simple_cnn', {}),
    'simple_cnn_se': ('simple_cnn_se', {'attn_after': (1,), 'attn_args': {'rd_ratio': 1 / 4}}),
}
RESNETS = [kind for kind in SMALL if not kind.startswith('simple')]
each_kind = pytest.mark.parametrize('kind', SMALL)
each_resnet = pytest.mark.parametrize('kind', RESNETS)
# Of one model of each attention, test_export.py shows it.
each_other = pytest.mark.parametrize('kind', [kind for kind in SMALL if kind not in list_attn()])


def create_model(name: str, **kwargs: Any) -> Any:
    """timm's; its models have methods and layers that `nn.Module`, the declared type, does not know."""
    return timm.create_model(name, **kwargs)


def build(kind: str, trained: bool = True, **kwargs: Any) -> Any:
    """A small model in eval mode; `trained` gives no layer a special value (timm starts branches at 0)."""
    torch.manual_seed(0)
    name, defaults = SMALL[kind]
    if 'attn_args' in kwargs:
        kwargs['attn_args'] = {**defaults.get('attn_args', {}), **kwargs['attn_args']}
    model = create_model(name, **{'num_classes': 10, **defaults, **kwargs}).eval()
    if trained:
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                if key.endswith('running_var') or (tensor.dim() == 1 and key.endswith('weight')):
                    tensor.uniform_(0.75, 1.25)
                elif key.endswith(('running_mean', 'bias')):
                    tensor.normal_(0, 0.1)
                elif key.endswith(('cfc', 'gamma', 'temperature', 'mlp_add.fc2.weight')):
                    tensor.normal_(0, 0.5)
    return model


def image(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


def gap(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    assert want.std() > 1e-4, 'nothing to compare'
    return ((got.float() - want.float()).abs().max() / want.float().abs().max()).item()


@pytest.fixture(autouse=True)
def no_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    """Most of these tests look at outputs alone."""
    with torch.set_grad_enabled('learns' in request.node.name):
        yield


# Shapes.


@pytest.mark.parametrize('size', [(1, 64, 64), (2, 32, 32), (1, 96, 33), (2, 40, 72)], ids=str)
@each_kind
def test_any_size_gives_logits(kind: str, size: tuple[int, int, int]) -> None:
    n, h, w = size
    y = build(kind)(image(n, 3, h, w))
    assert y.shape == (n, 10)
    assert y.isfinite().all()


@each_kind
def test_batch_of_one_equals_its_row_in_a_batch(kind: str) -> None:
    model, x = build(kind), image(3, 3, 64, 64)
    assert gap(model(x[1:2]), model(x)[1:2]) < 1e-5


@each_kind
def test_attention_is_used(kind: str) -> None:
    """Each site reaches the logits: a gain of 0.5 there changes them."""
    model, x = build(kind), image(2, 3, 64, 64)
    before = model(x)
    for site, attn in attn_sites(model).items():
        if kind in ('sk', 'sknet'):  # which have no gain
            kept = attn.get_parameter('fc2.weight').clone()
            attn.get_parameter('fc2.weight').zero_()
            assert not torch.equal(model(x), before), site
            attn.get_parameter('fc2.weight').copy_(kept)
        else:
            attn.gain = 0.5
            assert not torch.equal(model(x), before), site
            attn.gain = 1.0
    assert torch.equal(model(x), before)
    assert bool(attn_sites(model)) == (kind != 'simple_cnn')


# Features.


@pytest.mark.parametrize('kwargs', [{}, {'output_stride': 16}, {'cifar_stem': True}], ids=['', 'stride16', 'cifar'])
@each_resnet
def test_features_only_equals_forward_intermediates(kind: str, kwargs: dict[str, Any]) -> None:
    model = build(kind, **kwargs)
    name, defaults = SMALL[kind]
    features = create_model(name, features_only=True, **{**defaults, **kwargs}).eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith('fc.')}
    features.load_state_dict(state, strict=True)
    x = image(2, 3, 64, 96)
    ones, others = features(x), model.forward_intermediates(x, intermediates_only=True)
    assert len(ones) == len(others) == 5
    for one, other, channels, reduction in zip(
        ones, others, features.feature_info.channels(), features.feature_info.reduction(), strict=True
    ):
        assert torch.equal(one, other)
        assert one.shape == (2, channels, -(-64 // reduction), -(-96 // reduction))
    final, _ = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(final, others[-1])


@pytest.mark.parametrize('name', ['simple_cnn', 'simple_cnn_cbam'])
def test_features_of_the_simple_cnn_equal_its_intermediates(name: str) -> None:
    model = create_model(name).eval()
    features = create_model(name, features_only=True).eval()
    features.load_state_dict({f'model.{k}': v for k, v in model.state_dict().items() if 'head.' not in k})
    x = image(2, 3, 32, 48)
    ones, others = features(x), model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(f.shape) for f in ones] == [(2, 32, 32, 48), (2, 64, 16, 24), (2, 64, 8, 12)]
    assert features.feature_info.reduction() == [1, 2, 4] and features.feature_info.channels() == [32, 64, 64]
    assert all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def test_bam_lies_before_the_stages_feature() -> None:
    model = build('bam')
    x = image(1, 3, 64, 64)
    seen: list[Tensor] = []
    model.get_submodule('layer1.1').register_forward_hook(lambda _, __, y: seen.append(y))
    assert torch.equal(model.forward_intermediates(x, intermediates_only=True)[1], seen[0])


@each_resnet
def test_cifar_stem_keeps_the_resolution(kind: str) -> None:
    model = build(kind, cifar_stem=True)
    assert model.conv1.kernel_size == (3, 3) and model.conv1.stride == (1, 1)
    sizes = [tuple(f.shape[2:]) for f in model.forward_intermediates(image(1, 3, 32, 32), intermediates_only=True)]
    last = 8 if kind == 'gsop' else 4
    assert sizes == [(32, 32), (32, 32), (16, 16), (8, 8), (last, last)]
    assert [f['reduction'] for f in model.feature_info] == [1, 1, 2, 4, 32 // last]
    assert model(image(2, 3, 32, 32)).shape == (2, 10)


def test_cifar_stem_takes_other_images() -> None:
    model = build('se', cifar_stem=True, in_chans=1)
    assert model(image(1, 1, 28, 28)).shape == (1, 10)


@pytest.mark.parametrize('output_stride', [8, 16])
@pytest.mark.parametrize('kind', ['sk', 'sknet', 'gsop', 'bam'])
def test_output_stride_reaches_every_convolution(kind: str, output_stride: int) -> None:
    model = build(kind, output_stride=output_stride)
    x = model.forward_features(image(1, 3, 64, 64))
    assert x.shape[2:] == (64 // output_stride, 64 // output_stride)
    if kind == 'sk':
        dilations = [m.dilation[0] for m in model.layer4[0].conv2.modules() if isinstance(m, nn.Conv2d)][:2]
        # timm's first dilated block has the dilation of the stage before.
        assert dilations == ([2, 2] if output_stride == 8 else [1, 1])


# Compilers and exporters.


@each_kind
def test_compiles_to_one_graph(kind: str) -> None:
    torch.compiler.reset()
    model, x = build(kind), image(2, 3, 64, 64)
    want = model(x)
    assert gap(torch.compile(model, fullgraph=True, backend='eager')(x), want) < 1e-5
    torch.compiler.reset()


def exported(model: nn.Module) -> nn.Module:
    dynamic = {0: Dim('n', min=1, max=64), 2: Dim('h', min=64, max=512), 3: Dim('w', min=64, max=512)}
    return torch.export.export(model, (image(2, 3, 96, 128),), dynamic_shapes={'x': dynamic}).module()


@pytest.fixture(scope='module')
def sizes_export() -> None:
    try:
        exported(timm.create_model('resnet18').eval())
    except Exception as e:
        pytest.skip(f"torch {torch.__version__} exports timm's own resnet18 for no more than one size: {e}")


@each_other
def test_exports_with_dynamic_batch_and_size(kind: str, sizes_export: None) -> None:
    model = build(kind)
    program = exported(model)
    for size in ((1, 64, 160), (3, 100, 70)):
        x = image(size[0], 3, *size[1:])
        assert gap(program(x), model(x)) < 1e-5


@each_other
def test_scripts(kind: str) -> None:
    model = build(kind)
    scripted = torch.jit.script(model)
    for size in ((2, 64, 64), (1, 48, 80)):
        x = image(size[0], 3, *size[1:])
        assert gap(scripted(x), model(x)) < 1e-4


@each_kind
def test_traces_with_fx(kind: str) -> None:
    model = build(kind)
    features = create_feature_extractor(model, {'head.fc' if kind.startswith('simple') else 'fc': 'logits'}).eval()
    for size in ((1, 48, 80), (3, 64, 64)):
        x = image(size[0], 3, *size[1:])
        assert gap(features(x)['logits'], model(x)) < 1e-5


# Layouts, precision, devices.


@each_kind
def test_channels_last_gives_the_same_logits(kind: str) -> None:
    model, x = build(kind), image(2, 3, 64, 64)
    want = model(x)
    model = model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    assert gap(model(x), want) < 1e-4
    assert model.forward_features(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@each_kind
def test_autocast_gives_nearly_the_same_logits(kind: str, dtype: torch.dtype) -> None:
    model, x = build(kind), image(2, 3, 64, 64)
    want = model(x)
    with torch.autocast('cpu', dtype=dtype):
        got = model(x)
    assert got.isfinite().all()
    assert (got.float() - want).norm() / want.norm() < (0.1 if dtype == torch.bfloat16 else 0.02)


@each_kind
def test_meta_device_and_type_reach_every_tensor(kind: str) -> None:
    name, kwargs = SMALL[kind]
    stems: list[dict[str, Any]] = [{}, {'cifar_stem': True}] if kind in RESNETS else [{}]
    for stem in stems:
        model = create_model(name, device='meta', dtype=torch.bfloat16, **kwargs, **stem)
        tensors = model.state_dict().values()
        assert {t.device.type for t in tensors} == {'meta'}
        assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.bfloat16}


@each_kind
def test_bfloat16_model_gives_nearly_the_same_logits(kind: str) -> None:
    model, x = build(kind), image(2, 3, 64, 64)
    want = model(x)
    got = model.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() / want.norm() < 0.15


# Learning.


@each_kind
def test_learns_with_every_parameter(kind: str) -> None:
    """One step from timm's own start, then every parameter has a gradient that is not zero, the attention's too."""
    model = build(kind, zero_init_last=False) if kind in RESNETS else build(kind)
    x, labels = image(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    loss = nn.functional.cross_entropy(model(x), labels)
    loss.backward()
    dead = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert dead == []
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-3 * p.grad / p.grad.norm()
    assert nn.functional.cross_entropy(model(x), labels) < loss


@each_kind
def test_learns_the_same_with_checkpointing_and_deterministic_algorithms(kind: str) -> None:
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for checkpointing in (False, True):
            model = build(kind).train()
            model.set_grad_checkpointing(checkpointing)
            y = model(image(2, 3, 64, 64))
            y.square().sum().backward()
            results.append([y, *(p.grad for p in model.parameters())])
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*results, strict=True):
        assert a is not None and b is not None
        assert gap(b, a) < 1e-5 if a.numel() > 1 and a.std() > 1e-4 else torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@each_resnet
def test_fresh_model_learns_although_its_branches_start_at_zero(kind: str) -> None:
    """With timm's zero-initialised branches the attention sees zeros in step 1; in step 3 all of it has a gradient."""
    model = build(kind, trained=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(image(2, 3, 64, 64)), torch.tensor([0, 1])).backward()
        optimizer.step()
    dead = [
        f'{site}.{k}'
        for site, m in attn_sites(model).items()
        for k, p in m.named_parameters()
        if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert dead == []


@each_resnet
def test_init_weights_leaves_the_attention_alone(kind: str) -> None:
    model = build(kind, trained=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    model.init_weights()
    sites = tuple(f'{site}.' for site in attn_sites(model))
    after = model.state_dict()
    assert not torch.equal(after['layer1.0.conv1.weight'], before['layer1.0.conv1.weight'])
    if kind not in ('sk', 'sknet'):  # whose convolutions are the backbone's
        assert all(torch.equal(after[k], before[k]) for k in before if k.startswith(sites))


def test_simple_cnn_places_attention_where_asked() -> None:
    def sites(**kwargs: Any) -> list[str]:
        return list(attn_sites(create_model('simple_cnn_se', device='meta', **kwargs)))

    assert sites() == sites(attn_after=(1, 2)) == ['blocks.0.se', 'blocks.2.se']
    assert sites(attn_after=(1,)) == ['blocks.0.se']
    assert sites(attn_after=(2,)) == ['blocks.2.se']
    assert sites(attn_after=[1]) == ['blocks.0.se']  # as JSON has it

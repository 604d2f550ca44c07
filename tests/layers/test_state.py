"""A state dict says everything: the gain of an injected attention goes wherever the weights go.

What every test compares with is the model that was saved: same weights, same function.
"""

import copy
import io
import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.distributed.checkpoint as dcp
from timm.models import load_checkpoint
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import timm_attn
from timm_attn.cli import main
from timm_attn.hub.client import HubFileError
from timm_attn.hub.folder import read_folder
from timm_attn.layers import Attention, get_attn, list_attn

SMALL: dict[str, Any] = dict(layers=(1, 1, 1, 1), num_classes=3)
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
# Those with an identity start and a registered model.
INJECTED = [n for n in list_attn() if timm.is_model(f'{n}_resnet18') and not get_attn(n).cls.no_warm_start]
each_injected = pytest.mark.parametrize('name', INJECTED)


def alive(model: nn.Module, seed: int = 0) -> Any:
    """Gives BatchNorms weights and statistics: fresh ones end each branch in zeros, which hides what stands there."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.running_mean is not None and m.running_var is not None
            nn.init.uniform_(m.weight, 0.5, 1, generator=generator)
            nn.init.normal_(m.bias, 0, 0.1, generator=generator)
            nn.init.normal_(m.running_mean, 0, 0.1, generator=generator)
            nn.init.uniform_(m.running_var, 0.5, 1.5, generator=generator)
    return model.eval()


def registered(name: str = 'cbam', **kwargs: Any) -> Any:
    torch.manual_seed(9)
    return alive(timm.create_model(f'{name}_resnet18', **{**SMALL, **kwargs}), seed=9)


def injected(name: str = 'cbam', seed: int = 0, **kwargs: Any) -> Any:
    """A network that `inject` changed, after some training, as it were."""
    torch.manual_seed(seed)
    options: Any = timm.create_model(f'{name}_resnet18', **SMALL, device='meta').attn_args
    model = timm_attn.inject(timm.create_model('resnet18', **{**SMALL, **kwargs}), name, **options)
    with torch.no_grad():
        for site in timm_attn.attn_sites(model).values():
            for p in site.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
    return alive(model, seed)


def gap(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


class Plain(Attention):
    """An attention without any tensor: x * s(x)."""

    def __init__(self) -> None:
        super().__init__(neutral_gate=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.sigmoid() * self.gain)


# What the state dict says.


@each_injected
def test_an_injected_model_is_the_registered_one_with_the_same_state(name: str, tmp_path: Path) -> None:
    model = injected(name)
    want = model(X)
    state = model.state_dict()
    sites = timm_attn.attn_sites(model)
    assert {k for k in state if k.endswith('.gain')} == {f'{k}.gain' for k, m in sites.items() if m.gain != 1}
    for weights in (state, timm_attn.convert(state, f'{name}_resnet18', **SMALL)):
        other = registered(name)
        assert gap(other(X), want) > 0.01
        other.load_state_dict(weights)
        assert gap(other(X), want) <= 1e-6
    timm_attn.save(other, tmp_path)
    assert gap(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(X), want) <= 1e-6


@pytest.mark.parametrize('name', list_attn())
def test_a_gain_of_one_is_no_key(name: str) -> None:
    attn = timm_attn.create_attn(name, 64)
    keys = set(attn.state_dict())
    assert 'gain' not in keys
    attn.gain = 0.75
    assert set(attn.state_dict()) == keys | {'gain'}
    assert [k for k, _ in attn.named_parameters() if k == 'gain'] == []
    attn.gain = 1
    assert set(attn.state_dict()) == keys
    assert set(dict(attn.named_buffers())) <= keys | attn.__dict__.get('_non_persistent_buffers_set', set())


@pytest.mark.parametrize('name', list_attn())
def test_the_gain_comes_and_goes_with_the_state(name: str) -> None:
    attn, other = (timm_attn.create_attn(name, 64) for _ in range(2))
    attn.gain = 2 / 3
    state = attn.state_dict(prefix='a.', keep_vars=True)
    assert state['a.gain'].dtype == torch.float64 and state['a.gain'].shape == () and state['a.gain'] == 2 / 3
    for assign in (False, True):
        other.load_state_dict(attn.state_dict(), assign=assign)
        assert other.gain == 2 / 3 and other.factor == 2 / 3
        other.load_state_dict({k: v for k, v in attn.state_dict().items() if k != 'gain'}, assign=assign)
        assert other.gain == 1


def test_the_number_outlives_casts_and_empty_tensors() -> None:
    attn = timm_attn.create_attn('bam', 64)
    attn.gain = 2 / 3
    for change in (nn.Module.half, nn.Module.double, lambda m: m.to('meta'), lambda m: m.to_empty(device='cpu')):
        change(attn)
        assert attn.factor == 2 / 3 and attn.gain.device == next(attn.parameters()).device
        state = attn.state_dict()
        assert len({v.device for v in state.values()}) == 1 and state['gain'].dtype == torch.float64
    assert state['gain'] == 2 / 3


def test_a_part_of_a_state_says_nothing_of_the_rest() -> None:
    model = injected()
    want = model(X)
    others = {k: v for k, v in model.state_dict().items() if '.se.' not in k}
    model.load_state_dict(others, strict=False)
    assert gap(model(X), want) == 0
    model.load_state_dict({'layer1.0.se.fc1.weight': model.layer1[0].se.fc1.weight}, strict=False)
    assert [m.gain for m in timm_attn.attn_sites(model).values()] == [1, 4, 4, 4]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*layer1\.0\.se\.fc1\.weight'):
        model.load_state_dict(others)
    # Prefixes that only begin alike, and a wrapper around an attention, have states of their own.
    attn = timm_attn.create_attn('se', 64)
    attn.gain = 3.0
    attn.load_state_dict({'fc.weight': torch.ones(1)}, strict=False)
    assert attn.gain == 3


def test_an_attention_without_tensors_takes_a_whole_state_at_its_word() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Plain(), nn.Conv2d(3, 3, 1))
    attn: Any = model[1]
    attn.gain = 2.0
    state = model.state_dict()
    assert set(state) == {'0.weight', '0.bias', '1.gain', '2.weight', '2.bias'}
    plain = {k: v for k, v in state.items() if k != '1.gain'}
    # The last layer's weights alone say nothing of it, and the caller hears so.
    part = {k: v for k, v in plain.items() if k.startswith('2.')}
    assert model.load_state_dict(part, strict=False).missing_keys == ['0.weight', '0.bias', '1.gain']
    assert attn.gain == 2
    for strict in (True, False):
        assert not model.load_state_dict(plain, strict=strict).missing_keys
        assert attn.gain == 1
        model.load_state_dict(state, strict=strict)
        assert attn.gain == 2
    attn.load_state_dict({})
    assert attn.gain == 1


BAD: dict[str, tuple[Any, str]] = {
    'zero': (torch.tensor(0.0), r'\(=0\)'),
    'negative': (torch.tensor(-4.0), r'\(=-4\)'),
    'nan': (torch.tensor(math.nan), r'\(=nan\)'),
    'infinite': (torch.tensor(math.inf), r'\(=inf\)'),
    'a list': (torch.ones(1), r'torch\.float32 of shape \(1,\)'),
    'a matrix': (torch.ones(2, 2), r'torch\.float32 of shape \(2, 2\)'),
    'integer': (torch.tensor(4), r'torch\.int64 of shape \(\)'),
    'boolean': (torch.tensor(True), r'torch\.bool of shape'),
    'complex': (torch.tensor(4 + 0j), r'torch\.complex64 of shape'),
    'no values': (torch.tensor(4.0, device='meta'), r'torch\.float32 of shape'),
    'no tensor': (4.0, r'\(=float\)'),
}


@pytest.mark.parametrize(('value', 'match'), BAD.values(), ids=list(BAD))
def test_what_is_no_gain_is_refused(value: Any, match: str) -> None:
    attn = timm_attn.create_attn('se', 64)
    attn.gain = 2.0
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=rf"'gain' .*{match}.* must be a finite positive number"):
            attn.load_state_dict({**attn.state_dict(), 'gain': value}, strict=strict)
        assert attn.gain == 2


def test_convert_and_save_refuse_what_is_no_gain(tmp_path: Path) -> None:
    state = injected().state_dict()
    with pytest.raises(ValueError, match=r"'layer1\.0\.se\.gain' \(=0\) must be a finite positive number"):
        timm_attn.convert({**state, 'layer1.0.se.gain': torch.tensor(0.0)}, 'cbam_resnet18', **SMALL)
    with pytest.raises(ValueError, match=r'1 unused keys: layer1\.0\.gain'):
        timm_attn.convert({**state, 'layer1.0.gain': torch.tensor(4.0)}, 'cbam_resnet18', **SMALL)
    model = registered()
    model.layer1[0].se.gain = -1.0
    with pytest.raises(HubFileError, match=r"'layer1\.0\.se\.gain' \(=-1\) must be a finite positive number"):
        timm_attn.save(model, tmp_path)
    model.layer1[0].se.gain = 4.0
    timm_attn.save(model, tmp_path)
    file = tmp_path / 'model.safetensors'
    good = safetensors.torch.load_file(file)
    # Without the checksum, which would refuse each of these before a look at its keys.
    config = json.loads((tmp_path / 'config.json').read_text(encoding='utf-8'))
    del config['timm_attn']['weights_sha256']
    (tmp_path / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    for changed, match in (
        ({**good, 'layer1.0.gain': torch.tensor(4.0)}, r'1 that do not belong: layer1\.0\.gain'),
        ({**good, 'layer1.0.se.gain': torch.ones(1)}, r'1 of another shape: layer1\.0\.se\.gain \[1\] instead of \[\]'),
        (
            {**good, 'layer1.0.se.gain': torch.tensor(4)},
            r'1 of another kind of number.*: layer1\.0\.se\.gain',
        ),
        ({**good, 'layer1.0.se.gain': torch.tensor(-4.0)}, r"'layer1\.0\.se\.gain' \(=-4\) must be"),
    ):
        safetensors.torch.save_file(changed, file)
        with pytest.raises(HubFileError, match=match):
            read_folder(tmp_path)


# The ways that weights go.


def by_timm(source: Any, target: Any, folder: Path) -> None:
    torch.save({'state_dict': source.state_dict()}, folder / 'a.pth')
    load_checkpoint(target, str(folder / 'a.pth'))


def by_safetensors(source: Any, target: Any, folder: Path) -> None:
    safetensors.torch.save_model(source, str(folder / 'a.safetensors'))
    safetensors.torch.load_model(target, str(folder / 'a.safetensors'))


def by_fused(source: Any, target: Any, folder: Path) -> None:
    timm_attn.fuse(target, compile=False)
    target.load_state_dict(timm_attn.fuse(copy.deepcopy(source), compile=False).state_dict())


def by_average(source: Any, target: Any, folder: Path) -> None:
    average = AveragedModel(source)
    average.update_parameters(source)
    average.update_parameters(source)
    target.load_state_dict({k.removeprefix('module.'): v for k, v in average.state_dict().items() if k != 'n_averaged'})


def by_ema(kind: Callable[..., Any]) -> Callable[[Any, Any, Path], None]:
    def move(source: Any, target: Any, folder: Path) -> None:
        average = kind(source, decay=0.9)
        for _ in range(2):
            average.update(source)
        target.load_state_dict((average.ema if kind is ModelEma else average.module).state_dict())

    return move


WAYS: dict[str, Callable[[Any, Any, Path], object]] = {
    'load_state_dict': lambda source, target, folder: target.load_state_dict(source.state_dict()),
    'assign': lambda source, target, folder: target.load_state_dict(source.state_dict(), assign=True),
    'not strict': lambda source, target, folder: target.load_state_dict(source.state_dict(), strict=False),
    'double': lambda source, target, folder: target.load_state_dict(
        {k: v.double() for k, v in source.state_dict().items()}
    ),
    'load_checkpoint': by_timm,
    'safetensors': by_safetensors,
    'fused': by_fused,
    'AveragedModel': by_average,
    'ModelEma': by_ema(ModelEma),
    'ModelEmaV2': by_ema(ModelEmaV2),
    'ModelEmaV3': by_ema(ModelEmaV3),
}


@pytest.mark.parametrize('way', WAYS.values(), ids=list(WAYS))
def test_every_way_of_the_weights_takes_the_gain(way: Callable[..., object], tmp_path: Path) -> None:
    source = injected('bam')
    want = source(X)
    # Into another network with the same attention, and into the registered model, whose gains are 1.
    for target in injected('bam', seed=3), registered('bam'):
        way(source, target, tmp_path)
        assert gap(target(X), want) <= 1e-5
        assert target.layer1[1].gain == 2 / 3
    # And back: a state without gain makes an injected model the registered one.
    source = registered('bam')
    want = source(X)
    target = injected('bam')
    way(source, target, tmp_path)
    assert gap(target(X), want) <= 1e-5
    assert target.layer1[1].gain == 1


def test_convert_on_the_command_line_keeps_the_gain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = injected(layers=(2, 2, 2, 2), num_classes=1000)
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    out = str(tmp_path / 'out')
    assert main(['convert', str(tmp_path / 'a.pth'), '--model', 'cbam_resnet18', '--out', out]) == 0
    assert gap(timm.create_model(f'local-dir:{out}', pretrained=True).eval()(X), model(X)) <= 1e-6


def test_copies_scripts_and_exports_carry_the_gain() -> None:
    model = injected('bam')
    want = model(X)
    state = dict(model.state_dict())
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    others = {
        'deepcopy': copy.deepcopy(model),
        'pickle': pickle.loads(pickle.dumps(model)),
        'script': torch.jit.load(buffer),
        'trace': torch.jit.trace(model, X),
        'export': torch.export.export(model, (X,)).module(),
        'functional_call': lambda x: torch.func.functional_call(model, model.state_dict(), (x,)),
        'parameters and buffers': lambda x: torch.func.functional_call(
            model, dict(model.named_parameters()) | dict(model.named_buffers()), (x,)
        ),
    }
    assert {k: d for k, other in others.items() if (d := gap(other(X), want)) > 1e-6} == {}
    assert model.state_dict().keys() == state.keys()
    assert {k: v for k, v in model.state_dict().items() if not torch.equal(v, state[k])} == {}
    for kept in others['deepcopy'], others['pickle']:
        target = registered('bam')
        target.load_state_dict(kept.state_dict())
        assert gap(target(X), want) <= 1e-6


# Several processes.


@pytest.fixture
def group() -> Iterator[None]:
    distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    'plain': lambda model: model,
    'DDP': DistributedDataParallel,
    'compiled': lambda model: torch.compile(model, backend='eager'),
}


@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=list(WRAPPERS))
def test_distributed_checkpoints_take_the_gain(wrap: Callable[[Any], Any], group: None, tmp_path: Path) -> None:
    source = injected('bam')
    want = source(X)
    dcp.save({'model': get_model_state_dict(wrap(source))}, checkpoint_id=tmp_path)
    target = injected('bam', seed=3)
    assert gap(target(X), want) > 0.01
    wrapped = wrap(target)
    state = {'model': get_model_state_dict(wrapped)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(wrapped, state['model'])
    assert gap(target(X), want) <= 1e-6
    # A state for the registered model, gathered and handed on; and one that lies on the first process.
    for options in (StateDictOptions(full_state_dict=True, broadcast_from_rank0=b) for b in (False, True)):
        whole = get_model_state_dict(wrap(source), options=StateDictOptions(full_state_dict=True))
        other = registered('bam')
        set_model_state_dict(other, whole, options=options)
        assert gap(other(X), want) <= 1e-6


def test_distributed_data_parallel_carries_the_gain(group: None) -> None:
    source = DistributedDataParallel(injected('bam'))
    want = source(X)
    state = source.state_dict()
    assert state['module.layer1.1.gain'] == 2 / 3
    target = DistributedDataParallel(registered('bam'))
    target.load_state_dict(state)
    assert gap(target(X), want) <= 1e-6
    other = registered('bam')
    other.load_state_dict(timm_attn.convert(state, 'bam_resnet18', **SMALL))
    assert gap(other(X), want) <= 1e-6


def test_a_missing_or_unexpected_gain_behind_a_wrapper_is_an_error(group: None, tmp_path: Path) -> None:
    """torch.distributed.checkpoint reads only what the model asks for: it must ask for the gain, or be told."""
    dcp.save({'model': get_model_state_dict(registered('bam'))}, checkpoint_id=tmp_path)
    state = {'model': get_model_state_dict(injected('bam'))}
    with pytest.raises(dcp.CheckpointException, match=r'Missing key in checkpoint state_dict: model\.layer1\.1\.gain'):
        dcp.load(state, checkpoint_id=tmp_path)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\).*layer1\.1\.gain'):
        set_model_state_dict(
            DistributedDataParallel(registered('bam')), get_model_state_dict(DistributedDataParallel(injected('bam')))
        )


def test_a_registered_model_takes_a_distributed_checkpoints_gain_where_it_asks(group: None, tmp_path: Path) -> None:
    """torch asks for the keys that a model has, and one whose gain is 1 has none: the checkpoint tells which to add."""
    source = injected('bam')
    dcp.save({'model': get_model_state_dict(source)}, checkpoint_id=tmp_path)
    target = registered('bam')
    state = {'model': get_model_state_dict(target)}
    held = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    more = {k.removeprefix('model.') for k in held} - state['model'].keys()
    assert more == {f'{site}.gain' for site in timm_attn.attn_sites(source)}
    state['model'] |= {k: torch.ones((), dtype=torch.float64) for k in more}
    dcp.load(state, checkpoint_id=tmp_path)
    target.load_state_dict(state['model'])
    assert gap(target(X), source(X)) <= 1e-6


def test_initialising_again_keeps_the_gain() -> None:
    model = registered()
    model.layer1[0].se.gain = 2.0
    model.init_weights()
    assert model.layer1[0].se.gain == 2

"""Tensors that are no weights, and values that no model can hold, are refused before they become a model."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from timm_attn.weights import checkpoint_filter_fn, convert

Fill = Callable[[str], dict[str, Tensor]]
NAME = 'srm_resnet18'
KEY = 'layer1.0.conv1.weight'


def _refused(state_dict: dict[str, Any], message: str, **model_args: Any) -> None:
    keys = {k: id(v) for k, v in state_dict.items()}
    with pytest.raises(ValueError, match=message):
        convert(state_dict, NAME, **model_args)
    assert {k: id(v) for k, v in state_dict.items()} == keys


@pytest.mark.parametrize(
    ('change', 'what'),
    [
        (lambda v: (v * 50).to(torch.int8), 'int8'),
        (lambda v: v.to(torch.uint8), 'uint8'),
        (lambda v: v.long(), 'int64'),
        (lambda v: v > 0, 'bool'),
        (lambda v: v.to(torch.complex64), 'complex64'),
        (lambda v: v.to(torch.float8_e4m3fn), 'float8_e4m3fn'),
        (lambda v: v.to_sparse(), 'sparse_coo'),
        (lambda v: v.flatten(1).to_sparse_csr(), 'sparse_csr'),
        (lambda v: torch.nested.nested_tensor([v[0], v[1]]), 'nested'),
        (lambda v: v.to('meta'), 'without values, on the meta device'),
        (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), 'quantised'),
    ],
)
@pytest.mark.filterwarnings('ignore')  # torch calls some of these layouts prototypes
def test_other_types_and_layouts_are_refused_by_key(change: Any, what: str, filled: Fill) -> None:
    _refused(
        filled(NAME) | {KEY: change(filled(NAME)[KEY])}, rf"1 tensors are no weights: '{KEY}' is {what}\. Expected"
    )


def test_a_whole_net_of_integers_is_refused(filled: Fill) -> None:
    # A quantised state dict without its scales.
    net = {k: (v * 50).to(torch.int8) if v.is_floating_point() else v for k, v in filled(NAME).items()}
    _refused(net, r'tensors are no weights: .*int8.*multiplied out')


@pytest.mark.parametrize(
    ('value', 'dtype', 'args', 'said'),
    [
        (1e300, torch.float64, {}, 'float32'),
        (-1e39, torch.float64, {}, 'float32'),
        (1e5, torch.float32, {'dtype': torch.float16}, 'float16'),
        (float('nan'), torch.float32, {}, 'float32'),
        (float('-inf'), torch.bfloat16, {}, 'float32'),
    ],
)
def test_values_are_finite_in_the_models_own_type(
    value: float, dtype: torch.dtype, args: dict[str, Any], said: str, filled: Fill
) -> None:
    net = filled(NAME)
    net['bn1.bias'] = net['bn1.bias'].to(dtype).index_fill(0, torch.tensor([3]), value)
    _refused(net, rf'1 tensors hold NaN or infinite values once they are {said}.*bn1\.bias', **args)


def test_numbers_that_fit_pass_in_every_floating_type(filled: Fill) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        net = {k: v.to(dtype) if v.is_floating_point() else v for k, v in filled(NAME).items()}
        net['bn1.bias'] = net['bn1.bias'].index_fill(0, torch.tensor([3]), 60000.0)
        assert convert(net, NAME)['bn1.bias'].dtype == dtype
    # In a float64 model, what float32 cannot hold is a number.
    net = {k: v.double() if v.is_floating_point() else v for k, v in filled(NAME).items()}
    net['bn1.bias'][0] = 1e300
    assert convert(net, NAME, dtype=torch.float64)['bn1.bias'][0] == 1e300


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('layer2.0.bn1.running_var', -1e-3, r"'layer2\.0\.bn1\.running_var' is negative \(-0\.001\)"),
        ('layer3.1.se.bn.running_var', -1.0, r"'layer3\.1\.se\.bn\.running_var' is negative \(-1\)"),
    ],
)
def test_a_variance_is_not_negative(key: str, value: float, message: str, filled: Fill) -> None:
    net = convert(filled(NAME), NAME)
    net[key] = net[key].index_fill(0, torch.tensor([1]), value)
    _refused(net, message)


@pytest.mark.parametrize(
    'value', [torch.tensor(-5), torch.tensor(2.5), torch.tensor([1, 2]), torch.tensor(float('nan'))]
)
def test_a_counter_counts(value: Tensor, filled: Fill) -> None:
    net = filled(NAME) | {'bn1.num_batches_tracked': value}
    _refused(net, r'num_batches_tracked')


@pytest.mark.parametrize('value', [torch.tensor(True), torch.tensor(1j)])
def test_a_counter_is_a_number(value: Tensor, filled: Fill) -> None:
    _refused(filled(NAME) | {'bn1.num_batches_tracked': value}, r"'bn1\.num_batches_tracked' is (bool|complex64)\.")


def test_a_view_that_claims_gigabytes_is_refused_by_its_shape_without_being_read(filled: Fill) -> None:
    huge = torch.zeros(1).expand(3_000_000_000)
    for key in ('bn1.bias', KEY, 'fc.bias', 'layer1.0.rclb.cfc'):
        _refused(filled(NAME) | {key: huge}, r'1 keys of another shape: \S+ is \(3000000000,\)')
    kernel = torch.zeros(1).expand(1, 2, 40000, 40000)
    # Where a source's rule would flip or pad it.
    theirs = {'.ChannelGate.mlp.1.': '.channel.fc1.', '.ChannelGate.mlp.3.': '.channel.fc2.', '.SpatialGate.': '.x.'}
    net = {re.sub('|'.join(theirs), lambda m: theirs[m[0]], k): v for k, v in filled('cbam_resnet18').items()}
    net = {k.replace('.cbam.', '.se.').replace('.x.spatial.', '.spatial.conv.'): v for k, v in net.items()}
    convert(net, 'cbam_resnet18')
    net['layer1.0.se.spatial.conv.conv.weight'] = kernel
    with pytest.raises(ValueError, match=r'layer1\.0\.se\.conv\.weight is \(1, 2, 40000, 40000\)'):
        convert(net, 'cbam_resnet18')
    eca = filled('eca_resnet18_k3577') | {'layer1.0.eca.conv.weight': torch.zeros(1).expand(1, 1, 3_000_000_000)}
    with pytest.raises(ValueError, match=r'layer1\.0\.se\.conv\.weight is \(1, 1, 3000000000\)'):
        convert(eca, 'eca_resnet18')


def test_very_many_keys_are_refused_in_a_message_that_can_be_read(filled: Fill) -> None:
    many = {f'junk.{i}': torch.zeros(0) for i in range(20_000)}
    with pytest.raises(ValueError, match=r'has 20170 tensors .* and srm_resnet18 170: it is another network'):
        convert(filled(NAME) | many, NAME)
    few = dict(list(many.items())[:2000])
    with pytest.raises(ValueError, match=r'2000 unused keys: .*1000 more\)') as error:
        convert(filled(NAME) | few, NAME)
    assert len(str(error.value)) < 20_000


@pytest.mark.parametrize('source', ['local-dir', 'hf-hub'])
def test_a_folder_that_timm_reads_is_checked_too(source: str, randomise: Any) -> None:
    model = timm.create_model(NAME, num_classes=3)
    own = randomise(model, 0)
    cfg: Any = model.pretrained_cfg
    cfg.update(source=source, num_classes=3)
    assert checkpoint_filter_fn(own, model).keys() == own.keys()
    wrong = own | {'bn1.bias': own['bn1.bias'].double() + 1e300}
    with pytest.raises(ValueError, match=r'once they are float32.*bn1\.bias'):
        checkpoint_filter_fn(wrong, model)
    with pytest.raises(ValueError, match=re.escape("'bn1.bias' is int32")):
        checkpoint_filter_fn(own | {'bn1.bias': own['bn1.bias'].int()}, model)


def test_every_check_is_of_alive_networks(filled: Fill, with_weights: Callable[..., nn.Module]) -> None:
    # What passes computes something: no check passes because nothing was there.
    model = with_weights(NAME, convert(filled(NAME), NAME))
    with torch.inference_mode():
        assert model(torch.rand(1, 3, 32, 32)).std() > 0

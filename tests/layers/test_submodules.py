"""Every submodule that holds tensors is called in forward, so what works through modules works on attention.

Hooks, pruning, offloading, dynamic quantisation, LoRA, freezing and split BatchNorms, over `list_attn()`.
"""

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import timm.utils
import torch
from timm.layers import convert_splitbn_model
from torch import Tensor, nn
from torch.nn.utils import prune

from timm_attn import create_attn, list_attn

C = 64
OPTIONS: dict[str, dict[str, Any]] = {'gsop': {'dim': 16}}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, OPTIONS.get(name, {})) for name in list_attn()),
    ('bam', {'combine': 'add'}),
    ('gam', {'channel_gate': None, 'rd_ratio': 1 / 4, 'groups': 4}),
    ('sk', {'form': 'sknet'}),
]
each_variant = pytest.mark.parametrize(
    ('name', 'args'), VARIANTS, ids=['-'.join([n, *(f'{k}={v}' for k, v in a.items())]) for n, a in VARIANTS]
)


def build(name: str, args: dict[str, Any]) -> nn.Sequential:
    """An attention after some training, as it were, behind a convolution."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, C, 1), create_attn(name, C, **args))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 6, 9, generator=torch.Generator().manual_seed(1))


def gap(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def holders(model: nn.Module) -> dict[str, nn.Module]:
    """The submodules that hold parameters or buffers of their own."""
    return {k: m for k, m in model.named_modules() if [*m.parameters(recurse=False), *m.buffers(recurse=False)]}


def _note(called: list[str], key: str, *_: Any) -> None:
    called.append(key)


def _more(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    # Not a constant, to which a softmax or a BatchNorm in training would be deaf.
    return y + y.square()


@each_variant
def test_hooks_fire_on_every_submodule_that_holds_tensors(name: str, args: dict[str, Any]) -> None:
    model = build(name, args)
    called: list[str] = []
    for key, module in holders(model).items():
        module.register_forward_hook(partial(_note, called, key))
    model(images())
    assert sorted(set(called)) == sorted(holders(model))
    # A hook may replace what comes out, and what follows takes it.
    want = model(images())
    for key, module in holders(model[1]).items():
        if key:
            handle = module.register_forward_hook(_more)
            assert gap(model(images()), want) > 0, key
            handle.remove()


@each_variant
def test_pruned_weights_train_for_two_steps(name: str, args: dict[str, Any]) -> None:
    model = build(name, args)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)]
    prune.global_unstructured([(m, 'weight') for m in layers], pruning_method=prune.L1Unstructured, amount=0.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    want = model.eval()(images())
    for m in layers:
        prune.remove(m, 'weight')
    assert gap(model(images()), want) == 0


@each_variant
def test_offloaded_weights_give_the_same_output(name: str, args: dict[str, Any]) -> None:
    accelerate = pytest.importorskip('accelerate', reason='accelerate is missing (extra ecosystem)')
    model = build(name, args).eval()
    with torch.no_grad():
        want = model(images())
        accelerate.cpu_offload(model, execution_device=torch.device('cpu'))
        assert {p.device.type for p in model.parameters()} == {'meta'}
        assert gap(model(images()), want) == 0


@each_variant
def test_dynamic_quantisation_gives_nearly_the_same_output(name: str, args: dict[str, Any]) -> None:
    model = build(name, args).eval()
    linear = [k for k, m in model.named_modules() if type(m) is nn.Linear]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')  # torch points to torchao
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        assert [
            k for k, m in quantised.named_modules() if type(m).__module__.endswith('dynamic.modules.linear')
        ] == linear
        assert gap(quantised(images()), model(images())) < 0.03


@each_variant
def test_adapters_learn_and_change_the_output(name: str, args: dict[str, Any]) -> None:
    peft = pytest.importorskip('peft', reason='peft is missing (extra ecosystem)')
    model = build(name, args).eval()
    # peft refuses convolutions whose groups do not divide the rank, and forgets a dilation.
    targets = [
        k
        for k, m in model.named_modules()
        if k.startswith('1.')
        and (isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1 and m.dilation == (1, 1)))
    ]
    if not targets:
        pytest.skip('no dense layer')
    want = model(images())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    assert gap(adapted(images()), want) < 1e-6
    lora = {k: p for k, p in adapted.named_parameters() if 'lora_' in k}
    assert len(lora) == 2 * len(targets)
    for key, p in lora.items():
        nn.init.normal_(p, std=0.1)
        if 'lora_B' in key:
            assert gap(adapted(images()), want) > 0, key
    adapted(images()).square().mean().backward()
    assert [k for k, p in lora.items() if p.grad is None or not p.grad.abs().max() > 0] == []


@each_variant
def test_frozen_by_timm_no_buffer_moves_and_one_image_trains(name: str, args: dict[str, Any]) -> None:
    model = build(name, args).train()
    want = copy.deepcopy(model).eval()(images(1))
    timm.utils.freeze(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    got = model.train()(images(1))
    model(images())
    assert gap(got, want) < 1e-6
    assert [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])] == []
    for p in model.parameters():
        p.requires_grad_(True)
    model(images(1)).sum().backward()


@each_variant
def test_split_batchnorms_train(name: str, args: dict[str, Any]) -> None:
    """The first half of a batch goes through the BatchNorms that were there, as if it were the whole batch."""
    model = build(name, args).train()
    want = copy.deepcopy(model)(images()[:2])
    split = convert_splitbn_model(copy.deepcopy(model), 2)
    assert gap(split(images())[:2], want) < 1e-5

"""The registry: what is known of each attention, and how one is added."""

import ast
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import timm_attn
from timm_attn.layers import _registry, create_attn, get_attn, list_attn, register_attn
from timm_attn.layers._base import Attention

LAYERS = Path(inspect.getfile(timm_attn.layers)).parent
FACTS: dict[str, Any] = dict(title='T', authors='B, A', year=2020, venue='V', paper='https://p', code='https://c')


def test_list_is_the_designs() -> None:
    names = 'bam cbam coord csa eca ema fca gam gc gct gsop nl scsa scse se sge simam sk srm triplet'
    assert timm_attn.list_attn() == names.split()


@pytest.mark.parametrize('name', list_attn())
def test_entry_cites_its_paper_and_its_file_does_too(name: str) -> None:
    spec = get_attn(name)
    assert spec.name == name
    assert spec.place == _registry.PLACEMENTS[spec.placement]
    assert spec.paper.startswith(('https://arxiv.org/abs/', 'https://proceedings.mlr.press/'))
    assert spec.code.startswith('https://github.com/') or name == 'csa'
    assert spec.licence in ('MIT', 'Apache-2.0', 'none stated') or (name == 'csa' and not spec.licence)
    assert 2017 <= spec.year <= 2025
    assert spec.title in spec.bibtex and spec.authors in spec.bibtex and spec.paper in spec.bibtex
    source = sys.modules[spec.cls.__module__].__doc__ or ''
    assert spec.paper in source
    assert spec.code in source


@pytest.mark.parametrize('name', list_attn())
def test_class_and_options_are_documented(name: str) -> None:
    cls = get_attn(name).cls
    text = inspect.getdoc(cls) or ''
    for option in ('channels', *_registry.accepted_args(name)):
        assert f'{option}:' in text, f'{cls.__name__} does not document {option}'


@pytest.mark.parametrize('name', list_attn())
def test_signature_is_the_common_one(name: str) -> None:
    parameters = inspect.signature(get_attn(name).cls).parameters
    assert next(iter(parameters)) == 'channels'
    assert list(parameters)[-2:] == ['device', 'dtype']
    assert all(parameters[p].kind is inspect.Parameter.KEYWORD_ONLY for p in ('device', 'dtype'))
    assert all(p.default is not inspect.Parameter.empty for p in list(parameters.values())[1:])


def test_entries_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_attn('se').paper = 'https://elsewhere'  # pyright: ignore[reportAttributeAccessIssue] (that is the test)


def test_unknown_attention_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"Unknown attention 'foo'\. Expected one of: bam, cbam, coord, csa"):
        get_attn('foo')


@pytest.fixture
def empty_place() -> Iterator[None]:
    before = dict(_registry._ATTENTIONS)
    yield
    _registry._ATTENTIONS.clear()
    _registry._ATTENTIONS.update(before)


def test_new_attention_is_one_decorated_class(empty_place: None) -> None:
    @register_attn('halve', placement='block', **FACTS)
    class Halve(Attention):
        def __init__(self, channels: int, power: int = 1, *, device: Any = None, dtype: Any = None) -> None:
            super().__init__(neutral_gate=0.5**power)
            self.weight = nn.Parameter(torch.full((channels,), 0.5**power, device=device, dtype=dtype))

        def init_neutral(self) -> None:
            pass

        def forward(self, x: Tensor) -> Tensor:
            return x * (self.weight[:, None, None] * self.gain)

    assert 'halve' in timm_attn.list_attn()
    attn = create_attn('halve', 8, power=2, dtype=torch.float64)
    assert isinstance(attn, Halve)
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    assert torch.equal(attn(x), x / 4)


def test_names_are_registered_once(empty_place: None) -> None:
    with pytest.raises(ValueError, match=r"Attention 'se' is registered already, by timm_attn\.layers\.se"):
        register_attn('se', placement='block', **FACTS)(type('SE2', (Attention,), {}))


def test_unknown_placement_raises(empty_place: None) -> None:
    with pytest.raises(ValueError, match=r"Unknown placement 'blok' of 'foo'\. Expected one of: block, "):
        register_attn('foo', placement='blok', **FACTS)


def test_layers_import_torch_only() -> None:
    for path in LAYERS.glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or '']
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1, f'{path.name} imports from above layers/'
            roots = {m.split('.')[0] for m in modules} - set(sys.stdlib_module_names)
            assert roots <= {'torch'}, f'{path.name} imports {roots}'


def test_every_file_is_exported() -> None:
    package = importlib.import_module('timm_attn.layers')
    for name in list_attn():
        cls = get_attn(name).cls
        assert getattr(package, cls.__name__) is cls
        assert cls.__module__ == f'timm_attn.layers.{name}'

"""Checkpoints made from nothing but key lists, as the golden files were, and a loopback server for downloads."""

import functools
import http.server
import json
import math
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import timm_attn as timm_attn

GOLDEN = Path(__file__).parents[1] / 'golden'


def _signal(key: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return (2 * torch.rand(math.prod(shape), generator=generator) - 1).reshape(shape)


def _tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    last = key.rsplit('.', 1)[-1]
    if last == 'num_batches_tracked':
        return torch.tensor(0)
    s = _signal(key, shape)
    if last == 'running_mean':
        return 0.1 * s
    if last == 'running_var':
        return 1 + 0.25 * s
    if last == 'cfc':
        return 0.5 * s
    if last == 'weight':
        return s * math.sqrt(3 / (s.numel() // shape[0])) if s.ndim >= 2 else 1 + 0.25 * s
    return (0.1 if last == 'bias' else 0.5) * s


def _waves(shape: tuple[int, int, int]) -> Tensor:
    """FcaNet's constant buffer (C, d, d), from what the authors' code gives for 16 channels."""
    return load_file(GOLDEN / 'fca_dct.safetensors')[f'dct{shape[1]}'].repeat_interleave(shape[0] // 16, 0)


@functools.cache
def _filled(name: str) -> dict[str, Tensor]:
    lists = json.loads((GOLDEN / 'keys' / f'{name}.json').read_text())
    return {
        k: _waves(tuple(shape)) if k.endswith('dct_layer.weight') else _tensor(k, tuple(shape))
        for k, shape in lists.items()
        if not k.startswith('__')
    }


@pytest.fixture(scope='session')
def golden() -> Path:
    """The folder of the authors' outputs."""
    return GOLDEN


@pytest.fixture(scope='session')
def signal() -> Callable[[str, tuple[int, ...]], Tensor]:
    """The golden files' input, by its name and shape."""
    return _signal


@pytest.fixture
def filled() -> Callable[[str], dict[str, Tensor]]:
    """Name of a key list -> a checkpoint with its keys, each tensor made from its key."""
    return lambda name: dict(_filled(name))


def _randomise(state_dict: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key, value in state_dict.items():
        shape = tuple(value.shape)
        if key.endswith('num_batches_tracked'):
            found[key] = torch.tensor(0)
            continue
        s = 2 * torch.rand(shape, generator=generator) - 1
        if key.endswith('running_var') or (key.endswith('weight') and len(shape) == 1):
            s = 1 + 0.25 * s
        elif len(shape) >= 2 and not key.endswith('cfc'):
            s = s * math.sqrt(3 / math.prod(shape[1:]))
        else:
            s = 0.1 * s
        found[key] = s
    return found


@pytest.fixture(scope='session')
def randomise() -> Callable[[nn.Module, int], dict[str, Tensor]]:
    """A state dict of a model's keys and shapes with random values of sane size; the model may be on meta."""
    return lambda model, seed: _randomise(model.state_dict(), seed)


@functools.cache
def _plain(depth: int) -> dict[str, Tensor]:
    return _randomise(timm.create_model(f'resnet{depth}', device='meta').state_dict(), depth)


@pytest.fixture(scope='session')
def plain() -> Callable[[int], dict[str, Tensor]]:
    """Depth -> weights of a plain ResNet."""
    return lambda depth: dict(_plain(depth))


@pytest.fixture(scope='session')
def with_weights() -> Callable[..., nn.Module]:
    """A model that holds exactly a state dict's tensors: built on meta, so that nothing else can be left in it."""

    def build(name: str, state_dict: dict[str, Tensor], **model_args: object) -> nn.Module:
        model = timm.create_model(name, device='meta', **model_args)  # pyright: ignore[reportArgumentType]
        model.load_state_dict(state_dict, strict=True, assign=True)
        return model.eval()

    return build


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the loopback address under which it is served."""
    folder = tmp_path / 'served'
    folder.mkdir()
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f'http://127.0.0.1:{server.server_address[1]}'
    server.shutdown()
    server.server_close()
    thread.join()

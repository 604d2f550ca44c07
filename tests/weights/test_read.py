"""Checkpoint files of every kind are read; nothing in them is run."""

import argparse
import os
import pickle
import random
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from timm_attn.weights.read import read_checkpoint

STATE = {'conv1.weight': torch.arange(6.0).reshape(2, 3)}


class _Writes:
    """Unpickled by anything that runs pickles, this would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def _zipped(path: Path, **names: bytes) -> Path:
    with zipfile.ZipFile(path, 'w') as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    return path


def _written(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / kind
    if kind == 'x.safetensors':
        save_file(STATE, path)
    elif kind == 'x.pth.zip':
        torch.save(STATE, tmp_path / 'inner')
        _zipped(path, **{'x.pth': (tmp_path / 'inner').read_bytes(), '__MACOSX/x': b''})
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind != 'x.pth.tar')
    return path


@pytest.mark.parametrize('kind', ['x.pth', 'x.pth.tar', 'x.pkl', 'x.pth.zip', 'x.safetensors'])
def test_every_kind_of_file_is_read(kind: str, tmp_path: Path) -> None:
    path = _written(tmp_path, kind)
    checkpoint = read_checkpoint(path)
    assert torch.equal(checkpoint.content['conv1.weight'], STATE['conv1.weight'])
    assert (checkpoint.inner_sha1 == checkpoint.sha1) == (kind != 'x.pth.zip')


@pytest.mark.parametrize('new_format', [True, False])
def test_numpys_scalars_of_old_training_checkpoints_are_read(new_format: bool, tmp_path: Path) -> None:
    args = argparse.Namespace(depth=50)
    values = dict(best_prec1=np.float64(77.6), epoch=np.int64(89), lr=np.float32(0.5), args=args)
    torch.save({'state_dict': STATE, **values}, tmp_path / 'x.pth', _use_new_zipfile_serialization=new_format)
    content = read_checkpoint(tmp_path / 'x.pth').content
    assert (content['best_prec1'], content['epoch'], content['lr'], content['args'].depth) == (77.6, 89, 0.5, 50)


def test_numpys_scalars_are_known_by_their_old_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What numpy 1 wrote: the same function in a module that numpy 2 has renamed.
    scalar: Any = np.float64(0).__reduce__()[0]
    old = types.ModuleType('numpy.core.multiarray')

    def named(dtype: Any, data: bytes) -> Any:
        return scalar(dtype, data)

    named.__module__, named.__qualname__, named.__name__ = 'numpy.core.multiarray', 'scalar', 'scalar'
    old.scalar = named  # pyright: ignore[reportAttributeAccessIssue]

    class Scalar:
        def __reduce__(self) -> tuple[Any, ...]:
            return named, (np.dtype('float64'), np.float64(76.5).tobytes())

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'numpy.core.multiarray', old)
        torch.save({'state_dict': STATE, 'best_prec1': Scalar()}, tmp_path / 'x.pth')
    assert b'numpy.core.multiarray' in (tmp_path / 'x.pth').read_bytes()
    assert read_checkpoint(tmp_path / 'x.pth').content['best_prec1'] == 76.5


@pytest.mark.parametrize('kind', ['new', 'old', 'zipped', 'bare'])
def test_a_malicious_pickle_runs_nothing(kind: str, tmp_path: Path) -> None:
    proof = tmp_path / 'proof'
    content = {'state_dict': STATE, 'arch': _Writes(proof)}
    path = tmp_path / 'x.pth'
    if kind == 'bare':
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != 'old')
    # The file does what it is said to do where it is run.
    if kind == 'new':
        torch.load(path, weights_only=False)
        assert proof.is_dir()
        proof.rmdir()
    if kind == 'zipped':
        path = _zipped(tmp_path / 'x.pth.zip', **{'x.pth': path.read_bytes()})
    with pytest.raises(ValueError, match=r'damaged or holds more than weights.*was not run'):
        read_checkpoint(path)
    assert not proof.exists()


@pytest.mark.parametrize('kind', ['x.pth', 'x.pth.tar', 'x.pth.zip', 'x.safetensors'])
def test_a_truncated_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = _written(tmp_path, kind)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r'damaged|cannot be read as a checkpoint'):
        read_checkpoint(path)
    path.write_bytes(b'')
    with pytest.raises(ValueError, match=r'damaged|cannot be read as a checkpoint'):
        read_checkpoint(path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='is no file'):
        read_checkpoint(tmp_path / 'absent.pth')
    two = _zipped(tmp_path / 'two.zip', **{'a.pth': b'1', 'b.pth': b'2'})
    with pytest.raises(ValueError, match='an archive of 2 files'):
        read_checkpoint(two)
    tensor: Tensor = STATE['conv1.weight']
    torch.save(tensor, tmp_path / 'tensor.pth')
    with pytest.raises(ValueError, match='holds a Tensor, not a state dict'):
        read_checkpoint(tmp_path / 'tensor.pth')


def test_an_archive_that_claims_to_be_huge_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from timm_attn.weights import read

    monkeypatch.setattr(read, '_MAX_UNPACKED', 1 << 20)
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('x.pth', bytes(2 << 20))
    with pytest.raises(ValueError, match='claims to unpack to 2 MiB'):
        read_checkpoint(tmp_path / 'x.zip')


def test_a_torch_archive_with_compressed_records_is_bounded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from timm_attn.weights import read

    torch.save({'w': torch.zeros(1 << 20)}, tmp_path / 'plain.pth')
    with (
        zipfile.ZipFile(tmp_path / 'plain.pth') as stored,
        zipfile.ZipFile(tmp_path / 'x.pth', 'w', zipfile.ZIP_DEFLATED) as deflated,
    ):
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    assert (tmp_path / 'x.pth').stat().st_size < 100_000
    assert read_checkpoint(tmp_path / 'x.pth').content['w'].numel() == 1 << 20
    monkeypatch.setattr(read, '_MAX_UNPACKED', 1 << 20)
    inner = _zipped(tmp_path / 'y.zip', **{'x.pth': (tmp_path / 'x.pth').read_bytes()})
    for path in (tmp_path / 'x.pth', inner):
        with pytest.raises(ValueError, match=r'claims to unpack to 4 MiB'):
            read_checkpoint(path)
    # What is stored as it is has its own size for a bound.
    read_checkpoint(tmp_path / 'plain.pth')


def _damaged(data: bytes, generator: random.Random) -> bytes:
    """A few bytes changed, taken out or put in, most of them where the pickle is."""
    found = bytearray(data)
    for _ in range(generator.choice([1, 1, 2, 5])):
        at = generator.randrange(min(len(found), 2000)) if generator.random() < 0.8 else generator.randrange(len(found))
        kind = generator.randrange(3)
        if kind == 0:
            found[at] = generator.randrange(256)
        elif kind == 1:
            del found[at : at + generator.randrange(1, 9)]
        else:
            found[at:at] = generator.randbytes(generator.randrange(1, 9))
    return bytes(found)


@pytest.mark.parametrize('kind', ['x.pth', 'x.pth.tar', 'x.pth.zip', 'x.safetensors', 'bare.pkl'])
@pytest.mark.filterwarnings('ignore')
def test_a_damaged_file_gives_weights_or_one_error_that_names_it(kind: str, tmp_path: Path) -> None:
    content = {'state_dict': STATE | {'b': torch.ones(3).half()}, 'epoch': 3, 'args': argparse.Namespace(lr=0.1)}
    path = tmp_path / kind
    if kind == 'x.pth.zip':
        torch.save(content, tmp_path / 'inner')
        _zipped(path, **{'x.pth': (tmp_path / 'inner').read_bytes()})
    elif kind == 'x.safetensors':
        save_file(STATE, path)
    elif kind == 'bare.pkl':
        path.write_bytes(pickle.dumps({'epoch': 3, 'state_dict': {'a': [1, 2.5, 'x', (None, True)]}}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != 'x.pth.tar')
    data, generator = path.read_bytes(), random.Random(kind)
    refused: list[str] = []
    for _ in range(400):
        path.write_bytes(_damaged(data, generator))
        try:
            read_checkpoint(path)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert [text for text in refused if str(path) not in text] == []

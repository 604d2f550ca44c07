"""Small data and models, and files in the formats that the readers know."""

import argparse
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_attn.cli import compare as compare_command
from timm_attn.cli import quickstart as quickstart_command
from timm_attn.lab.data import Data, Images
from timm_attn.lab.train import Entry, Settings


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of floats depend on the number of threads, and some tests compare with another process to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def striped(targets: list[int], side: int, seed: int) -> list[np.ndarray]:
    """Grey images (side, side) whose bright column tells the class, in noise."""
    rng = np.random.default_rng(seed)
    images = []
    for t in targets:
        image = rng.integers(0, 80, size=(side, side), dtype=np.uint8)
        image[:, t % side] = 255
        images.append(image)
    return images


@pytest.fixture
def tiny_data() -> Data:
    """Forty images of four classes to learn from, and sixteen to measure on."""
    y, y_val = [i % 4 for i in range(40)], [i % 4 for i in range(16)]
    return Data(
        name='stripes',
        train=Images(striped(y, 8, 0), y, 'L'),
        val=Images(striped(y_val, 8, 1), y_val, 'L'),
        classes=['a', 'b', 'c', 'd'],
        img_size=8,
        mean=(0.5,),
        std=(0.5,),
        augment=dict(scale=(0.6, 1.0), hflip=0.5, color_jitter=0.4),
    )


@pytest.fixture
def tiny_settings() -> Settings:
    return Settings(epochs=3, batch_size=8, img_size=8, lr=0.05, warmup_epochs=1)


@pytest.fixture
def tiny_models() -> tuple[Entry, ...]:
    args = dict(layers=[1, 1, 1, 1], channels=[16, 16, 16, 16], cifar_stem=True)
    return Entry('plain', 'resnet18', args), Entry('SE', 'se_resnet18', args)


@pytest.fixture
def cli() -> Callable[..., None]:
    """Runs `timm-attn compare ...` and `timm-attn quickstart ...` in this process."""

    def run(*words: str | Path) -> None:
        parser = argparse.ArgumentParser()
        commands = parser.add_subparsers(required=True)
        compare_command.add_parser(commands)
        quickstart_command.add_parser(commands)
        args = parser.parse_args([str(w) for w in words])
        args.run(args)

    return run


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes PNG files in one folder per class."""

    def write(name: str, classes: dict[str, int], side: int = 16) -> Path:
        root = tmp_path / name
        root.mkdir(parents=True)
        for k, (label, count) in enumerate(classes.items()):
            (root / label).mkdir()
            for i, image in enumerate(striped([k] * count, side, k)):
                Image.fromarray(image).save(root / label / f'{i}.png')
        return root

    return write


@pytest.fixture
def fashion_files(tmp_path: Path) -> Path:
    """Fashion-MNIST's four files in the IDX format, with 60 and 40 images, where torchvision looks for them."""
    folder = tmp_path / 'sets' / 'FashionMNIST' / 'raw'
    folder.mkdir(parents=True)
    for part, count in (('train', 60), ('t10k', 40)):
        targets = [i % 10 for i in range(count)]
        images = np.stack(striped(targets, 28, count))
        # Magic number: two zero bytes, 8 for unsigned bytes, the number of dimensions; then each size, big-endian.
        data = struct.pack('>BBBB3I', 0, 0, 8, 3, *images.shape) + images.tobytes()
        (folder / f'{part}-images-idx3-ubyte').write_bytes(data)
        labels = struct.pack('>BBBBI', 0, 0, 8, 1, count) + bytes(targets)
        (folder / f'{part}-labels-idx1-ubyte').write_bytes(labels)
    return tmp_path / 'sets'


@pytest.fixture
def cifar_files(tmp_path: Path) -> Path:
    """CIFAR-10 and CIFAR-100 in their binary versions: label bytes, then 3072 bytes of red, green and blue planes."""
    root = tmp_path / 'sets'
    ten = root / 'cifar-10-batches-bin'
    ten.mkdir(parents=True)
    for k, name in enumerate([*(f'data_batch_{i}.bin' for i in range(1, 6)), 'test_batch.bin']):
        targets = [i % 10 for i in range(20)]
        rows = zip(targets, coloured(20, k), strict=True)
        (ten / name).write_bytes(b''.join(bytes([t]) + planes(i) for t, i in rows))
    names = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
    (ten / 'batches.meta.txt').write_text('\n'.join(names) + '\n')
    hundred = root / 'cifar-100-binary'
    hundred.mkdir()
    for name, count in (('train.bin', 200), ('test.bin', 100)):
        rows = zip(range(count), coloured(count, count), strict=True)
        (hundred / name).write_bytes(b''.join(bytes([t % 20, t % 100]) + planes(i) for t, i in rows))
    return root


def coloured(count: int, seed: int) -> np.ndarray:
    """Images (count, 32, 32, 3)."""
    return np.random.default_rng(seed).integers(0, 256, size=(count, 32, 32, 3), dtype=np.uint8)


def planes(image: np.ndarray) -> bytes:
    """The bytes of one image with its channels one after the other."""
    return image.transpose(2, 0, 1).tobytes()

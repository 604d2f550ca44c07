import gzip
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.loader import fast_collate

from timm_attn.lab.data import Data, Images, load_data, split

Folder = Callable[..., Path]


def test_digits_are_the_scans_of_scikit_learn_split_by_class() -> None:
    datasets = pytest.importorskip('sklearn.datasets', reason='scikit-learn is not installed')
    data = load_data('digits')
    source = datasets.load_digits()
    assert len(data.train) + len(data.val) == len(source.target) == 1797
    assert Counter(data.train.targets) + Counter(data.val.targets) == Counter(source.target.tolist())
    for c, n in Counter(source.target.tolist()).items():
        assert abs(data.val.targets.count(c) - n / 3) < 1
    # Each picture is one of the scans, in 17 levels stretched to bytes, and no scan is in both parts.
    scans = [np.round(i * 255 / 16).astype(np.uint8).tobytes() for i in source.images]
    classes = dict(zip(scans, source.target.tolist(), strict=True))
    train, val = ([np.asarray(s.image(i))[..., 1].tobytes() for i in range(len(s))] for s in (data.train, data.val))
    assert set(train) | set(val) == set(scans) and not set(train) & set(val)
    assert [classes[scan] for scan in val] == data.val.targets
    assert load_data('digits').fingerprint() == data.fingerprint()


def test_split_gives_each_class_its_part_and_is_always_the_same() -> None:
    targets = [0] * 10 + [1] * 20 + [2] * 3
    train, held = split(targets, 0.2)
    assert sorted(train + held) == list(range(33))
    assert Counter(targets[i] for i in held) == {0: 2, 1: 4, 2: 1}
    assert split(targets, 0.2) == (train, held)
    assert split(targets, 0.2, seed=1) != (train, held)
    with pytest.raises(ValueError, match='Class 1 has one image only'):
        split([0, 0, 1], 0.2)


def test_idx_files_of_fashion_mnist_are_read(fashion_files: Path) -> None:
    data = load_data('fashion-mnist', data_dir=fashion_files)
    assert (len(data.train), len(data.val), data.in_chans, data.img_size) == (60, 40, 1, 28)
    assert data.classes[:2] == ['T-shirt/top', 'Trouser'] and len(data.classes) == 10
    assert data.train.targets == [i % 10 for i in range(60)]
    raw = (fashion_files / 'FashionMNIST/raw/train-images-idx3-ubyte').read_bytes()[16:]
    assert np.asarray(data.train.image(7)).tobytes() == raw[7 * 784 : 8 * 784]


@pytest.mark.parametrize(
    ('name', 'train', 'val', 'label'), [('cifar10', 100, 20, 'airplane'), ('cifar100', 200, 100, '0')]
)
def test_cifar_binaries_are_read(cifar_files: Path, name: str, train: int, val: int, label: str) -> None:
    data = load_data(name, data_dir=cifar_files)
    assert (len(data.train), len(data.val), data.in_chans) == (train, val, 3)
    assert data.classes[0] == label
    if name == 'cifar100':
        assert data.train.targets == [i % 100 for i in range(200)]  # The second label byte, the fine one.
        record = (cifar_files / 'cifar-100-binary/train.bin').read_bytes()[5 * 3074 :][:3074]
        planes = np.frombuffer(record[2:], dtype=np.uint8).reshape(3, 32, 32)
        assert np.array_equal(np.asarray(data.train.image(5)).transpose(2, 0, 1), planes)


def test_cifar_of_torchvision_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip('torchvision.datasets')
    folder = tmp_path / 'cifar-10-batches-py'
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, size=(10, 3072), dtype=np.uint8)
    for name, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list:
        (folder / name).write_bytes(pickle.dumps({'data': images, 'labels': list(range(10))}))
    (folder / 'batches.meta').write_bytes(pickle.dumps({'label_names': [f'class {i}' for i in range(10)]}))
    # The published check sums are those of the real files; the format is the same.
    for attribute in ('train_list', 'test_list'):
        monkeypatch.setattr(datasets.CIFAR10, attribute, [[n, None] for n, _ in getattr(datasets.CIFAR10, attribute)])
    monkeypatch.setattr(datasets.CIFAR10, 'meta', {**datasets.CIFAR10.meta, 'md5': None})
    data = load_data('cifar10', data_dir=tmp_path)
    assert (len(data.train), len(data.val), data.classes[3]) == (50, 10, 'class 3')
    assert np.array_equal(np.asarray(data.val.image(4)).transpose(2, 0, 1).reshape(-1), images[4])


@pytest.mark.parametrize('name', ['fashion-mnist', 'cifar10', 'cifar100'])
def test_absent_data_set_says_where_it_was_sought_and_how_to_get_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"No {name} in '{tmp_path}'.*--data-dir, or pass --download"):
        load_data(name, data_dir=tmp_path)


def test_failed_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip('torchvision.datasets')
    # A port that nothing listens on, so that no network is touched.
    monkeypatch.setattr(datasets.FashionMNIST, 'mirrors', ['http://127.0.0.1:9/'])
    with pytest.raises(ValueError, match=r'Could not fetch fashion-mnist into .*check the network'):
        load_data('fashion-mnist', data_dir=tmp_path, download=True)


def test_damaged_cifar_binaries_are_refused(cifar_files: Path) -> None:
    path = cifar_files / 'cifar-100-binary/test.bin'
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r'test\.bin in .* are no whole number of cifar100 records'):
        load_data('cifar100', data_dir=cifar_files)
    path.unlink()
    with pytest.raises(ValueError, match=r'lacks test\.bin'):
        load_data('cifar100', data_dir=cifar_files)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Unknown data 'mnist'\. Expected one of digits, fashion-mnist, cifar10"):
        load_data('mnist')


def test_image_folder_is_split_by_class(image_folder: Folder) -> None:
    root = image_folder('pets', {'cat': 10, 'dog': 5, 'eel': 2})
    data = load_data(str(root))
    assert (data.name, data.classes, data.img_size) == ('pets', ['cat', 'dog', 'eel'], 224)
    assert Counter(data.val.targets) == {0: 2, 1: 1, 2: 1}
    assert Counter(data.train.targets) == {0: 8, 1: 4, 2: 1}
    assert data.train.image(0).mode == 'RGB'


def test_image_folder_with_splits_keeps_them_and_class_numbers_of_train(image_folder: Folder, tmp_path: Path) -> None:
    image_folder('pets/train', {'ape': 2, 'bee': 3, 'cat': 4})
    image_folder('pets/val', {'bee': 2, 'cat': 1})  # A class may be absent where one measures.
    data = load_data(str(image_folder('other', {'x': 1}).parent / 'pets'))
    assert data.classes == ['ape', 'bee', 'cat']
    assert (Counter(data.train.targets), Counter(data.val.targets)) == ({0: 2, 1: 3, 2: 4}, {1: 2, 2: 1})
    assert data.measured == 'val'
    image_folder('pets/validation', {'bee': 1, 'dog': 1})
    root = tmp_path / 'pets'
    with pytest.raises(ValueError, match="has 'val' and 'validation', which mean the same: rename or remove one"):
        load_data(root)
    shutil.rmtree(root / 'val')
    with pytest.raises(ValueError, match=r"pets/validation' has classes that the training images have not: dog"):
        load_data(root)


def test_folder_errors_hold_the_path(image_folder: Folder, tmp_path: Path) -> None:
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match=rf"'{tmp_path}/empty' holds no images"):
        load_data(str(tmp_path / 'empty'))
    one = image_folder('one', {'cat': 3})
    with pytest.raises(ValueError, match=rf"'{one}' holds one class only \('cat'\)"):
        load_data(str(one))
    single = image_folder('single', {'cat': 3, 'dog': 1})
    with pytest.raises(ValueError, match=rf"'{single}' \(cat, dog\): Class 1 has one image only"):
        load_data(str(single))
    (image_folder('notest/train', {'cat': 3, 'dog': 3})).parent.joinpath('extra').mkdir()
    with pytest.raises(ValueError, match="has a 'train' folder, but none of val, valid, validation, dev, test"):
        load_data(str(tmp_path / 'notest'))
    loose = image_folder('loose', {'cat': 3, 'dog': 3})
    Image.new('RGB', (4, 4)).save(loose / 'stray.png')
    with pytest.raises(ValueError, match=r'outside of class folders, such as .*stray\.png'):
        load_data(str(loose))


def test_unreadable_images_are_named_and_never_skipped(image_folder: Folder) -> None:
    root = image_folder('pets', {'cat': 4, 'dog': 4}, side=64)
    bad = root / 'cat' / '2.png'
    whole = bad.read_bytes()
    bad.write_bytes(b'not an image')
    with pytest.raises(ValueError, match=rf"'{bad}' is no readable image"):
        load_data(str(root))
    # Header whole, body cut off: found when the image is decoded.
    bad.write_bytes(whole[: len(whole) // 2])
    data = load_data(str(root))
    index, images = next((i, s) for s in (data.train, data.val) for i, p in enumerate(s.items) if p == bad)
    with pytest.raises(ValueError, match=rf"'{bad}' is no readable image"):
        images[index]


@pytest.mark.parametrize(
    ('folders', 'measured', 'left_out'),
    [
        ('train valid test', 'valid', 'test'),
        ('Train Val', 'Val', None),
        ('TRAIN DEV', 'DEV', None),
        ('Training Testing', 'Testing', None),
        ('train test validation', 'validation', 'test'),
    ],
)
def test_splits_are_known_by_their_usual_names_in_any_case(
    image_folder: Folder, tmp_path: Path, folders: str, measured: str, left_out: str | None
) -> None:
    counts = {'train': (6, 4), 'val': (3, 2), 'test': (1, 2)}
    for name in folders.split():
        kind = {'train': 'train', 'test': 'test'}.get(name.lower().removesuffix('ing'), 'val')
        cats, dogs = counts[kind]
        image_folder(f'pets/{name}', {'cat': cats, 'dog': dogs})
    data = load_data(tmp_path / 'pets')
    held = counts['test' if measured == 'Testing' else 'val']
    assert (data.measured, data.classes) == (measured, ['cat', 'dog'])
    assert Counter(data.train.targets) == {0: 6, 1: 4}
    assert Counter(data.val.targets) == {0: held[0], 1: held[1]}
    assert data.skipped == ({f"image in '{left_out}', which is not measured on": 3} if left_out else {})


def test_a_root_of_splits_without_train_is_refused(image_folder: Folder, tmp_path: Path) -> None:
    image_folder('pets/val', {'cat': 3, 'dog': 3})
    image_folder('pets/test', {'cat': 3, 'dog': 3})
    with pytest.raises(ValueError, match="has 'test', 'val', but no 'train' folder"):
        load_data(tmp_path / 'pets')


def test_splits_by_hand(image_folder: Folder) -> None:
    train, held = image_folder('a', {'cat': 4, 'dog': 4}), image_folder('b', {'cat': 2, 'dog': 1})
    more = image_folder('c', {'cat': 1, 'dog': 1})
    data = load_data(train, val_dir=held)
    assert (len(data.train), len(data.val), data.measured) == (8, 3, str(held))
    assert load_data(train, test_dir=more).measured == str(more)
    both = load_data(train, val_dir=held, test_dir=more)
    assert both.measured == str(held) and both.skipped == {"image in 'c', which is not measured on": 2}
    with pytest.raises(ValueError, match="'digits' has splits of its own"):
        load_data('digits', val_dir=held)
    with pytest.raises(ValueError, match="nowhere' is no folder"):
        load_data(train, val_dir=train / 'nowhere')


def test_the_class_is_the_first_folder_below_the_root(tmp_path: Path) -> None:
    for name in ('cat/2020', 'cat/2021', 'dog/2020', 'dog/2021/deep'):
        folder = tmp_path / 'pets' / name
        folder.mkdir(parents=True)
        for i in range(4):
            Image.new('L', (8, 8), i).save(folder / f'{i}.png')
    data = load_data(tmp_path / 'pets')
    assert data.classes == ['cat', 'dog']
    assert len(data.train) + len(data.val) == 16
    assert all(p.relative_to(tmp_path / 'pets').parts[0] == data.classes[t] for p, t in labelled(data))


def labelled(data: Data) -> list[tuple[Path, int]]:
    """Path and class of all images of a folder."""
    pairs = [pair for s in (data.train, data.val) for pair in zip(s.items, s.targets, strict=True)]
    return [(p, t) for p, t in pairs if isinstance(p, Path)]


def test_hidden_entries_are_no_classes_and_other_files_are_counted(
    image_folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    root = image_folder('pets', {'cat': 6, 'dog': 6})
    shutil.copytree(root / 'cat', root / 'cat/.ipynb_checkpoints')
    shutil.copytree(root, root / '__MACOSX', ignore=shutil.ignore_patterns('__MACOSX'))
    (root / 'dog/._0.png').write_bytes(b'resource fork')
    (root / 'dog/.DS_Store').write_bytes(b'x')
    (root / 'dog/notes.TXT').write_text('x')
    (root / 'README').write_text('x')
    for ending in ('webp', 'bmp', 'TIFF', 'gif', 'jfif', 'jpe', 'ppm', 'jp2', 'tga'):
        Image.new('RGB', (8, 8)).save(root / f'cat/other.{ending}')
    with caplog.at_level('INFO', logger='timm_attn'):
        data = load_data(root)
    assert data.classes == ['cat', 'dog']
    assert len(data.train) + len(data.val) == 12 + 9
    assert data.skipped == {
        'hidden (.*, __MACOSX)': 4,
        'no image by its ending (.txt)': 1,
        'no image by its ending (none)': 1,
    }
    assert 'measured on 4: a fifth of each class, drawn once. Left out: 4 x hidden' in caplog.text


def test_links_pipes_and_devices_are_neither_followed_out_nor_waited_for(image_folder: Folder) -> None:
    outside = image_folder('outside', {'eel': 3})
    root = image_folder('pets', {'cat': 6, 'dog': 6})
    alone = load_data(root)
    (root / 'cat/loop').symlink_to('.')
    (root / 'cat/up').symlink_to(root)
    (root / 'dog/copy.png').symlink_to('../cat/0.png')  # The same picture in another class.
    (root / 'eel').symlink_to(outside / 'eel')
    (root / 'cat/away.png').symlink_to(outside / 'eel/0.png')
    (root / 'cat/broken.png').symlink_to('nothing.png')
    os.mkfifo(root / 'cat/pipe.png')
    (root / 'dog/zero.png').symlink_to('/dev/zero')
    data = load_data(root)
    assert data.train.items == alone.train.items and data.val.items == alone.val.items
    assert data.skipped == {
        'link that leads out of the folder': 3,
        'link to nothing': 1,
        'link to what is there already': 3,
        'pipe, device or socket': 1,
    }
    # A store inside the folder, as version control of data keeps it, is read through its links.
    store = root / '.store'
    store.mkdir()
    Image.new('L', (8, 8)).save(store / 'abc.png')
    (root / 'dog/linked.png').symlink_to('../.store/abc.png')
    assert (root / 'dog/linked.png') in [p for p, _ in labelled(load_data(root))]


def test_a_link_from_one_split_into_the_other_leaks_nothing(image_folder: Folder, tmp_path: Path) -> None:
    image_folder('pets/train', {'cat': 3, 'dog': 3})
    image_folder('pets/val', {'cat': 2, 'dog': 2})
    (tmp_path / 'pets/val/cat/seen.png').symlink_to('../../train/cat/0.png')
    (tmp_path / 'pets/train/cat/seen.png').symlink_to('../../val/cat/0.png')
    data = load_data(tmp_path / 'pets')
    assert (len(data.train), len(data.val)) == (6, 4)
    assert data.skipped == {'link to what is there already': 2}


def test_an_empty_class_folder_is_refused(image_folder: Folder) -> None:
    root = image_folder('pets', {'cat': 3, 'dog': 3})
    (root / 'fox').mkdir()
    with pytest.raises(ValueError, match='has folders without an image that is read: fox: remove or fill them'):
        load_data(root)


def test_debian_packs_fashion_mnist_by_gzip(
    fashion_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = fashion_files / 'FashionMNIST/raw'
    packed = tmp_path / 'packed'
    packed.mkdir()
    for path in raw.iterdir():
        (packed / f'{path.name}.gz').write_bytes(gzip.compress(path.read_bytes()))
    whole = load_data('fashion-mnist', data_dir=fashion_files)
    assert load_data('fashion-mnist', data_dir=packed).fingerprint() == whole.fingerprint()
    monkeypatch.setattr('timm_attn.lab.data._DEBIAN', packed)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    assert load_data('fashion-mnist').fingerprint() == whole.fingerprint()
    (packed / 't10k-labels-idx1-ubyte.gz').unlink()
    with pytest.raises(ValueError, match=r'lacks the file t10k-labels-idx\*-ubyte'):
        load_data('fashion-mnist')


@pytest.mark.parametrize('change', [lambda b: b[:-1], lambda b: b + b'x', lambda b: b'', lambda b: b'\0\0\x0d' + b[3:]])
def test_damaged_idx_files_are_refused(fashion_files: Path, change: Callable[[bytes], bytes]) -> None:
    path = fashion_files / 'FashionMNIST/raw/train-images-idx3-ubyte'
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"'{path}' is no whole IDX file of bytes"):
        load_data('fashion-mnist', data_dir=fashion_files)


def test_damaged_gzip_and_labels_beyond_ten_are_refused(fashion_files: Path) -> None:
    path = fashion_files / 'FashionMNIST/raw/train-labels-idx1-ubyte'
    whole = path.read_bytes()
    path.write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(ValueError, match=rf"'{path}' cannot be read"):
        load_data('fashion-mnist', data_dir=fashion_files)
    path.write_bytes(whole[:-1] + b'\x0a')
    with pytest.raises(ValueError, match='a label of train is 10, and Fashion-MNIST has classes 0 to 9'):
        load_data('fashion-mnist', data_dir=fashion_files)


def test_unknown_data_offers_the_near_name() -> None:
    with pytest.raises(ValueError, match=r"'fashon-mnist'\. Did you mean 'fashion-mnist'\?"):
        load_data('fashon-mnist')


def test_reduced_data_keep_all_classes(tiny_data: Data) -> None:
    small = tiny_data.reduced(8, 4)
    assert (len(small.train), len(small.val)) == (8, 4)
    assert Counter(small.train.targets) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert small.fingerprint() != tiny_data.fingerprint()


def test_fingerprint_sees_one_changed_label(tiny_data: Data) -> None:
    before = tiny_data.fingerprint()
    tiny_data.val.targets[3] = 0
    assert tiny_data.fingerprint() != before


def test_images_pass_through_timm_transforms(tiny_data: Data) -> None:
    tiny_data.train.transform = create_transform((1, 12, 12), mean=(0.5,), std=(0.5,), crop_pct=1.0)  # type: ignore
    x, target = tiny_data.train[5]
    assert isinstance(x, torch.Tensor) and x.shape == (1, 12, 12) and target == 1


@pytest.mark.parametrize('shape', [(8, 8), (8, 8, 3)])
def test_batches_of_arrays_have_the_bits_of_images_one_by_one(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    items = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(6)]
    images = Images(items, range(6), 'L' if len(shape) == 2 else 'RGB')
    images.transform = create_transform(  # type: ignore
        (3, 8, 8), is_training=True, no_aug=True, use_prefetcher=True, interpolation='bilinear'
    )
    assert images.stacks(8) and not images.stacks(9)
    x, y = fast_collate(images.__getitems__([4, 1, 3]))
    images.stacked = True
    fast, targets = images.__getitems__([4, 1, 3])
    assert fast.dtype == x.dtype == torch.uint8 and torch.equal(fast, x) and torch.equal(targets, y)
    items[2] = items[2][:7]
    assert not images.stacks(8)


def test_torchvisions_sets_by_timms_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    raw = tmp_path / 'KMNIST' / 'raw'
    raw.mkdir(parents=True)
    held = {}
    for part, n in (('train', 30), ('t10k', 20)):
        images, labels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10
        held[part] = images
        for kind, array in (('images-idx3', images), ('labels-idx1', labels)):
            header = bytes([0, 0, 8, array.ndim]) + b''.join(s.to_bytes(4, 'big') for s in array.shape)
            (raw / f'{part}-{kind}-ubyte').write_bytes(header + array.tobytes())
    data = load_data('torch/kmnist', data_dir=tmp_path)
    assert (len(data.train), len(data.val), len(data.classes), data.img_size, data.in_chans) == (30, 20, 10, 28, 1)
    assert np.array_equal(np.asarray(data.val.image(7)), held['t10k'][7]) and data.val.targets[7] == 7
    assert data.mean[0] == pytest.approx(held['train'].mean() / 255, abs=1e-4)
    assert data.std[0] == pytest.approx(held['train'].std() / 255, abs=1e-4)
    with pytest.raises(ValueError, match=r'No torch/mnist of arrays in .*: give its folder by --data-dir'):
        load_data('torch/mnist', data_dir=tmp_path)
    with pytest.raises(ValueError, match=r'No torch/nothing of arrays in .*Unknown torchvision dataset nothing'):
        load_data('torch/nothing', data_dir=tmp_path)

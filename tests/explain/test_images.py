import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from timm_attn.explain.images import MAX_PIXELS, check_image, endings, open_image, plain


@pytest.mark.parametrize('kind', ['png', 'tiff', 'pgm'])
def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path, kind: str) -> None:
    values = np.linspace(0, 65535, 4096).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f'a.{kind}')
    image = open_image(tmp_path / f'a.{kind}')
    assert image.mode == 'L'
    assert np.array_equal(np.asarray(image), values // 256)


def test_dark_sixteen_bit_image_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / 'a.png')
    assert np.asarray(open_image(tmp_path / 'a.png')).max() == 0


@pytest.mark.parametrize(
    ('low', 'high', 'expected'),
    [
        (0, 1, (0, 255)),
        (0, 0.5, (0, 128)),
        (0, 255, (0, 255)),
        (0, 65535, (0, 255)),
        (-3, 7, (0, 255)),
        (0, 1e9, (0, 255)),
    ],
)
def test_float_images_are_scaled_by_the_range_of_their_values(
    tmp_path: Path, low: float, high: float, expected: tuple[int, int]
) -> None:
    values = np.linspace(low, high, 4096, dtype=np.float32).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / 'a.tiff')
    pixels = np.asarray(open_image(tmp_path / 'a.tiff')).astype(int)
    assert (pixels.min(), pixels.max()) == expected
    assert len(np.unique(pixels)) == expected[1] - expected[0] + 1
    assert (np.diff(pixels.reshape(-1)) >= 0).all()


@pytest.mark.parametrize('high', [255, 65535, 10_000_000])
def test_whole_numbers_of_32_bits_are_scaled_too(tmp_path: Path, high: int) -> None:
    Image.fromarray(np.linspace(0, high, 4096).reshape(64, 64).astype(np.int32)).save(tmp_path / 'a.tiff')
    pixels = np.asarray(open_image(tmp_path / 'a.tiff'))
    assert len(np.unique(pixels)) == 256


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / 'a.tiff')
    with pytest.raises(ValueError, match=r"a\.tiff' is no readable image \(it holds NaN or infinite values\)"):
        open_image(tmp_path / 'a.tiff')


@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_are_upright(tmp_path: Path, orientation: int) -> None:
    upright = Image.new('RGB', (60, 40))
    ImageDraw.Draw(upright).rectangle((0, 0, 20, 10), fill=(255, 0, 0))
    # What a camera stores for each orientation, by the EXIF standard's table: the inverse of what a viewer does.
    turns = Image.Transpose
    stored = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_90,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = upright.transpose(stored[orientation]) if orientation > 1 else upright
    image.save(tmp_path / 'a.png', exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / 'a.png')), np.asarray(upright))


@pytest.mark.parametrize(
    ('mode', 'ending', 'expected'),
    [
        ('1', 'png', 'L'), ('L', 'png', 'L'), ('LA', 'png', 'L'), ('P', 'gif', 'RGB'), ('P', 'png', 'RGB'),
        ('RGB', 'webp', 'RGB'), ('RGBA', 'png', 'RGB'), ('CMYK', 'jpg', 'RGB'), ('CMYK', 'tiff', 'RGB'),
        ('YCbCr', 'jpg', 'RGB'), ('LAB', 'tiff', 'RGB'), ('RGB', 'bmp', 'RGB'), ('RGB', 'jp2', 'RGB'),
    ],
)  # fmt: skip
def test_every_mode_becomes_grey_or_colour(tmp_path: Path, mode: str, ending: str, expected: str) -> None:
    Image.new('RGB', (16, 16), (255, 255, 255)).convert('RGB').save(tmp_path / 'white.png')
    white = Image.new('LAB', (16, 16), (255, 128, 128)) if mode == 'LAB' else None
    image = white or Image.open(tmp_path / 'white.png').convert(mode)
    image.save(tmp_path / f'a.{ending}')
    read = open_image(tmp_path / f'a.{ending}')
    assert read.mode == expected
    assert np.asarray(read).min() > 250


def test_palette_with_transparency_gives_no_warning(tmp_path: Path) -> None:
    image = Image.new('P', (4, 4))
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.putdata([1] * 16)
    image.save(tmp_path / 'a.png', transparency=b'\xff\x80')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert open_image(tmp_path / 'a.png').getpixel((0, 0)) == (10, 200, 30)


def test_pictures_too_large_are_refused_by_their_header(tmp_path: Path) -> None:
    for side in (9000, 20000):  # Above our limit, and above that of Pillow.
        Image.new('1', (side, side)).save(tmp_path / 'a.png')
        for read in (open_image, check_image):
            with pytest.raises(ValueError, match=r"a\.png' is no readable image \(.*pixels"):
                read(tmp_path / 'a.png')
    assert MAX_PIXELS < 9000**2


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'pipe.png')
    for path in (tmp_path / 'pipe.png', '/dev/zero', tmp_path):
        with pytest.raises(ValueError, match=r'is no readable image \(it is no ordinary file\)'):
            open_image(path)
    with pytest.raises(ValueError, match='there is no such file'):
        open_image(tmp_path / 'absent.png')


@pytest.mark.parametrize('kind', ['png', 'jpg', 'gif', 'tiff', 'bmp', 'webp', 'jp2', 'tga', 'ppm'])
def test_damaged_files_give_one_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f'a.{kind}'
    Image.effect_noise((32, 32), 50).convert('RGB').save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(whole[: rng.integers(0, len(whole))] if rng.random() < 0.5 else whole)
        for _ in range(10 * bool(damaged)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(damaged)
        said = [f"'{path}' is no readable image"]
        try:
            said = [open_image(path).mode]
        except ValueError as e:
            said.append(str(e))
        assert said in (['L'], ['RGB']) or said[1].startswith(said[0])


def test_what_needs_another_program_is_no_image() -> None:
    assert endings() >= set('.png .jpg .jpeg .jpe .jfif .webp .bmp .tif .tiff .gif .ppm .pgm .tga'.split())
    assert not endings() & set('.eps .ps .pdf .wmf .emf .mpg .h5 .txt .npy .svg'.split())


def test_an_image_of_a_browser_is_made_plain_too() -> None:
    assert plain(Image.fromarray(np.full((4, 4), 65535, np.uint16))).getpixel((0, 0)) == 255

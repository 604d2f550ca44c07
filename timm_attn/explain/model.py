"""A model to be explained: loading it, its transform, its labels, and whether it was ever trained."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..hub.load import open_model
from ..layers import did_you_mean
from .images import plain

# Of long over short side. Resized so that the short side is the model's, a longer image would need gigabytes.
LONGEST = 100


def unknown_model(source: str) -> ValueError:
    """The error for a name that is nowhere.

    Args:
        source: What was asked for.
    """
    return ValueError(
        f"'{source}' is no folder, no Hub repository (owner/name) and no registered model."
        f'{did_you_mean(source, timm.list_models())} timm-attn list shows them.'
    )


def load_model(source: str, *, pretrained: bool = True) -> nn.Module:
    """A model by whatever name the user has for it, in eval mode on the CPU.

    Args:
        source: A folder with config.json, a Hub repository ('me/cbam' or 'hf-hub:me/cbam'), or a registered model.
        pretrained: Load weights; a folder or repository always does.

    Raises:
        ValueError: It is none of the three, or a folder whose files are damaged or do not fit each other.
    """
    if Path(source).is_dir() or source.startswith(('local-dir:', 'hf-hub:')) or source.count('/') == 1:
        return open_model(source).eval()
    if not timm.is_model(source):
        raise unknown_model(source)
    model = timm.create_model(source, pretrained=pretrained).eval()
    model.loaded_untrained = not pretrained  # pyright: ignore[reportArgumentType]
    return model


def is_untrained(model: nn.Module) -> bool:
    """Whether the weights are plainly random.

    Either `load_model` was asked for none, or no BatchNorm's mean has moved from 0, as one step of training moves it.

    Args:
        model: Any model; of another one without BatchNorm nothing is known, and the answer is False.
    """
    if getattr(model, 'loaded_untrained', False):
        return True
    means = [m.running_mean for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    return bool(means) and not any(bool(mean.any()) for mean in means)


def image_transform(model: nn.Module, *, crop: bool = True) -> Callable[[Image.Image], Tensor]:
    """The evaluation transform of a model, from an image to a batch of one.

    Args:
        model: A timm model; its pretrained_cfg says size, crop and normalisation.
        crop: Cut out the centre as for evaluation; otherwise the whole image, its short side at the model's size.

    Returns:
        From an image of any mode to a tensor (1, C, H, W); it raises a ValueError for an image more than 100 times as
        long as wide, which would need gigabytes.

    Raises:
        ValueError: The model takes neither grey nor colour images.
    """
    config = resolve_model_data_config(model)
    mean, std, channels = _statistics(model)
    config.update(mean=mean, std=std)
    steps: list[Any] = cast(Any, create_transform(**config, is_training=False)).transforms
    if not crop:
        # Left whole: of timm's crop modes, 'center' would cut and 'squash' distort. The last two steps make a tensor
        # and normalise it.
        steps = [_Short(min(config['input_size'][-2:])), *steps[-2:]]

    def transform(image: Image.Image) -> Tensor:
        if max(image.size) > LONGEST * min(image.size):
            raise ValueError(f'{image.width} x {image.height} pixels are no picture to look at: cut out a part of it.')
        x: Any = plain(image).convert('L' if channels == 1 else 'RGB')
        for step in steps:
            x = step(x)
        return x[None]  # (1, C, H, W)

    return transform


class _Short:
    """Resizes the short side, keeping the shape; sides are multiples of 32, the stride of a ResNet."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        scale = self.size / min(image.size)
        step = 32 if self.size >= 64 else 1
        width, height = (max(step, round(side * scale / step) * step) for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)


def shown_image(model: nn.Module, x: Tensor) -> np.ndarray:
    """What a model saw, as an image: undoes the normalisation.

    Args:
        model: The model whose transform made x.
        x: (1, C, H, W).

    Returns:
        (H, W, 3), or (H, W) for grey images, in [0, 1].
    """
    mean, std, _ = _statistics(model)
    image = x[0].cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    array = image.clamp(0, 1).permute(1, 2, 0).numpy()
    return array[..., 0] if array.shape[2] == 1 else array


def label_names(model: nn.Module) -> list[str]:
    """Names of a model's classes by index: its own, ImageNet's for 1000 classes, else 'class 0' and so on.

    Args:
        model: A model; `num_classes` and `pretrained_cfg['label_names']` are read.

    Raises:
        ValueError: Its names are a mapping whose keys are not the indices of its classes.
    """
    count = getattr(model, 'num_classes', 0)
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names') or []
    if isinstance(names, Mapping):
        by_index = {int(k): v for k, v in names.items() if str(k).isdecimal()}
        if sorted(by_index) != list(range(len(names))):
            raise ValueError(f'label_names has the keys {list(names)[:5]}; expected the indices 0 to {count - 1}.')
        names = [by_index[i] for i in range(len(names))]
    if len(names) == count:
        return [str(n) for n in names]
    if count == 1000:
        info = ImageNetInfo()
        return [info.index_to_description(i) for i in range(count)]
    return [f'class {i}' for i in range(count)]


def _statistics(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Mean and deviation of each input channel, and the number of channels."""
    config = resolve_model_data_config(model)
    channels = getattr(model, 'in_chans', None) or config['input_size'][0]
    if channels not in (1, 3):
        raise ValueError(f'{type(model).__name__} takes {channels} channels; only grey (1) and colour (3) are images.')
    mean, std = tuple(config['mean']), tuple(config['std'])
    if len(mean) != channels:
        mean, std = ((sum(v) / len(v),) * channels for v in (mean, std))
    return mean, std, channels

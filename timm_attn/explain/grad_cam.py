"""Grad-CAM, for models with attention and plain ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..optional import require


def grad_cam(model: nn.Module, x: Tensor, label: int) -> np.ndarray | str:
    """Grad-CAM of the package grad-cam on the last stage, leaving the model as it was.

    Args:
        model: A timm model with `feature_info`, in eval mode.
        x: (1, C, H, W).
        label: Class to explain.

    Returns:
        (H, W) in [0, 1], or in words why there is none.
    """
    try:
        require('pytorch_grad_cam', 'lab', pip_name='grad-cam')
    except ImportError as e:
        return str(e)
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    info: Any = getattr(model, 'feature_info', None)
    stage = info[-1]['module'] if info else ''
    if not stage:
        return f'{type(model).__name__} names no stages (feature_info), so the last one is unknown.'
    layer = model.get_submodule(stage)
    shape = _output_shape(model, layer, x)
    if len(shape) != 4:
        return f"{type(model).__name__}'s last stage gives {shape}, no map of pixels."
    # Swin and its like keep their channels last.
    last = info[-1]['num_chs'] == shape[3] != shape[1]
    with (
        _frozen(model),
        GradCAM(
            model=model, target_layers=[layer], reshape_transform=(lambda f: f.permute(0, 3, 1, 2)) if last else None
        ) as cam,
    ):
        # grad-cam's annotation asks for modules where its own targets are none.
        targets: list[Any] = [ClassifierOutputTarget(label)]
        # The parameters take no gradient, so the input has to.
        heat = cam(x.detach().clone().requires_grad_(), targets)[0]
    return np.nan_to_num(heat)


def _output_shape(model: nn.Module, layer: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Shape of what a layer gives; () where it is no tensor."""
    shapes: list[tuple[int, ...]] = []
    handle = layer.register_forward_hook(
        lambda module, args, out: shapes.append(tuple(out.shape) if isinstance(out, Tensor) else ())
    )
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    return shapes[-1] if shapes else ()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient inside, and modes and gradients are the old ones afterwards."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training]
    gradients = [p.grad for p in model.parameters()]
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
        for m in training:
            m.training = True
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g

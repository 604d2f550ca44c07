"""Statistics in float32, whatever the precision around them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.fx
from torch import Tensor


# The leaf functions below hold control flow, which torch.fx cannot follow: it takes each as one node. fx replaces
# them in this module only, so layers call them through the functions without underscore.
@torch.fx.wrap
def _upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@torch.fx.wrap
def _matmul_upcast(a: Tensor, b: Tensor) -> Tensor:
    a, b = _upcast(a), _upcast(b)
    if torch.jit.is_scripting():
        # TorchScript has no autocast switch for any device; autocast leaves float64 alone.
        return (a.double() @ b.double()).to(a.dtype)
    if not a.is_meta and torch.is_autocast_enabled(a.device.type):  # autocast knows no meta device
        with torch.autocast(a.device.type, enabled=False):
            return a @ b
    return a @ b


def upcast(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; float32 and float64 as they are."""
    return _upcast(x)


def matmul_upcast(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (float64 stays), also inside autocast, which would take it to half precision.

    Args:
        a: (..., n, m).
        b: (..., m, p).
    """
    return _matmul_upcast(a, b)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Lets the modules that are called inside compute in the type of x, also inside autocast.

    Args:
        x: Their input.
    """
    # autocast knows no meta device, and torch.fx, which records no context, no device at all.
    unknown = isinstance(x, torch.fx.Proxy) or x.is_meta
    return nullcontext() if unknown else torch.autocast(x.device.type, enabled=False)

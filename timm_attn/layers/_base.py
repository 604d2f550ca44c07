"""What all attentions share: a gain on the gate, a neutral state, and a look at the gates themselves."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Gate:
    """One kind of gate, as pictures, cards and statistics read it.

    Attributes:
        axes: The axes of the tensor behind the batch: 'C' channels, 'H' rows, 'W' columns, 'B' branches, 'K' heads,
            'G' groups, 'D' features of a matrix. 'C' is a weight a channel, 'HW' a map, 'CHW' a gate of each value.
        title: Its name in pictures.
        multiplies: Features are multiplied by the values. A covariance, an attention matrix and a branch before its
            sigmoid are looked at, and multiply nothing.
        entries: Names along the axis 'B'.
    """

    axes: str
    title: str
    multiplies: bool = True
    entries: tuple[str, ...] = ()


def read_gain(value: object, key: str = 'gain') -> float:
    """The number that a state dict holds as an attention's `gain`.

    Args:
        value: What stands there: a floating-point tensor without axes, finite and positive.
        key: Its name, for the message.

    Raises:
        ValueError: It is anything else.
    """
    scalar = isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point() and not value.is_meta
    if isinstance(value, Tensor) and scalar and math.isfinite(gain := float(value)) and gain > 0:
        return gain
    what = f'{value.dtype} of shape {tuple(value.shape)}' if isinstance(value, Tensor) else type(value).__name__
    shown = f'{float(value):g}' if isinstance(value, Tensor) and scalar else what
    raise ValueError(f"'{key}' (={shown}) must be a finite positive number in a floating-point tensor without axes.")


@dataclass(frozen=True)
class GateForm:
    """What the gates of an attention follow from, for fused blocks, which need not make the map x that it gates.

    The attention is x * c * p * gain: a gate of channels c, and p, the mean of gates over planes of z = x * c. Its
    class says so by `statistics`, or by a method `gate_form()` that returns this. Only the class itself: a subclass
    may compute something else.

    Attributes:
        statistics: What the method `gate_of` takes of each plane of x, (N, C) each, to give c (N, C, 1, 1): 'mean',
            'var' (unbiased, 0 for one pixel), 'peak' (the maximum). Empty for no c.
        dims: Dimensions along which z is pooled to its maximum and, behind it, its mean. The method `gates_of_pools`
            takes the list of results, each of z's shape but for a 2 in place of that size, and gives a gate for each,
            with a 1 in that place. Empty for no p.
    """

    statistics: tuple[str, ...] = ()
    dims: tuple[int, ...] = ()


class Attention(nn.Module):
    """Base of every attention.

    Once `init_neutral()` has set its last layer to zero, the module multiplies its input by the constant
    `neutral_gate`, whatever the input. Both starts from pretrained weights use nothing else: injection sets
    `gain = 1 / neutral_gate`, the warm-start tags fold the constant into the convolution or BatchNorm beside it.

    Attributes:
        gain: What multiplies the gate; 1 unless injected with the identity start. Where it is not 1, it is a buffer (a
            scalar tensor) and in the state dict, so that equal keys and tensors compute the same.
        factor: The number that `gain` was set to, where a tensor is of no use.
        neutral_gate: The constant that the neutral state multiplies by; None where there is no such state.
        kinds: Key of `gates(x)` -> what it is, in the order in which pictures show them.
        keywords: What the Hub's tags say besides what `kinds` tell, such as 'self-attention'.
        no_warm_start: Why a plain network's weights cannot start a registered model; empty where they can.
        no_weight_decay: Parameters that the released code trains without weight decay and that timm, which exempts
            all 1-D parameters, would decay.
        statistics: Those of `GateForm`, of an attention that is x * gate_of(*statistics) * gain.
        recomputable: The output depends on input, parameters, buffers and modes alone, and a pass changes nothing but
            running statistics of BatchNorms. So a fused block may run it again in the backward pass, and keep nothing
            of it. Of the class that declares it, not of its subclasses.
        pairs_of_pixels: It makes a float32 matrix of pixels by pixels for each image, so large maps cost much.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {}
    keywords: ClassVar[tuple[str, ...]] = ()
    no_warm_start: ClassVar[str] = ''
    no_weight_decay: ClassVar[tuple[str, ...]] = ()
    statistics: tuple[str, ...] = ()
    factor: float
    if TYPE_CHECKING:  # no annotation for TorchScript: a number where it is 1, else a tensor
        gain: Any
    recomputable: ClassVar[bool] = False
    pairs_of_pixels: ClassVar[bool] = False

    def __init__(self, neutral_gate: float | None) -> None:
        super().__init__()
        self.neutral_gate = neutral_gate
        self.gain = 1.0

    def __setattr__(self, name: str, value: Any) -> None:
        if name != 'gain':
            super().__setattr__(name, value)
        elif isinstance(value, Tensor) and value.is_meta:
            self._set_gain(self.factor, value.device)
        else:
            self._set_gain(float(value), value.device if isinstance(value, Tensor) else None)

    def _set_gain(self, number: float, device: torch.device | None) -> None:
        """Puts the gain beside the module's tensors, as a buffer where it is not 1."""
        self.factor = number
        self.__dict__.pop('gain', None)
        self._buffers.pop('gain', None)
        if number == 1:
            self.__dict__['gain'] = 1.0
            return
        like = next(chain(self.parameters(), self.buffers()), None)
        if like is not None and not (like.is_meta and device):
            device = like.device
        wide = torch.float64 if like is not None and like.dtype == torch.float64 else torch.float32
        self._buffers['gain'] = torch.tensor(number, dtype=wide, device=device)

    def _number(self) -> float:
        """The gain in full precision: `factor`, unless the buffer was given another value."""
        shown = self._buffers.get('gain')
        if type(shown) is not Tensor or shown.is_meta:
            return self.factor
        return self.factor if torch.tensor(self.factor, dtype=shown.dtype) == (value := shown.item()) else value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'Attention':
        number, shown = self._number(), self._buffers.pop('gain', None)
        super()._apply(fn, recurse)
        if shown is not None:
            # Neither cast nor left empty: 2/3 in half precision is another number.
            self._set_gain(number, fn(torch.ones_like(shown)).device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (shown := self._buffers.get('gain')) is not None:
            # Not on an accelerator, which may know no float64.
            device = 'meta' if shown.is_meta else 'cpu'
            destination[f'{prefix}gain'] = torch.tensor(self._number(), dtype=torch.float64, device=device)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, gain = f'{prefix}gain', self._number()
        shown = self._buffers.pop('gain', None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        members = {*self._parameters, *self._buffers, *self._modules}
        own = any(k.startswith(prefix) and k[len(prefix) :].split('.')[0] in members for k in state_dict)
        if key in state_dict:
            unexpected_keys[:] = [k for k in unexpected_keys if k != key]
            try:
                gain = read_gain(state_dict[key], key)
            except ValueError as e:
                if not (shown is not None and shown.is_meta and getattr(state_dict[key], 'is_meta', False)):
                    error_msgs.append(str(e))
        elif own or not (missing_keys or any(True for _ in chain(self.parameters(), self.buffers()))):
            # An attention without tensors has no key to go by: there, nothing before it may be missing.
            gain = 1.0
        elif gain != 1:
            missing_keys.append(key)
        self._set_gain(gain, None if shown is None else shown.device)

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        """Zeroes the last layer of each gate, so that the module multiplies by `neutral_gate`.

        Raises:
            ValueError: The attention has no neutral state.
        """
        raise NotImplementedError

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """What the attention looks at, without `gain`.

        Args:
            x: The module's input (N, C, H, W).

        Returns:
            Each of the class's `kinds`, the batch first: 'channel' (N, C), 'spatial' (N, H, W) and so on.
        """
        raise NotImplementedError(f'{type(self).__name__} shows no gates: give the class `kinds` and `gates(x)`.')

    @classmethod
    def options_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """The options that the shapes of a module's weights tell, for messages about weights that do not fit.

        Args:
            shapes: Key in the module's state dict -> shape; some may be absent.

        Returns:
            Option -> its value as a number or a fraction in digits, such as '3' or '4/64'.
        """
        return {}

    def extra_repr(self) -> str:
        return f'gain={self._number():g}' if self._number() != 1 else ''


def rd_ratio_of(shapes: Mapping[str, tuple[int, ...]], key: str = 'fc1.weight') -> dict[str, str]:
    """The option `rd_ratio` for `Attention.options_of`, from the first layer of a bottleneck.

    Args:
        shapes: Key -> shape.
        key: The layer's weight, (C // r, C, ...).
    """
    return {'rd_ratio': f'{shapes[key][0]}/{shapes[key][1]}'} if key in shapes else {}


def kernel_size_of(shapes: Mapping[str, tuple[int, ...]], key: str = 'conv.weight') -> dict[str, str]:
    """The option `kernel_size` for `Attention.options_of`, from a convolution.

    Args:
        shapes: Key -> shape.
        key: The convolution's weight.
    """
    return {'kernel_size': str(shapes[key][-1])} if key in shapes else {}


def attn_sites(model: nn.Module) -> dict[str, Attention]:
    """All attention modules of a model.

    Args:
        model: Any model, registered or injected into.

    Returns:
        Name -> module, from input to output, as in the state dict, without torch.compile's prefix; of attentions
        inside one another, the outermost.
    """
    sites: dict[str, Attention] = {}
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            name = '.'.join(part for part in name.split('.') if part != '_orig_mod')
            if not any(name.startswith(f'{outer}.') for outer in sites):
                sites[name] = module
    return sites


def no_weight_decay(model: nn.Module) -> set[str]:
    """Parameters of a model's attentions that are trained without weight decay, by name.

    Args:
        model: Any model, registered or injected into.
    """
    return {f'{site}.{p}' for site, m in attn_sites(model).items() for p in m.no_weight_decay}


def gain_keys(model: nn.Module) -> frozenset[str]:
    """The keys under which a state dict may hold a gain, whether or not this model's does.

    Args:
        model: Any model, registered or injected into.
    """
    return frozenset(f'{name}.gain'.lstrip('.') for name, m in model.named_modules() if isinstance(m, Attention))


def reduced_channels(channels: int, rd_ratio: float) -> int:
    """The width C // r of a bottleneck, with no rounding and no least width.

    Args:
        channels: C.
        rd_ratio: 1 / r.

    Raises:
        ValueError: Nothing is left.
    """
    # A ratio such as 0.29 is stored a little too small: without the sum, 100 channels would give 28.
    hidden = int(channels * rd_ratio + 1e-6)
    if hidden < 1:
        least = -int(-1 / rd_ratio // 1) if rd_ratio > 0 else None
        hint = f'at least {least} channels or a larger rd_ratio' if least else 'a positive rd_ratio'
        raise ValueError(f'channels (={channels}) times rd_ratio (={rd_ratio:g}) leaves no channel: give {hint}.')
    return hidden


def check_odd(kernel_size: int) -> None:
    """Refuses kernels that would shift the map.

    Raises:
        ValueError: The size is even or not positive.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'kernel_size (={kernel_size}) must be odd and positive, so that the map keeps its size.')


def check_choice(argument: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuses a value that is not among the choices.

    Raises:
        ValueError: Names the argument, the value and the choices.
    """
    if value not in choices:
        raise ValueError(f'{argument} (={value!r}) must be one of: {", ".join(map(repr, choices))}.')

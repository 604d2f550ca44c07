"""What a source of checkpoints is: data about its files and keys, and the few functions its rows may name."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]
# Rewrites one tensor for the shape that the model has; what cannot be made to fit is returned as it is.
Value = Callable[[Tensor, Shape], Tensor]
Replacement = str | Callable[[re.Match[str]], str]
# A source's name for a net without attention, which starts any attention warm.
PLAIN = 'plain'


@dataclass(frozen=True)
class Target:
    """What a converter may know about a model.

    Attributes:
        name: Its registered name.
        attn: Its attention, None for none.
        attn_args: The options of its attention.
        shapes: Key -> shape of all it needs.
        sites: Where its attention sits, each with the dot behind it.
        gains: Keys that a checkpoint may have besides: where one is absent, its attention's gain is 1.
    """

    name: str
    attn: str | None
    attn_args: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    sites: tuple[str, ...]
    gains: frozenset[str]


Check = Callable[[Mapping[str, Tensor], Target, str], None]


@dataclass(frozen=True)
class HostedFile:
    """Weights that the source's authors host themselves.

    Attributes:
        name: What stands behind 'official/'.
        model: The registered model that it fits.
        place: Google Drive id, or an address.
        top1: ImageNet-1k accuracy in percent as stated there; None where nothing is.
        model_args: Arguments of the model.
    """

    name: str
    model: str
    place: str
    top1: float | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A family of checkpoints and how their keys become ours.

    Attributes:
        name: What `convert(source=...)` calls it.
        marks: Attention -> pattern that only this source's keys of that attention match; 'plain' for nets without.
        rules: Ordered (pattern, replacement); each is applied to what the one before left. In a replacement, END
            stands for the place behind a stage's last block.
        home: The repository of its authors.
        licence: Of the weights, as stated there; None where nothing is.
        values: (pattern of the source's keys, function); the only changes of numbers.
        zeros: Pattern of our keys that are 0 where the source has no such tensor.
        constants: Pattern of the source's keys that hold what the model computes itself: checked, and left out.
        checks: Functions that raise ValueError for what fits by its keys and is another network.
        alias: Other names of the source for some of its attentions: equal keys elsewhere.
        own_names: Attentions whose keys here are our own, so that only the caller can tell the two apart.
        nets: Pattern of the nets that may stand behind 'NAME/', where equal keys are different networks.
        known_sha1: sha1 of a released file -> the net that it holds.
        files: What its authors host.
    """

    name: str
    marks: Mapping[str, str]
    rules: tuple[tuple[str, Replacement], ...] = ()
    home: str = ''
    licence: str | None = None
    values: tuple[tuple[str, Value], ...] = ()
    zeros: str | None = None
    constants: str | None = None
    checks: tuple[Check, ...] = ()
    alias: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    own_names: tuple[str, ...] = ()
    nets: str = ''
    known_sha1: Mapping[str, str] = field(default_factory=dict)
    files: tuple[HostedFile, ...] = ()

    def attn_of(self, keys: Mapping[str, Tensor]) -> str | None:
        """The attention whose keys of this source are there, None for none.

        Args:
            keys: A state dict.
        """
        for attn, pattern in self.marks.items():
            if any(re.search(pattern, key) for key in keys):
                return attn
        return None

    def names_of(self, attn: str) -> set[str]:
        """What `convert(source=...)` may call the source of a net with this attention, or of a plain one.

        Args:
            attn: One of `marks`.
        """
        return {self.name, *self.alias.get(attn, ())}

    def rename(self, key: str) -> str:
        """Our name of a key, with END still in it.

        Args:
            key: The source's name.
        """
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key


def reshaped(tensor: Tensor, shape: Shape) -> Tensor:
    """A linear layer's matrix as a 1x1 convolution's weight, or the other way round.

    Args:
        tensor: (O, I) or (O, I, 1, 1).
        shape: The other of the two.
    """
    same = [n for n in tensor.shape if n != 1] == [n for n in shape if n != 1]
    return tensor.reshape(shape) if same and tensor.shape[:2] == shape[:2] else tensor


def padded(tensor: Tensor, shape: Shape) -> Tensor:
    """A 1-D convolution's kernel with zeros at both ends, which is the same function.

    Args:
        tensor: (1, 1, k).
        shape: (1, 1, K), K >= k, both odd.
    """
    more = shape[-1] - tensor.shape[-1] if tensor.ndim == len(shape) == 3 else 0
    fits = more > 0 and more % 2 == 0 and tensor.shape[:-1] == shape[:-1]
    return F.pad(tensor, (more // 2, more // 2)) if fits else tensor


def flipped(tensor: Tensor, shape: Shape) -> Tensor:
    """The kernel of a spatial gate that pools [mean, max] for one that pools [max, mean].

    Args:
        tensor: (1, 2, k, k).
        shape: The same.
    """
    return tensor.flip(1) if tensor.ndim == 4 and tensor.shape[1] == 2 else tensor


def check_product(keys: Mapping[str, Tensor], target: Target, name: str) -> None:
    """Refuses released BAM weights in the paper's sum, which is another function of the same branches.

    Raises:
        ValueError: The model has `combine='add'`.
    """
    if target.attn == 'bam' and target.attn_args.get('combine') == 'add':
        raise ValueError(
            f"'{name}' weights of BAM multiply the two branches, and attn_args={{'combine': 'add'}} adds them: create "
            f'{target.name} without it.'
        )


def check_form(form: str) -> Check:
    """A check that refuses the weights of one selective-kernel network for the other.

    Args:
        form: The form that the source's weights have: 'sk_resnet' or 'sknet'.
    """
    nets = {'sk_resnet': 'SK-ResNet* (sk_resnet50, 101)', 'sknet': 'SKNet (sk_resnext50_32x4d, 101)'}

    def check(keys: Mapping[str, Tensor], target: Target, name: str) -> None:
        has = target.attn_args.get('form', 'sk_resnet')
        if target.attn == 'sk' and has != form:
            raise ValueError(
                f"'{name}' weights of SK are those of {nets[form]}, and {target.name} is {nets[has]}: two networks "
                'with other branches.'
            )

    return check

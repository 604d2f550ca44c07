"""The one table of attentions: a decorated class is in `list_attn()`, `inject`, the tests, the CLI and the cards."""

import difflib
import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points, packages_distributions
from typing import Any, TypeVar

import torch

from ._base import Attention

_logger = logging.getLogger(__name__)

# Placement -> where that is in a ResNet.
PLACEMENTS = {
    'block': 'at the end of each residual branch',
    'last_block': 'in the last block of each stage',
    'one_block': 'in the last block but one of stage 3',
    'stage': 'after each stage but the last',
    'conv2': "between each block's second convolution and its BatchNorm",
    'conv': "in place of each block's 3x3 convolution",
}

# Entry points of other packages, each a module that registers attentions when it is imported.
PLUGINS = 'timm_attn.plugins'
_LOADED: set[str] = set()

T = TypeVar('T', bound=type[Attention])


@dataclass(frozen=True)
class AttnSpec:
    """What is known of an attention besides its equations.

    Attributes:
        name: The registry's name.
        cls: The module class.
        placement: One of `PLACEMENTS`.
        title: Title of the paper.
        authors: Authors, joined by ' and ' as bibtex wants them.
        year: Year of the venue.
        venue: Where it appeared.
        paper: Link to the paper.
        code: Link to the code that the default follows; empty where the module is this project's own.
        licence: Of that code, by its SPDX name, or 'none stated'; empty where there is no code.
        equation: What it computes, in a line; s is the sigmoid, W and w are learned.
    """

    name: str
    cls: type[Attention]
    placement: str
    title: str
    authors: str
    year: int
    venue: str
    paper: str
    code: str
    licence: str = ''
    equation: str = ''

    @property
    def place(self) -> str:
        """Where it stands in a ResNet, in words."""
        return PLACEMENTS[self.placement]

    @property
    def bibtex(self) -> str:
        """The paper as a bibtex entry."""
        key = self.authors.split(',')[0].split()[-1].lower() + str(self.year) + self.name
        return (
            f'@article{{{key},\n  title={{{self.title}}},\n  author={{{self.authors}}},\n'
            f'  journal={{{self.venue}}},\n  year={{{self.year}}},\n  url={{{self.paper}}}\n}}'
        )


_ATTENTIONS: dict[str, AttnSpec] = {}


def register_attn(
    name: str,
    *,
    placement: str,
    title: str,
    authors: str,
    year: int,
    venue: str,
    paper: str,
    code: str,
    licence: str = '',
    equation: str = '',
) -> Callable[[T], T]:
    """Puts a class into the registry under `name`; the other arguments are the fields of `AttnSpec`.

    Raises:
        ValueError: The name is taken, or the placement is unknown.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"Unknown placement '{placement}' of '{name}'. Expected one of: {', '.join(PLACEMENTS)}.")

    def register(cls: T) -> T:
        if name in _ATTENTIONS:
            raise ValueError(f"Attention '{name}' is registered already, by {_ATTENTIONS[name].cls.__module__}.")
        _ATTENTIONS[name] = AttnSpec(name, cls, placement, title, authors, year, venue, paper, code, licence, equation)
        return cls

    return register


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known: ` Did you mean 'cbam'?`, empty where nothing is near.

    Args:
        name: What was asked for.
        known: What there is.
    """
    near = difflib.get_close_matches(str(name), list(known), 3)
    return f' Did you mean {" or ".join(map(repr, near))}?' if near else ''


def list_attn() -> list[str]:
    """Names of all attentions, sorted, with those of installed packages that have an entry point for it.

    A package that cannot be imported is named in a warning.
    """
    for problem in _load_plugins():
        _logger.warning('%s', problem)
    return sorted(_ATTENTIONS)


def is_registered(name: str) -> bool:
    """Whether an attention is in the table already, with no look at other packages."""
    return name in _ATTENTIONS


def get_attn(name: str) -> AttnSpec:
    """The registry's entry of an attention.

    A name that is not known is looked for in the packages that have an entry point in the group `timm_attn.plugins`:
    each is imported, once, and registers its attentions.

    Args:
        name: One of `list_attn()`, or of such a package.

    Raises:
        ValueError: No attention has that name, or a package fails to import.
    """
    problems = [] if name in _ATTENTIONS else _load_plugins()
    if name not in _ATTENTIONS:
        if problems:
            raise ValueError(problems[0])
        meant = did_you_mean(name, list_attn())
        raise ValueError(f"Unknown attention '{name}'.{meant} Expected one of: {', '.join(list_attn())}.")
    return _ATTENTIONS[name]


def _load_plugins() -> list[str]:
    """Imports the packages that have an entry point, each once; gives what is wrong with those that fail."""
    problems = []
    for point in entry_points(group=PLUGINS):
        if point.value not in _LOADED:
            _LOADED.add(point.value)  # before: what is imported may ask for the list itself
            try:
                point.load()
            except Exception as e:
                _LOADED.discard(point.value)
                problems.append(
                    f"The plugin '{point.name}' ({point.value}) of the group {PLUGINS} cannot be imported "
                    f'({type(e).__name__}: {e}): mend or uninstall its package.'
                )
    return problems


def package_of(name: str) -> str:
    """The package that an attention comes with; empty for this one.

    Args:
        name: One of `list_attn()`.
    """
    top = get_attn(name).cls.__module__.partition('.')[0]
    return '' if top == __name__.partition('.')[0] else next(iter(packages_distributions().get(top, ())), top)


def accepted_args(name: str) -> list[str]:
    """Options of an attention: its constructor's arguments but `channels`, `device` and `dtype`."""
    parameters = inspect.signature(get_attn(name).cls).parameters
    return [p for p in parameters if p not in ('channels', 'device', 'dtype')]


def check_attn_args(name: str, attn_args: dict[str, Any]) -> None:
    """Refuses options that an attention does not have.

    Raises:
        ValueError: No attention has that name.
        TypeError: Names the unknown options and the accepted ones.
    """
    accepted = accepted_args(name)
    unknown = [a for a in attn_args if a not in accepted]
    if unknown:
        meant = did_you_mean(unknown[0], accepted) if len(unknown) == 1 else ''
        raise TypeError(
            f"'{name}' has no option {', '.join(map(repr, unknown))}.{meant} Accepted: {', '.join(accepted)}."
        )


def create_attn(
    name: str,
    channels: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **attn_args: Any,
) -> Attention:
    """Builds one attention module, initialised as its released code does.

    Args:
        name: One of `list_attn()`.
        channels: Channels C of the (N, C, H, W) maps it will see.
        device: Where its parameters are placed.
        dtype: Type of its parameters.
        **attn_args: Options of the attention's class.

    Raises:
        ValueError: Unknown name, or options that do not fit the channels.
        TypeError: Unknown options; the message names the accepted ones.
    """
    check_attn_args(name, attn_args)
    cls: Any = get_attn(name).cls
    return cls(channels, **attn_args, device=device, dtype=dtype)

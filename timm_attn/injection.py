"""Puts attention into any timm model that has slots for it; the registered models are built this way too."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .layers import Attention, AttnSpec, attn_sites, check_attn_args, create_attn, get_attn

_logger = logging.getLogger(__name__)

# timm's attributes for attention, None or Identity while empty. A block that has several gets its last one filled.
SLOTS = ('se', 'attn', 'attn2', 'attn3', 'attn_last')
FAMILIES = (
    'resnet, resnext, wide_resnet, res2net, regnet, mobilenetv2, hrnet, nf_resnet, gernet, repvgg, darknet, vovnet'
)
STARTS = ('identity', 'paper')
LARGE = 100e6


@dataclass(frozen=True)
class Site:
    """A place for attention: its name, the channels there, the factor that the model multiplies its output by."""

    name: str
    channels: int
    put: Callable[[nn.Module], object]
    scale: float = 1.0


class _Probe(nn.Module):
    """Stands in a slot for one forward pass and notes the channels it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.channels: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.channels = x.shape[1]
        return x


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Has every module in eval mode for a while, and each back in its own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def _empty_slots(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    found = {}
    absent = object()
    for name, block in model.named_modules():
        values = {slot: getattr(block, slot, absent) for slot in SLOTS}
        empty = [slot for slot, value in values.items() if value is None or type(value) is nn.Identity]
        if name and empty:  # the model itself is no block
            found[f'{name}.{empty[-1]}'] = (block, empty[-1])
    return found


def _probe(model: nn.Module) -> None:
    """One forward pass of an image, on the meta device: nothing is computed, and no buffer moves."""
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    meta = {k: v.to('meta') for k, v in tensors.items()}
    x = torch.zeros(2, conv.in_channels, 64, 64, device='meta', dtype=conv.weight.dtype)
    with evaluating(model), torch.no_grad():
        functional_call(model, meta, (x,))


def _block_sites(model: nn.Module) -> list[Site]:
    slots = _empty_slots(model)
    if not slots:
        first = next(iter(attn_sites(model)), None)
        filled = f' (they are filled: {first}, ...)' if first else ''
        raise ValueError(
            f'{type(model).__name__} has no empty attention slot {SLOTS}{filled}. Families that have: {FAMILIES}.'
        )
    before = {site: getattr(block, slot) for site, (block, slot) in slots.items()}
    probes = {site: _Probe() for site in slots}
    try:
        for site, (block, slot) in slots.items():
            setattr(block, slot, probes[site])
        _probe(model)
    finally:
        for site, (block, slot) in slots.items():
            # A slot that was None is no module; setattr alone would leave it registered as one.
            delattr(block, slot)
            setattr(block, slot, before[site])
    missed = [site for site, probe in probes.items() if probe.channels is None]
    if missed:
        raise ValueError(
            f'{type(model).__name__} never calls the slots {missed}, so attention there would do nothing. '
            f'Families that work: {FAMILIES}.'
        )
    return [
        Site(
            site,
            probes[site].channels or 0,
            functools.partial(setattr, block, slot),
            # Normaliser-free blocks multiply what comes out of the slot by a constant of their own.
            getattr(block, 'attn_gain', 1.0),
        )
        for site, (block, slot) in slots.items()
    ]


def _last_block_sites(model: nn.Module) -> list[Site]:
    # 'layer1.2.se' is a slot of block '2' in stage 'layer1'.
    return list({site.name.rsplit('.', 2)[0]: site for site in _block_sites(model)}.values())


def _stage_sites(model: nn.Module) -> list[Site]:
    # feature_info lists the stem, then every stage; attention follows each stage but the last.
    infos = list(getattr(model, 'feature_info', ()))[1:-1]
    if not infos:
        raise ValueError(f'{type(model).__name__} lists no stages in feature_info. Families that do: {FAMILIES}.')
    sites = []
    for info in infos:
        stage = model.get_submodule(info['module'])
        if not isinstance(stage, nn.Sequential):
            raise ValueError(
                f"'{info['module']}' of {type(model).__name__} is a {type(stage).__name__}, and attention after a "
                'stage is appended to an nn.Sequential. Families that work: resnet, resnext, wide_resnet, res2net.'
            )
        if isinstance(stage[-1], Attention):
            raise ValueError(f"'{info['module']}' of {type(model).__name__} ends in attention already: {stage[-1]}.")
        sites.append(Site(f'{info["module"]}.{len(stage)}', info['num_chs'], stage.append))
    return sites


_SITES: dict[str, Callable[[nn.Module], list[Site]]] = {
    'block': _block_sites,
    'last_block': _last_block_sites,
    'stage': _stage_sites,
}


def _args_by_width(name: str, attn_args: dict[str, Any], widths: list[int]) -> dict[int, dict[str, Any]]:
    """A list among the options holds one value for each width, in the order in which the widths appear."""
    for key, value in attn_args.items():
        if isinstance(value, list | tuple) and len(value) != len(widths):
            raise ValueError(
                f"'{key}' of '{name}' has {len(value)} values ({value}), but the model has {len(widths)} widths: "
                f'{widths}.'
            )
    return {
        width: {k: v[i] if isinstance(v, list | tuple) else v for k, v in attn_args.items()}
        for i, width in enumerate(widths)
    }


def _no_weight_decay(model: nn.Module, inner: Callable[[], Any] | None) -> set[str]:
    names = {f'{site}.{p}' for site, m in attn_sites(model).items() for p in m.no_weight_decay}
    return names | set(inner() if inner else ())


def inject(model: nn.Module, name: str, *, start: str = 'identity', **attn_args: Any) -> nn.Module:
    """Puts attention into a model, in place.

    With the identity start the model's output stays what it was, to the bit where the neutral gate is a power of
    two, so a pretrained model keeps its accuracy and the attention learns from there. The state dict says so: it holds
    the number by which each gate is multiplied (`gain`), and a registered model of the same attention loads it too.

    Args:
        model: A timm model with empty attention slots, or with stages for attention that follows a stage.
        name: One of `list_attn()` but 'sk', which replaces convolutions.
        start: 'identity' as above; 'paper' initialises as the released code does.
        **attn_args: Options of the attention; a list gives one value for each width of the model.

    Returns:
        The same model.

    Raises:
        ValueError: No such attention or start, 'sk', a model without slots, a slot that the model never calls, or
            options that do not fit its channels.
        TypeError: Unknown options; the message names the accepted ones.
    """
    attn = get_attn(name)
    check_attn_args(name, attn_args)
    if start not in STARTS:
        raise ValueError(f"Unknown start '{start}'. Expected one of: {', '.join(STARTS)}.")
    if attn.placement not in _SITES:
        raise ValueError(
            f"'{name}' replaces convolutions, so it cannot be injected into a model: its keys would move. "
            f"Create a registered one, such as timm.create_model('{name}_resnet50')."
        )
    sites = _SITES[attn.placement](model)
    modules = _build(attn, sites, attn_args, next(model.parameters()))
    for site, module in zip(sites, modules, strict=True):
        if start == 'identity':
            module.init_neutral()
            module.gain = 1 / (module.neutral_gate * site.scale)
        module.train(model.training)
        site.put(module)
    if attn.cls.no_weight_decay:
        inner = getattr(model, 'no_weight_decay', None)
        host: Any = model
        host.no_weight_decay = functools.partial(_no_weight_decay, model, inner)
    size = sum(p.numel() for m in modules for p in m.parameters())
    if size > LARGE:
        _logger.warning("'%s' adds %.0f M parameters; a smaller rd_ratio or more groups give fewer.", name, size / 1e6)
    return model


def _build(attn: AttnSpec, sites: list[Site], attn_args: dict[str, Any], like: Tensor) -> list[Attention]:
    widths = list(dict.fromkeys(site.channels for site in sites))
    args = _args_by_width(attn.name, attn_args, widths)
    dd = {'device': like.device, 'dtype': like.dtype}
    return [create_attn(attn.name, site.channels, **dd, **args[site.channels]) for site in sites]

"""Puts attention into any network; the registered models are built this way too.

A *slot* is timm's own empty place for attention inside a block, such as `block.se`. An *output* placement gates what a
module returns: the attention becomes the module's child, and a forward hook applies it; a container that runs its
children one after the other gets it as its last child instead. Either way the keys of the network keep their names.
"""

import copy
import difflib
import functools
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .layers import Attention, AttnSpec, attn_sites, check_attn_args, create_attn, get_attn, no_weight_decay

_logger = logging.getLogger(__name__)

# timm's attributes for attention, None or Identity while empty. A block that has several gets its last one filled.
SLOTS = ('se', 'attn', 'attn2', 'attn3', 'attn_last')
FAMILIES = (
    'resnet, resnext, wide_resnet, res2net, regnet, mobilenetv2, hrnet, nf_resnet, gernet, repvgg, darknet, vovnet'
)
STARTS = ('identity', 'paper')
WHERE = ('auto', 'slot', 'output')
FORMATS = ('NCHW', 'NHWC')
LARGE = 100e6
# Bytes of a float32 matrix of pixels by pixels, for an image: 28 x 28 pixels have 2.5 MB, 14 x 14 have 0.15.
MANY_PAIRS = 1e6
# Names of the child that gates a module's output.
CHILDREN = ('attn', 'attn_gate')
_WRAPPERS = {'DataParallel', 'DistributedDataParallel', 'FullyShardedDataParallel', 'FSDPModule'}

At = str | Sequence[str] | Callable[[str, nn.Module], bool]


# ---- The hooks ------------------------------------------------------------------------------------------------------
# Functions of the module, so that they are copied and pickled by name; typed, so that TorchScript compiles them. The
# last one is for modules of several arguments, whose types TorchScript would have to be told one by one.


def _gate(self: Any, input: tuple[Tensor], output: Tensor) -> Tensor:
    return self.attn(output)


def _gate_again(self: Any, input: tuple[Tensor], output: Tensor) -> Tensor:
    return self.attn_gate(output)


def _gate_nhwc(self: Any, input: tuple[Tensor], output: Tensor) -> Tensor:
    return self.attn(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _gate_nhwc_again(self: Any, input: tuple[Tensor], output: Tensor) -> Tensor:
    return self.attn_gate(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


_HOOKS: dict[tuple[str, str], Callable[..., Tensor]] = {
    ('attn', 'NCHW'): _gate,
    ('attn_gate', 'NCHW'): _gate_again,
    ('attn', 'NHWC'): _gate_nhwc,
    ('attn_gate', 'NHWC'): _gate_nhwc_again,
}


def _hook_key(child: str) -> Any:
    # Not a number from torch's counter: a model that is loaded in another process keeps its numbers, and the next hook
    # registered there could take one of them.
    return f'timm_attn.{child}'


# ---- Sites ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A place for attention.

    Args:
        owner: Name of the module that holds it.
        child: Its name there.
        kind: 'none' or 'identity' for a slot, by what was there; 'append' for a container's last child; 'hook' for a
            child that a hook calls.
        channels: Channels of the map there.
        scale: The factor that the model multiplies its output by.
        pixels: Rows times columns of the map there, for the image that told the channels.
    """

    owner: str
    child: str
    kind: str
    channels: int = 0
    scale: float = 1.0
    pixels: int = 0

    @property
    def name(self) -> str:
        """Its name in the model."""
        return f'{self.owner}.{self.child}'

    def put(self, model: nn.Module, attn: nn.Module, fmt: str) -> None:
        """Puts attention there."""
        owner = model.get_submodule(self.owner)
        if self.kind in ('none', 'identity'):
            setattr(owner, self.child, attn)
        else:
            owner.add_module(self.child, attn)
        if self.kind == 'hook':
            owner._forward_hooks[_hook_key(self.child)] = _HOOKS[self.child, fmt]

    def clear(self, model: nn.Module) -> None:
        """Takes out what is there."""
        owner = model.get_submodule(self.owner)
        delattr(owner, self.child)
        if self.kind == 'none':
            setattr(owner, self.child, None)
        elif self.kind == 'identity':
            setattr(owner, self.child, nn.Identity().train(owner.training))
        elif self.kind == 'hook':
            owner._forward_hooks.pop(_hook_key(self.child), None)


class _Probe(nn.Module):
    """Stands where attention shall be for one forward pass, and notes what comes by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        # A view, so that what a container returns can be told from what its other children returned.
        out = x.view_as(x) if isinstance(x, Tensor) else x
        self.seen.append(out)
        return out


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


def _is_empty(value: object) -> bool:
    return value is None or type(value) is nn.Identity


def _slots(block: nn.Module) -> dict[str, object]:
    absent = object()
    found = {slot: getattr(block, slot, absent) for slot in SLOTS}
    return {slot: v for slot, v in found.items() if v is None or isinstance(v, nn.Module)}


def _empty_slot(block: nn.Module) -> str | None:
    return next((slot for slot, value in reversed(_slots(block).items()) if _is_empty(value)), None)


def _slot_site(name: str, block: nn.Module, slot: str) -> Site:
    kind = 'none' if getattr(block, slot) is None else 'identity'
    # Normaliser-free blocks multiply what comes out of the slot by a constant of their own.
    return Site(name, slot, kind, scale=getattr(block, 'attn_gain', 1.0))


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model but itself, without those inside attentions."""
    inner = tuple(attn_sites(model))
    return {
        name: m
        for name, m in model.named_modules()
        if name and name not in inner and not name.startswith(tuple(f'{site}.' for site in inner))
    }


def _taken(model: nn.Module) -> list[str]:
    """Slots that hold something, of the blocks that have none to spare."""
    return [
        f'{name}.{slot}'
        for name, block in _base_modules(model).items()
        if (slots := _slots(block)) and not any(map(_is_empty, slots.values()))
        for slot in [next(iter(slots))]
    ]


def _output_site(name: str, module: nn.Module, fmt: str) -> Site:
    if fmt == 'NHWC' and type(module) is nn.Sequential and len(module):
        # Its last child returns what it returns, and can have a hook that turns the maps.
        child, last = list(module.named_children())[-1]
        return _output_site(f'{name}.{child}', last, fmt)
    if isinstance(module, nn.Sequential) and str(len(module)) not in module._modules:
        return Site(name, str(len(module)), 'hook')
    for child in CHILDREN:
        if not hasattr(module, child):
            return Site(name, child, 'hook')
    raise ValueError(f"'{name}' has an 'attn' and an 'attn_gate' already: there is no name left for its attention.")


# ---- Which sites: by the attention's own placement, or by `at` ------------------------------------------------------


def _block_sites(model: nn.Module, fmt: str) -> list[Site]:
    sites = [
        _slot_site(name, block, slot)
        for name, block in _base_modules(model).items()
        if (slot := _empty_slot(block)) is not None
    ]
    if not sites:
        first = next(iter(_taken(model)), None)
        filled = f' (they are filled: {first}, ...)' if first else ''
        infos = list(getattr(model, 'feature_info', ()))
        names = [i['module'] for i in infos if isinstance(i, dict) and i.get('module')]
        hint = f', such as at={names[-4:]}' if names else ''
        raise ValueError(
            f'{type(model).__name__} has no empty attention slot {SLOTS}{filled}: say with `at` which modules '
            f'attention shall follow{hint}. Families that have slots: {FAMILIES}.'
        )
    return sites


def _last_block_sites(model: nn.Module, fmt: str) -> list[Site]:
    # 'layer1.2' is a block in stage 'layer1'.
    return list({site.owner.rpartition('.')[0]: site for site in _block_sites(model, fmt)}.values())


def _one_block_sites(model: nn.Module, fmt: str) -> list[Site]:
    stages: dict[str, list[Site]] = {}
    for site in _block_sites(model, fmt):
        stages.setdefault(site.owner.rpartition('.')[0], []).append(site)
    # As the paper has it: before the last block of the stage whose maps are 14 x 14 at 224 pixels.
    stage = list(stages.values())[-2:][0]
    return stage[-2:][:1]


def _conv2_sites(model: nn.Module, fmt: str) -> list[Site]:
    sites = [
        _output_site(f'{name}.conv2', conv, fmt)
        for name, block in _base_modules(model).items()
        if isinstance(conv := getattr(block, 'conv2', None), nn.Conv2d) and hasattr(block, 'bn2')
    ]
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no block with a convolution 'conv2' and its BatchNorm 'bn2', between which "
            'this attention goes: say with `at` which modules it shall follow. Families that have such blocks: resnet, '
            'resnext, wide_resnet.'
        )
    return sites


def _stage_sites(model: nn.Module, fmt: str) -> list[Site]:
    # feature_info lists the stem, then every stage; attention follows each stage but the last.
    infos = list(getattr(model, 'feature_info', ()))[1:-1]
    if not infos:
        raise ValueError(
            f'{type(model).__name__} lists no stages in feature_info: say with `at` which modules attention shall '
            f'follow. Families that list them: {FAMILIES}.'
        )
    sites = []
    for info in infos:
        name = info['module']
        stage = model.get_submodule(name)
        last = next(reversed(list(stage.children())), None)
        if isinstance(last, Attention):
            raise ValueError(f"'{name}' of {type(model).__name__} ends in attention already: {last}.")
        sites.append(_output_site(name, stage, fmt))
    return sites


_SITES: dict[str, Callable[[nn.Module, str], list[Site]]] = {
    'block': _block_sites,
    'last_block': _last_block_sites,
    'one_block': _one_block_sites,
    'conv2': _conv2_sites,
    'stage': _stage_sites,
}


def _near(word: str, names: Sequence[str]) -> str:
    word = re.sub(r'\\d\+?|\[[^]]*\]\+?', '0', word).replace('\\', '')
    # Without numbers, 'layer9.0' is near 'layer1.0' as much as 'layer2.0'.
    near = difflib.get_close_matches(word, names, 6, 0.5) or list(names)[:6]
    return ', '.join(map(repr, near))


def _matches(model: nn.Module, at: At) -> dict[str, nn.Module]:
    modules = _base_modules(model)
    if callable(at):
        found = {name: m for name, m in modules.items() if at(name, m)}
        if not found:
            raise ValueError(f'`at` is true for none of the {len(modules)} modules of {type(model).__name__}.')
        return found
    patterns = [at] if isinstance(at, str) else list(at)
    if not patterns or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f'at (={at!r}) must be a regular expression, a list of them, or a predicate (name, module).')
    names: set[str] = set()
    for pattern in patterns:
        try:
            found_here = {name for name in modules if re.fullmatch(pattern, name)}
        except re.error as e:
            raise ValueError(f'at (={pattern!r}) is no regular expression: {e}.') from e
        if not found_here:
            raise ValueError(
                f'at (={pattern!r}) matches no module of {type(model).__name__}. Near names: '
                f'{_near(pattern, list(modules))}; model.named_modules() lists all.'
            )
        names |= found_here
    return {name: m for name, m in modules.items() if name in names}


def _chosen_sites(model: nn.Module, at: At, where: str, fmt: str) -> list[Site]:
    sites = []
    for name, module in _matches(model, at).items():
        slot = _empty_slot(module) if where != 'output' and fmt == 'NCHW' else None
        if slot is not None:
            sites.append(_slot_site(name, module, slot))
        elif where == 'slot':
            filled = [k for k, v in _slots(module).items() if not _is_empty(v)]
            what = f'has its slot filled ({name}.{filled[0]})' if filled else f'has no slot ({", ".join(SLOTS)})'
            raise ValueError(
                f"'{name}', a {type(module).__name__}, {what}: choose other modules, or where='output' to gate what "
                'it returns.'
            )
        else:
            sites.append(_output_site(name, module, fmt))
    return sites


# ---- The probe ------------------------------------------------------------------------------------------------------


def _copy(model: nn.Module, meta: bool) -> nn.Module:
    """A copy to try things on; on the meta device it takes no memory and computes nothing."""
    memo: dict[int, Any] = {}
    if meta:
        for module in model.modules():
            for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
                if isinstance(value, Tensor) and id(value) not in memo:
                    empty = torch.empty_like(value, device='meta', requires_grad=False)
                    memo[id(value)] = nn.Parameter(empty, False) if isinstance(value, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _is_shape(example: Any) -> bool:
    return isinstance(example, list | tuple) and bool(example) and all(type(n) is int for n in example)


def _examples(model: Any, example: Any) -> list[tuple[Any, ...]]:
    """What to call the model with, the likeliest first: shapes and tensors on the CPU."""
    if isinstance(example, Tensor) or _is_shape(example):
        return [(tuple(example) if not isinstance(example, Tensor) else example,)]
    if example is not None:
        return [tuple(example) if isinstance(example, list | tuple) else (example,)]
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if conv is None:
        raise ValueError(
            f'{type(model).__name__} has no Conv2d to tell what its images are: pass `example`, a tensor, its shape, '
            'or a tuple of arguments.'
        )
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    size = cfg.get('input_size') if isinstance(cfg, dict) else getattr(cfg, 'input_size', None)
    own = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    sizes = [tuple(own) if isinstance(own, list | tuple) else (), tuple(size or ())[1:], (224, 224), (64, 64), (32, 32)]
    # The first convolution may be behind a rearrangement of the image.
    wide = [c for c in (getattr(model, 'in_chans', None), conv.in_channels, 3) if type(c) is int]
    return [((2, c, *s),) for c in dict.fromkeys(wide) for s in dict.fromkeys(sizes) if len(s) == 2]


@dataclass
class _Seen:
    """What one forward pass showed of a site."""

    probe: _Probe
    calls: int = 0
    output: Any = None


def _run(model: nn.Module, sites: list[Site], args: tuple[Any, ...], like: Tensor | None, meta: bool) -> list[_Seen]:
    """One forward pass through a copy that has a probe at each site."""
    trial = _copy(model, meta)
    seen = []
    for site in sites:
        found = _Seen(_Probe())
        owner = trial.get_submodule(site.owner)
        if site.kind == 'hook':
            owner.add_module(site.child, found.probe)

            def look(module: nn.Module, args: Any, output: Any, found: _Seen = found) -> None:
                found.calls, found.output = found.calls + 1, output

            owner.register_forward_hook(look, prepend=True)
        else:
            setattr(owner, site.child, found.probe)
        seen.append(found)
    device = 'meta' if meta else like.device if like is not None else 'cpu'
    dtype = like.dtype if like is not None and like.is_floating_point() else torch.float32

    def ready(value: Any) -> Any:
        if _is_shape(value):
            return torch.zeros(value, device=device, dtype=dtype)
        return pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, value)

    trial.eval()
    with torch.no_grad():
        try:
            trial(*map(ready, args))
        except Exception:
            # A container that hands its children lists, or counts them, fails with the probe among them.
            for site, found in zip(sites, seen, strict=True):
                if site.kind == 'hook' and any(not isinstance(x, Tensor) for x in found.probe.seen):
                    _refuse_container(model, site)
            raise
    return seen


class _Refused(ValueError):
    """No matter of the example: another one would not help."""


def _refuse_container(model: nn.Module, site: Site) -> None:
    kind = type(model.get_submodule(site.owner)).__name__
    raise _Refused(
        f"'{site.owner}', a {kind}, runs its children by iteration and returns something else than the last one gives, "
        'so a child of it cannot gate its output: choose modules inside it, or around it.'
    )


def _probe(model: nn.Module, sites: list[Site], example: Any) -> tuple[list[_Seen], bool]:
    """What a forward pass shows of each site, and whether its images were square."""
    like = next((t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()), None)
    on_meta = like is not None and like.is_meta
    first: Exception | None = None
    examples = _examples(model, example)
    # What depends on values cannot run without them: then a copy of the model runs for real.
    for meta in (True,) if on_meta else (True, False):
        for args in examples:
            try:
                seen = _run(model, sites, args, like, meta)
            except _Refused:
                raise
            except Exception as e:
                first = first or e
                continue
            return seen, any(map(_square, args))
    tried = ', '.join(str(a[0]) for a in examples) if example is None else 'the example'
    if any(site.kind != 'hook' for site in sites):
        try:
            _run(model, [], examples[0], like, True)
        except Exception:
            pass
        else:
            raise _Refused(
                f'{type(model).__name__} works on {tried}, but not with attention in its empty slots '
                f'({type(first).__name__}: {str(first)[:300]}), so they are none. Say with `at` which modules '
                f'attention shall follow. Families that have slots: {FAMILIES}.'
            ) from first
    raise ValueError(
        f'A forward pass of {type(model).__name__} to find the channels failed for {tried} '
        f'({type(first).__name__}: {str(first)[:300] or "no message"}). Pass `example`: a tensor, its shape, or a '
        'tuple of arguments that the model takes.'
    ) from first


def _square(value: Any) -> bool:
    shape = tuple(value.shape) if isinstance(value, Tensor) else value
    return _is_shape(shape) and len(shape) == 4 and shape[2] == shape[3]


def _channels(owner: str, x: Any, fmt: str, square: bool, slot: str = '') -> int:
    """Channels of the map that attention would get; anything that is no map of that layout is refused."""
    what = f"The slot '{owner}.{slot}'" if slot else f"'{owner}'"
    verb = 'gets' if slot else 'returns'
    if not isinstance(x, Tensor):
        inner = f' of {len(x)}' if isinstance(x, list | tuple | dict) else ''
        raise _Refused(
            f'{what} {verb} a {type(x).__name__}{inner}, and attention needs one map (N, C, H, W): choose modules '
            'inside it that return a tensor.'
        )
    if x.ndim == 3:
        raise _Refused(
            f'{what} {verb} tokens {tuple(x.shape)}, which have no rows and columns; attention here is over maps '
            '(N, C, H, W): choose modules that return maps.'
        )
    if x.ndim != 4:
        raise _Refused(f'{what} {verb} a tensor {tuple(x.shape)}, and attention needs a map (N, C, H, W).')
    _, a, b, c = x.shape
    # Square images have square maps: which two axes are equal tells the layout, unless all three are.
    if square and fmt == 'NCHW' and b != c and a == b:
        raise _Refused(
            f"{what} {verb} {tuple(x.shape)} for square images, which looks like (N, H, W, C): pass fmt='NHWC'."
        )
    if square and fmt == 'NHWC' and a != b and b == c:
        raise _Refused(
            f"{what} {verb} {tuple(x.shape)} for square images, which looks like (N, C, H, W): leave out fmt='NHWC'."
        )
    return a if fmt == 'NCHW' else c


def _resolve(model: nn.Module, sites: list[Site], fmt: str, example: Any) -> list[Site]:
    """The sites with their channels, and with how a module's output can be gated."""
    seen, square = _probe(model, sites, example)
    kind = type(model).__name__
    missed = [
        site.name if site.kind != 'hook' else site.owner
        for site, found in zip(sites, seen, strict=True)
        if not (found.calls if site.kind == 'hook' else found.probe.seen)
    ]
    if missed:
        slots = any(site.kind != 'hook' for site in sites)
        raise ValueError(
            f'{kind} never calls the {"slots" if slots else "modules"} {missed}, so attention there would do nothing'
            + (f'. Families that work: {FAMILIES}.' if slots else ': choose modules that its forward pass calls.')
        )
    twice = [
        site.name if site.kind != 'hook' else site.owner
        for site, found in zip(sites, seen, strict=True)
        if (found.calls if site.kind == 'hook' else len(found.probe.seen)) > 1
    ]
    if twice:
        raise ValueError(
            f'{kind} calls {twice} more than once in a forward pass, and one attention cannot be in several places: '
            'choose other modules.'
        )
    found_sites = []
    for site, found in zip(sites, seen, strict=True):
        slot = '' if site.kind == 'hook' else site.child
        map_ = found.probe.seen[0] if slot else found.output
        channels = _channels(site.owner, map_, fmt, square, slot)
        new = site.kind
        if not slot and found.probe.seen:
            # The module ran the new child itself. It has to be the last step, as in nn.Sequential.
            if len(found.probe.seen) != 1 or found.output is not found.probe.seen[0]:
                _refuse_container(model, site)
            if fmt != 'NCHW':
                raise ValueError(
                    f"'{site.owner}' runs its children one after the other, where attention gets maps as they are: "
                    f"fmt='{fmt}' needs a module inside it, such as its last child."
                )
            new = 'append'
        elif not slot and site.child not in CHILDREN:
            # An nn.Sequential with a forward pass of its own, which did not run the new child.
            _refuse_container(model, site)
        pixels = map_.shape[1:].numel() // channels
        found_sites.append(Site(site.owner, site.child, new, channels, site.scale, pixels))
    return found_sites


# ---- Checks ---------------------------------------------------------------------------------------------------------


def _check_model(model: nn.Module) -> None:
    kind = type(model).__name__
    for m in model.modules():
        if wrapper := next((c.__name__ for c in type(m).__mro__ if c.__name__ in _WRAPPERS), None):
            raise ValueError(
                f'The model is wrapped by {wrapper}, which has listed its parameters already and would not synchronise '
                'those of new attention: inject first, then wrap.'
            )
        if hasattr(m, '_orig_mod') or m._compiled_call_impl is not None:
            raise ValueError(
                f'{kind} is compiled, and compiled code may not see new attention: inject first, then torch.compile.'
            )
        if isinstance(m, torch.jit.ScriptModule) and m is model:
            raise ValueError(f'{kind} is a TorchScript module, which takes no new modules: inject first, then script.')


def _forget_compiled() -> None:
    # A handle that torch.compile gave for this model before guards everything but hooks, and would run its old graphs.
    if 'torch._dynamo' in sys.modules:
        torch.compiler.reset()


def _check_neutral(attn: AttnSpec, module: Attention, channels: int, args: dict[str, Any]) -> None:
    """Tries the module's neutral state on a random map, on the CPU."""
    with torch.device('cpu'):
        _check_neutral_here(attn, module, channels, args)


def _check_neutral_here(attn: AttnSpec, module: Attention, channels: int, args: dict[str, Any]) -> None:
    if any(t.is_meta for t in module.state_dict().values()):
        with torch.random.fork_rng(devices=[]):
            module = create_attn(attn.name, channels, device='cpu', **args)
        if any(t.is_meta for t in module.parameters()):
            return  # accelerate's init_empty_weights makes every parameter empty: there is nothing to compute with
        module.init_neutral()
    else:
        module = copy.deepcopy(module).to('cpu', torch.float32)
    x = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    module.eval()
    with torch.no_grad():
        for gain in (1.0, 2.0):
            module.gain = gain
            assert module.neutral_gate is not None  # refused before
            wrong = (module(x) - x * (module.neutral_gate * gain)).abs().max().item()
            if not wrong <= 1e-5 * gain * abs(module.neutral_gate) * x.abs().max().item():
                fault = (
                    f'`init_neutral` does not make it multiply by its neutral_gate (={module.neutral_gate:g})'
                    if gain == 1
                    else 'it ignores `gain`, which must multiply its gate'
                )
                raise ValueError(
                    f"'{attn.name}' ({attn.cls.__module__}.{attn.cls.__name__}) cannot start as the identity: {fault} "
                    f"(off by {wrong:.2g}). Mend the class, or use start='paper'."
                )


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


def _build(attn: AttnSpec, sites: list[Site], attn_args: dict[str, Any], start: str, like: Any) -> list[Attention]:
    widths = list(dict.fromkeys(site.channels for site in sites))
    args = _args_by_width(attn.name, attn_args, widths)
    dd = {} if like is None else {'device': like.device, 'dtype': like.dtype}
    modules = []
    checked: set[int] = set()
    for site in sites:
        module = create_attn(attn.name, site.channels, **dd, **args[site.channels])
        if start == 'identity':
            neutral = module.neutral_gate
            try:
                module.init_neutral()
            except NotImplementedError:
                neutral = None
            if not neutral:
                raise ValueError(
                    f"'{attn.name}' has no neutral state, so it cannot start as the identity: use start='paper', "
                    'which changes what the model computes.'
                )
            if site.channels not in checked:
                _check_neutral(attn, module, site.channels, args[site.channels])
                checked.add(site.channels)
            module.gain = 1 / (neutral * site.scale)
        modules.append(module)
    return modules


# ---- inject, eject, freeze_backbone ---------------------------------------------------------------------------------


def _no_weight_decay(model: nn.Module, inner: Callable[[], Any] | None) -> set[str]:
    return no_weight_decay(model) | set(inner() if inner else ())


def _is_ours(method: Any) -> bool:
    return isinstance(method, functools.partial) and method.func is _no_weight_decay


def exempt(host: Any) -> None:
    """Has a model's `no_weight_decay` name its attentions' parameters too; without any, as it was.

    Args:
        host: A registered model, also one that timm took apart for its features, or one that `inject` changed.
    """
    method = getattr(host, 'no_weight_decay', None)
    needed = no_weight_decay(host)
    if needed and not _is_ours(method) and not needed <= set(method() if method else ()):
        host.no_weight_decay = functools.partial(_no_weight_decay, host, method)
    elif not needed and _is_ours(method):
        del host.no_weight_decay
        inner = cast(Any, method).args[1]
        if inner is not None and getattr(host, 'no_weight_decay', None) != inner:
            host.no_weight_decay = inner


def _log(name: str, model: nn.Module, sites: list[Site], taken: list[str]) -> None:
    kind = type(model).__name__
    first, last = sites[0].name, sites[-1].name
    span = first if len(sites) == 1 else f'{first} ... {last}'
    text = f"'{name}' fills {len(sites)} site{'s' * (len(sites) != 1)} of {kind} ({span})"
    if taken:
        some = ', '.join(taken[:4]) + (', ...' if len(taken) > 4 else '')
        _logger.warning('%s; %d slots were taken already: %s.', text, len(taken), some)
    else:
        _logger.info('%s.', text)


def inject(
    model: nn.Module,
    name: str,
    *,
    at: At | None = None,
    where: str = 'auto',
    fmt: str = 'NCHW',
    start: str = 'identity',
    example: Any = None,
    **attn_args: Any,
) -> nn.Module:
    """Puts attention into a model, in place.

    With the identity start the model's output stays what it was, to the bit where the neutral gate is a power of
    two, so a pretrained model keeps its accuracy and the attention learns from there. The state dict says so: it holds
    the number by which each gate is multiplied (`gain`), and a registered model of the same attention loads it too.

    Whatever goes wrong, the model stays as it was.

    Args:
        model: Any network, not wrapped or compiled yet.
        name: One of `list_attn()` but 'sk', which replaces convolutions.
        at: Which modules: a regular expression that fully matches names of `named_modules()`, a list of them, or a
            predicate (name, module). None is the attention's own place: timm's empty slots, or the ends of stages.
        where: 'slot' fills a module's empty slot, before the addition; 'output' gates what a module returns; 'auto'
            takes the slot where there is one.
        fmt: Layout of the maps that modules return: 'NCHW', or 'NHWC' as Swin's are.
        start: 'identity' as above; 'paper' initialises as the released code does.
        example: What the model is called with to find the channels: a tensor, its shape, or a tuple of arguments. None
            is an image. Nothing is computed, and no buffer moves.
        **attn_args: Options of the attention; a list gives one value for each width of the model.

    Returns:
        The same model.

    Raises:
        ValueError: No such attention, start, place or layout; 'sk'; modules that do not exist, are never called or
            called twice, or return no map; options that do not fit the channels; the identity start of an attention
            that has no neutral state; a model that is wrapped or compiled.
        TypeError: Unknown options; the message names the accepted ones.
    """
    attn = get_attn(name)
    check_attn_args(name, attn_args)
    if start not in STARTS:
        raise ValueError(f"Unknown start '{start}'. Expected one of: {', '.join(STARTS)}.")
    if where not in WHERE:
        raise ValueError(f"Unknown where '{where}'. Expected one of: {', '.join(WHERE)}.")
    if fmt == 'NLC':
        raise ValueError(
            "fmt='NLC': tokens have no rows and columns, and attention here is over maps. Choose modules that return "
            "maps, with fmt='NCHW' or 'NHWC'."
        )
    if fmt not in FORMATS:
        raise ValueError(f"Unknown fmt '{fmt}'. Expected one of: {', '.join(FORMATS)}.")
    if fmt == 'NHWC' and where == 'slot':
        raise ValueError("fmt='NHWC' is for outputs of modules: timm's slots get maps (N, C, H, W).")
    if attn.placement == 'conv':
        raise ValueError(
            f"'{name}' replaces convolutions, so it cannot be injected into a model: its keys would move. "
            f"Create a registered one, such as timm.create_model('{name}_resnet50')."
        )
    _check_model(model)
    taken = []
    if at is not None:
        sites = _chosen_sites(model, at, where, fmt)
    elif where == 'output':
        raise ValueError("where='output' gates what modules return: say with `at` which ones.")
    else:
        sites = _SITES[attn.placement](model, fmt)
        if attn.placement == 'block':
            taken = _taken(model)
    sites = _resolve(model, sites, fmt, example)
    like = next((t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()), None)
    modules = _build(attn, sites, attn_args, start, like)
    for site, module in zip(sites, modules, strict=True):
        module.train(model.get_submodule(site.owner).training)
        site.put(model, module, fmt)
    if any(site.kind == 'hook' for site in sites):
        _forget_compiled()
    exempt(model)
    _record(model, attn, attn_args, at, where, fmt, start, example, sites)
    _log(name, model, sites, taken)
    norms = [s.owner for s in sites if isinstance(model.get_submodule(s.owner), nn.modules.batchnorm._BatchNorm)]
    if any(site.kind == 'hook' for site in sites) and norms:
        _logger.warning(
            'Attention follows BatchNorms (%s, ...): convert_sync_batchnorm replaces them and would drop the '
            'attention, so convert before injecting.',
            norms[0],
        )
    size = sum(p.numel() for m in modules for p in m.parameters())
    if size > LARGE:
        _logger.warning("'%s' adds %.0f M parameters; a smaller rd_ratio or more groups give fewer.", name, size / 1e6)
    largest = max(sites, key=lambda site: site.pixels)
    if attn.cls.pairs_of_pixels and 4 * largest.pixels**2 > MANY_PAIRS:
        _logger.warning(
            "'%s' makes a matrix of %d x %d tokens in '%s', %.1f MB an image: choose later stages with `at`.",
            *(name, largest.pixels, largest.pixels, largest.name, 4 * largest.pixels**2 / 1e6),
        )
    return model


def _record(
    model: Any,
    attn: AttnSpec,
    attn_args: dict[str, Any],
    at: At | None,
    where: str,
    fmt: str,
    start: str,
    example: Any,
    sites: list[Site],
) -> None:
    """Notes on the model what was done, in plain JSON: what rebuilds it, and what takes it out again."""
    shape = list(example.shape) if isinstance(example, Tensor) else list(example) if _is_shape(example) else None
    done = {
        'attn': attn.name,
        'attn_args': {k: list(v) if isinstance(v, tuple) else v for k, v in attn_args.items()},
        'at': None if at is None else [re.escape(site.owner) for site in sites],
        'where': where,
        'fmt': fmt,
        'start': start,
        'example': shape,
        'sites': {site.name: site.kind for site in sites},
    }
    if '_injections' not in vars(model):
        # What timm would have to be asked for, to get the model as it was.
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        names = {k: cfg.get(k) for k in ('architecture', 'tag')} if isinstance(cfg, dict) else {}
        model._base = {**names, 'model_args': dict(getattr(model, '_model_args', {}))}
        model._injections = []
    model._injections.append(done)


def injections(model: nn.Module) -> list[dict[str, Any]]:
    """What `inject` did to a model, in order: the arguments that do it again, and 'sites' {name: kind of place}.

    Args:
        model: Any model.
    """
    return list(vars(model).get('_injections', ()))


def base_of(model: nn.Module) -> dict[str, Any]:
    """What a model was before the first injection: 'architecture', 'tag' and 'model_args' of timm's factory.

    Args:
        model: A model that `inject` changed.
    """
    return dict(vars(model).get('_base', {}))


def gate_of_output(module: nn.Module) -> nn.Module | None:
    """The attention that a module calls on its output (N, C, H, W); None where there is none, or other hooks.

    Args:
        module: Any module.
    """
    if len(module._forward_hooks) != 1 or module._forward_pre_hooks:
        return None
    if module._backward_hooks or module._backward_pre_hooks or 'forward' in vars(module):
        return None
    ((key, hook),) = module._forward_hooks.items()
    return next(
        (getattr(module, child) for child in CHILDREN if (key, hook) == (_hook_key(child), _HOOKS[child, 'NCHW'])),
        None,
    )


def uncalled(model: nn.Module, example: Any = None) -> list[str]:
    """Attentions of a model that its forward pass does not call.

    Args:
        model: Any model with attention.
        example: As for `inject`.
    """
    like = next((t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()), None)
    called: set[str] = set()
    trial = _copy(model, True)
    for name, attn in attn_sites(trial).items():
        attn.register_forward_hook(lambda m, i, o, name=name: called.add(name))
    trial.eval()
    shape = _examples(model, example)[0][0]
    x = torch.zeros(shape, device='meta', dtype=like.dtype if like is not None else torch.float32)
    with torch.no_grad():
        trial(x)
    return [name for name in attn_sites(trial) if name not in called]


def eject(model: nn.Module) -> nn.Module:
    """Takes all attention that `inject` put into a model out again, in place.

    Keys and outputs are the base's again, to the bit; what the attention has learned is gone. A registered model keeps
    the attention that it was built with.

    Args:
        model: A model that `inject` changed, or that holds one.

    Returns:
        The same model.

    Raises:
        ValueError: Nothing was injected, or the model is wrapped or compiled.
    """
    _check_model(model)
    hosts = [m for m in model.modules() if injections(m)]
    if not hosts:
        raise ValueError(f'{type(model).__name__} holds no attention that timm_attn.inject put there.')
    for host in hosts:
        for done in reversed(injections(host)):
            for site, kind in reversed(done['sites'].items()):
                owner, _, child = site.rpartition('.')
                Site(owner, child, kind).clear(host)
        del host._injections, host._base
        exempt(host)
    _forget_compiled()
    return model


def _heads(model: nn.Module) -> list[nn.Module]:
    find = getattr(model, 'get_classifier', None)
    if find is not None:
        found = find()
        return [m for m in (found if isinstance(found, list | tuple) else [found]) if isinstance(m, nn.Module)]
    names = ('fc', 'classifier', 'head', 'heads', 'segmentation_head')
    if modules := [m for name in names if isinstance(m := getattr(model, name, None), nn.Module)]:
        return modules
    raise ValueError(
        f'{type(model).__name__} has no get_classifier() and none of {names}: pass head=False, and set requires_grad '
        'of its head yourself.'
    )


def _norms_without_gradient(model: nn.Module) -> Iterator[nn.Module]:
    """The backbone's norms with running statistics, as far as they are frozen."""
    modules = _base_modules(model)
    learns = any(p.requires_grad for m in modules.values() for p in m.parameters(recurse=False))
    for m in modules.values():
        if isinstance(m, nn.modules.batchnorm._NormBase):
            own = list(m.parameters(recurse=False))
            if not (any(p.requires_grad for p in own) if own else learns):
                yield m


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    type(model).train(model, mode)
    for norm in _norms_without_gradient(model):
        norm.eval()
    return model


def freeze_backbone(model: nn.Module, *, head: bool = True) -> nn.Module:
    """Has only the attention, and the head, of a model learn, in place.

    The backbone's BatchNorms stay in eval under `train()`, so that also their running statistics are those it came
    with. `model.requires_grad_(True)` and `model.train()` let everything learn again.

    Args:
        model: A model with attention, registered or injected.
        head: The classifier learns too.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no attention, or no head that is known.
    """
    sites = attn_sites(model)
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no attention to train first: timm_attn.inject(model, 'cbam'), or create a "
            'model of `timm-attn list`.'
        )
    learning = [*sites.values(), *(_heads(model) if head else ())]
    model.requires_grad_(False)
    for module in learning:
        module.requires_grad_(True)
    cast(Any, model).train = functools.partial(_train, model)
    return model.train(model.training)

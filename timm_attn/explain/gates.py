"""What a model's attentions do: their gates for an input, and whether they do anything over many."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..layers import Attention, Gate, attn_sites

Gates = dict[str, Tensor]
Kinds = Mapping[str, Gate]

_WRAPPERS = (nn.DataParallel, DistributedDataParallel, ModelEmaV2, ModelEmaV3, AveragedModel)


def attention_maps(model: nn.Module, x: Tensor) -> dict[str, Gates]:
    """Gates of every attention in a model for one batch, as the model computes them in eval mode.

    The model is left as it was: parameters, gradients, BatchNorm statistics, each module's train or eval mode, and
    what `torch.compile` has cached. Wrappers (`torch.compile`, DDP, timm's ModelEma) are looked through, and autocast
    around the call holds inside it.

    Args:
        model: Any model that holds attentions of this package, registered or injected.
        x: Input batch (N, C, H, W), on the model's device, normalised as for a forward pass.

    Returns:
        Site name -> kind -> tensor, in the order of the forward pass; float32 where the gate was half precision.
        'channel' is (N, C) and 'spatial' (N, H, W) in most; `gate_kinds` says what there is, with its axes. An injected
        attention's `gain` is not part of its gates.

    Raises:
        ValueError: The input is not a batch of images, the model has no attention, one was never called, or gave gates
            that its class does not describe.
        NotImplementedError: An attention from elsewhere has no `gates`.
    """
    maps: dict[str, Gates] = {}
    watch(model, x, maps.__setitem__)
    return maps


def watch(model: nn.Module, x: Tensor, see: Callable[[str, Gates], Any]) -> Tensor:
    """Runs one batch and hands each attention's gates to `see` as soon as they are known.

    Unlike `attention_maps` this keeps no gate, which matters where they are as large as GAM's.

    Args:
        model: As for `attention_maps`.
        x: Input batch (N, C, H, W).
        see: Called with a site's name and its gates.

    Returns:
        The model's output, without gradient.

    Raises:
        ValueError: As `attention_maps`.
    """
    if not isinstance(x, Tensor) or x.ndim != 4 or not len(x):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f'Expected a batch of images (N, C, H, W), got {got}: stack images, or add x[None] to one.')
    net = unwrapped(model)
    sites = attn_sites(net)
    if not sites:
        raise ValueError(
            f'{type(net).__name__} holds no attention of timm_attn: create one such as cbam_resnet50, or '
            "timm_attn.inject(model, 'cbam') first. (Scripted and exported models have lost theirs.)"
        )
    seen: set[str] = set()

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(module, Attention)
            gates = {k: _readable(v) for k, v in module.gates(args[0]).items()}
            _check_kinds(name, module, gates)
            see(name, gates)
            seen.add(name)

        return look

    with ExitStack() as stack:
        stack.enter_context(_untouched(net))
        for name, module in sites.items():
            stack.callback(module.register_forward_pre_hook(hook(name)).remove)
        out = net(x)
    missed = [n for n in sites if n not in seen]
    if missed:
        raise ValueError(f'{type(net).__name__} never called its attentions {missed}, so they do nothing.')
    return out


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DDP, DataParallel, and the moving averages of timm and torch.

    Args:
        model: A model, wrapped or not. A part of its own that is called `module` is no wrapping.
    """
    while True:
        if isinstance(model, ModelEma):
            model = model.ema
        elif isinstance(model, _WRAPPERS):
            model = model.module  # type: ignore[assignment]
        elif isinstance(inner := getattr(model, '_orig_mod', None), nn.Module):
            model = inner
        else:
            return model


def stage_sites(names: Iterable[str]) -> dict[str, str]:
    """Stage -> its last site, for pictures that have no room for all.

    Args:
        names: Site names such as 'layer1.0.se', in order.
    """
    names = list(names)
    # MobileNet-like models keep all stages in one container: 'blocks.0.1.se'.
    depth = 1 if len({n.split('.')[0] for n in names}) > 1 else 2
    return {'.'.join(n.split('.')[:depth]): n for n in names}


def gate_kinds(model: nn.Module) -> dict[str, Kinds]:
    """What the gates of each attention are, as its class says.

    Args:
        model: As for `attention_maps`.

    Returns:
        Site name -> kind of gate -> its axes and title.
    """
    return {name: module.kinds for name, module in attn_sites(unwrapped(model)).items()}


def gates_only(gates: Gates, kinds: Kinds) -> Gates:
    """The tensors that features are multiplied by: no covariance, no attention matrix, no branch before a sigmoid.

    Args:
        gates: One site's.
        kinds: What they are.
    """
    return {kind: gate for kind, gate in gates.items() if kinds[kind].multiplies}


def _check_kinds(site: str, module: Attention, gates: Gates) -> None:
    for kind, gate in gates.items():
        described = module.kinds.get(kind)
        if described is None or len(described.axes) != gate.ndim - 1:
            name = type(module).__name__
            said = 'which its `kinds` leave out' if described is None else f"but its `kinds` say '{described.axes}'"
            raise ValueError(
                f"{name}.gates() at '{site}' gives '{kind}' {tuple(gate.shape)}, {said}: describe each gate by the "
                f"axes behind the batch, such as kinds = {{'{kind}': Gate('C', '{kind}')}}."
            )


def _readable(gate: Tensor) -> Tensor:
    # numpy, and with it every plot, knows no bfloat16.
    return gate.float() if gate.dtype in (torch.bfloat16, torch.float16) else gate


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients or compilation; each module's own mode comes back afterwards."""
    training = [m for m in model.modules() if m.training]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        # Parts compiled one by one would run a cached graph that knows nothing of the hooks. (torch >= 2.6)
        if hasattr(torch.compiler, 'set_stance'):
            stack.enter_context(torch.compiler.set_stance('force_eager'))
        try:
            for m in training:
                m.training = False
            yield
        finally:
            for m in training:
                m.training = True
            # Casts that autocast caches under no_grad have no gradient, and a later training step in the same autocast
            # block would use them: https://github.com/pytorch/pytorch/issues/112583, until torch has its pull 165068.
            if torch.is_autocast_enabled('cpu') or torch.is_autocast_enabled('cuda'):
                torch.clear_autocast_cache()

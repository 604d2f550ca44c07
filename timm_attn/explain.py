"""What a model's attentions do: their gates for an input, and whether they do anything over many."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from .layers import Attention, attn_sites

LOW, HIGH = 0.05, 0.95

Gates = dict[str, Tensor]


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
        Kinds: 'channel' (N, C), 'spatial' (N, H, W) or for GAM (N, C, H, W), 'branch' (N, 2, D) of SK, 'covariance'
        (N, d, d) of GSoP, 'matrix' (N, heads, c, c) of CSA, 'cw' (N, C, W) and 'hc' (N, H, C) of triplet attention.
        BAM's 'channel' and 'spatial' are its branches before the sigmoid, which takes both: 'gate' (N, C, H, W).
        An injected attention's `gain` is not part of its gates.

    Raises:
        ValueError: The input is not a batch of images, the model has no attention, or one was never called.
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
    if not isinstance(x, Tensor) or x.ndim != 4:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f'Expected a batch of images (N, C, H, W), got {got}: stack images, or add x[None] to one.')
    net = unwrap_model(model)
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
            see(name, {k: _readable(v) for k, v in module.gates(args[0]).items()})
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


def stage_sites(names: Iterable[str]) -> dict[str, str]:
    """Stage -> its last site, for pictures that have no room for all.

    Args:
        names: Site names such as 'layer1.0.se', in order.
    """
    names = list(names)
    # MobileNet-like models keep all stages in one container: 'blocks.0.1.se'.
    depth = 1 if len({n.split('.')[0] for n in names}) > 1 else 2
    return {'.'.join(n.split('.')[:depth]): n for n in names}


def gates_only(gates: Gates) -> Gates:
    """The tensors that features are multiplied by: no covariance, no attention matrix, no branch before a sigmoid."""
    if 'gate' in gates:
        return {'gate': gates['gate']}
    return {kind: gate for kind, gate in gates.items() if kind not in ('covariance', 'matrix')}


@dataclass(frozen=True)
class GateHealth:
    """How the gates of one kind at one site behaved over many inputs.

    Attributes:
        low: Share of all gate values below 0.05; None for an attention matrix, which gates nothing.
        high: Share above 0.95; None likewise.
        variance: Variance of a gate over the inputs, mean over the site's gates. At 0 the attention is a constant.
        dead: Number of gates below 0.05 for every input.
        saturated: Number above 0.95 for every input.
        gates: Number of gates (channels, positions) of the site.
        inputs: Number of inputs seen.
        identity: The attention gave back its input unchanged, every time.
    """

    low: float | None
    high: float | None
    variance: float
    dead: int
    saturated: int
    gates: int
    inputs: int
    identity: bool = False

    @property
    def verdict(self) -> str:
        """What to think of it, in one word.

        'identity' (features pass unchanged), 'constant' (the same gates for every input, which a fixed scale would do
        as well), 'dead' or 'saturated' (more than half of the gates are, for every input), or 'alive'.
        """
        if self.identity:
            return 'identity'
        if self.variance < 1e-8:
            return 'constant'
        if self.dead > self.gates / 2:
            return 'dead'
        return 'saturated' if self.saturated > self.gates / 2 else 'alive'


class GateStats:
    """Running statistics of the gates of one kind at one site.

    Args:
        is_gate: Features are multiplied by the values, so that small and large ones mean something.
    """

    def __init__(self, is_gate: bool = True) -> None:
        self.is_gate = is_gate
        self.inputs = 0
        self.low = self.high = 0

    def update(self, gate: Tensor) -> None:
        """Adds a batch.

        Args:
            gate: (N, ...), of the same shape but for N as all before.

        Raises:
            ValueError: The shape differs.
        """
        gate = gate.float()
        n, self.inputs = self.inputs, self.inputs + len(gate)
        self.low += int((gate < LOW).sum())
        self.high += int((gate > HIGH).sum())
        mean, least, most = gate.mean(0), gate.amin(0), gate.amax(0)
        square = (gate - mean).square().sum(0)
        if not n:
            self.mean, self.square, self.least, self.most = mean, square, least, most
            return
        if mean.shape != self.mean.shape:
            raise ValueError(
                f'Gates of shape {tuple(mean.shape)} follow gates of shape {tuple(self.mean.shape)}: '
                'statistics over inputs need images of one size, so resize them.'
            )
        # Chan, Golub and LeVeque's update of mean and squared deviation: no cancellation, any batch size.
        delta = mean - self.mean
        self.square += square + delta.square() * (n * len(gate) / self.inputs)
        self.mean += delta * (len(gate) / self.inputs)
        self.least, self.most = torch.minimum(self.least, least), torch.maximum(self.most, most)

    def health(self, identity: bool = False) -> GateHealth:
        """The statistics so far.

        Args:
            identity: What to note in the field of that name.

        Raises:
            ValueError: Fewer than two inputs were seen.
        """
        if self.inputs < 2:
            raise ValueError(f'Attention health needs at least 2 inputs, got {self.inputs}.')
        values = self.inputs * self.mean.numel()
        return GateHealth(
            low=self.low / values if self.is_gate else None,
            high=self.high / values if self.is_gate else None,
            variance=float(self.square.mean()) / self.inputs,
            dead=int((self.most < LOW).sum()) if self.is_gate else 0,
            saturated=int((self.least > HIGH).sum()) if self.is_gate else 0,
            gates=self.mean.numel(),
            inputs=self.inputs,
            identity=identity,
        )


def attention_health(model: nn.Module, loader: Iterable[Any]) -> dict[str, dict[str, GateHealth]]:
    """Whether each attention does anything: dead, saturated or constant gates over a data set.

    Args:
        model: As for `attention_maps`; left as it was.
        loader: Batches (N, C, H, W), or tuples that start with one; moved to the model's device.

    Returns:
        Site name -> kind of gate -> its health. CSA gates nothing; its attention 'matrix' stands in, for which only
        `variance` and `identity` say something.

    Raises:
        ValueError: Fewer than two inputs, images of different sizes, or as `attention_maps`.
    """
    stats: dict[str, dict[str, GateStats]] = {}
    changed: set[str] = set()

    def see(name: str, gates: Gates) -> None:
        site, real = stats.setdefault(name, {}), gates_only(gates)
        for kind, gate in (real or gates).items():
            site.setdefault(kind, GateStats(bool(real))).update(gate)

    def compare(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def look(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if name not in changed and not torch.equal(args[0], out):
                changed.add(name)

        return look

    net = unwrap_model(model)
    device = next(net.parameters()).device
    with ExitStack() as stack:
        for name, module in attn_sites(net).items():
            stack.callback(module.register_forward_hook(compare(name)).remove)
        for batch in loader:
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            watch(model, x.to(device) if isinstance(x, Tensor) else x, see)
    if not stats:
        raise ValueError('Attention health needs at least 2 inputs, got 0: the loader gave no batch.')
    return {n: {k: s.health(n not in changed) for k, s in site.items()} for n, site in stats.items()}


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

"""Whether attentions do anything over many inputs: dead, saturated, constant or alive gates."""

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import attn_sites
from .gates import Gates, gate_kinds, gates_only, unwrapped, watch

LOW, HIGH = 0.05, 0.95


@dataclass(frozen=True)
class GateHealth:
    """How the gates of one kind at one site behaved over many inputs.

    Attributes:
        low: Share of all gate values below 0.05; None for what multiplies nothing, such as an attention matrix.
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

        'identity' (features pass unchanged), 'not finite' (a gate was NaN or infinite), 'constant' (the same gates for
        every input, which a fixed scale would do as well), 'dead' or 'saturated' (more than half of the gates are, for
        every input), or 'alive'.
        """
        if self.identity:
            return 'identity'
        if not math.isfinite(self.variance):
            return 'not finite'
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
        loader: Batches (N, C, H, W), or tuples that start with one, or one batch; moved to the model's device.

    Returns:
        Site name -> kind of gate -> its health. Where nothing is multiplied by a gate, as in channel self-attention,
        what there is to look at stands in, for which only `variance` and `identity` say something.

    Raises:
        ValueError: Fewer than two inputs, images of different sizes, or as `attention_maps`.
    """
    stats: dict[str, dict[str, GateStats]] = {}
    changed: set[str] = set()

    def see(name: str, gates: Gates) -> None:
        site, real = stats.setdefault(name, {}), gates_only(gates, kinds[name])
        for kind, gate in (real or gates).items():
            site.setdefault(kind, GateStats(bool(real))).update(gate)

    def compare(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def look(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if name not in changed and not torch.equal(args[0], out):
                changed.add(name)

        return look

    net = unwrapped(model)
    kinds = gate_kinds(net)
    device = next((p.device for p in net.parameters()), None)
    with ExitStack() as stack:
        for name, module in attn_sites(net).items():
            stack.callback(module.register_forward_hook(compare(name)).remove)
        for batch in [loader] if isinstance(loader, Tensor) and loader.ndim == 4 else loader:
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            watch(model, x.to(device) if isinstance(x, Tensor) else x, see)
    if not stats:
        raise ValueError('Attention health needs at least 2 inputs, got 0: the loader gave no batch.')
    return {n: {k: s.health(n not in changed) for k, s in site.items()} for n, site in stats.items()}

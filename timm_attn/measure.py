"""What a model is and costs: parameters, MACs, activations, bytes kept, at the peak and moved; clock and machine."""

import gc
import itertools
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .fusion.compile import observe_kernels
from .layers import as_executed
from .version import package_version


class Activations(TorchDispatchMode):
    """Counts the outputs of convolutions and matrix products, which is what timm's tables call activations."""

    counted = ('convolution', 'mm', 'addmm', 'bmm', 'baddbmm', 'matmul', 'linear')

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and func.overloadpacket.__name__.split('.')[-1] in self.counted:
            self.total += out.numel()
        return out


def count(model: nn.Module, input_size: Sequence[int]) -> dict[str, int]:
    """Size and work of a model for one image.

    MACs are convention A: multiply-adds of convolutions and matrix products, half of what `FlopCounterMode` counts.
    Activations are the elements these operations put out, as in timm's tables.

    Args:
        model: The model; on the meta device nothing is computed.
        input_size: (C, H, W).

    Returns:
        'params', 'macs', 'activations'.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    x = torch.zeros(1, *input_size, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as flops, Activations() as activations:
        model(x)
    model.train(training)
    return {
        'params': sum(p.numel() for p in model.parameters()),
        'macs': flops.get_total_flops() // 2,
        'activations': activations.total,
    }


def kept_bytes(model: nn.Module, x: Tensor, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> int:
    """Bytes alive after a forward pass that were not before it, whoever holds them; the output is among them.

    The sum of the profiler's memory events, every allocation less every release: exact, and the same on every machine.
    The model's buffers and the random numbers stay as they were.

    Args:
        model: Any model, in its mode: in train mode, what it keeps for backward.
        x: Its input (N, C, H, W).
        context: What the pass runs in, such as autocast.
    """

    def run() -> Any:
        with context():
            return model(x)

    buffers = [(b, b.clone()) for b in model.buffers()]
    devices = [x.device] if x.device.type == 'cuda' else []
    try:
        with torch.random.fork_rng(devices):
            return sum(_memory_events(run, x.device))
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)


def peak_bytes(model: nn.Module, x: Tensor) -> int:
    """The most bytes alive at any time of a forward and a backward pass, beyond those before it.

    Gradients of parameters and what convolutions work in are among them.

    Args:
        model: Any model.
        x: Its input.
    """

    def step() -> None:
        model(x).float().sum().backward()
        model.zero_grad()

    return max(itertools.accumulate(_memory_events(step, x.device)))


def _memory_events(run: Callable[[], Any], device: torch.device) -> list[int]:
    """Bytes of each allocation, and of each release less than 0, in their order."""
    # The profiler reports its own stages on stderr, from this level on down.
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')
    run()  # pays for what is allocated once
    gc.collect()  # so that nothing of it is released while counting
    # The profiler below torch.profiler, which would make a Python object of every event, and not of memory's alone.
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        held = run()
    assert profile is not None and profile.kineto_results is not None
    events: list[Any] = [
        e
        for e in profile.kineto_results.events()
        if e.name() == '[memory]' and e.device_type().name.lower() == device.type
    ]
    del held
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


class _Traffic(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # What only looks at a tensor in another way, or makes one without writing to it, moves nothing.
        if not func.is_view and 'empty' not in func.name() and func.name() != 'aten::detach':
            self.count((args, kwargs, out))
        return out

    def count(self, tree: Any) -> None:
        self.bytes += sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


def traffic_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that the operations of a training step read and write, each operand and each result counted once.

    Exact, and the same on every machine; what an operation reads twice and what stays in a cache is not seen. A kernel
    of a fused block is one operation.

    Args:
        model: Any model.
        x: Its input.
    """
    traffic = _Traffic()
    with as_executed(), observe_kernels(lambda _, args, results: traffic.count((args, results))), traffic:
        model(x).float().sum().backward()
    model.zero_grad()
    return traffic.bytes


def clock(device: str) -> float:
    """Seconds for differences: what this process computed in one thread, else the wall's clock.

    Args:
        device: 'cpu' or 'cuda', which is waited for.
    """
    if device == 'cuda':
        torch.cuda.synchronize()
    # Other work on the machine counts less than on the wall's clock; of several threads the sum would be counted.
    return time.process_time() if _clock(device) == 'process' else time.perf_counter()


def _clock(device: str) -> str:
    return 'process' if device == 'cpu' and torch.get_num_threads() == 1 else 'wall'


def seconds(run: Callable[[], Any], device: str) -> float:
    """Seconds that a function takes: on a CPU by `clock`, on a GPU between two CUDA events.

    Args:
        run: The function.
        device: 'cpu' or 'cuda'.
    """
    if device != 'cuda':
        start = clock(device)
        run()
        return clock(device) - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def environment(device: str = 'cpu') -> dict[str, Any]:
    """What a number depends on besides the code: versions, machine, cores, threads, and the clock of the seconds.

    Args:
        device: 'cpu' or 'cuda'.
    """
    return {
        'machine': torch.cuda.get_device_name() if device == 'cuda' else cpu_name(),
        'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        'threads': torch.get_num_threads(),
        'capability': torch.backends.cpu.get_cpu_capability(),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'timm_attn': package_version(),
        'clock': _clock(device),
    }


def cpu_name() -> str:
    """The processor as it names itself."""
    info = Path('/proc/cpuinfo')
    if info.exists():
        for line in info.read_text(encoding='utf-8').splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()

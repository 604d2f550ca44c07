"""Functions of tensors, compiled by inductor and called with next to nothing in between.

A call of a `torch.compile`d function checks dozens of guards in Python and C++. With warm caches that takes 20
microseconds; between two convolutions, which empty the caches, it takes a millisecond, more than the work on most maps
of a ResNet. So a kernel is compiled once for each kind of arguments, and then inductor's own callable is called. A kind
says what `torch.compile` would have to find out by tracing Python: which sizes are those of the map. That, and a folder
of what was compiled before, make the first step of a model short.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

_logger = logging.getLogger(__name__)

Arguments = list[Any]
Call = Callable[[Arguments], Sequence[Any]]

# Inductor compiles one function at a time. A child forked meanwhile has no thread that would release the lock.
_compiling = threading.RLock()


def _forked() -> None:
    _compiling._at_fork_reinit()  # pyright: ignore[reportAttributeAccessIssue]
    if 'torch._inductor.async_compile' in sys.modules:
        # Inductor forgets its pool of processes in a child, but not that of threads, which are not there.
        cast(Any, sys.modules['torch._inductor.async_compile']).AsyncCompile.pool.cache_clear()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_forked)


class Kernel:
    """A function of a map, further tensors and constants that is called compiled or as it is.

    Args:
        function: Returns a tuple of new tensors. Its arguments are dense tensors, None, named tuples of such, and
            constants, of which there should be few. The first tensor is a map (N, C, H, W). Sizes of others are 1, or
            those of the map: in this order, (C,) where there is one.
        overwrites: The function writes its result into its first tensor, which `__call__` returns before the others.
    """

    def __init__(self, function: Callable[..., tuple[Any, ...]], overwrites: bool) -> None:
        self.function, self.overwrites = function, overwrites
        self.graphs: dict[tuple[Any, ...], Call] = {}
        functools.update_wrapper(self, function)

    def __call__(self, compiled: bool, *args: Any) -> tuple[Any, ...]:
        """The results.

        Args:
            compiled: Compile the function, or take the compiled one.
            *args: Its arguments.
        """
        if not _observers or _rehearsal.calls is not None:
            return self._results(compiled, args)
        with _disable_current_modes():
            results = self._results(compiled, args)
        for observer in _observers:
            observer(self, args, results)
        return results

    def _results(self, compiled: bool, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not compiled:
            results = self.function(*args)
            return (_flat(args)[0], *results) if self.overwrites else results
        # The number of threads is written into what is compiled.
        kind: list[Any] = [torch.get_num_threads()]
        dense: Arguments = []
        shape: Sequence[int] | None = None
        for x in _flat(args):
            if isinstance(x, Tensor):
                shape = shape or x.shape
                last = not x.is_contiguous()
                # Channels last is for maps. What is as small as a gate or a sum is cheap to copy, and slow to read so.
                if last and not (x.shape == shape and x.is_contiguous(memory_format=torch.channels_last)):
                    x, last = x.contiguous(), False
                kind.append(_Kind(x.dtype, x.device, last, _sizes(x.shape, shape), x.numel() < 1 << 31))
            else:
                kind.append(x)
            dense.append(x)
        key = tuple(kind)
        graph = self.graphs.get(key)
        if graph is None and _rehearsal.calls is not None:
            _rehearsal.calls[self, key] = self._of_flat(args)
            return self._results(False, args)
        if graph is None:
            with _compiling:
                graph = self.graphs.get(key) or self._compiled(self._of_flat(args), key, shape or ())
                self.graphs[key] = graph
        results = graph(dense)
        return (dense[0], *results) if self.overwrites else tuple(results)

    def _of_flat(self, args: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
        """The function of arguments like these, but those in named tuples one by one."""
        groups = [type(x) if _is_group(x) else None for x in args]

        def function(*flat: Any) -> tuple[Any, ...]:
            rest = list(flat)
            grouped: list[Any] = []
            for group in groups:
                n = 1 if group is None else len(group._fields)
                grouped.append(rest[0] if group is None else group(*rest[:n]))
                rest = rest[n:]
            return self.function(*grouped)

        return function

    def _compiled(self, function: Callable[..., tuple[Any, ...]], key: tuple[Any, ...], shape: Sequence[int]) -> Call:
        """The function compiled for such arguments, or as it is where that fails."""
        device = next(x for x in key if isinstance(x, _Kind)).device.type
        if not compiler_works(device):
            return lambda flat: function(*flat)
        try:
            return _compile(self.function, function, key, shape)
        except Exception as e:
            warnings.warn(
                f'timm_attn.fuse cannot compile {self.function.__name__}() ({type(e).__name__}: {_first_line(e)}): '
                'it stays slow.',
                stacklevel=4,
            )
            return lambda flat: function(*flat)


class _Kind(NamedTuple):
    """Tensors that one compiled function serves.

    Attributes:
        dtype: Their dtype.
        device: Their device.
        last: They are in channels_last.
        sizes: As `_sizes` gives them.
        small: Their elements can be counted in 32 bits.
    """

    dtype: torch.dtype
    device: torch.device
    last: bool
    sizes: tuple[int, ...]
    small: bool


def _sizes(shape: Sequence[int], of_map: Sequence[int]) -> tuple[int, ...]:
    """A tensor's sizes: 0 for that of the map, 1, or another number. A vector has the map's channels."""
    return tuple([1 if n == 1 else 0 if n == m else n for n, m in zip(shape, of_map[len(shape) == 1 :], strict=False)])


def _first_line(e: Exception) -> str:
    return next(iter(str(e).splitlines()), '')


def _is_group(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, '_fields')


def _flat(args: Sequence[Any]) -> Arguments:
    """The arguments, and those in named tuples one by one."""
    flat: Arguments = []
    for x in args:
        if _is_group(x):
            flat.extend(x)
        else:
            flat.append(x)
    return flat


Observer = Callable[[Kernel, tuple[Any, ...], tuple[Any, ...]], None]
_observers: list[Observer] = []


@contextlib.contextmanager
def observe_kernels(observer: Observer) -> Iterator[None]:
    """Calls `observer` after each call of a kernel, which is one operation meanwhile: no dispatch mode sees inside.

    Args:
        observer: Takes the kernel, its arguments and its results.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def kernel(function: Callable[..., tuple[Any, ...]]) -> Kernel:
    """Makes a kernel of a function of new results."""
    return Kernel(function, overwrites=False)


def overwriting(function: Callable[..., tuple[Any, ...]]) -> Kernel:
    """Makes a kernel of a function that writes into its first tensor."""
    return Kernel(function, overwrites=True)


# ---- Compiling -------------------------------------------------------------------------------------------------------

# Sides of maps that inductor reckons with on a CPU. What it writes for them is kept for all, whoever comes first.
_USUAL = (2, 256, 28, 28)


def _compile(
    kernel: Callable[..., Any], function: Callable[..., tuple[Any, ...]], key: tuple[Any, ...], shape: Sequence[int]
) -> Call:
    """Compiles a function for all maps of a kind.

    Args:
        kernel: The function as it is written: what was compiled before is known by its source.
        function: The same of flat arguments.
        key: Number of threads; kinds of the tensors and the other arguments.
        shape: Of the map that it is called with.

    Returns:
        Takes the list of arguments.
    """
    tensors = [i for i, x in enumerate(key[1:]) if isinstance(x, _Kind)]
    the_map: _Kind = key[1 + tensors[0]]
    sides = [d for d, n in enumerate(the_map.sizes) if n == 0]
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        if the_map.device.type == 'cpu':
            call, places = _on_cpu(kernel, function, key)
        else:
            graph, places = _graph(function, key, shape)
            call = graph.current_callable

    def of_arguments(args: Arguments) -> list[Any]:
        given = [args[i] for i in tensors]
        shape = given[0].shape
        results = call([*[shape[d] for d in sides], *given])
        return [None if p is None else results[p] for p in places]

    return of_arguments


def _on_cpu(kernel: Callable[..., Any], function: Callable[..., Any], key: tuple[Any, ...]) -> tuple[Call, list[Any]]:
    """As `_graph`, but the call; what inductor writes is kept beside its own files."""
    # Slow to import, and of no use to those who do not compile.
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache, write_atomic

    path = _path(kernel, key)
    if not path.exists():
        _rehearse()  # may write it
    with _settings():
        try:
            kept = json.loads(path.read_bytes())
        except (OSError, ValueError):
            graph, places = _graph(function, key, _USUAL)
            kept = {'code': _without_idle_imports(graph.source_code), 'places': places}
            write_atomic(str(path), json.dumps(kept), make_dirs=True, encode_utf_8=True)
        module = PyCodeCache.load(kept['code'])
        AsyncCompile().wait(vars(module))  # which it has done itself, but for what was handed to threads
    return module.call, kept['places']


def _path(kernel: Callable[..., Any], key: tuple[Any, ...]) -> Path:
    """Where what inductor writes is kept, by all that it depends on."""
    from torch._inductor import config
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    settings = sorted(config.save_config_portable().items())
    with _settings():
        flags = pick_vec_isa().build_arch_flags()
    sources = [Path(file).read_text(encoding='utf-8') for file in (__file__, inspect.getfile(kernel))]
    known = (torch.__version__, flags, settings, sources, kernel.__qualname__, key)
    return Path(cache_dir(), 'timm_attn', f'{hashlib.sha256(repr(known).encode()).hexdigest()}.json')


def _settings() -> contextlib.AbstractContextManager[None]:
    """Inductor's, for a CPU.

    Its own record of graphs does not say for how many threads they were compiled. Compiling and loading a file for each
    instruction set takes five seconds: every compiler that reads torch's headers knows them, and torch's own kernels
    take what the processor says, too.
    """
    from torch._inductor import config

    trusted = config.cpp.vec_isa_ok is None or config.cpp.vec_isa_ok
    return config.patch({'fx_graph_cache': False, 'cpp.vec_isa_ok': trusted})


def _without_idle_imports(code: str) -> str:
    """Inductor writes all of its imports on top of everything. Two take half a second each; kernels use neither."""

    def idle(line: str) -> bool:
        found = re.fullmatch(r'from torch\._inductor\.\S+ import (?:\w+ as )?(\w+)', line)
        return found is not None and len(re.findall(rf'\b{found[1]}\b', code)) == 1

    return '\n'.join([line for line in code.split('\n') if not idle(line)])


def _graph(
    function: Callable[..., tuple[Any, ...]], key: tuple[Any, ...], shape: Sequence[int]
) -> tuple[Any, list[int | None]]:
    """What inductor makes of the function, and where the results are in what that returns: nothing twice, and no None.

    It takes the map's sizes, but for those of 1, and the tensors.

    Args:
        function: As `_compile`'s.
        key: As `_compile`'s.
        shape: Usual sizes of the map, by which inductor chooses loops.
    """
    from torch._dynamo.source import ConstantSource
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv()
    kinds = [x for x in key[1:] if isinstance(x, _Kind)]
    symbols = [env.create_symbol(n, ConstantSource(f'size{d}'), DimDynamic.DYNAMIC) for d, n in enumerate(shape)]
    of_map = [env.create_symintnode(s, hint=n) for s, n in zip(symbols, shape, strict=True)]
    sizes = [of_map[d] for d, n in enumerate(kinds[0].sizes) if n == 0]

    def example(x: _Kind) -> Tensor:
        like = of_map[len(x.sizes) == 1 :]
        layout = torch.channels_last if x.last else torch.contiguous_format
        size = [n or like[d] for d, n in enumerate(x.sizes)]
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)

    places: list[int | None] = []

    def traced(*given: Any) -> list[Tensor]:
        tensors = iter(given[len(sizes) :])
        results = function(*[next(tensors) if isinstance(x, _Kind) else x for x in key[1:]])
        made = list({id(r): r for r in results if r is not None}.values())
        places[:] = [None if r is None else next(i for i, m in enumerate(made) if m is r) for r in results]
        return made

    fake = FakeTensorMode(shape_env=env)
    with torch.autocast(kinds[0].device.type, enabled=False), tracing(TracingContext(fake)):
        with fake:
            examples = [*sizes, *map(example, kinds)]
            graph = make_fx(traced, decomposition_table=select_decomp_table())(*examples)
        return compile_fx_inner(graph, examples), places


# ---- Compiling what will be called -----------------------------------------------------------------------------------


class _Rehearsal(threading.local):
    """What a thread knows of the calls to come.

    Attributes:
        run: Calls what will be called, with smaller maps.
        calls: The functions of flat arguments that it called, by kernel and kind; None where it is not running.
    """

    run: Callable[[], None] | None = None
    calls: dict[tuple[Kernel, tuple[Any, ...]], Callable[..., Any]] | None = None


_rehearsal = _Rehearsal()


@contextlib.contextmanager
def rehearsed(run: Callable[[], None] | None) -> Iterator[None]:
    """The first kernel that has to be compiled has all others that `run` calls compiled beside it, on a CPU.

    Args:
        run: Calls kernels as will be called here and in a backward pass later, with other maps. None compiles what is
            called alone.
    """
    before, _rehearsal.run = _rehearsal.run, run
    try:
        yield
    finally:
        _rehearsal.run = before


def _rehearse() -> None:
    run, _rehearsal.run = _rehearsal.run, None
    if run is None:
        return
    _rehearsal.calls = calls = {}
    try:
        # No one who counts operations, or keeps what is saved elsewhere, is to hear of it.
        with _disable_current_modes(), saved_tensors_hooks(_same, _same), torch.random.fork_rng(devices=[]):
            run()
    except Exception as e:  # what comes then, or is not known, is compiled when it is called
        _logger.debug('A block could not be rehearsed (%s: %s).', type(e).__name__, _first_line(e))
    finally:
        _rehearsal.calls = None
    with _without_waiting():
        for (kernel, key), function in calls.items():
            with contextlib.suppress(Exception):  # whoever calls it hears of it
                _compile(kernel.function, function, key, _USUAL)


def _same(x: Tensor) -> Tensor:
    return x


@contextlib.contextmanager
def _without_waiting() -> Iterator[None]:
    """What this thread compiles meanwhile is handed to inductor's threads, and not fit to be called."""
    from torch._inductor.async_compile import AsyncCompile

    here, wait = threading.get_ident(), AsyncCompile.wait

    def wait_elsewhere(self: Any, scope: dict[str, Any]) -> None:
        if threading.get_ident() != here:
            wait(self, scope)

    AsyncCompile.wait = wait_elsewhere
    try:
        yield
    finally:
        AsyncCompile.wait = wait


def _probe(x: Tensor) -> tuple[Tensor]:
    return (x + 1,)


@functools.cache
def compiler_works(device: str) -> bool:
    """Whether inductor can compile for the device ('cpu', 'cuda'); says so once where it cannot."""
    try:
        if device == 'cpu' and cast(Any, torch.__version__) < (2, 9):
            # pytorch issue 159154: what a loop keeps of a plane gets the room of a row.
            raise RuntimeError(f'what torch {torch.__version__} compiles writes past its buffers: install torch 2.9')
        with _compiling, rehearsed(None):
            _compile(
                _probe,
                _probe,
                (torch.get_num_threads(), _Kind(torch.float32, torch.device(device), False, (0, 0, 0, 0), True)),
                _USUAL,
            )
    except Exception as e:
        warnings.warn(
            f'timm_attn.fuse cannot compile for {device} ({type(e).__name__}: {_first_line(e)}); blocks keep '
            'less memory, but are not faster. Install a C++ compiler (CPU) or Triton (GPU), or pass compile=False.',
            stacklevel=3,
        )
        return False
    return True

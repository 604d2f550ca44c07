"""Functions of tensors, compiled by inductor and called with next to nothing in between.

A call of a `torch.compile`d function checks dozens of guards in Python and C++. With warm caches that takes 20
microseconds; between two convolutions, which empty the caches, it takes a millisecond, more than the work on most maps
of a ResNet. So a kernel is compiled once for each kind of arguments, and then inductor's own callable is called.
"""

import contextlib
import functools
import operator
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Arguments = list[Any]

# Dynamo traces one function at a time. A child forked meanwhile has no thread that would release the lock.
_compiling = threading.RLock()
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_compiling._at_fork_reinit)  # pyright: ignore[reportAttributeAccessIssue]


class Kernel:
    """A function of dense tensors and constants that is called compiled or as it is.

    Args:
        function: Returns a tuple of new tensors. Its arguments are tensors, None, named tuples of such, and constants,
            of which there should be few.
        overwrites: The function writes its result into its first tensor, which `__call__` returns before the others.
    """

    def __init__(self, function: Callable[..., tuple[Any, ...]], overwrites: bool) -> None:
        self.function, self.overwrites = function, overwrites
        self.graphs: dict[tuple[Any, ...], Callable[[Arguments], Sequence[Any]]] = {}
        functools.update_wrapper(self, function)

    def __call__(self, compiled: bool, *args: Any) -> tuple[Any, ...]:
        """The results.

        Args:
            compiled: Compile the function, or take the compiled one.
            *args: Its arguments.
        """
        if not _observers:
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
        kind: list[Any] = []
        dense: Arguments = []
        shape = None
        for x in _flat(args):
            if isinstance(x, Tensor):
                shape = shape or x.shape
                last = not x.is_contiguous()
                # Channels last is for maps. What is as small as a gate or a sum is cheap to copy, and slow to read so.
                if last and not (x.shape == shape and x.is_contiguous(memory_format=torch.channels_last)):
                    x, last = x.contiguous(), False
                kind.append((x.dtype, x.device, last, *[s == 1 for s in x.shape], x.numel() < 1 << 31))
            else:
                kind.append(x)
            dense.append(x)
        key = tuple(kind)
        graph = self.graphs.get(key)
        if graph is None:
            with _compiling:
                graph = self.graphs.get(key) or self._compiled(args, dense)
                self.graphs[key] = graph
        results = graph(dense)
        return (dense[0], *results) if self.overwrites else tuple(results)

    def _compiled(self, args: tuple[Any, ...], dense: Arguments) -> Callable[[Arguments], Sequence[Any]]:
        """The function compiled for such arguments, or as it is where that fails."""
        groups = [type(x) if _is_group(x) else None for x in args]

        def function(*flat: Any) -> tuple[Any, ...]:
            rest = list(flat)
            grouped: list[Any] = []
            for group in groups:
                n = 1 if group is None else len(group._fields)
                grouped.append(rest[0] if group is None else group(*rest[:n]))
                rest = rest[n:]
            return self.function(*grouped)

        device = next(x for x in dense if isinstance(x, Tensor)).device.type
        if not compiler_works(device):
            return lambda flat: function(*flat)
        try:
            return _compile(function, dense)
        except Exception as e:
            warnings.warn(
                f'timm_attn.fuse cannot compile {self.function.__name__}() ({type(e).__name__}: {_first_line(e)}): '
                'it stays slow.',
                stacklevel=4,
            )
            return lambda flat: function(*flat)


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


def _compile(function: Callable[..., tuple[Any, ...]], args: Arguments) -> Callable[[Arguments], Sequence[Any]]:
    """Compiles a function for all sizes of such arguments.

    Args:
        function: The kernel's.
        args: Arguments of the kind it is compiled for.

    Returns:
        Takes the list of arguments.
    """
    # Slow to import, and of no use to those who do not compile.
    from torch._dynamo import config as dynamo
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental import _config

    shapes = cast(Any, _config)
    # Parameters are detached, for torch.compile takes their sizes as constants.
    tensors = {i: x.detach() for i, x in enumerate(args) if isinstance(x, Tensor)}
    graphs: list[tuple[Callable[..., Any], list[Callable[[Arguments], Any]], list[int]]] = []

    def capture(graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        compiled = compile_fx_inner(graph, examples)  # pyright: ignore[reportArgumentType]

        def run(inputs: Arguments) -> Any:
            sources = _sources(examples, inputs, tensors)
            results = compiled(inputs)
            graphs.append((getattr(compiled, 'current_callable', compiled), sources, [r.data_ptr() for r in results]))
            return results

        run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
        return run

    def of_tensors(*given: Tensor) -> tuple[Any, ...]:
        full = list(args)
        for i, x in zip(tensors, given, strict=True):
            full[i] = x
        return function(*full)

    backend = aot_autograd(
        fw_compiler=capture,
        inference_compiler=capture,
        decompositions=select_decomp_table,
        keep_inference_input_mutations=True,
    )
    scratch = [x.clone() for x in tensors.values()]  # the first call is for compiling only
    tensors = dict(zip(tensors, scratch, strict=True))
    with (
        torch.no_grad(),
        torch.autocast(scratch[0].device.type, enabled=False),
        shapes.patch(use_duck_shape=False),  # sizes that happen to be equal are not the same size
        dynamo.patch(specialize_float=True),
    ):
        shown = torch.compile(of_tensors, dynamic=True, fullgraph=True, backend=backend)(*scratch)
    torch._dynamo.reset_code(of_tensors.__code__)
    ((graph, sources, made),) = graphs
    # The graph returns no None, and nothing twice.
    places = [None if r is None else made.index(r.data_ptr()) for r in shown]

    def call(args: Arguments) -> list[Any]:
        results = graph([source(args) for source in sources])
        return [None if p is None else results[p] for p in places]

    return call


def _sources(
    examples: Sequence[Any],
    inputs: Arguments,
    tensors: dict[int, Tensor],
) -> list[Callable[[Arguments], Any]]:
    """Where a graph's inputs come from: functions of the kernel's arguments.

    Args:
        examples: The inputs with symbolic sizes.
        inputs: The same with values.
        tensors: The kernel's tensors by position.
    """
    position = {x.data_ptr(): i for i, x in tensors.items()}
    origins = [position[x.data_ptr()] if isinstance(x, Tensor) else None for x in inputs]
    sizes = {
        str(size): (i, d)
        for example, i in zip(examples, origins, strict=True)
        if i is not None
        for d, size in enumerate(example.shape)
    }

    def source(example: Any, value: Any, origin: int | None) -> Callable[[Arguments], Any]:
        if origin is not None:
            return operator.itemgetter(origin)
        if str(example) in sizes:
            i, d = sizes[str(example)]
            return lambda args: args[i].shape[d]
        return lambda args: value  # a number among the arguments

    return list(map(source, examples, inputs, origins))


@functools.cache
def compiler_works(device: str) -> bool:
    """Whether inductor can compile for the device ('cpu', 'cuda'); says so once where it cannot."""
    try:
        if device == 'cpu' and cast(Any, torch.__version__) < (2, 9):
            # pytorch issue 159154: what a loop keeps of a plane gets the room of a row.
            raise RuntimeError(f'what torch {torch.__version__} compiles writes past its buffers: install torch 2.9')
        with _compiling, _disable_current_modes():
            _compile(lambda x: (x + 1,), [torch.zeros(2, 3, 4, 5, device=device)])
    except Exception as e:
        warnings.warn(
            f'timm_attn.fuse cannot compile for {device} ({type(e).__name__}: {_first_line(e)}); blocks keep '
            'less memory, but are not faster. Install a C++ compiler (CPU) or Triton (GPU), or pass compile=False.',
            stacklevel=3,
        )
        return False
    return True

"""Launcher: `python -m timm_attn SCRIPT args...` runs a script that knows this package's models.

timm has no plugin discovery: its scripts see our models only after `import timm_attn`. Python imports this package
before it runs this file, so all that is left is to start the script as if it had been called directly. The same works
on many processes: `torchrun --standalone --nproc_per_node=8 -m timm_attn train.py args...`.
"""

import functools
import os
import runpy
import sys
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

USAGE = """\
usage: python -m timm_attn SCRIPT [args...]
       torchrun --standalone --nproc_per_node=N -m timm_attn SCRIPT [args...]

Runs a Python script, such as train.py of https://github.com/huggingface/pytorch-image-models, with the models of
timm_attn registered. All arguments after SCRIPT are the script's own.

example: python -m timm_attn validate.py --data-dir DIR --model cbam_resnet50 --pretrained
"""


def allow_cpu_device_ids() -> None:
    """Lets DistributedDataParallel be called with `device_ids=[cpu]`, as timm's train.py does on a CPU.

    DDP refuses a CPU among its device_ids; None means the same for a model that is on the CPU. Calls with any other
    device are left as they are.
    """
    init = DistributedDataParallel.__init__

    @functools.wraps(init)
    def cpu_init(self: DistributedDataParallel, module: Any, device_ids: Any = None, *args: Any, **kwargs: Any) -> None:
        if device_ids and all(_is_cpu(d) for d in device_ids):
            device_ids = None
        init(self, module, device_ids, *args, **kwargs)

    DistributedDataParallel.__init__ = cpu_init


def _is_cpu(device: int | str | torch.device) -> bool:
    # A bare number is the index of an accelerator.
    return not isinstance(device, int) and torch.device(device).type == 'cpu'


def main(argv: list[str]) -> int:
    """Runs a script under the name `__main__`, with `sys.argv` and `sys.path` as if Python had been given it.

    Args:
        argv: The script's path and its arguments.

    Returns:
        The exit status: 2 if there is no script to run. A script that calls `sys.exit` ends the process itself.
    """
    if not argv:
        print(f'{USAGE}\nerror: SCRIPT is missing', file=sys.stderr)
        return 2
    script = argv[0]
    if script in ('-h', '--help'):
        print(USAGE, end='')
        return 0
    if not os.path.isfile(script):
        hint = f'; the tools of this package are called as `timm-attn {script}`' if script.isidentifier() else ''
        print(f"error: SCRIPT (='{script}') is no file: give the path of a Python script{hint}.", file=sys.stderr)
        return 2
    sys.argv = argv
    # With -P or PYTHONSAFEPATH, Python puts no folder in front, neither for -m nor for a script.
    if not getattr(sys.flags, 'safe_path', False):
        sys.path[0] = os.path.dirname(os.path.abspath(script))
    if not torch.cuda.is_available():
        allow_cpu_device_ids()
    runpy.run_path(script, run_name='__main__')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

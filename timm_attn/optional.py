"""Optional packages, imported where they are needed."""

import importlib
from types import ModuleType

from .version import pip_source


def require(package: str, extra: str, pip_name: str | None = None) -> ModuleType:
    """Imports an optional package.

    Args:
        package: The module to import.
        extra: The extra of timm_attn that installs it.
        pip_name: The name under which pip knows it, where that differs.

    Raises:
        ImportError: It is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as e:
        name = pip_name or package.split('.')[0]
        # Before a release the name on an index is nobody's, or somebody else's.
        released = pip_source() == 'timm_attn'
        every = f"'timm_attn[{extra}]'" if released else f"'.[{extra}]' in a checkout of timm_attn"
        raise ImportError(
            f"This needs '{name}', which is not installed: pip install {name}, or all of the extra by pip install "
            f'{every}.'
        ) from e

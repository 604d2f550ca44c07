"""The version of this package, where the project lives, and what pip installs it from."""

from importlib.metadata import PackageNotFoundError, distribution, version

# The one place that says where the project lives: README, site, cards and Spaces name it, and tests hold them to it.
PROJECT = 'https://github.com/timm-attn/timm_attn'


def package_version() -> str:
    """The installed version of timm_attn, or the checkout's when it is not installed."""
    try:
        return version('timm_attn')
    except PackageNotFoundError:
        return '0+checkout'


def pip_source() -> str:
    """What to `pip install`: this package's name if it came from an index, as a release does, else the repository.

    Pip writes direct_url.json for what comes from anywhere but an index (PEP 610).
    """
    try:
        released = distribution('timm_attn').read_text('direct_url.json') is None
    except PackageNotFoundError:
        released = False
    return 'timm_attn' if released else f'git+{PROJECT}'

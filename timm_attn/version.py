"""The version of this package."""

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """The installed version of timm_attn, or the checkout's when it is not installed."""
    try:
        return version('timm_attn')
    except PackageNotFoundError:
        return '0+checkout'

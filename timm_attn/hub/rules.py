"""Names of the files of a model folder, and the rules that their fields are checked by."""

import math
import re
from collections.abc import Callable
from typing import Any

CONFIG = 'config.json'

WEIGHTS = 'model.safetensors'

# In its place, where a folder holds only what injection added to a base.
ADAPTER = 'adapter.safetensors'

CARD = 'README.md'


MAX_HEADER_BYTES = 25_000_000

Check = Callable[[Any], bool]


def integer(low: int, high: int) -> Check:
    """Checks for an integer of a range, both ends included; True is none."""
    return lambda v: type(v) is int and low <= v <= high


def number(low: float, high: float) -> Check:
    """Checks for a finite number of a range, both ends included; True is none."""
    return lambda v: type(v) in (int, float) and math.isfinite(v) and low <= v <= high


def text(length: int, pattern: str = r'(?s).*') -> Check:
    """Checks for a string of at most so many characters that matches a pattern as a whole."""
    return lambda v: isinstance(v, str) and len(v) <= length and re.fullmatch(pattern, v) is not None


def list_of(check: Check, low: int, high: int) -> Check:
    """Checks for a list of a length in a range, each item of which passes a check."""
    return lambda v: isinstance(v, list) and low <= len(v) <= high and all(map(check, v))


def one_of(*values: Any) -> Check:
    """Checks for one of some values, equal in type too."""
    return lambda v: any(type(v) is type(x) and v == x for x in values)


def or_null(check: Check) -> Check:
    """Checks for None, or what passes a check."""
    return lambda v: v is None or check(v)


def boolean(v: Any) -> bool:
    """Whether it is True or False."""
    return type(v) is bool


def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=)`: refuses an object that names a key twice."""
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError('a key occurs twice')
    return found


def no_constant(name: str) -> Any:
    """For `json.loads(parse_constant=)`: refuses NaN and Infinity, which are no JSON."""
    raise ValueError(f'{name} is no JSON')


MAX_CARD_BYTES = 1 << 20

_REPO_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[\w.-]+')


def check_repo_id(repo_id: str) -> str:
    """Returns the name of a repository, or raises a ValueError that says what one looks like."""
    if not _REPO_ID.fullmatch(repo_id) or '--' in repo_id or '..' in repo_id or repo_id.endswith(('.git', '.', '-')):
        raise ValueError(f"repo_id (={repo_id!r}) must be 'NAMESPACE/NAME', such as 'me/cbam_resnet50.mine'.")
    return repo_id

"""What several commands share: talk on stderr, and evaluation records from a file."""

import json
import logging
import sys
from typing import Any


def talk() -> None:
    """Sends what the package says while it works to stderr; stdout holds the result."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format='%(message)s')
    logging.getLogger('timm_attn').setLevel(logging.INFO)


def read_records(path: str | None) -> Any:
    """Evaluation records of `--eval FILE`, None without one.

    Args:
        path: The JSON file.

    Raises:
        ValueError: It cannot be read as JSON.
    """
    if path is None:
        return None
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file)
    except (OSError, ValueError) as e:
        raise ValueError(f"--eval: '{path}' cannot be read as JSON: {e}") from e

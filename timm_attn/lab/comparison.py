"""What a comparison is: everything that decides its numbers."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from .data import Data
from .train import Entry, Settings, run_id


@dataclass(frozen=True)
class Comparison:
    """Models, seeds, data and settings: everything that decides the numbers.

    Args:
        models: The first is what the others are compared with.
        data: Images of both splits.
        settings: Of the training.
        seeds: How many; they are 0, 1, ...
    """

    models: tuple[Entry, ...]
    data: Data
    settings: Settings
    seeds: int

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError('No models: name at least one.')
        labels = [m.label for m in self.models]
        if len({run_id(m, 0) for m in self.models}) < len(labels):
            raise ValueError(f'Each model needs a label of its own, got {labels}.')
        if self.seeds < 1:
            raise ValueError(f"'seeds' (={self.seeds}) must be at least 1.")

    def runs(self) -> list[tuple[Entry, int]]:
        """All runs, seed by seed, so that a comparison cut short has whole seeds."""
        return [(m, s) for s in range(self.seeds) for m in self.models]

    def plain(self) -> dict[str, Any]:
        """What `comparison.json` holds."""
        data = self.data
        held = dict(
            models=[asdict(m) for m in self.models],
            seeds=self.seeds,
            data=dict(
                name=data.name,
                train=len(data.train),
                val=len(data.val),
                classes=len(data.classes),
                measured=data.measured,
                skipped=data.skipped,
                augment=data.augment,
                fingerprint=data.fingerprint(),
            ),
            settings=asdict(self.settings),
        )
        return json.loads(json.dumps(held))

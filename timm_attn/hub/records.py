"""What is on record about weights: where they come from, how they were trained and measured, and what classes mean.

One form for config.json, cards and the Hub. Users may give mappings in place of the dataclasses.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from huggingface_hub import EvalResult

from .client import HubFileError
from .rules import Check, integer, list_of, number, text

# How weights were made, and what a card says about it.
STATUSES: dict[str, str] = {
    'trained': 'These weights were trained as the section on training says.',
    'converted': 'The numbers are those of {source}; only their names and layout were changed.',
    'warm start': 'This is not a trained attention model: the weights are those of the plain {source}, the attention '
    "is neutral, and the logits equal the plain network's. It is a start for fine-tuning.",
    'random': 'These weights were never trained: they are good for tests and as a start only.',
}
METRIC_NAMES = {'top1': 'Top-1', 'top5': 'Top-5', 'acc': 'Accuracy', 'accuracy': 'Accuracy'}
R = TypeVar('R', bound='_Record')

_TEXT = text(4096)
_COUNT = integer(0, 1 << 53)
_NUMBER = number(-1e300, 1e300)


def _plain(v: Any) -> bool:
    return v is None or isinstance(v, bool) or _TEXT(v) or _NUMBER(v)


def _flat(v: Any) -> bool:
    """Plain values, lists of them and one level of objects, as a card can list them."""
    if isinstance(v, dict):
        return len(v) <= 64 and all(map(text(128), v)) and all(map(_plain, v.values()))
    return _plain(v) or list_of(_plain, 0, 256)(v)


def _metrics(v: Any) -> bool:
    return isinstance(v, dict) and 0 < len(v) <= 64 and all(map(text(128), v)) and all(map(_NUMBER, v.values()))


# What a field of each type may hold.
_RULES: dict[Any, tuple[Check, str]] = {
    str | None: (_TEXT, 'a text of at most 4096 characters'),
    int | None: (_COUNT, 'an integer of at least 0'),
    float | None: (_NUMBER, 'a number'),
    Sequence[str] | None: (list_of(_TEXT, 0, 64), 'a list of texts'),
    Mapping[str, float] | None: (_metrics, 'an object {name: number}'),
    Any: (_flat, 'a text, a number, or a short list or object of them'),
}


class _Record:
    """Fields that are None are not on record."""

    record: ClassVar[str]

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, tuple):
                value = list(value)
            check, rule = _RULES[f.type]
            if value is not None and not check(value):
                raise ValueError(f'{self.record}.{f.name} (={str(value)[:80]!r}) must be {rule}.')

    @classmethod
    def of(cls: type[R], given: Any) -> R:
        """A record of this kind, from a mapping too.

        Args:
            given: A record, a mapping of its fields, or None.

        Raises:
            ValueError: A field is unknown or holds something else than its rule says.
        """
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping | None):
            raise ValueError(f'{cls.record} (a {type(given).__name__}) must be a {cls.__name__} or a mapping.')
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        if unknown := [str(k)[:80] for k in given or {} if k not in known]:
            raise ValueError(
                f'{cls.record} must be plain JSON in its own fields, but has {unknown}. Accepted: {", ".join(known)}.'
            )
        return cls(**(given or {}))

    def to_dict(self) -> dict[str, Any]:
        """What is on record, as plain JSON."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items() if v is not None}


@dataclass(frozen=True)
class Provenance(_Record):
    """Where weights come from.

    Args:
        source: What they were before, in words or as a name, such as 'timm/resnet50.a1_in1k'.
        source_url: Its address.
        file: Name of the file.
        sha256: Of that file.
        sha1: Of that file.
        license: Licence of the weights, such as 'apache-2.0'.
        license_link: Where it can be read.
        datasets: Data sets they were trained on, as the Hub names them, such as 'ILSVRC/imagenet-1k'.
        base_model: Model on the Hub that was trained further.
        weights: Which weights of a checkpoint, such as 'averaged'.
        conversion: What was done to them.
        max_abs_diff: Largest difference to the source in a logit.
        stated: An accuracy that somebody else states, with who says so.
        stated_top1: The same in percent.
    """

    record: ClassVar[str] = 'provenance'
    source: str | None = None
    source_url: str | None = None
    file: str | None = None
    sha256: str | None = None
    sha1: str | None = None
    license: str | None = None
    license_link: str | None = None
    datasets: Sequence[str] | None = None
    base_model: str | None = None
    weights: str | None = None
    conversion: str | None = None
    max_abs_diff: float | None = None
    stated: str | None = None
    stated_top1: float | None = None


@dataclass(frozen=True)
class Training(_Record):
    """How weights were trained.

    Args:
        data: The data.
        images: Number of images.
        epochs: Passes over them.
        steps: Steps of the optimizer.
        batch_size: Images a step.
        optimizer: Its name and settings.
        learning_rate: The highest.
        weight_decay: Of the optimizer.
        schedule: Of the learning rate.
        loss: The loss.
        augmentation: What was done to images.
        image_size: Height and width in pixels.
        precision: Such as 'bfloat16 autocast'.
        start: What training started from.
        recipe: Name of a recipe, or its address.
        seed: Of the random numbers.
        hardware: What it ran on.
        seconds: How long it took.
        code: Commit or version of the code.
        notes: Anything else.
        co2_eq_emissions: As the Hub's cards have it, where it was measured.
    """

    record: ClassVar[str] = 'training'
    data: str | None = None
    images: int | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    optimizer: Any = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    schedule: Any = None
    loss: Any = None
    augmentation: Any = None
    image_size: Any = None
    precision: str | None = None
    start: str | None = None
    recipe: Any = None
    seed: Any = None
    hardware: str | None = None
    seconds: float | None = None
    code: str | None = None
    notes: str | None = None
    co2_eq_emissions: Any = None


@dataclass(frozen=True)
class Evaluation(_Record):
    """What was measured.

    Args:
        dataset: Name of the data.
        metrics: Name -> value, accuracies in percent.
        dataset_id: The data set on the Hub.
        split: Which part of it.
        n: Number of images.
        protocol: How images were prepared.
        seeds: Number of runs that the values are means of.
        date: When.
        notes: Anything else.
        source_name: Where the record is kept; needs `source_url`.
        source_url: Its address.
    """

    record: ClassVar[str] = 'eval_results'
    dataset: str | None = None
    metrics: Mapping[str, float] | None = None
    dataset_id: str | None = None
    split: str | None = None
    n: int | None = None
    protocol: str | None = None
    seeds: int | None = None
    date: str | None = None
    notes: str | None = None
    source_name: str | None = None
    source_url: str | None = None

    def __post_init__(self) -> None:
        for name, value in (self.metrics or {}).items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(
                    f"eval_results: the metric '{name}' (={value!r}) must be a number that JSON has, so a finite one."
                )
        super().__post_init__()
        if self.dataset is None or not self.metrics:
            raise ValueError("eval_results: a record needs 'dataset' (a name) and 'metrics' ({name: number}).")
        if self.source_name and not self.source_url:
            raise ValueError(f"eval_results: 'source_name' (={self.source_name!r}) needs a 'source_url'.")


def _evaluation(record: Any) -> Evaluation:
    if isinstance(record, EvalResult):
        return Evaluation(
            dataset=record.dataset_name,
            dataset_id=record.dataset_type,
            split=record.dataset_split,
            metrics={record.metric_name or record.metric_type: record.metric_value},
            source_name=record.source_name,
            source_url=record.source_url,
        )
    if isinstance(record, Mapping):
        loose = {k: v for k, v in record.items() if k in METRIC_NAMES}
        given = record.get('metrics')
        if loose and (given is None or isinstance(given, Mapping)):
            record = {k: v for k, v in record.items() if k not in loose} | {'metrics': {**(given or {}), **loose}}
    elif not isinstance(record, Evaluation):
        raise ValueError(
            f'eval_results holds a {type(record).__name__}; expected an Evaluation, or a dict with dataset and metrics.'
        )
    return Evaluation.of(record)


def normalise_evaluation(eval_results: Any) -> list[dict[str, Any]]:
    """Evaluation records in one form.

    Args:
        eval_results: None, a record, or a list of records. A record is an `Evaluation`, a dict of its fields (where
            'top1', 'top5', 'accuracy' may stand beside the others in place of 'metrics'), or huggingface_hub's
            `EvalResult`.

    Returns:
        Records with 'dataset', 'metrics' and whatever else was given.

    Raises:
        ValueError: A record lacks its dataset or metrics, has an unknown field, or holds something that is no number.
    """
    if eval_results is None:
        return []
    single = isinstance(eval_results, Mapping | EvalResult | Evaluation)
    return [_evaluation(r).to_dict() for r in ([eval_results] if single else list(eval_results))]


def add_evaluation(config: Mapping[str, Any], eval_results: Any) -> dict[str, Any]:
    """A config with other evaluation records; None leaves those it has.

    Args:
        config: A parsed config.json.
        eval_results: As for `normalise_evaluation`.

    Raises:
        ValueError: A record is incomplete.
    """
    if eval_results is None:
        return dict(config)
    return {**config, 'timm_attn': {**config.get('timm_attn', {}), 'evaluation': normalise_evaluation(eval_results)}}


def check_about(about: Any, where: str) -> dict[str, Any]:
    """Checks the section 'timm_attn' of a config.json, which may come from anywhere.

    A later version of this package, or somebody's own tool, may have more fields: those must be plain values.

    Args:
        about: The section, None where there is none.
        where: The file's name for the message.

    Raises:
        HubFileError: Names the field.
    """
    if about is None:
        return {}
    if not isinstance(about, dict):
        raise HubFileError(f'{where}: timm_attn must be an object, but is a {type(about).__name__}.')
    status = about.get('status')
    if status is not None and (not isinstance(status, str) or status not in STATUSES):
        raise HubFileError(f'{where}: timm_attn.status (={str(status)[:80]!r}) must be one of: {", ".join(STATUSES)}.')
    if not text(64, '[0-9a-f]{64}')(about.get('weights_sha256', '0' * 64)):
        raise HubFileError(f'{where}: timm_attn.weights_sha256 must be 64 hexadecimal digits.')
    if 'adapter' in about:
        adapter = about['adapter']
        digits = text(64, '[0-9a-f]{64}')
        if not (isinstance(adapter, dict) and digits(adapter.get('sha256')) and text(128)(adapter.get('base'))):
            raise HubFileError(
                f"{where}: timm_attn.adapter must be an object with 'base', a name, and 'sha256', 64 hexadecimals."
            )
        if type(adapter.get('numbers', 0)) is not int:
            raise HubFileError(f'{where}: timm_attn.adapter.numbers must be an integer.')
    records: Any = about.get('evaluation', [])
    if not isinstance(records, list) or len(records) > 256:
        raise HubFileError(f'{where}: timm_attn.evaluation must be a list of records.')
    groups: list[tuple[str, type[_Record], Any]] = [(f'evaluation[{i}]', Evaluation, r) for i, r in enumerate(records)]
    groups += [(k, cls, about[k]) for k, cls in (('provenance', Provenance), ('training', Training)) if k in about]
    for name, cls, values in groups:
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        if not isinstance(values, dict):
            raise HubFileError(f'{where}: timm_attn.{name} must be an object, but is a {type(values).__name__}.')
        try:
            cls.of({k: v for k, v in values.items() if k in known})
        except ValueError as e:
            raise HubFileError(f'{where}: timm_attn.{name}: {e}') from e
        for key, value in values.items():
            if key not in known and not (text(128)(key) and _flat(value)):
                raise HubFileError(f'{where}: timm_attn.{name}.{str(key)[:80]} must be a text, a number or a list.')
    for key, value in about.items():
        if key not in ('status', 'provenance', 'training', 'evaluation') and not (text(128)(key) and _flat(value)):
            raise HubFileError(f'{where}: timm_attn.{str(key)[:80]} must be a text, a number, a list or an object.')
    return about


# --- Labels -----------------------------------------------------------------------------------------------------------

_LABEL = text(1024)


def normalise_labels(labels: Any, num_classes: int, where: str = 'label_names') -> list[str]:
    """Names of the classes as a list by class index.

    Args:
        labels: Texts by index: a sequence, or a mapping whose keys are the indices, as integers or their digits.
        num_classes: How many there must be.
        where: What holds them, for the message.

    Raises:
        ValueError: The keys are not 0 to num_classes - 1, each once; a name is no text; or there are more or fewer.
    """
    if isinstance(labels, Mapping):
        found: dict[int, Any] = {}
        for key, value in labels.items():
            index = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
            if type(index) is not int or index in found:
                raise ValueError(
                    f'{where} has the key {str(key)[:80]!r}: a mapping must have the class indices 0 to '
                    f'{num_classes - 1} as its keys, each once, such as {{0: "cat", 1: "dog"}}.'
                )
            found[index] = value
        if len(found) == num_classes and set(found) != set(range(num_classes)):
            raise ValueError(f'{where} must have the class indices 0 to {num_classes - 1} as its keys.')
        labels = [found[k] for k in sorted(found)]
    if isinstance(labels, str) or not isinstance(labels, Sequence) or not all(map(_LABEL, labels)):
        raise ValueError(f'{where} must hold texts of at most 1024 characters, by class index.')
    if len(labels) != num_classes:
        raise ValueError(f'{where} has {len(labels)} names, but there are {num_classes} classes.')
    return list(labels)


def normalise_descriptions(
    descriptions: Any, names: Sequence[str] | None, where: str = 'label_descriptions'
) -> dict[str, str] | None:
    """Descriptions of the classes, by their names, as timm has them; None without names, which they are about.

    Args:
        descriptions: Texts by name; or by class index, as `normalise_labels` takes names.
        names: Names of the classes by index.
        where: What holds them, for the message.

    Raises:
        ValueError: A key is no class, or a description no text.
    """
    if not descriptions or names is None:
        return None
    if isinstance(descriptions, Mapping) and set(descriptions) <= set(names):
        if not all(map(_LABEL, descriptions.values())):
            raise ValueError(f'{where} must hold texts of at most 1024 characters.')
        return dict(descriptions)
    return dict(zip(names, normalise_labels(descriptions, len(names), where), strict=True))

"""Records of how weights were measured, in one form for config.json, cards and the Hub."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult

from .config import encode_config, parse_config

METRIC_NAMES = {'top1': 'Top-1', 'top5': 'Top-5', 'acc': 'Accuracy', 'accuracy': 'Accuracy'}


def _metric(name: str, value: Any) -> tuple[str, float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"eval_results: the metric '{name}' (={value!r}) must be a number.")
    return name, value


def normalise_evaluation(eval_results: Any) -> list[dict[str, Any]]:
    """Evaluation records in one form.

    Args:
        eval_results: None, a record, or a list of records. A record is a dict with 'dataset' and 'metrics' {name:
            value} (or 'top1', 'top5', 'accuracy' beside the other fields), or huggingface_hub's `EvalResult`.

    Returns:
        Records with 'dataset', 'metrics' and whatever else was given.

    Raises:
        ValueError: A record lacks its dataset or metrics, or holds something that is no number.
    """
    if eval_results is None:
        return []
    records = [eval_results] if isinstance(eval_results, Mapping | EvalResult) else list(eval_results)
    out = []
    for record in records:
        if isinstance(record, EvalResult):
            found = {
                'dataset': record.dataset_name,
                'dataset_id': record.dataset_type,
                'split': record.dataset_split,
                'metrics': {record.metric_name or record.metric_type: record.metric_value},
                'source_name': record.source_name,
                'source_url': record.source_url,
            }
        elif isinstance(record, Mapping):
            found = dict(record)
            loose = {k: found.pop(k) for k in list(found) if k in METRIC_NAMES}
            found['metrics'] = {**(found.get('metrics') or {}), **loose}
        else:
            raise ValueError(f'eval_results holds a {type(record).__name__}; expected a dict with dataset and metrics.')
        if not isinstance(found.get('dataset'), str) or not found['metrics']:
            raise ValueError(
                f"eval_results: a record needs 'dataset' (a name) and 'metrics' ({{name: number}}); got {found}."
            )
        if found.get('source_name') and not found.get('source_url'):
            raise ValueError(f"eval_results: 'source_name' (={found['source_name']!r}) needs a 'source_url'.")
        found['metrics'] = dict(_metric(k, v) for k, v in found['metrics'].items())
        out.append({k: v for k, v in found.items() if v is not None})
    return parse_config(encode_config({'records': out}), 'eval_results')['records']


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

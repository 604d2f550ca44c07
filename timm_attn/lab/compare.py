"""Comparing models fairly: `timm-attn compare`.

The folder of a comparison holds `comparison.json` (models, data, settings), `runs/<model>-seed<n>.json` for each
finished run and `checkpoints/` for those under way. Files are written whole, and each run depends only on what
`comparison.json` holds and its seed, so that a comparison may be killed, go on elsewhere, or be spread over the tasks
of a job array that share the folder. Bits are the same on machines of one kind with as many threads per run.
"""

import hashlib
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_write
from ..optional import require
from . import plots, tables
from .comparison import Comparison
from .data import Data
from .train import Entry, Report, Settings, run, run_id


def compare(
    comparison: Comparison,
    out: str | Path,
    *,
    jobs: int = 1,
    shard: tuple[int, int] = (1, 1),
    workers: int = 0,
    save_weights: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Does the runs that are not done yet, and returns the records of all that are done.

    Args:
        comparison: What to run.
        out: Folder of the results, new or of the same comparison. More models or seeds than before are fine.
        jobs: Processes; the cores are divided among them.
        shard: (i, n): do the i-th of n parts of the runs, i from 1.
        workers: Processes per run that decode images.
        save_weights: Keep the final weights of each run in `checkpoints/`.
        progress: A bar on stderr.

    Raises:
        ValueError: The folder holds another comparison, the device is absent, or a run failed.
    """
    out = Path(out)
    part, parts = shard
    if not 1 <= part <= parts:
        raise ValueError(f"'shard' (={part}/{parts}) must be I/N with I from 1 to N.")
    if jobs < 1:
        raise ValueError(f"'jobs' (={jobs}) must be at least 1.")
    device = comparison.settings.device
    if torch.device(device).type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f"'{device}' is not available here: pass --device cpu.")
    _claim(out, comparison.plain())
    todo = [r for r in comparison.runs()[part - 1 :: parts] if not _record_path(out, *r).exists()]
    reference = comparison.models[0]
    left = len(todo) * comparison.settings.epochs
    with _bar(left, progress and bool(todo)) as report:
        tasks = [_Task(entry, reference, s, comparison.settings, str(out), workers, save_weights) for entry, s in todo]
        if jobs == 1 or len(tasks) < 2:
            for task in tasks:
                _do(task, comparison.data, report)
        else:
            _do_in_processes(tasks, comparison.data, min(jobs, len(tasks)), report)
    return load_runs(out)


def load_runs(out: str | Path) -> list[dict[str, Any]]:
    """Records of the finished runs in a folder.

    Raises:
        ValueError: A record is no JSON, or belongs to another comparison.
    """
    held = _load_comparison(Path(out))
    digest = _digest(held)
    wanted = {run_id(Entry(**m), s) for m in held['models'] for s in range(held['seeds'])}
    records = []
    for path in sorted((Path(out) / 'runs').glob('*.json')):
        record = _load_json(path)
        if record.get('comparison') != digest:
            raise ValueError(f"'{path}' was made with other settings or data than '{out}' holds: remove it.")
        if record['run'] in wanted:
            records.append(record)
    return records


def write_report(out: str | Path) -> tuple[list[tables.Row], list[str], str]:
    """Merges whatever runs are there into `results.json`, `report.md`, `comparison.png` and `curves.png`.

    Args:
        out: Folder of a comparison, which other processes may still write to.

    Returns:
        The rows of the table, the names of runs not there yet, and the table as text.

    Raises:
        ValueError: The folder holds no comparison, or no finished run.
    """
    out = Path(out)
    held = _load_comparison(out)
    runs = load_runs(out)
    if not runs:
        raise ValueError(f"'{out}' holds no finished run yet.")
    labels = [m['label'] for m in held['models']]
    done = {r['run'] for r in runs}
    missing = [n for m in held['models'] for s in range(held['seeds']) if (n := run_id(Entry(**m), s)) not in done]
    table = tables.rows(runs, labels)
    clock = '/'.join(sorted({r['environment']['clock'] for r in runs}))
    seeds = f'{held["seeds"]} seeds' if held['seeds'] > 1 else 'one seed'
    title = f'{held["data"]["name"]}: {held["settings"]["epochs"]} epochs, {seeds}'
    plots.comparison(table, out / 'comparison.png', title=title, clock=clock)
    plots.curves(runs, labels, out / 'curves.png', title=title)
    if not missing:
        with suppress(OSError):  # Kept while it holds weights.
            (out / 'checkpoints').rmdir()
    _write(out / 'report.md', tables.report(held, runs, missing))
    _write(out / 'results.json', _dumps({**held, 'missing': missing, 'rows': [asdict(r) for r in table], 'runs': runs}))
    return table, missing, tables.text_table(*tables.cells(table, clock))


@dataclass(frozen=True)
class _Task:
    entry: Entry
    reference: Entry
    seed: int
    settings: Settings
    out: str
    workers: int
    save_weights: bool


def _do(task: _Task, data: Data, report: Report) -> None:
    out = Path(task.out)
    checkpoints = out / 'checkpoints'
    record = run(
        task.entry,
        task.reference,
        data,
        task.settings,
        task.seed,
        checkpoints,
        workers=task.workers,
        save_weights=task.save_weights,
        report=report,
    )
    record['comparison'] = _digest(_load_comparison(out))
    _write(_record_path(out, task.entry, task.seed), _dumps(record))
    (checkpoints / f'{record["run"]}.pt').unlink(missing_ok=True)


_shared: dict[str, Any] = {}  # In a worker process: the data, and the queue that the parent's bar reads.


def _start_worker(data: Data, queue: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    _shared.update(data=data, queue=queue)
    parent = multiprocessing.parent_process()

    def leave() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)  # A killed parent would leave this process waiting for work for ever.

    threading.Thread(target=leave, daemon=True).start()


def _do_in_worker(task: _Task) -> None:
    _do(task, _shared['data'], lambda name, numbers: _shared['queue'].put((name, numbers)))


def _do_in_processes(tasks: Sequence[_Task], data: Data, jobs: int, report: Report) -> None:
    context = multiprocessing.get_context('spawn')
    queue = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // jobs)

    def listen() -> None:
        while (message := queue.get()) is not None:
            report(*message)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(data, queue, threads))
    try:
        waiting = {pool.submit(_do_in_worker, task) for task in tasks}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
    except BrokenProcessPool as e:
        raise ValueError(
            'A process that trained was ended from outside (out of memory?). The same command goes on from the last '
            'finished epoch; fewer --jobs need less memory.'
        ) from e
    finally:
        pool.shutdown(cancel_futures=True)
        queue.put(None)
        listener.join()


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Report]:
    if not shown:
        yield lambda name, numbers: None
        return
    tqdm = require('tqdm', 'lab').tqdm
    # `disable=None` hides the bar, not the lines, where stderr is no terminal.
    with tqdm(total=total, unit='epoch', disable=None, dynamic_ncols=True, smoothing=0.1) as bar:

        def report(name: str, numbers: dict[str, float]) -> None:
            bar.set_postfix_str(f'{name} {numbers["top1"]:.1f} %', refresh=False)
            bar.update()
            if numbers['epoch'] == numbers['epochs']:
                tqdm.write(f'{name}: {numbers["top1"]:.2f} %', file=sys.stderr)

        yield report


def _claim(out: Path, plain: dict[str, Any]) -> None:
    """Writes `comparison.json`, or checks that the one there is of the same comparison and widens it."""
    path = out / 'comparison.json'
    if path.exists():
        held = _load_comparison(out)
        different = [
            f'{group}.{key}: {held[group].get(key)!r} there, {plain[group].get(key)!r} now'
            for group in ('data', 'settings')
            for key in sorted(held[group].keys() | plain[group].keys())
            if held[group].get(key) != plain[group].get(key)
        ]
        there = {m['label']: m for m in held['models']}
        if held['models'][0] != plain['models'][0]:
            different.append(f'first model: {held["models"][0]["label"]} there, {plain["models"][0]["label"]} now')
        changed = [m['label'] for m in plain['models'] if there.get(m['label'], m) != m]
        different += [f'model {label}: other name or arguments' for label in changed]
        if different:
            raise ValueError(
                f"'{out}' holds another comparison ({'; '.join(different)}): "
                'choose another folder, or the same settings.'
            )
        known = {m['label'] for m in plain['models']}
        kept = [m for m in held['models'] if m['label'] not in known]
        plain = {**plain, 'models': plain['models'] + kept, 'seeds': max(plain['seeds'], held['seeds'])}
        if plain == held:
            return
    _write(path, _dumps(plain))


def _digest(held: dict[str, Any]) -> str:
    """Of what must not change between the runs of a folder; models and seeds may be added."""
    fixed = dict(data=held['data'], settings=held['settings'], first=held['models'][0])
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def _record_path(out: Path, entry: Entry, seed: int) -> Path:
    return out / 'runs' / f'{run_id(entry, seed)}.json'


def _load_comparison(out: Path) -> dict[str, Any]:
    path = out / 'comparison.json'
    if not path.is_file():
        raise ValueError(f"'{out}' holds no comparison: there is no comparison.json.")
    return _load_json(path)


def _load_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except ValueError as e:
        raise ValueError(f"'{path}' is no JSON ({e}): remove it, and the run is done again.") from e


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def _dumps(held: Any) -> str:
    # NaN (the deviation of one seed) is no JSON; null is.
    return json.dumps(_without_nan(held), indent=1, allow_nan=False) + '\n'


def _without_nan(held: Any) -> Any:
    if isinstance(held, dict):
        return {k: _without_nan(v) for k, v in held.items()}
    if isinstance(held, (list, tuple)):
        return [_without_nan(v) for v in held]
    return None if isinstance(held, float) and held != held else held

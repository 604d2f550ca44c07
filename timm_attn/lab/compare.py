"""Comparing models fairly: `timm-attn compare`.

The folder of a comparison holds `comparison.json` (models, data, settings), `runs/<model>-seed<n>.json` for each
finished run and `checkpoints/` for those under way. Files are written whole, and each run depends only on what
`comparison.json` holds and its seed, so that a comparison may be killed, go on elsewhere, or be spread over the tasks
of a job array that share the folder. Bits are the same on machines of one kind with as many threads per run.
"""

import hashlib
import importlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..optional import require
from . import plots, tables
from .comparison import Comparison
from .data import Data, randomness_of
from .runs import BEAT, Lease, LeaseLost, dumps, read_comparison, read_record, write
from .train import Entry, Report, Settings, build, optimization, run, run_id


def compare(
    comparison: Comparison,
    out: str | Path,
    *,
    jobs: int = 1,
    workers: int = 0,
    save_weights: bool = False,
    progress: bool = True,
    imports: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Does the runs that are not done yet, and returns the records of all that are done.

    Any number of processes on any machines may do so at once in one folder: each run is done by one of them, and what
    a killed one left is taken over. Runs that others are at are not waited for.

    Args:
        comparison: What to run.
        out: Folder of the results, new or of the same comparison. More models or seeds than before are fine.
        jobs: Processes; the cores are divided among them.
        workers: Processes per run that decode images.
        save_weights: Keep the final weights of each run in `checkpoints/`.
        progress: A bar on stderr.
        imports: Modules that register models or attentions; each process imports them.

    Raises:
        ValueError: A model, an option or the data will not do, the folder holds another comparison, or a run failed.
            What can be known before the first run is.
    """
    out = Path(out)
    if jobs < 1:
        raise ValueError(f"'jobs' (={jobs}) must be at least 1.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"'{out}' is a file; the folder of the results is written here: choose another name.")
    check(comparison)
    _claim(out, comparison.plain())
    todo = [r for r in comparison.runs() if not _record_path(out, *r).exists()]
    reference = comparison.models[0]
    left = len(todo) * comparison.settings.epochs
    with _bar(left, progress and bool(todo)) as report:
        tasks = [_Task(entry, reference, s, comparison.settings, str(out), workers, save_weights) for entry, s in todo]
        jobs = min(jobs, len(tasks))
        if jobs <= 1:
            _share(tasks, _Inline(comparison.data, report), 1)
        else:
            _do_in_processes(tasks, comparison.data, jobs, report, imports)
    return load_runs(out)


def check(comparison: Comparison) -> None:
    """Builds every model with its weights, the optimizer and the schedule, and has each model see one image.

    Raises:
        ValueError: What will not do, and for which model.
    """
    data, settings = comparison.data, comparison.settings
    if settings.batch_size > len(data.train):
        raise ValueError(f"'batch_size' (={settings.batch_size}) exceeds the {len(data.train)} training images.")
    if torch.device(settings.device).type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f"'{settings.device}' is not available here: pass --device cpu.")
    with randomness_of('check'):
        for entry in comparison.models:
            model = build(entry, data, settings).eval()
            try:
                with torch.no_grad():
                    out = model(torch.zeros(2, data.in_chans, settings.img_size, settings.img_size))
            except (RuntimeError, AssertionError, ValueError) as e:
                raise ValueError(
                    f"'{entry.label}' takes no images of {settings.img_size} pixels ({e}): choose another --img-size."
                ) from e
            if out.shape != (2, len(data.classes)):
                raise ValueError(f"'{entry.label}' gives {tuple(out.shape)} for 2 images: it is no classifier.")
            optimization(model, settings, updates_per_epoch=1)


def load_runs(out: str | Path) -> list[dict[str, Any]]:
    """Records of the finished runs in a folder.

    Raises:
        ValueError: A record is no JSON, or belongs to another comparison.
    """
    held = read_comparison(Path(out))
    digest = _digest(held)
    wanted = {run_id(Entry(**m), s) for m in held['models'] for s in range(held['seeds'])}
    paths = sorted((Path(out) / 'runs').glob('*.json'))
    records = [read_record(p, digest, lambda model, seed: run_id(Entry(**model), seed)) for p in paths]
    return [r for r in records if r['run'] in wanted]


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
    held = read_comparison(out)
    runs = load_runs(out)
    if not runs:
        raise ValueError(f"'{out}' holds no finished run yet.")
    labels = [m['label'] for m in held['models']]
    done = {r['run'] for r in runs}
    missing = [n for m in held['models'] for s in range(held['seeds']) if (n := run_id(Entry(**m), s)) not in done]
    table = tables.rows(runs, labels)
    clock = '/'.join(sorted({r['environment']['clock'] for r in runs}))
    most = max(len(row.top1.values) for row in table)
    seeds = ('up to ' if missing and most > 1 else '') + (f'{most} seeds' if most > 1 else 'one seed')
    title = f'{held["data"]["name"]}: {held["settings"]["epochs"]} epochs, {seeds}'
    plots.comparison(table, out / 'comparison.png', title=title, clock=clock)
    plots.curves(runs, labels, out / 'curves.png', title=title)
    if not missing:
        with suppress(OSError):  # Kept while it holds weights.
            (out / 'checkpoints').rmdir()
            (out / 'leases').rmdir()
    write(out / 'report.md', tables.report(held, runs, missing))
    write(out / 'results.json', dumps({**held, 'missing': missing, 'rows': [asdict(r) for r in table], 'runs': runs}))
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


def _do(task: _Task, data: Data, report: Report) -> dict[str, Any]:
    return run(
        task.entry,
        task.reference,
        data,
        task.settings,
        task.seed,
        Path(task.out) / 'checkpoints',
        workers=task.workers,
        save_weights=task.save_weights,
        report=report,
    )


def _finish(task: _Task, record: dict[str, Any], lease: Lease) -> None:
    out = Path(task.out)
    record['comparison'] = _digest(read_comparison(out))
    lease.check()  # Taken over while this process was away: the other writes the record.
    write(_record_path(out, task.entry, task.seed), dumps(record))
    (out / 'checkpoints' / f'{record["run"]}.pt').unlink(missing_ok=True)


class _Inline:
    """Does tasks in this process, for those that ask for futures."""

    def __init__(self, data: Data, report: Report) -> None:
        self.data = data
        self.report = report

    def submit(self, task: _Task) -> 'Future[dict[str, Any]]':
        future: Future[dict[str, Any]] = Future()
        try:
            future.set_result(_do(task, self.data, self.report))
        except Exception as e:
            future.set_exception(e)
        return future


def _share(tasks: Sequence[_Task], pool: Any, jobs: int) -> None:
    """Does the tasks that no other worker holds, `jobs` at a time, and those of workers that died meanwhile."""
    out = Path(tasks[0].out) if tasks else Path()
    todo = [(task, Lease(out / 'leases', run_id(task.entry, task.seed))) for task in tasks]
    running: dict[Future[dict[str, Any]], tuple[_Task, Lease, ExitStack]] = {}
    with ExitStack() as all_held:
        while todo or running:
            for task, lease in list(todo):
                done = _record_path(out, task.entry, task.seed)
                if not done.exists():
                    if len(running) == jobs or not lease.take():
                        continue
                    held = all_held.enter_context(ExitStack())
                    held.enter_context(lease.alive())
                    if not done.exists():  # Or its holder finished between the two looks.
                        running[pool.submit(task)] = task, lease, held
                    else:
                        held.close()
                todo.remove((task, lease))
            if running:
                for future in wait(running, timeout=BEAT if todo else None, return_when=FIRST_COMPLETED).done:
                    task, lease, held = running.pop(future)
                    with suppress(LeaseLost), held:
                        _finish(task, future.result(), lease)
                for _, lease in todo:
                    lease.moved = False
            elif todo:
                if all(lease.moved for _, lease in todo):
                    return  # The holders of all that is left give signs of life.
                time.sleep(BEAT / 10)


_shared: dict[str, Any] = {}  # In a worker process: the data, and the queue that the parent's bar reads.


def _start_worker(data: Data, queue: Any, threads: int, imports: Sequence[str]) -> None:
    for module in imports:
        importlib.import_module(module)
    torch.set_num_threads(threads)
    _shared.update(data=data, queue=queue)
    parent = multiprocessing.parent_process()

    def leave() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)  # A killed parent would leave this process waiting for work for ever.

    threading.Thread(target=leave, daemon=True).start()


def _do_in_worker(task: _Task) -> dict[str, Any]:
    return _do(task, _shared['data'], lambda name, numbers: _shared['queue'].put((name, numbers)))


class _Processes:
    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def submit(self, task: _Task) -> 'Future[dict[str, Any]]':
        return self.pool.submit(_do_in_worker, task)


def _do_in_processes(tasks: Sequence[_Task], data: Data, jobs: int, report: Report, imports: Sequence[str]) -> None:
    context = multiprocessing.get_context('spawn')
    queue = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // jobs)

    def listen() -> None:
        while (message := queue.get()) is not None:
            report(*message)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(data, queue, threads, imports))
    try:
        _share(tasks, _Processes(pool), jobs)
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
    lease = Lease(out / 'leases', 'comparison')
    while not lease.take():  # Another process writes it: a matter of milliseconds.
        time.sleep(BEAT / 100)
    try:
        _widen(out, plain)
    finally:
        lease.release()


def _widen(out: Path, plain: dict[str, Any]) -> None:
    path = out / 'comparison.json'
    if path.exists():
        held = read_comparison(out)
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
    write(path, dumps(plain))


def _digest(held: dict[str, Any]) -> str:
    """Of what must not change between the runs of a folder; models and seeds may be added."""
    fixed = dict(data=held['data'], settings=held['settings'], first=held['models'][0])
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def _record_path(out: Path, entry: Entry, seed: int) -> Path:
    return out / 'runs' / f'{run_id(entry, seed)}.json'

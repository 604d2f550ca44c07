"""The rows of docs/reliability.md: what goes wrong or is tried, and what then happens. Each row is a test.

    python tests/hub/support/hub_tables.py    # writes docs/reliability.md

`tests/hub/test_push_faults.py`, `test_load_faults.py` and `test_attacks.py` run the rows; `test_reliability.py`
compares the page with them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[3] / 'docs' / 'reliability.md'


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        id: The test's id.
        what: What goes wrong, or is tried.
        outcome: 'done' (it ends well all the same) or 'error' (a `HubError`; nothing half-done), with more words.
        step: The step of the protocol it strikes.
        method: HTTP method of the requests it strikes.
        path: Regular expression of their paths.
        fault: Arguments of `HubServer.fault`.
        match: Regular expression in the message of the error.
    """

    id: str
    what: str
    outcome: str
    step: str = ''
    method: str = ''
    path: str = ''
    fault: dict[str, Any] = field(default_factory=dict)
    match: str = ''

    @property
    def ends_well(self) -> bool:
        return self.outcome.startswith('done')


_IN_TIME = 'error within the time limit; running it again finishes'
_AGAIN = 'done: retried'
_ERROR = 'error that says what to do; running it again finishes'

# Name, arguments of HubServer.fault, outcome, message.
_FAULTS: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ('401', {'status': 401, 'times': None}, _ERROR, 'hf auth login'),
    ('403', {'status': 403, 'times': None}, _ERROR, 'write access|403'),
    ('404', {'status': 404, 'times': None}, _ERROR, 'check the name'),
    ('409 once', {'status': 409}, _AGAIN, ''),
    ('412 once', {'status': 412}, 'done: read again, merged again', ''),
    ('429 once, Retry-After 3', {'status': 429, 'headers': {'Retry-After': '3'}}, 'done: waited as told', ''),
    ('429, Retry-After 9999', {'status': 429, 'headers': {'Retry-After': '9999'}, 'times': None}, _ERROR, 'to wait'),
    ('500 once', {'status': 500}, _AGAIN, ''),
    ('503 once', {'status': 503}, _AGAIN, ''),
    ('503 for good', {'status': 503, 'times': None}, _ERROR, '503|Gave up'),
    ('hang-up once', {'drop': True}, _AGAIN, ''),
    ('hang-up for good', {'drop': True, 'times': None}, _ERROR, 'connection|Gave up|reached'),
    ('silence', {'stall': True, 'times': None}, _IN_TIME, 'answer|Gave up'),
    ('answer lost once', {'drop': True, 'after': True}, 'done: what took effect is found', ''),
)

_PUSH_STEPS = (
    ('look at the repository', 'GET', r'^/api/models/me/x(/revision/|$)'),
    ('create it', 'POST', r'^/api/repos/create'),
    ('create the branch', 'POST', r'/branch/'),
    ('list its files', 'POST', r'/paths-info/'),
    ('find its card', 'HEAD', r'/resolve/.*README'),
    ('read its card', 'GET', r'/resolve/.*README'),
    ('check our card', 'POST', r'^/api/validate-yaml'),
    ('announce the files', 'POST', r'/preupload/'),
    ('ask for storage', 'POST', r'/info/lfs/objects/batch'),
    ('upload', 'PUT', r'^/repos/'),
    ('have it verified', 'POST', r'/info/lfs/objects/verify'),
    ('commit', 'POST', r'/commit/'),
)
_LOAD_STEPS = (
    ('resolve the revision', 'GET', r'^/api/models/me/x'),
    ('ask for checksums', 'POST', r'/paths-info/'),
    ('find config.json', 'HEAD', r'/resolve/.*config'),
    ('read config.json', 'GET', r'/resolve/.*config'),
    ('find model.safetensors', 'HEAD', r'/resolve/.*model'),
    ('read model.safetensors', 'GET', r'^/repos/'),
)


def _slug(*words: str) -> str:
    return '-'.join(words).replace(',', '').replace(' ', '_')


# What the client itself makes of some answers differs from the rule.
_AT_ONCE = ('done: the client asks again at once', '')
_PUSH_EXCEPTIONS: dict[tuple[str, str], tuple[str, str]] = {
    ('find its card', '429 once, Retry-After 3'): _AT_ONCE,
}
_LOAD_EXCEPTIONS: dict[tuple[str, str], tuple[str, str]] = {
    ('find config.json', '429 once, Retry-After 3'): _AT_ONCE,
    ('find model.safetensors', '429 once, Retry-After 3'): _AT_ONCE,
}


def _cross(steps: Iterable[tuple[str, str, str]], exceptions: dict[tuple[str, str], tuple[str, str]]) -> list[Row]:
    rows = []
    for step, method, path in steps:
        for name, fault, outcome, match in _FAULTS:
            outcome, match = exceptions.get((step, name), (outcome, match))
            rows.append(Row(_slug(step, name), name, outcome, step, method, path, fault, match))
    return rows


PUSH_FAULTS = _cross(_PUSH_STEPS, _PUSH_EXCEPTIONS)

LOAD_FAULTS = [
    *_cross(_LOAD_STEPS, _LOAD_EXCEPTIONS),
    *(
        Row(_slug(step, name), name, outcome, step, 'GET', path, fault, match)
        for step, path in (('read config.json', r'/resolve/.*config'), ('read model.safetensors', r'^/repos/'))
        for name, fault, outcome, match in (
            ('one bit flipped once', {'corrupt': True}, 'done: deleted and fetched again', ''),
            (
                'one bit flipped for good',
                {'corrupt': True, 'times': None},
                'error: checksum; the file is gone from the cache',
                'checksum',
            ),
            ('cut short once', {'truncate': 100}, _AGAIN, ''),
            ('cut short for good', {'truncate': 100, 'times': None}, _ERROR, 'connection|Gave up|Consistency|reached'),
            ('cut short, length honest', {'truncate': 100, 'honest': True, 'times': None}, _ERROR, 'Consistency'),
        )
    ),
]


def _markdown(rows: Iterable[Row], first: str, step: str = 'step') -> str:
    lines = [f'| {step} | {first} | outcome |', '|---|---|---|']
    lines += [f'| {r.step} | {r.what} | {r.outcome} |' for r in rows]
    return '\n'.join(lines)


def _matrix() -> str:
    """Faults by what becomes of them when they strike a step of a push or of a load."""
    names = list(dict.fromkeys(r.what for r in [*PUSH_FAULTS, *LOAD_FAULTS]))
    lines = ['| fault | pushing | loading |', '|---|---|---|']
    for name in names:
        cells = []
        for rows in (PUSH_FAULTS, LOAD_FAULTS):
            outcomes: dict[str, list[str]] = {}
            for r in rows:
                if r.what == name:
                    outcomes.setdefault(r.outcome, []).append(r.step)
            most = max(outcomes, key=lambda o: len(outcomes[o]), default='')
            rest = [f'{o} ({", ".join(steps)})' for o, steps in outcomes.items() if o != most]
            shown = f'{most}, {len(outcomes[most])} steps' if most else '-'
            cells.append('; '.join([shown, *rest]))
        lines.append(f'| {name} | {cells[0]} | {cells[1]} |')
    return '\n'.join(lines)


def _counts(rows: Iterable[Row], title: str) -> str:
    """How many rows of each step end well, and how many are refused or an error."""
    steps: dict[str, list[Row]] = {}
    for r in rows:
        steps.setdefault(r.step, []).append(r)
    lines = [f'| {title} | rows | done | refused or an error |', '|---|--:|--:|--:|']
    for step, found in steps.items():
        done = sum(r.ends_well for r in found)
        lines.append(f'| {step} | {len(found)} | {done} | {len(found) - done} |')
    return '\n'.join(lines)


def _details(title: str, rows: Iterable[Row], first: str) -> str:
    return f'<details>\n<summary>{title}</summary>\n\n{_markdown(rows, first)}\n\n</details>'


def page() -> str:
    """docs/reliability.md."""
    from hub_attacks import ATTACKS, EVENTS, KILLS
    from model_rows import MODELS

    kills = '\n'.join(f'| `{r.what}` | {r.outcome} | {r.fault["at_least"]} |' for r in KILLS)
    return f"""# Reliability

Each row is a test that runs the real client against a Hub on the loopback interface
(`tests/hub/support/hub_server.py`), over real HTTP. This page is written by
`python tests/hub/support/hub_tables.py`, and a test compares it with the rows that ran.

## {len(PUSH_FAULTS)} faults while pushing, {len(LOAD_FAULTS)} while loading

Each fault strikes each of the {len(_PUSH_STEPS)} requests of a push and the {len(_LOAD_STEPS)} of a load with an empty
cache. Afterwards the repository holds either the old files or all of the new ones, and nothing that somebody else
committed is lost. 'For good' lasts until the run has ended; then the same command runs again without the fault. All
waiting together, over all requests and attempts of one push or load, ends after 100 s without progress.

{_matrix()}

## {len(ATTACKS)} attacks

What a repository, a cache or a folder may hold. 'Refused' is a `HubFileError` that names the file and the field, before
anything was built from it; a folder that is to be pushed is refused by the same rules.

{_counts(ATTACKS, 'in')}

## {len(KILLS)} commands, killed at every file operation

A process ends, as by SIGKILL, at each of its file operations below the folder, before that takes effect; then others
read the folder, and the same command runs again. Nobody ever reads a mixture: not timm's own reader, which compares
nothing, and not ours, for which config.json names the sha256 of its weights. The command finishes, and what the killed
one left is gone.

| command | what is read, and then | operations, at least |
|---|---|--:|
{kills}

Two processes that save over one folder take turns; a file that cannot be written in full (a file size limit, a full
disc) changes nothing.

## {len(EVENTS)} events

{_counts(EVENTS, 'around a')}

Over Xet the bytes are moved by the package `hf_xet`, where it is installed, with time limits of its own:
`HF_HUB_DISABLE_XET=1` has all of it go over HTTP, with ours. What these rows say of dripping is of bodies; headers that
drip are not bounded but by the 100 KB that the HTTP library takes of them.

## {len(MODELS)} ways of a model

Each names the test that shows it, below `tests/`; what was measured once only says so.

{_markdown(MODELS, 'what happens', 'where')}

## All rows

{_details(f'Pushing: {len(PUSH_FAULTS)} faults', PUSH_FAULTS, 'fault')}

{_details(f'Loading: {len(LOAD_FAULTS)} faults', LOAD_FAULTS, 'fault')}

{_details(f'{len(ATTACKS)} attacks', ATTACKS, 'attack')}

{_details(f'{len(EVENTS)} events', EVENTS, 'event')}
"""


if __name__ == '__main__':
    from timm_attn.files import atomic_write

    PAGE.parent.mkdir(exist_ok=True)
    with atomic_write(PAGE) as path:
        path.write_text(page(), encoding='utf-8')

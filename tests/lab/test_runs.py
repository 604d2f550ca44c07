import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier

import pytest

from timm_attn.lab.runs import EXPIRY, Lease, LeaseLost


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def elsewhere(lease: Lease) -> Lease:
    """The lease, held on a machine where this one cannot look for the process."""
    assert lease.path is not None
    lease._content = lambda: f'["x", {lease._beats}, "another machine", 1, ""]'.encode()  # type: ignore[method-assign]
    lease.path.write_bytes(lease._content())
    return lease


def test_one_of_many_gets_a_run_that_is_free_and_one_that_is_expired(tmp_path: Path) -> None:
    for round_ in range(20):
        barriers = {8: Barrier(8), 7: Barrier(7)}
        clocks = [Clock() for _ in range(8)]
        leases = [Lease(tmp_path / str(round_), 'run', c) for c in clocks]

        def take(lease: Lease, barriers: dict[int, Barrier] = barriers, among: int = 8) -> bool:
            barriers[among].wait()
            return lease.take()

        with ThreadPoolExecutor(8) as pool:
            took = list(pool.map(take, leases))
            assert took.count(True) == 1
            elsewhere(leases[took.index(True)])
            others = [lease for lease, t in zip(leases, took, strict=True) if not t]
            assert not any(lease.take() for lease in others)  # Seen for the first time: no judgement yet.
            for clock in clocks:
                clock.now += EXPIRY + 1
            assert list(pool.map(partial(take, among=7), others)).count(True) == 1
        with pytest.raises(LeaseLost):
            leases[took.index(True)].check()


def test_a_holder_that_gives_signs_of_life_keeps_its_run_whatever_the_clocks_say(tmp_path: Path) -> None:
    mine, clock = Lease(tmp_path, 'run', Clock(1e9)), Clock(-1e6)
    assert mine.take()
    elsewhere(mine)
    watcher = Lease(tmp_path, 'run', clock)
    assert not watcher.take() and not watcher.moved
    for _ in range(5):
        clock.now += EXPIRY - 1
        mine.beat()
        os.utime(mine.path or '', (0, 0))  # Times of files, which another machine's clock makes, say nothing.
        assert not watcher.take() and watcher.moved
    mine.check()
    clock.now += EXPIRY + 1
    assert watcher.take()
    mine.beat()  # Too late: it changes nothing that is another's.
    watcher.check()
    mine.release()
    watcher.check()
    watcher.release()
    assert not list(tmp_path.iterdir())


def test_a_killed_process_of_this_machine_is_known_at_once(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from timm_attn.lab.runs import Lease
        lease = Lease(Path({str(tmp_path)!r}), 'run')
        print(lease.take(), flush=True)
        sys.stdin.read()
    """)
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, '-c', script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(root)},
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == 'True\n'
        watcher = Lease(tmp_path, 'run', Clock())
        assert not watcher.take()
        child.send_signal(signal.SIGKILL)
    assert watcher.take()


@pytest.mark.parametrize('content', ['', 'x', '[]', '[1, 2, 3]', '{}', 'null'])
def test_a_damaged_lease_is_waited_for_like_any_other(tmp_path: Path, content: str) -> None:
    (tmp_path / 'run.0.lease').write_text(content)
    clock = Clock()
    watcher = Lease(tmp_path, 'run', clock)
    assert not watcher.take()
    clock.now += EXPIRY + 1
    assert watcher.take()


def test_names_with_dots_do_not_meet(tmp_path: Path) -> None:
    first, second = Lease(tmp_path, 'a.1', Clock()), Lease(tmp_path, 'a', Clock())
    assert first.take() and second.take()
    first.release()
    second.check()

"""Fixtures for tests against the loopback Hub of `tests/hub/support/hub_server.py`.

Servers (one per test; their users are in `TOKENS`):

* `hub`: a `HubServer` without Xet: plain HTTP and LFS.
* `xet_hub`: the same with Xet, which is what the client speaks by default.

The client in this process, in milliseconds, for most tests:

* `hub_client`: points the installed huggingface_hub at `hub`, with a fresh cache, the token of `me`, Xet off.
* `xet_client`: the same for `xet_hub`, with Xet on.

Both give a `Client`: `.hub`, `.cache`, `.home`, `.sleeps` (seconds the client wanted to wait between tries: it does not
really wait, nothing else of it is changed), `.login(token)` (None: anonymous), `.offline()`, `.timeouts(seconds)`,
`.set(constant, value)`, `.new_xet_session(cache)`.
The endpoint, cache and switches of huggingface_hub are read at its import and kept in module globals; the fixture sets
all of them and puts them back, and `test_server.py` shows by the request log that each kind of call reaches the server.

The client in a process of its own, from a clean import, in seconds:

* `client_env`: the environment for it (with `hub`): a fresh HF_HOME, the token of `me`, Xet off.
* `run_client(code_or_function, *args, token=..., server=..., env=..., patient=False, check=True)`: runs a string or a
  self-contained function with JSON arguments, gives a `Finished` with `returncode`, `stdout`, `stderr`, `value` (what
  the function returned). The client does not wait between tries unless `patient`.
* `start_client(...)`: the same, but gives the running `subprocess.Popen`, to be killed by the test.

Types for annotations: `from hub_client import Client, RunClient, StartClient` and `from hub_server import HubServer`.
Races are made with `fault(..., call=function)`, `fault(..., stall=True)` and `wait_for(...)`, never by sleeping.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import (
    TOKENS,
    Client,
    Clock,
    RunClient,
    StartClient,
    client_environment,
    client_here,
    run_with,
    serve,
    start_clients,
)
from hub_server import HubServer

from timm_attn.hub import client


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A loopback Hub without Xet."""
    yield from serve(xet=False)


@pytest.fixture
def xet_hub() -> Iterator[HubServer]:
    """A loopback Hub with Xet."""
    pytest.importorskip('lz4.frame', reason='the Xet server unpacks chunks with lz4')
    yield from serve(xet=True)


@pytest.fixture
def hub_client(hub: HubServer, tmp_path: Path) -> Iterator[Client]:
    """The client of this process on `hub`, without Xet."""
    yield from client_here(hub, tmp_path / 'hf_home', xet=False)


@pytest.fixture
def xet_client(xet_hub: HubServer, tmp_path: Path) -> Iterator[Client]:
    """The client of this process on `xet_hub`, with Xet."""
    yield from client_here(xet_hub, tmp_path / 'hf_home', xet=True)


@pytest.fixture
def client_env(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """Environment of a separate client of `hub`."""
    return client_environment(hub, tmp_path / 'hf_home_of_process', TOKENS['me'])


@pytest.fixture
def start_client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StartClient]:
    """Start a client in a process of its own; it is killed at the end of the test if it still runs."""
    yield from start_clients(lambda: request.getfixturevalue('hub'), tmp_path)


@pytest.fixture
def run_client(start_client: StartClient) -> RunClient:
    """Run a client in a process of its own to its end."""
    return run_with(start_client)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Our own client with a few quick attempts, and the pauses it would take."""
    clock = Clock()
    monkeypatch.setattr(client, 'SETTINGS', client.Settings(timeout=10, tries=3, attempts=3))
    monkeypatch.setattr(client, 'time', clock)
    return clock

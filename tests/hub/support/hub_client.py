"""The real huggingface_hub client against the loopback Hub: in this process, or in one of its own.

The fixtures of `tests/hub/conftest.py` are made of this.
"""

import importlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pytest
from hub_server import HubServer

ROOT = Path(__file__).resolve().parents[3]

# User (and what he may do) of each token: `me` writes to me/ and org/.
TOKENS = {'me': 'hf_me_write', 'reader': 'hf_me_read', 'other': 'hf_other_write'}

# No telemetry, and hardly a wait between the tries of hf_xet, which are as many as ever.
_XET_SWITCHES = {'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_XET_CLIENT_RETRY_BASE_DELAY': '1ms'}

_PROXIES = ('HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY', 'http_proxy', 'https_proxy', 'all_proxy')


def serve(xet: bool) -> Iterator[HubServer]:
    """A Hub with the users of `TOKENS`."""
    with HubServer(xet=xet) as server:
        server.add_user('me', TOKENS['me'], namespaces=['org'])
        server.add_user('me', TOKENS['reader'], role='read', namespaces=['org'])
        server.add_user('other', TOKENS['other'])
        yield server


# --- In this process --------------------------------------------------------------------------------------------------


class _Clock:
    """The time module for the client's retries: sleeps are noted, not slept."""

    def __init__(self, sleeps: list[float]) -> None:
        self._sleeps = sleeps

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        self._sleeps.append(seconds)


@dataclass
class Client:
    """The huggingface_hub of this process, pointed at a loopback Hub."""

    hub: HubServer
    home: Path
    patch: pytest.MonkeyPatch
    sleeps: list[float] = field(default_factory=list)

    @property
    def cache(self) -> Path:
        return self.home / 'hub'

    def login(self, token: str | None) -> None:
        """Be the user of this token, None: nobody."""
        if token is None:
            self.patch.delenv('HF_TOKEN', raising=False)
        else:
            self.patch.setenv('HF_TOKEN', token)

    def offline(self, offline: bool = True) -> None:
        """As with HF_HUB_OFFLINE=1."""
        self.set('HF_HUB_OFFLINE', offline)

    def timeouts(self, seconds: float) -> None:
        """As with HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT."""
        self.set('HF_HUB_ETAG_TIMEOUT', seconds)
        self.set('HF_HUB_DOWNLOAD_TIMEOUT', seconds)

    def new_xet_session(self, cache: Path) -> None:
        """Forget what hf_xet knows of earlier transfers."""
        from huggingface_hub.utils._xet import abort_xet_session

        abort_xet_session()
        self.patch.setenv('HF_XET_CACHE', str(cache))

    def set(self, name: str, value: object) -> None:
        """Set a constant of huggingface_hub in every module that holds a copy of it."""
        holders = [module for module in _client_modules() if name in vars(module)]
        if not holders:
            raise AttributeError(f'huggingface_hub has no constant {name}')
        for module in holders:
            self.patch.setattr(module, name, value)


def _client_modules() -> list[ModuleType]:
    return [m for name, m in sys.modules.items() if m and (name + '.').startswith('huggingface_hub.')]


def _point_client(hub: HubServer, home: Path, patch: pytest.MonkeyPatch, xet: bool) -> Client:
    import huggingface_hub
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    # Whoever copies a constant at import must not do so while it is changed.
    for name in ('repocard', '_snapshot_download', '_commit_api', '_upload_pipeline', 'lfs', 'hf_file_system'):
        importlib.import_module(f'huggingface_hub.{name}')
    for name in ('_git_credential', '_cache_manager', '_xet', 'tqdm'):
        importlib.import_module(f'huggingface_hub.utils.{name}')

    for name in list(os.environ):
        if name in _PROXIES or name.startswith(('HF_', 'HUGGING')) or name == 'TRANSFORMERS_OFFLINE':
            patch.delenv(name)
    client = Client(hub, home, patch)
    client.login(TOKENS['me'])
    host = hub.endpoint.removeprefix('http://').rsplit(':', 1)[0]
    changed = {
        'ENDPOINT': hub.endpoint,
        'HUGGINGFACE_CO_URL_TEMPLATE': hub.endpoint + '/{repo_id}/resolve/{revision}/{filename}',
        'HF_URL_HOSTS': constants.HF_URL_HOSTS | {host},
        '_HUB_ORIGINS': _http._HUB_ORIGINS | {_http._url_origin(hub.endpoint)},
        'HF_HOME': str(home),
        'HF_HUB_CACHE': str(home / 'hub'),
        'HUGGINGFACE_HUB_CACHE': str(home / 'hub'),
        'HF_ASSETS_CACHE': str(home / 'assets'),
        'HF_XET_CACHE': str(home / 'xet'),
        'HF_TOKEN_PATH': str(home / 'token'),
        'HF_STORED_TOKENS_PATH': str(home / 'stored_tokens'),
        'AGENT_HARNESSES_PATH': str(home / '.agent_harnesses.json'),
        'HF_HUB_DISABLE_XET': not xet,
        'HF_HUB_DISABLE_TELEMETRY': True,
        'HF_HUB_DISABLE_PROGRESS_BARS': True,
        'HF_HUB_OFFLINE': False,
        'XET_CONNECTION_INFO_CACHE': {},
    }
    for name, value in changed.items():
        client.set(name, value)
    # hf_xet reads the environment whenever it opens a session.
    for name, value in {'HF_HOME': str(home), 'HF_XET_CACHE': str(home / 'xet'), **_XET_SWITCHES}.items():
        patch.setenv(name, value)
    # The module-level functions, such as huggingface_hub.create_repo, are methods of this one object.
    patch.setattr(hf_api.api, 'endpoint', hub.endpoint)
    patch.setattr(hf_api.api, '_whoami_cache', {})
    assert huggingface_hub.create_repo.__self__ is hf_api.api
    clock = _Clock(client.sleeps)
    patch.setattr(_http, 'time', clock)
    patch.setattr(file_download, 'time', clock)
    return client


def client_here(hub: HubServer, home: Path, xet: bool) -> Iterator[Client]:
    """The client of this process, pointed at a Hub and put back afterwards."""
    import huggingface_hub
    from huggingface_hub.utils import _http
    from huggingface_hub.utils._xet import abort_xet_session

    factory = _http._GLOBAL_CLIENT_FACTORY
    huggingface_hub.close_session()
    abort_xet_session()
    with pytest.MonkeyPatch.context() as patch:
        yield _point_client(hub, home, patch, xet)
        abort_xet_session()
        huggingface_hub.set_client_factory(factory)


# --- In another process -----------------------------------------------------------------------------------------------


@dataclass
class Finished:
    """A client that ran in a process of its own."""

    returncode: int
    stdout: str
    stderr: str
    value: Any = None


_PRELUDE = """
import json, sys, time
if {impatient}:
    import huggingface_hub.file_download, huggingface_hub.utils._http

    class _Clock:
        def __getattr__(self, name):
            return getattr(time, name)

        def sleep(self, seconds):
            pass

    huggingface_hub.file_download.time = huggingface_hub.utils._http.time = _Clock()
"""

_CALL = """
_value = {name}(*json.loads(sys.argv[1]))
with open(sys.argv[2], 'w') as _file:
    json.dump(_value, _file)
"""


def client_environment(hub: HubServer, home: Path, token: str | None, patient: bool = False) -> dict[str, str]:
    """Environment of a process whose huggingface_hub talks to `hub`."""
    drop = ('HF_', 'HUGGING', 'TRANSFORMERS_OFFLINE', 'COV_', 'PYTHONWARNINGS')
    env = {k: v for k, v in os.environ.items() if not k.startswith(drop) and k not in _PROXIES}
    env |= {
        'HF_ENDPOINT': hub.endpoint,
        'HF_HOME': str(home),
        'HF_HUB_DISABLE_TELEMETRY': '1',
        'HF_HUB_DISABLE_PROGRESS_BARS': '1',
        'TORCH_HOME': str(home / 'torch'),
        'OMP_NUM_THREADS': '1',
        'PYTHONPATH': os.pathsep.join([str(ROOT), *filter(None, [env.get('PYTHONPATH')])]),
    }
    if hub.cas is None:
        env['HF_HUB_DISABLE_XET'] = '1'
    if not patient:
        env |= _XET_SWITCHES
    if token is not None:
        env['HF_TOKEN'] = token
    return env


class Clock:
    """Notes the pauses that our own client takes between attempts, in place of taking them."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)


class StartClient(Protocol):
    def __call__(
        self,
        code: str | Callable[..., Any],
        *args: Any,
        token: str | None = ...,
        server: HubServer | None = ...,
        env: dict[str, str] | None = ...,
        patient: bool = ...,
    ) -> 'subprocess.Popen[str]': ...


class RunClient(Protocol):
    def __call__(
        self,
        code: str | Callable[..., Any],
        *args: Any,
        token: str | None = ...,
        server: HubServer | None = ...,
        env: dict[str, str] | None = ...,
        patient: bool = ...,
        check: bool = ...,
        timeout: float = ...,
    ) -> Finished: ...


def start_clients(default: Callable[[], HubServer], folder: Path) -> Iterator[StartClient]:
    """Starts clients in processes of their own, working in `folder`; those that still run at the end are killed."""
    running: list[subprocess.Popen[str]] = []

    def start(
        code: str | Callable[..., Any],
        *args: Any,
        token: str | None = TOKENS['me'],
        server: HubServer | None = None,
        env: dict[str, str] | None = None,
        patient: bool = False,
    ) -> 'subprocess.Popen[str]':
        server = server or default()
        text = _PRELUDE.format(impatient=not patient)
        text += code if isinstance(code, str) else textwrap.dedent(inspect.getsource(code))
        text += '' if isinstance(code, str) else _CALL.format(name=code.__name__)
        script = folder / f'client_{len(running)}.py'
        script.write_text(text)
        process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(args), str(script.with_suffix('.json'))],
            cwd=folder,
            env=client_environment(server, folder / 'hf_home_of_process', token, patient) | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def run_with(start: StartClient) -> RunClient:
    """Runs a client in a process of its own to its end."""

    def run(
        code: str | Callable[..., Any], *args: Any, check: bool = True, timeout: float = 120, **options: Any
    ) -> Finished:
        process = start(code, *args, **options)
        stdout, stderr = process.communicate(timeout=timeout)
        assert isinstance(process.args, list)
        found = Path(str(process.args[-1]))
        value = json.loads(found.read_text(encoding='utf-8')) if found.exists() else None
        if check and process.returncode:
            pytest.fail(f'The client ended with {process.returncode}:\n{stdout}\n{stderr}')
        return Finished(process.returncode, stdout, stderr, value)

    return run

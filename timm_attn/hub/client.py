"""The Hub's client with an end to waiting, and its many exceptions as one.

huggingface_hub sends its requests without a time limit, retries some of them for minutes, and fails with its own
errors, those of its HTTP library, of the Xet storage and of Python. Inside `timeouts()` each request has a time limit
and a bounded number of tries, and all waiting together has an end; whatever fails in `call()` becomes a `HubError` that
says what to do.
"""

import importlib
import json
import logging
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import HfApi, constants, errors
from huggingface_hub.utils import _http as _hub_http

from ..version import package_version

# httpx2, or httpx with an older client: whichever the client's own errors come from.
_http: Any = importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.partition('.')[0])


_logger = logging.getLogger(__name__)
T = TypeVar('T')


class HubError(RuntimeError):
    """Something between us and the Hub failed; the message says what to do.

    Args:
        message: What happened and what to do.
        status: The HTTP status, where the Hub answered.
        transient: Whether the same request may succeed a moment later.
        wait: Seconds the Hub asks to wait.
        offline: Whether the network was not asked, because HF_HUB_OFFLINE is set.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        transient: bool = False,
        wait: float | None = None,
        offline: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.transient = transient
        self.wait = wait
        self.offline = offline


class HubFileError(HubError, ValueError):
    """A file of a repository or folder was refused: the message names the file, the field and the rule."""


@dataclass
class Settings:
    """How long to wait.

    Args:
        timeout: Seconds without a byte after which a request has failed.
        tries: How often one request is sent before we give up on it.
        attempts: How often a push or load starts over, each time from what the Hub holds then.
        wait: Seconds before the second attempt, doubled for each further one.
        longest_wait: A `Retry-After` beyond this many seconds is reported, not waited for.
        patience: Seconds that one push or load spends in all on requests that fail and on pauses. What makes progress
            does not count.
        slowest: Bytes a second of an answer, over `patience` seconds, below which it is no progress.
    """

    timeout: float = 30.0
    tries: int = 4
    attempts: int = 5
    wait: float = 1.0
    longest_wait: float = 100.0
    patience: float = 100.0
    slowest: float = 1000.0


SETTINGS = Settings()


def hub_api(token: str | bool | None = None) -> HfApi:
    """The client that all our requests go through.

    Args:
        token: A token, None for the one that is logged in, False for none.
    """
    return HfApi(token=token, library_name='timm_attn', library_version=package_version())


class _Patience:
    """The seconds that one push or load has lost so far to requests that failed, and to pauses."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.since = monotonic()

    @property
    def left(self) -> float:
        return SETTINGS.patience - self.spent

    def progress(self) -> None:
        """A request is sent that is no repetition of the last one."""
        self.since = monotonic()

    def failed(self) -> None:
        """The last request came to nothing. One that moved bytes for longer than the time limit was no standstill."""
        now = monotonic()
        self.spent += min(now - self.since, SETTINGS.timeout)
        self.since = now


class _Paced(_http.SyncByteStream):
    """The body of an answer, which ends in an error where it drips: each byte comes in time, and the last one never."""

    def __init__(self, stream: Any, path: str) -> None:
        self.stream, self.path = stream, path

    def __iter__(self) -> Iterator[bytes]:
        since, received = monotonic(), 0
        for chunk in self.stream:
            received += len(chunk)
            passed = monotonic() - since
            if passed >= SETTINGS.patience:
                if received < SETTINGS.slowest * passed:
                    raise HubError(
                        f'Gave up after {passed:.0f} s in which {self.path} sent {received} bytes, less than '
                        f'{SETTINGS.slowest:g} bytes a second. {_CHECK}'
                    )
                since, received = monotonic(), 0
            yield chunk

    def close(self) -> None:
        self.stream.close()


class _Tries:
    """Counts how often a request had no answer below 400, and stops the client's own retries at a bound."""

    def __init__(self) -> None:
        self.counts: dict[tuple[Any, ...], tuple[int, str]] = {}
        self.last: dict[int, tuple[Any, ...]] = {}

    @staticmethod
    def _key(request: Any) -> tuple[Any, ...]:
        # A resumed download has another range: it makes progress, and progress is not counted.
        return threading.get_ident(), request.method, str(request.url), request.headers.get('range')

    def before(self, request: Any) -> None:
        key = self._key(request)
        patience = _patience
        if self.last.get(key[0]) == key:
            patience.failed()
        else:
            patience.progress()
        self.last[key[0]] = key
        if patience.left <= 0:
            raise HubError(f'Gave up after {patience.spent:.0f} s without progress at {request.url.path}. {_CHECK}')
        limit = min(SETTINGS.timeout, patience.left)
        # The client overrides the time limit of the session with 60 s for some requests.
        given = request.extensions.get('timeout', {})
        request.extensions['timeout'] = {
            k: limit if given.get(k) is None else min(limit, given[k]) for k in ('connect', 'read', 'write', 'pool')
        }
        count, last = self.counts.get(key, (0, 'no answer'))
        if count >= SETTINGS.tries:
            del self.counts[key]
            raise HubError(
                f'Gave up after {count} tries of {request.method} {request.url.path} (last: {last}). {_CHECK}'
            )
        self.counts[key] = (count + 1, f'no answer within {limit:g} s')

    def after(self, response: Any) -> None:
        key = self._key(response.request)
        response.stream = _Paced(response.stream, response.request.url.path)
        if response.is_redirect:
            _check_redirect(response)
        if response.status_code < 400:
            self.counts.pop(key, None)
            return
        if key in self.counts:
            self.counts[key] = (self.counts[key][0], f'HTTP {response.status_code}')
        wait = _retry_after(response)
        if wait is not None and wait > _longest_wait():
            raise HubError(
                f'The Hub limits the rate of requests and asks to wait {wait:g} s: run the same command again then.',
                status=response.status_code,
                wait=wait,
            )
        _patience.spent += wait or 0


def _longest_wait() -> float:
    return min(SETTINGS.longest_wait, _patience.left)


def _check_redirect(response: Any) -> None:
    """Files lie on other hosts; the Hub's own answers, and what is sent to it, do not."""
    request = response.request
    if not request.url.path.startswith('/api/'):
        return
    target = request.url.join(response.headers.get('location', ''))
    same_host = (target.scheme, target.host, target.port) == (request.url.scheme, request.url.host, request.url.port)
    if not same_host or (request.method != 'GET' and response.status_code not in (307, 308)):
        raise HubError(
            f'{request.url.host} answers {request.method} {request.url.path} with a redirect ({response.status_code}) '
            f'to {target.host}{target.path}: check HF_ENDPOINT and the proxy; a login page may stand in between.',
            status=response.status_code,
        )


_CHECK = (
    'Check the connection and https://status.huggingface.co, then run the same command again: it goes on where it '
    'stopped.'
)
# One for all threads, as uploads have threads of their own: time that passes for all of them is counted once.
_patience = _Patience()
_lock = threading.Lock()
_users = 0
_previous: Any = None


@contextmanager
def timeouts() -> Iterator[None]:
    """Gives each request of the Hub's client a time limit and a bounded number of tries, until the end of the block.

    The client is one per process, so pushes and loads that run at once in several threads share the limits; the last
    one takes them back.
    """
    global _users, _previous, _patience
    with _lock:
        _users += 1
        if _users == 1:
            _patience = _Patience()
            previous = _previous = _hub_http._GLOBAL_CLIENT_FACTORY
            tries = _Tries()

            def factory() -> Any:
                client = previous()
                client.timeout = _http.Timeout(SETTINGS.timeout)
                hooks = client.event_hooks
                client.event_hooks = {
                    'request': [*hooks.get('request', []), tries.before],
                    'response': [*hooks.get('response', []), tries.after],
                }
                return client

            huggingface_hub.set_client_factory(factory)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                huggingface_hub.set_client_factory(_previous)


_LOGIN = "log in with 'hf auth login', or set HF_TOKEN"
_STATUS = {
    400: 'The Hub refused the request as malformed ({detail}).',
    401: 'The Hub refused the token for {repo} ({detail}): ' + _LOGIN + ' to a token that is still valid.',
    402: 'The Hub asks for payment for {repo} ({detail}): see the billing page of the account, or push a public '
    'repository.',
    403: 'The token may not do this on {repo} ({detail}): use a token with write access to its namespace.',
    404: 'The Hub does not know what was asked for at {repo} ({detail}): check the name and the revision.',
    409: 'The Hub reports a conflict for {repo} ({detail}): another operation is under way; run the same command '
    'again.',
    412: '{repo} changed while we worked ({detail}): run the same command again, it starts from the new state.',
    413: 'The Hub refused the size of the upload to {repo} ({detail}).',
    429: 'The Hub limits the rate of requests ({detail}): wait, then run the same command again.',
}
# Raised by the Xet storage and by this machine; clients before 2.0 lack the first.
_LOCAL: tuple[type[Exception], ...] = (OSError, RuntimeError, getattr(errors, 'XetDownloadError', OSError))
_TRANSIENT = frozenset({408, 409, 412, 429, 500, 502, 503, 504})
_AGAIN = 'run the same command again: it goes on where it stopped'


def call(action: str, repo_id: str, token: str | bool | None, work: Callable[[], T]) -> T:
    """Does something with the Hub, and turns whatever the client raises into a `HubError` with a remedy.

    The token is in no text of the error, and the error leads to none that holds it.

    Args:
        action: What is being done, such as 'push to'.
        repo_id: The repository.
        token: The token in use, which must not be shown.
        work: What to do.

    Returns:
        What `work` returns.

    Raises:
        HubError: Something failed.
    """
    try:
        return work()
    except Exception as e:
        error = as_hub_error(e, repo_id, token)
        if error is None:
            raise
        if error is not e:
            text = f'Could not {action} {repo_id}. {error}'
            error = HubError(
                text, status=error.status, transient=error.transient, wait=error.wait, offline=error.offline
            )
    # Not in the except block: what the client raised may quote the token, and would be printed with its traceback.
    error.__cause__ = error.__context__ = None
    raise error


def retry(action: str, repo_id: str, token: str | bool | None, work: Callable[[], T]) -> T:
    """Does something that may be repeated, again when it failed for a reason that may pass.

    Args:
        action: What is being done, such as 'push to'.
        repo_id: The repository.
        token: The token in use, which must not be shown.
        work: What to do; it starts from what the Hub holds then.

    Returns:
        What `work` returns.

    Raises:
        HubError: Somebody has to act, the Hub asks for more patience than `SETTINGS` has, or the attempts are used up.
    """
    delay = SETTINGS.wait
    for attempt in range(1, SETTINGS.attempts + 1):
        try:
            return call(action, repo_id, token, work)
        except HubError as e:
            _patience.failed()
            pause = delay if e.wait is None else e.wait
            # A commit in between is no reason to wait.
            pause = 0 if e.status == 412 else pause
            if attempt == SETTINGS.attempts or not e.transient or pause > _longest_wait():
                raise
            _logger.warning('%s (attempt %d of %d; the next in %g s)', e, attempt, SETTINGS.attempts, pause)
        time.sleep(pause)
        _patience.spent += pause
        delay *= 2
    raise AssertionError('the last attempt returns or raises')


def as_hub_error(e: Exception, repo_id: str, token: str | bool | None = None) -> HubError | None:
    """What an exception of the client means, or None when it is none of those a Hub can cause.

    Args:
        e: The exception.
        repo_id: The repository.
        token: The token in use, which must not be shown.
    """
    if isinstance(e, HubError):
        return e
    # The client wraps what failed in an upload, and in the look at a file that is not cached.
    wrapped = isinstance(e, errors.LocalEntryNotFoundError) or type(e) is RuntimeError
    if wrapped and isinstance(e.__cause__, Exception):
        inner = as_hub_error(e.__cause__, repo_id, token)
        if inner is not None:
            return inner
    found = _explain(e, repo_id, _hidden(str(e), token))
    unreadable = isinstance(e, KeyError | TypeError | ValueError | IndexError | AttributeError)
    if found is None and unreadable and _raised_by_client(e):
        return HubError(
            f'The Hub, or what answers in its place, said something that the client cannot read '
            f'({type(e).__name__}: {_hidden(str(e), token)}): check HF_ENDPOINT and the proxy.'
        )
    return found


def _raised_by_client(e: Exception) -> bool:
    """Whether an exception comes out of the Hub's client, and not out of code of ours or what that calls."""
    frames = [frame.f_globals.get('__name__', '').partition('.')[0] for frame, _ in traceback.walk_tb(e.__traceback__)]
    known = [name for name in frames if name in ('huggingface_hub', 'timm_attn')]
    return bool(known) and known[-1] == 'huggingface_hub'


def _hidden(text: str, token: str | bool | None) -> str:
    token = token if isinstance(token, str) else huggingface_hub.get_token()
    text = ' '.join(text.split())
    return text.replace(token, '(token)') if token else text


def _retry_after(response: Any) -> float | None:
    limit = _hub_http.parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    value = response.headers.get('retry-after', '').strip()
    return float(value) if value.isdigit() else None


def _nameless(e: BaseException | None) -> bool:
    """Whether the host has no address: no network, or a wrong name; another try soon is no help."""
    while e is not None:
        if isinstance(e, socket.gaierror):
            return True
        e = e.__cause__ or e.__context__
    return False


def _explain(e: Exception, repo: str, detail: str) -> HubError | None:
    if isinstance(e, errors.GatedRepoError):
        return HubError(
            f"'{repo}' is gated: accept its conditions on its page on the Hub, then {_LOGIN} of that account.",
            status=403,
        )
    if isinstance(e, errors.RepositoryNotFoundError):
        return HubError(
            f"There is no repository '{repo}', or it is private: check the name, and {_LOGIN} of an account that may "
            f'see it.',
            status=404,
        )
    if isinstance(e, errors.RevisionNotFoundError):
        return HubError(f"'{repo}' has no such revision ({detail}): name a branch, tag or commit of it.", status=404)
    if isinstance(e, errors.DisabledRepoError):
        return HubError(f"The Hub has disabled access to '{repo}': ask its owner or the Hub's support.", status=403)
    if isinstance(e, errors.RemoteEntryNotFoundError):
        return HubError(f"'{repo}' lacks a file ({detail}).", status=404)
    if isinstance(e, errors.HfHubHTTPError):
        status = e.response.status_code
        text = _STATUS.get(status, f'The Hub answered {status} ({{detail}}): {_AGAIN}; https://status.huggingface.co.')
        text = text.format(repo=f"'{repo}'", detail=detail)
        return HubError(text, status=status, transient=status in _TRANSIENT, wait=_retry_after(e.response))
    if isinstance(e, errors.OfflineModeIsEnabled):
        return HubError('HF_HUB_OFFLINE is set: unset it to use the network.', offline=True)
    if isinstance(e, errors.LocalEntryNotFoundError):
        return HubError(f'The file is not in the cache and the Hub cannot be reached ({detail}): {_AGAIN}.')
    if isinstance(e, errors.HFValidationError):
        return HubError(f'{detail} Expected NAMESPACE/NAME.')
    if isinstance(e, json.JSONDecodeError):
        return HubError(f'The Hub answered with something that is no JSON ({detail}): {_AGAIN}.', transient=True)
    if isinstance(e, ValueError) and 'Invalid metadata in README.md' in detail:
        return HubError(f"The Hub refuses the card's metadata: {detail}", status=400)
    if isinstance(e, _http.HTTPError) and _nameless(e):
        return HubError(
            f'No host of that name: {constants.ENDPOINT} cannot be looked up ({detail}). Connect to the network, '
            'correct HF_ENDPOINT or HTTPS_PROXY, or use a folder that you have: timm_attn.load(FOLDER).'
        )
    if isinstance(e, _http.TimeoutException):
        return HubError(f'The Hub did not answer within {SETTINGS.timeout:g} s: {_AGAIN}.', transient=True)
    if isinstance(e, _http.HTTPError):
        return HubError(f'The connection to the Hub failed ({detail}): {_AGAIN}.', transient=True)
    if isinstance(e, _LOCAL):
        # Consistency checks, a disc that is full, the Xet storage: their own text is the best there is.
        return HubError(f'{type(e).__name__}: {detail}. Once that is settled, {_AGAIN}.')
    return None

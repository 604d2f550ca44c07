"""Models to and from the Hugging Face Hub, in a way that survives failures on either side.

`push_to_hub` checks everything before it creates anything, makes one commit on top of the state it has read, and may
be run again after any failure. `load_from_hub` builds nothing and reads no weight before config, checksum and header
are in order.
"""

import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard, constants
from torch import nn

from .adapter import Base
from .card import check_card, render_card
from .client import HubError, HubFileError, as_hub_error, hub_api, retry, timeouts
from .config import MAX_CONFIG_BYTES, check_config, encode_config, parse_config
from .download import RemoteFile, Snapshot, checksum, fetch, remote_files
from .folder import EvaluationLike, Labels, ModelFiles, decode_card, open_folder, save
from .records import Provenance, Training, add_evaluation, normalise_descriptions, normalise_labels
from .rules import ADAPTER, CARD, CONFIG, MAX_CARD_BYTES, WEIGHTS, check_repo_id

_logger = logging.getLogger(__name__)
_COMMIT = re.compile(r'[0-9a-f]{40}')
# Weights that other loaders fall back to. Beside ours they are another model's.
_STALE = ('pytorch_model.bin',)


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Args:
        repo_id: The repository.
        commit: The commit that holds the model.
        url: Where to look at it.
        changed: The files of the new commit; empty when the repository held all of them already and no commit was made.
        pull_request: The pull request, where one was asked for.
        removed: Old weight files that the commit took away.
    """

    repo_id: str
    commit: str
    url: str
    changed: tuple[str, ...]
    pull_request: str | None = None
    removed: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not (self.changed or self.removed):
            return f'{self.repo_id} is up to date at {self.commit[:12]}: nothing to push, no commit made.'
        what = f'pull request {self.pull_request}' if self.pull_request else f'commit {self.commit[:12]}'
        gone = f' and removed the old {", ".join(self.removed)}' if self.removed else ''
        return f'Pushed {", ".join(self.changed) or "nothing new"} to {self.repo_id}{gone}: {what}, {self.url}'


def _check_target(revision: str | None, create_pr: bool) -> None:
    if revision is not None and _COMMIT.fullmatch(revision):
        raise ValueError(f'revision (={revision!r}) is a commit, and commits do not change: name a branch.')
    if create_pr and revision not in (None, constants.DEFAULT_REVISION):
        raise ValueError(f"create_pr=True opens a pull request against 'main'; leave revision (={revision!r}) out.")


def push_to_hub(
    model_or_dir: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    eval_results: EvaluationLike = None,
    force: bool = False,
    commit_message: str | None = None,
    label_names: Labels | None = None,
    provenance: Provenance | Mapping[str, Any] | None = None,
    training: Training | Mapping[str, Any] | None = None,
    status: str | None = None,
    license: str | None = None,
    data_config: Mapping[str, Any] | None = None,
    adapter: bool = False,
    base: Base = None,
) -> PushResult:
    """Puts a model, its config and its card on the Hub in one commit.

    Nothing is created or sent before the files and the card have passed all checks here. The commit names the state it
    was made from; when somebody else commits in between, the push starts over from theirs, or says so and stops, when
    they committed other weights. Run it again after any failure: what is there already is not sent twice, and when
    everything is there no commit is made.

    Args:
        model_or_dir: A model, or a folder that `save` wrote, an adapter's too.
        repo_id: 'NAMESPACE/NAME'; created when it does not exist.
        private: Whether a repository that is created is private.
        revision: The branch; created from main when it does not exist.
        create_pr: Open a pull request instead of committing to the branch.
        token: A token with write access; None is the one that is logged in.
        eval_results: As for `save`; replaces the records of a folder.
        force: Replace a model of another architecture, a config that cannot be read, or weights that somebody else
            committed meanwhile.
        commit_message: First line of the commit.
        label_names: As for `save`; without them the ones in the repository are kept when the number of classes is the
            same, with their descriptions.
        provenance: As for `save`, for a model.
        training: As for `save`, for a model.
        status: As for `save`, for a model.
        license: As for `save`, for a model.
        data_config: As for `save`, for a model.
        adapter: As for `save`, for a model; a folder is what it is.
        base: As for `save`, for an adapter.

    Returns:
        What was pushed, and at which commit.

    Raises:
        ValueError: An argument, the model or the card is not in order. Nothing was sent.
        HubError: The Hub or the way to it failed; the message says what to do.
    """
    check_repo_id(repo_id)
    _check_target(revision, create_pr)
    with tempfile.TemporaryDirectory(prefix='timm_attn-') as temporary:
        records = {
            'label_names': label_names,
            'provenance': provenance,
            'training': training,
            'status': status,
            'license': license,
            'data_config': data_config,
        }
        if isinstance(model_or_dir, nn.Module):
            save(model_or_dir, temporary, adapter=adapter, base=base, eval_results=eval_results, card=False, **records)
            model = open_folder(temporary)
        else:
            if given := [k for k, v in records.items() if v is not None and k != 'label_names']:
                raise ValueError(
                    f'{given} are for a model; a folder has its own: pass them to save, or edit its config.json.'
                )
            model = open_folder(model_or_dir)
            if (adapter and model.kind != ADAPTER) or base is not None:
                raise ValueError(
                    'adapter=True and base= are for a model; a folder is pushed as it is: write it with '
                    'timm_attn.save(model, directory, adapter=True).'
                )
    raw = dict(model.config.raw)
    if not isinstance(model_or_dir, nn.Module):
        raw = add_evaluation(raw, eval_results)
        if label_names is not None:
            # Descriptions of other names go.
            names = normalise_labels(label_names, model.config.num_classes)
            if names != model.config.pretrained_cfg.get('label_names'):
                raw.pop('label_descriptions', None)
            raw['label_names'] = names
    push = _Push(repo_id, revision, create_pr, private, force, commit_message, token, raw, model)
    push.check()
    if token is None and huggingface_hub.get_token() is None:
        raise HubError("There is no token: log in with 'hf auth login', or set HF_TOKEN. Nothing was sent.", status=401)
    with timeouts():
        return push.run()


class _Push:
    """One push: local files, checked, and attempts to commit them on top of what the Hub holds at that moment."""

    def __init__(
        self,
        repo_id: str,
        revision: str | None,
        create_pr: bool,
        private: bool,
        force: bool,
        commit_message: str | None,
        token: str | None,
        config: dict[str, Any],
        model: ModelFiles,
    ) -> None:
        self.repo_id = repo_id
        self.revision = revision
        self.create_pr = create_pr
        self.private = private
        self.force = force
        self.message = commit_message or f'Add {config["architecture"]}'
        self.token = token
        self.config = config
        self.model = model
        self.files = model.files
        self.api = hub_api(token)
        # The weights that the Hub held when this push first looked.
        self.first: tuple[RemoteFile | None] | None = None

    def check(self) -> None:
        """Renders everything as for an empty repository, so that what is wrong is found before the first request."""
        check_config(parse_config(encode_config(self.config)))
        check_card(self._card(self.config, self._local_card()))

    def _local_card(self) -> str | None:
        return decode_card(self.files[CARD]) if CARD in self.files else None

    def _card(self, config: dict[str, Any], old: str | None) -> str:
        return render_card(config, weights=self.files[self.model.kind], source=f'hf-hub:{self.repo_id}', old=old)

    def run(self) -> PushResult:
        """Attempts until it is done, somebody has to act, or the attempts are used up."""
        return retry('push to', self.repo_id, self.api.token, self._attempt)

    def _attempt(self) -> PushResult:
        snapshot = self._snapshot()
        self._check_meanwhile(snapshot)
        files = self._merged(snapshot)
        changed = tuple(n for n, data in files.items() if not _same(snapshot.files.get(n), data))
        removed = tuple(n for n in self._stale() if n in snapshot.files)
        url = f'{self.api.endpoint}/{self.repo_id}'
        if not (changed or removed):
            _logger.info('%s is up to date at %s: no commit made.', self.repo_id, snapshot.commit[:12])
            return PushResult(self.repo_id, snapshot.commit, f'{url}/tree/{snapshot.commit}', ())
        for name in removed:
            _logger.warning("'%s' holds an old %s, which is removed: it is no file of this model.", self.repo_id, name)
        info = self._commit(snapshot, {n: files[n] for n in changed}, removed)
        commit = info.oid
        there = remote_files(self.api, self.repo_id, commit, list(files))
        if wrong := [n for n, data in files.items() if not _same(there.get(n), data)]:
            raise HubError(
                f'The Hub took the commit {commit[:12]}, but holds other bytes of {", ".join(wrong)}: run the same '
                'command again.'
            )
        return PushResult(self.repo_id, commit, info.pr_url or f'{url}/commit/{commit}', changed, info.pr_url, removed)

    def _stale(self) -> tuple[str, ...]:
        return (*_STALE, WEIGHTS if self.model.kind == ADAPTER else ADAPTER)

    def _check_meanwhile(self, snapshot: Snapshot) -> None:
        """Refuses to replace weights that somebody else committed after this push began."""
        now = snapshot.files.get(self.model.kind)
        if self.first is None:
            self.first = (now,)
        (first,) = self.first
        if now == first or now is None or _same(now, self.files[self.model.kind]) or self.force:
            return
        raise HubError(
            f"Somebody else committed other weights to '{self.repo_id}' while this push was under way (commit "
            f'{snapshot.commit}): look at them first. Run the same command again to replace them (they stay in the '
            'history), or pass force=True (--force) to replace whatever comes in between.',
            status=409,
        )

    def _commit(self, snapshot: Snapshot, files: dict[str, bytes], removed: tuple[str, ...]) -> Any:
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        try:
            return self.api.create_commit(
                self.repo_id,
                [*operations, *(CommitOperationDelete(name) for name in removed)],
                commit_message=self.message,
                revision=self.revision,
                create_pr=self.create_pr,
                parent_commit=snapshot.commit,
            )
        except Exception as e:
            error = as_hub_error(e, self.repo_id, self.api.token)
            if not self.create_pr or error is None or not error.transient or error.status in (412, 429):
                raise
            # The answer is lost, but perhaps not the pull request: a second one would be worse than a question.
            raise HubError(
                f'{error} See first whether {self.api.endpoint}/{self.repo_id}/discussions has the pull request '
                f'already.',
                status=error.status,
            ) from e

    def _snapshot(self) -> Snapshot:
        """What the Hub holds now; creates the repository or the branch when there is none."""
        names = [CONFIG, WEIGHTS, ADAPTER, CARD, *_STALE, *self.files]
        try:
            info = self.api.model_info(self.repo_id, revision=self.revision or constants.DEFAULT_REVISION)
        except huggingface_hub.errors.GatedRepoError:
            raise
        except huggingface_hub.errors.RepositoryNotFoundError:
            self._ask_about_card()
            self.api.create_repo(self.repo_id, private=self.private)
            info = self.api.model_info(self.repo_id)
            self._make_branch(info.sha)
        except huggingface_hub.errors.RevisionNotFoundError:
            self._make_branch(None)
            info = self.api.model_info(self.repo_id, revision=self.revision)
        commit = info.sha
        if commit is None or not _COMMIT.fullmatch(commit):
            raise HubError(
                f"The Hub named no commit for '{self.repo_id}' (got {commit!r}): run the same command again."
            )
        return Snapshot(self.repo_id, self.revision, commit, remote_files(self.api, self.repo_id, commit, names))

    def _ask_about_card(self) -> None:
        # The Hub's own opinion of the card comes before anything is created.
        try:
            ModelCard(self._card(self.config, self._local_card())).validate(repo_type='model')
        except ValueError as e:
            if isinstance(e, HubError):
                raise
            raise HubError(f'The Hub refuses the card: {" ".join(str(e).split())}', status=400) from e

    def _make_branch(self, commit: str | None) -> None:
        if self.revision in (None, constants.DEFAULT_REVISION):
            return
        if self.revision.startswith('refs/'):
            raise HubError(
                f"'{self.repo_id}' has no {self.revision}: pull requests are opened with create_pr=True.", status=404
            )
        self.api.create_branch(self.repo_id, branch=self.revision, revision=commit)

    def _merged(self, snapshot: Snapshot) -> dict[str, bytes]:
        """Our files with what has to be kept of those on the Hub: label names, and a human's part of the card."""
        config = dict(self.config)
        there = self._remote_config(snapshot)
        if there is not None:
            if there.get('architecture') != config['architecture'] and not self.force:
                raise HubError(
                    f"'{self.repo_id}' holds a {str(there.get('architecture'))[:80]}, not a {config['architecture']}: "
                    'choose another repository, or pass force=True (--force) to replace it.'
                )
            if (other := self._stale()[-1]) in snapshot.files and not self.force:
                raise HubError(
                    f"'{self.repo_id}' holds {other}, which a push of {self.model.kind} would remove: choose another "
                    'repository, or pass force=True (--force) to replace it.'
                )
            config |= self._kept_labels(there)
        data = encode_config(config)
        check_config(parse_config(data))
        old = self._local_card()
        if CARD in snapshot.files:
            old = decode_card(fetch(self.api, snapshot, CARD, max_bytes=MAX_CARD_BYTES))
        text = self._card(config, old)
        check_card(text)
        return {**self.files, CONFIG: data, CARD: text.encode()}

    def _kept_labels(self, there: dict[str, Any]) -> dict[str, Any]:
        """Names of the classes where ours have none, and the descriptions of names that stay."""
        count, ours = self.model.config.num_classes, self.config.get('label_names')
        theirs = there.get('label_names')
        if not theirs or there.get('num_classes') != count:
            return {}
        try:
            names = normalise_labels(theirs, count)
            if ours is not None and (normalise_labels(ours, count) != names or 'label_descriptions' in self.config):
                return {}
            descriptions = normalise_descriptions(there.get('label_descriptions'), names)
        except ValueError as e:
            raise HubError(
                f"The label names of '{self.repo_id}' cannot be kept: {e} Pass label_names of your own."
            ) from e
        return {'label_names': names} | ({'label_descriptions': descriptions} if descriptions else {})

    def _remote_config(self, snapshot: Snapshot) -> dict[str, Any] | None:
        if CONFIG not in snapshot.files:
            return None
        try:
            return parse_config(fetch(self.api, snapshot, CONFIG, max_bytes=MAX_CONFIG_BYTES))
        except HubFileError as e:
            if self.force:
                return None
            raise HubError(f"{e} Pass force=True (--force) to replace what '{self.repo_id}' holds.") from e


def _same(remote: RemoteFile | None, data: bytes) -> bool:
    return remote is not None and remote.size == len(data) and remote.checksum == checksum(data, remote.checksum)

# SPDX-License-Identifier: Apache-2.0
"""One open W&B run: turns entries into calls of the SDK, each entry once, and remembers what must be confirmed.

`offline` and `online` open the run with `sdk_start_and_stop` and hand it over. They ask this module what was written
last.
"""

from __future__ import annotations

import html
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trackhub.spi import (
    Artifact,
    BadImageError,
    Entry,
    Histogram,
    Image,
    Metrics,
    Params,
    PermanentError,
    Rejection,
    RunInfo,
    RunStatus,
    Summary,
    Table,
    Tags,
    Text,
    make_folder,
    open_file,
    read_image_header,
)
from trackhub_wandb.artifact_uploads import ArtifactUpload
from trackhub_wandb.image_without_decoder import image_of_file
from trackhub_wandb.naming import CONFIG_ENTRY, artifact_name, config_value, file_stem, tag_text
from trackhub_wandb.sdk_start_and_stop import remove_from_config, remove_links
from trackhub_wandb.unconfirmed_files import FilesOfRows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from wandb.sdk.artifacts.artifact import Artifact as SdkArtifact
    from wandb.sdk.data_types.base_types.media import Media
    from wandb.sdk.wandb_run import Run

    from trackhub_wandb.options import WandBOptions

__all__ = ["SdkRun", "first_config", "link_or_copy"]

_IMAGE_SUFFIXES = {"image/png": ".png", "image/jpeg": ".jpg"}
_HTML = '<!doctype html><meta charset="utf-8"><pre style="white-space: pre-wrap">{}</pre>'

# W&B shows 0 as finished, 254 as crashed and other codes as failed. Source: wandb/wandb pull request 12499.
_EXIT_CODES = {RunStatus.FINISHED: 0, RunStatus.KILLED: 254}
_FAILED = 1

_MAX_COLUMNS = 2000
"""Most columns of a table. The SDK's time grows with their square: 2,000 columns take seconds, a million take days."""

_MAX_KEPT_CHARS = 1 << 20
"""Most characters of all tags and final values of a run. With each new one, the SDK sends and keeps all of them."""

_PROBE_BYTES = 1 << 16
_PROBE_S = 5.0


class SdkRun:
    """One run of the SDK, from ``wandb.init`` to its end.

    Metrics, texts, images, histograms and tables become rows. A row's ``_step`` is the entry's position, and its
    ``_timestamp`` is the time of the log call. The step of the log call and the round are columns. So W&B can store
    late and repeated steps, and the position shows whether a row is stored already.

    Attributes:
        run: the SDK's run.
        next_position: the position after the last entry that the SDK got.
        first_row: in a resumed run, rows before this position are stored already. Their files are sent once more.
        rows: how many rows the SDK got.
        last: what the SDK got last, a row or the config, and its position.
        files: the media files and the artifacts of tables that the SDK got and that are not confirmed.
        config: this backend's entry in the run's config, as the SDK last got it.
        config_changed: True if the config changed since the last confirmation.
    """

    def __init__(
        self,
        run: Run,
        info: RunInfo,
        options: WandBOptions,
        fixed_tags: Sequence[str],
        before_artifact: Callable[[SdkArtifact, Path], None],
    ) -> None:
        """Take over an open run.

        Args:
            run: what ``wandb.init`` returned.
            info: which run it is.
            options: the backend's options.
            fixed_tags: the run's tags that were not logged.
            before_artifact: called with each artifact, and a folder for its files, before the SDK gets the artifact.
        """
        self.run = run
        self.next_position = 0
        self.first_row: int = run.starting_step
        self.rows = 0
        self.last: tuple[Literal["row", "config"], int] = ("config", -1)
        self.files = FilesOfRows()
        self._info = info
        self._before_artifact = before_artifact
        self._step_metric = options.step_metric
        self._round_metric = options.round_metric
        self._fixed_tags = tuple(fixed_tags)
        config: Any = run.config
        self.config: dict[str, Any] = dict(config.get(CONFIG_ENTRY) or first_config(info)[CONFIG_ENTRY])
        self.config_changed = False
        self._tags: dict[str, str] = dict(self.config.get("tags") or {})
        self._summary: dict[str, Any] = dict(self.config.get("summary") or {})
        for metric in (self._step_metric, self._round_metric):
            # These metrics get no summary: the last step and round of a run say nothing about the result.
            run.define_metric(metric, summary="none")
        # With step_sync, the SDK would put the last step into rows that have none.
        run.define_metric("*", step_metric=self._step_metric, step_sync=False)

    def write(self, batch: Sequence[Entry]) -> list[Rejection]:
        """Hand these entries to the SDK, except entries that it has. Return a rejection for each that W&B cannot hold.

        Raises:
            Exception: the SDK failed. Its errors have no common base class.
        """
        rejected: list[Rejection] = []
        config_entries: list[Entry] = []
        for entry in batch:
            if entry.position < self.next_position:
                continue
            if isinstance(entry.payload, Params | Tags | Summary):
                config_entries.append(entry)
                continue
            rejected += self._store_config_entries(config_entries)
            config_entries = []
            try:
                self._store(entry)
            except Exception as error:  # noqa: BLE001 - `_rejection` raises an error that is not about the value
                rejected.append(self._rejection(entry, error))
            self.next_position = entry.position + 1
        return rejected + self._store_config_entries(config_entries)

    def _rejection(self, entry: Entry, error: Exception) -> Rejection:
        """Return the rejection of an entry that W&B cannot hold or the SDK refused. Raise any other error."""
        if isinstance(error, _Unstorable):
            return Rejection(entry.position, error.reason, str(error))
        if not self.is_refusal(error):
            raise error
        return Rejection(entry.position, "invalid_value", f"{type(error).__name__}: {error}")

    def _store_config_entries(self, entries: Sequence[Entry]) -> list[Rejection]:
        """Hand the params, tags and final values of these entries to the SDK together.

        Each time, the SDK sends and keeps all that the run has, so one time for each entry would be slow. If the SDK
        refuses them together, each entry is tried alone.
        """
        if not entries:
            return []
        rejected: list[Rejection] = []
        before = self._tags, self._summary
        params: dict[str, Any] = {}
        summary: dict[str, Any] = {}
        for entry in entries:
            try:
                match entry.payload:
                    case Tags(values):
                        self._tags = self._kept("tags", self._tags, values, self._summary)
                    case Summary(values):
                        self._summary = self._kept("final values", self._summary, values, self._tags)
                        summary |= {key: self._summary[key] for key in values}
                    case Params(values):
                        params |= {key: config_value(value) for key, value in values.items()}
            except Exception as error:  # noqa: BLE001 - as in `write`
                rejected.append(self._rejection(entry, error))
        try:
            self._set_config_entries(params, summary, entries[-1].position, new_tags=self._tags is not before[0])
        except Exception as error:
            self._tags, self._summary = before
            if len(entries) == 1:
                rejected = [self._rejection(entries[0], error)]
            elif self.is_refusal(error):
                return [rejection for entry in entries for rejection in self._store_config_entries([entry])]
            else:
                raise
        self.next_position = entries[-1].position + 1
        return rejected

    def probe(self) -> None:
        """Write a file beside those of the run and delete it, then have the SDK's service answer a question.

        Raises:
            Exception: the SDK failed, or the file system. The SDK's errors have no common base class.
        """
        with tempfile.TemporaryFile(dir=self._files_folder()) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
        interface: Any = self.run._interface
        interface.deliver_get_summary().wait_or(timeout=_PROBE_S)

    def is_refusal(self, error: Exception) -> bool:
        """Return True if the SDK refused a value. Another attempt would fail as well."""
        import wandb

        # The SDK also raises UsageError for a run that is over.
        kinds = (ValueError, TypeError, ArithmeticError, RecursionError, wandb.errors.UsageError)
        return isinstance(error, kinds) and not self.run._is_finished

    def send_again(self, path: str) -> None:
        """Hand a media file to the SDK once more, since the SDK itself does not try again."""
        self.run._publish_file(path)

    def send_config_again(self) -> None:
        """Hand the config to the SDK once more, since the SDK itself does not try again."""
        self._set_config({}, int(self.config["through"]))

    def finish(self, status: RunStatus) -> None:
        """End the run in W&B.

        Raises:
            Exception: the SDK failed. Its errors have no common base class.
        """
        if self._summary:  # W&B replaces a final value when a row has its key, so set all of them again
            self.run.summary.update(self._summary)
        self.run.finish(exit_code=_EXIT_CODES.get(status, _FAILED))
        remove_links(self.run.settings.root_dir, self.run.id)

    def _store(self, entry: Entry) -> None:
        payload = entry.payload
        match payload:
            case Metrics():
                self._row(entry, payload.values)
            case Text():
                self._media(entry, payload.key, self._html(payload))
            case Image():
                self._image(entry, payload)
            case Histogram():
                self._histogram(entry, payload)
            case Table():
                self._table(entry, payload)
            case Artifact():
                self._artifact(entry, payload)
            case _:  # never: the core rejects other kinds, and `write` takes out params, tags and final values
                raise _Unstorable("unsupported_kind", f"{type(payload).__name__} is not among this backend's kinds")

    def _row(self, entry: Entry, values: Mapping[str, Any]) -> None:
        if entry.position < self.first_row:
            return
        row = {**values, "_timestamp": entry.time}
        if entry.step is not None:
            row[self._step_metric] = entry.step
        if entry.round is not None:
            row[self._round_metric] = entry.round
        self.run.log(row, step=entry.position, commit=True)
        self.rows += 1
        self.last = ("row", entry.position)

    def _set_config(self, params: dict[str, Any], position: int) -> None:
        # ``through`` becomes lower only if a resumed run gets entries that it already has.
        self.config = {**self.config, "tags": dict(self._tags), "through": position}
        if self._summary:
            self.config["summary"] = dict(self._summary)
        config: Any = self.run.config
        # Remove nested params first. Otherwise W&B would merge the new value into the old one, leaf by leaf.
        remove_from_config(self.run, [key for key in params if isinstance(config.get(key), dict)])
        config.update({**params, CONFIG_ENTRY: self.config}, allow_val_change=True)
        self.config_changed = True
        self.last = ("config", position)

    def _set_config_entries(
        self, params: dict[str, Any], summary: dict[str, Any], position: int, *, new_tags: bool
    ) -> None:
        if new_tags:
            shown = (tag_text(key, value) for key, value in self._tags.items())
            self.run.tags = tuple(dict.fromkeys((*self._fixed_tags, *shown)))
        if summary:
            self.run.summary.update(summary)
        # The config holds the final values, too, since the server confirms a config and not a summary.
        self._set_config(params, position)

    def _kept(self, what: str, kept: dict[str, Any], new: Mapping[str, Any], others: dict[str, Any]) -> dict[str, Any]:
        """Return the tags with new tags, or the final values with new final values.

        Args:
            what: ``tags`` or ``final values``, for the message.
            kept: those that the run has.
            new: those to add.
            others: the run's final values, if these are tags, or the reverse. They use the same room.

        Raises:
            _Unstorable: there is no room for the new ones.
        """
        found = {**kept, **{key: config_value(value) for key, value in new.items()}}
        if sum(len(key) + len(str(value)) for key, value in (*found.items(), *others.items())) > _MAX_KEPT_CHARS:
            raise _Unstorable(
                "too_large",
                f"the run's tags and final values would have more than {_MAX_KEPT_CHARS} characters with these {what}: "
                "log long texts with log_text",
            )
        return found

    def _html(self, payload: Text) -> Media:
        import wandb

        return wandb.Html(_HTML.format(html.escape(payload.text)), inject=False, data_is_not_path=True)

    def _image(self, entry: Entry, payload: Image) -> None:
        source = self._content(payload)
        try:
            with source.open("rb") as file:
                header = read_image_header(file)
        except BadImageError as error:
            raise _Unstorable("invalid_value", f"image {payload.key!r}: {error}") from error
        suffix = _IMAGE_SUFFIXES[header.media_type]
        with tempfile.TemporaryDirectory(prefix="trackhub-wandb-") as folder:
            # The SDK recognises the format by the suffix, and blobs have none.
            named = Path(folder, f"image{suffix}")
            link_or_copy(source, named)
            self._media(entry, payload.key, image_of_file(named, header, payload.caption))

    def _content(self, payload: Image | Artifact) -> Path:
        path = self._info.blob_path(payload.blob)
        if not path.is_file():
            raise _Unstorable("content_missing", f"the content of {payload.key!r} is not at {path}")
        return path

    def _histogram(self, entry: Entry, payload: Histogram) -> None:
        import wandb

        if len(payload.counts) > wandb.Histogram.MAX_LENGTH:
            raise _Unstorable(
                "too_many_bins",
                f"histogram {payload.key!r} has {len(payload.counts)} bins; W&B holds {wandb.Histogram.MAX_LENGTH} at "
                "most. Log fewer bins",
            )
        # The SDK's type says arrays, but it also takes lists, for which it does not need numpy.
        bins: Any = (payload.counts, payload.edges)
        self._row(entry, {payload.key: wandb.Histogram(np_histogram=bins)})

    def _table(self, entry: Entry, payload: Table) -> None:
        import wandb
        from wandb.sdk.artifacts._internal_artifact import InternalArtifact

        if len(payload.rows) > wandb.Table.MAX_ARTIFACT_ROWS:
            raise _Unstorable(
                "too_large",
                f"table {payload.key!r} has {len(payload.rows)} rows; W&B holds {wandb.Table.MAX_ARTIFACT_ROWS} at "
                "most. Log it as an artifact",
            )
        if len(payload.columns) > _MAX_COLUMNS:
            raise _Unstorable(
                "too_large",
                f"table {payload.key!r} has {len(payload.columns)} columns; this backend stores {_MAX_COLUMNS} at "
                "most. Log it as an artifact",
            )
        table = wandb.Table(columns=list(payload.columns), data=[], allow_mixed_types=True)
        # The constructor would work out the type of each cell, although the columns take any type. For 100,000 cells,
        # that takes three times as long as everything else.
        table.data = payload.rows
        # W&B's pages read a table from an artifact of the run. W&B's API reads the table from a file. `run.log` would
        # make both, but leave two copies in the home folder of the receiver's user. So make both here.
        name = file_stem(payload.key)
        artifact = InternalArtifact(f"run-{self.run.id}-{name}", "run_table")
        path = self._artifact_folder(entry) / f"{name}.table.json"
        with open(path, "w", encoding="utf-8", opener=open_file) as file:
            file.write(json.dumps(table.to_json(artifact), sort_keys=True))
        held = artifact.add_file(str(path), name=path.name, policy="immutable", skip_cache=True)
        table._set_artifact_target(artifact, held.path)
        self._log_artifact(entry, artifact)
        self.files.add_table(entry.position, ArtifactUpload(lambda: self.run.log_artifact(artifact), artifact))
        self._media(entry, payload.key, table)

    def _files_folder(self) -> Path:
        return Path(self.run.settings.sync_dir)

    def _artifact_folder(self, entry: Entry) -> Path:
        folder = self._files_folder() / "artifacts" / str(entry.position)
        make_folder(folder)
        return folder

    def _media(self, entry: Entry, key: str, media: Media) -> None:
        # `run.log` would name the file after the key, which may not be a safe file name. It would also write the row
        # again, which may be stored already although its file is missing.
        media.bind_to_run(self.run, file_stem(key), entry.position)
        value = media.to_json(self.run)
        self.files.add_file(entry.position, str(value["path"]), int(value["size"]))
        self._row(entry, {key: value})

    def _artifact(self, entry: Entry, payload: Artifact) -> None:
        self._log_artifact(entry, self.artifact_of(entry, payload))
        self._set_config({}, entry.position)

    def artifact_of(self, entry: Entry, payload: Artifact) -> SdkArtifact:
        """Return the SDK's artifact of an entry, with its file. From any thread.

        Raises:
            PermanentError: W&B cannot hold it.
            OSError: the file cannot be read.
        """
        import wandb

        metadata = {
            "key": payload.key,
            "job_id": self._info.job.id,
            "job_name": self._info.job.name,
            "site": self._info.site,
            "time": entry.time,
            **({} if entry.step is None else {"step": entry.step}),
            **({} if entry.round is None else {"round": entry.round}),
        }
        try:
            artifact = wandb.Artifact(
                artifact_name(payload.key, self._info.site), type=payload.artifact_type, metadata=metadata
            )
            # Nobody changes the blob, so the SDK needs no copy of it.
            artifact.add_file(str(self._content(payload)), name=payload.filename, policy="immutable", skip_cache=True)
        except (ValueError, TypeError) as error:
            raise _Unstorable("invalid_value", f"artifact {payload.key!r}: {error}") from error
        return artifact

    def _log_artifact(self, entry: Entry, artifact: SdkArtifact) -> None:
        self._before_artifact(artifact, self._artifact_folder(entry))
        self.run.log_artifact(artifact)


def first_config(info: RunInfo) -> dict[str, Any]:
    """Return the config that a new run starts with."""
    about = {"job_id": info.job.id, "job_name": info.job.name, "site": info.site, "side": str(info.side)}
    return {CONFIG_ENTRY: {**config_value(about), "through": -1}}


class _Unstorable(PermanentError):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name. Copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

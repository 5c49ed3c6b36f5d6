"""Uploads to Hugging Face, after a local save is complete. A failed upload is reported and never disturbs training."""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError

if TYPE_CHECKING:
    from library.training.options import HubOptions

_log = logging.getLogger(__name__)
_TRIES = 5
_FIRST_WAIT_SECONDS = 2.0
_MOST_WAITING = 16
_EXIT_SECONDS = 600.0
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")
# Answers of the server that trying again does not change.
_FINAL_ANSWERS = frozenset({400, 401, 403, 404, 409, 413, 422})


@dataclass(frozen=True, slots=True)
class UploadResult:
    """What became of one upload; `error` is empty when it worked."""

    name: str
    error: str = ""


def hub_api(hub: HubOptions) -> Any:
    """Return a client of the hub with the user's token (`HF_TOKEN` is read by the client itself)."""
    from huggingface_hub import HfApi

    return HfApi(token=hub.huggingface_token)


def without_token(text: str, token: str | None) -> str:
    """Return `text` with every token in it hidden."""
    return _TOKEN.sub("hf_***", text.replace(token, "***") if token else text)


class Uploader:
    """Sends models, and states if asked for, to one repository. Call it on the main process only.

    An instance is what `SaveActions.upload` expects.
    """

    def __init__(self, hub: HubOptions, *, api: Any = None, sleep: Callable[[float], object] = time.sleep) -> None:
        self._hub = hub
        self._api = api
        self._sleep = sleep
        self._waiting: queue.Queue[tuple[Path, bool] | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self.results: list[UploadResult] = []

    @property
    def enabled(self) -> bool:
        """Whether there is a repository to upload to."""
        return bool(self._hub.huggingface_repo_id)

    def prepare(self) -> None:
        """Make the repository when it is missing, private unless `--huggingface_repo_visibility public`.

        Raises:
            UserError: the hub refuses it (wrong name, no permission). An unreachable hub is only reported.
        """
        if not self.enabled:
            return
        private = self._hub.huggingface_repo_visibility != "public"
        try:
            self._client().create_repo(
                self._hub.huggingface_repo_id, repo_type=self._hub.huggingface_repo_type, private=private, exist_ok=True
            )
        except Exception as error:  # noqa: BLE001 - the boundary to the hub's client
            text = without_token(str(error), self._hub.huggingface_token)
            if _status(error) in _FINAL_ANSWERS or type(error).__name__ == "HFValidationError":
                hint = "Check the name, and that the token may write to it"
                raise UserError(text, hint, where=f"--huggingface_repo_id {self._hub.huggingface_repo_id}") from error
            _log.warning("the hub cannot be reached now (%s); uploads will be tried anyway", text)

    def __call__(self, path: Path, state: bool, final: bool) -> None:  # noqa: FBT001
        """Upload a complete file or folder: in the background with `--async_upload`, but the last model at once."""
        if not self.enabled or (state and not self._hub.save_state_to_huggingface):
            return
        if not self._hub.async_upload or final:
            self._upload(path, state)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait((path, state))
        except queue.Full:
            self._report(path, "too many uploads are waiting; left out")

    def close(self, timeout: float = _EXIT_SECONDS) -> list[UploadResult]:
        """Wait for uploads in the background, at most `timeout` seconds, and report what did not work."""
        if self._thread is not None:
            deadline = time.monotonic() + timeout
            with suppress(queue.Full):
                self._waiting.put(None, timeout=timeout)
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                self._report(Path("uploads"), f"not finished after {timeout:.0f} s")
            self._thread = None
        failed = [result for result in self.results if result.error]
        if self.results:
            _log.info(
                "uploads to %s: %d done, %d failed",
                self._hub.huggingface_repo_id,
                len(self.results) - len(failed),
                len(failed),
            )
        return failed

    def _client(self) -> Any:
        if self._api is None:
            self._api = hub_api(self._hub)
        return self._api

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            self._upload(*job)

    def _upload(self, path: Path, state: bool) -> None:  # noqa: FBT001
        for left in reversed(range(_TRIES)):
            try:
                self._send(path, state=state)
            except Exception as error:  # noqa: BLE001 - a failed upload must not end training
                text = without_token(f"{type(error).__name__}: {error}", self._hub.huggingface_token)
                if left == 0 or not path.exists() or _status(error) in _FINAL_ANSWERS:
                    self._report(path, text)
                    return
                _log.info("upload of %s failed (%s), trying again", path.name, text)
                self._sleep(_FIRST_WAIT_SECONDS * 2 ** (_TRIES - 1 - left))
            else:
                self.results.append(UploadResult(path.name))
                _log.info("uploaded %s to %s", path.name, self._hub.huggingface_repo_id)
                return

    def _send(self, path: Path, *, state: bool) -> None:
        hub = self._hub
        common = {"repo_id": hub.huggingface_repo_id, "repo_type": hub.huggingface_repo_type}
        place = place_in_repo(hub.huggingface_path_in_repo, path.name)
        if path.is_dir():
            # A model folder without a place goes to the root, where diffusers looks for it.
            inside = place if hub.huggingface_path_in_repo or state else None
            self._client().upload_folder(folder_path=str(path), path_in_repo=inside, **common)
        else:
            self._client().upload_file(path_or_fileobj=str(path), path_in_repo=place, **common)

    def _report(self, path: Path, text: str) -> None:
        self.results.append(UploadResult(path.name, text))
        _log.error("%s was not uploaded to %s: %s", path.name, self._hub.huggingface_repo_id, text)


def place_in_repo(prefix: str | None, name: str) -> str:
    """Return ``<prefix>/<name>``, or the name alone."""
    return f"{prefix.strip('/')}/{name}" if prefix and prefix.strip("/") else name


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None

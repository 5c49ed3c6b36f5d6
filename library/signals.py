"""Signals ask a run to stop or to save; the run looks at a flag between its steps.

`accelerate launch` neither forwards SIGTERM nor waits for its child, so the flag also watches the parent process: when
the launcher is gone, the run stops as on SIGTERM.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from library.errors import StopTraining

_STOP_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
# One Ctrl-C may arrive twice: from the terminal and, forwarded, from the launcher.
_SAME_KEYSTROKE_SECONDS = 1.0
_LAUNCHER_VARIABLES = ("ACCELERATE_", "TORCHELASTIC_", "LOCAL_RANK")
_NOTICE = "Finishing this step, then saving: do not close. Ctrl-C again ends at once without saving."
# Programs that a person starts a run from and may leave while it goes on.
_SHELLS = frozenset(
    {"sh", "bash", "dash", "zsh", "fish", "ksh", "csh", "tcsh", "login", "sshd", "systemd", "init", "tmux", "screen"}
)


class StopFlag:
    """Remembers that the run was asked to stop or to save.

    Until `deferred()` is entered, a signal ends the process at once (nothing is lost while models are loaded). Inside,
    it is only noted; a second SIGINT ends the process at once even then. Handlers are installed in the main thread
    only, and the previous ones come back on exit.
    """

    def __init__(
        self, *, watch_parent: bool | None = None, announce: bool | None = None, notice: str = _NOTICE
    ) -> None:
        """Create the flag.

        Args:
            watch_parent: treat the death of the parent process as SIGTERM; None decides by who the parent is.
            announce: write a line to standard error when a signal comes; None: on the first rank only.
            notice: that line, when the signal is only noted.
        """
        self.orphaned = False
        self._announce = os.environ.get("RANK", "0") == "0" if announce is None else announce
        self._notice = notice
        self._requested: int | None = None
        self._requested_at = 0.0
        self._save = False
        self._deferred = False
        self._pid = os.getpid()
        self._parent = os.getppid()
        self._watch = parent_is_launcher() if watch_parent is None else watch_parent
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> int | None:
        """The number of the signal that asked the run to stop, or None. Looks after the parent as well."""
        if self._requested is None and self._watch and os.getppid() != self._parent:
            self.orphaned = True
            self.request(signal.SIGTERM)
            self._tell("The process that started this one has ended. Stopping after this step.")
        return self._requested

    def request(self, signum: int) -> None:
        """Ask the run to stop as if `signum` had come (another process of the run received it)."""
        if self._requested is None:
            self._requested = int(signum)
            self._requested_at = time.monotonic()

    def request_save(self) -> None:
        """Ask for a state to be saved at the next opportunity, as SIGUSR1 does."""
        self._save = True

    @property
    def save_requested(self) -> bool:
        """Whether a state save was asked for and not yet taken."""
        return self._save

    def take_save_request(self) -> bool:
        """Return whether a state save was asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    @property
    def exit_code(self) -> int:
        """128 + signal number, or 0 when nothing was asked."""
        return 128 + self._requested if self._requested is not None else 0

    def stop(self, message: str) -> StopTraining:
        """Return the exception that ends the run for the signal received, with `message` for the user."""
        return StopTraining(message, self.exit_code)

    def check(self, what: str) -> None:
        """Leave a long job that needs no state (caching, sampling) when a stop was asked for.

        Raises:
            StopTraining: with exit status 128 + signal number.
        """
        if self.requested is not None:
            name = signal.Signals(self._requested or signal.SIGTERM).name
            raise self.stop(f"stopped by {name} while {what}. Run the same command again to go on")

    @contextmanager
    def deferred(self) -> Iterator[StopFlag]:
        """Within the block signals are only noted, and the caller polls `requested`."""
        before, self._deferred = self._deferred, True
        try:
            yield self
        finally:
            self._deferred = before

    def install(self) -> StopFlag:
        """Take over the signals; does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread() or self._previous:
            return self
        for name in (*_STOP_NAMES, "SIGUSR1"):
            number = getattr(signal, name, None)
            # A SIGHUP that is ignored is nohup's doing, and means what it says.
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue
            self._previous[number] = signal.signal(number, self._on_save if name == "SIGUSR1" else self._on_stop)
        return self

    def restore(self) -> None:
        """Bring back the handlers that were there before `install`."""
        if os.getpid() == self._pid and threading.current_thread() is threading.main_thread():
            for number, handler in self._previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._previous.clear()

    def __enter__(self) -> StopFlag:
        return self.install()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.restore()

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            _as_a_child(number)
            return
        again = self._requested is not None
        if again:
            if number == signal.SIGINT and time.monotonic() - self._requested_at > _SAME_KEYSTROKE_SECONDS:
                self._tell("Stopping at once. Files saved before are complete.")
                os._exit(128 + number)
            return
        self.request(number)
        if not self._deferred:
            self._tell(f"Stopped by {signal.Signals(number).name}.")
            raise SystemExit(128 + number)
        self._tell(self._notice)

    def _tell(self, text: str) -> None:
        """Write without Python's streams and logging, which a handler must not enter twice."""
        if self._announce:
            with suppress(OSError):
                os.write(2, f"\n{text}\n".encode())


def parent_is_launcher() -> bool:
    """Whether this process should end when its parent does.

    True below accelerate, torchrun or another program; False below a shell, since a run may outlive a log-out.
    """
    if os.name == "nt" or os.getppid() <= 1:
        return False
    if any(name.startswith(_LAUNCHER_VARIABLES) for name in os.environ):
        return True
    try:
        name = Path(f"/proc/{os.getppid()}/comm").read_text().strip()
    except OSError:
        return False
    return name.split(":")[0].lstrip("-") not in _SHELLS


def worker_signals() -> None:
    """Set up a data loader worker: Ctrl-C is the main process's business, SIGTERM ends the worker."""
    for name, handler in (("SIGINT", signal.SIG_IGN), ("SIGTERM", signal.SIG_DFL), ("SIGUSR1", signal.SIG_IGN)):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)


def _as_a_child(number: int) -> None:
    """What a forked child does with a handler that it inherited: ignore Ctrl-C, obey the rest."""
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

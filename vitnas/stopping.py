"""SIGINT and SIGTERM end a command with one sentence, wherever they come: importing, working, inside compiled code.

While modules are imported there is nothing to put away, and a signal ends the process at once. While a command works
it raises `Stopped` in the main thread, which lets go of what is held; a training takes a checkpoint first (`deferred`).
What is raised may be lost on the way (Python drops what a finaliser raises, and libraries catch what they should not),
and compiled code may not come back for minutes; so a thread hears of the signal too, raises it again, and ends the
process when the time is up.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 20.0  # SLURM kills 30 s after SIGTERM
AGAIN_S = 3.0  # how long what was raised may take to put things away


class Stopped(KeyboardInterrupt):
    """A signal asked for the end. All that lets a KeyboardInterrupt through lets this through."""


class Stopper:
    """The handler of both signals.

    Args:
        asked: the signal that came, or None.
        works: whether a command works, so that there is something to put away.
        keeps: whether it works in a folder that the same command goes on in.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.works = self.keeps = False
        self._waiting = 0
        self._told = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked is not None, number
        if not self.works:
            self.leave()
        if again or not self._waiting:
            raise Stopped

    def tell(self) -> int:
        """Print the sentence, once; returns the exit status."""
        number = self.asked or signal.SIGINT
        if not self._told:
            self._told = True
            by = " by SIGTERM" if number == signal.SIGTERM else ""
            show = "\x1b[?25h" if os.isatty(2) else ""  # bars of progress hide the cursor
            rank = os.environ.get("RANK", "0")
            which = "" if rank == "0" else f" (process {rank})"
            anew = "nothing of it is kept, and the same command begins anew"
            then = "the same command continues from the last checkpoint" if self.keeps else anew
            text = f"{show}vitnas{which}: stopped{by}; {then if self.works else 'it had not begun'}.\n"
            with suppress(OSError):
                os.write(2, text.encode())
        self.works = False
        return 128 + number

    def leave(self) -> NoReturn:
        """End the process now."""
        status = self.tell()
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(status)

    def install(self) -> None:
        """Become the handler where nobody else is; a shell's background job may ignore SIGINT."""
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, self)
        tell = sys.unraisablehook

        def unraisable(what: sys.UnraisableHookArgs) -> None:
            # A finaliser lost the signal, or is that of a loader whose workers could not be started: the one is told by
            # `tell` and the other by the error that stopped it, where Python would print tracebacks.
            is_half_made = what.exc_type is AttributeError and "DataLoader" in str(what.exc_value)
            if what.exc_type is not Stopped and not is_half_made:
                tell(what)

        sys.unraisablehook = unraisable
        if logging.lastResort:
            logging.lastResort.addFilter(_is_no_stop)

    def watch(self) -> None:
        """Hear of a signal in a thread, too."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_leave_to_parent)
        threading.Thread(
            target=self._insist, args=(reader, writer), name="vitnas-signals", daemon=True
        ).start()

    def _insist(self, reader: socket.socket, writer: socket.socket) -> None:
        """Raise the first signal again every few seconds, and end the process when the time is up."""
        number = 0
        while number not in SIGNALS:
            number = reader.recv(1)[0]
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end:
            time.sleep(AGAIN_S)
            if not self._waiting and not self._told:
                signal.pthread_kill(threading.main_thread().ident or 0, number)
        self.asked = self.asked or number
        self.leave()

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """See `deferred`."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
        if self.asked is not None and not self._waiting:
            raise Stopped


def _is_no_stop(record: logging.LogRecord) -> bool:
    """All but a `Stopped` on its way: SQLAlchemy notes it, with a traceback, where it comes as a connection closes."""
    return not (record.exc_info and record.exc_info[0] is Stopped)


def _leave_to_parent() -> None:
    """In a fork: the parent ends its children."""
    if isinstance(signal.getsignal(signal.SIGTERM), Stopper):
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def current() -> Stopper | None:
    """The Stopper of this process, if a command runs in it."""
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, Stopper) else None


def asked() -> int:
    """The signal that asked for the end, or 0."""
    stopper = current()
    return 0 if stopper is None else stopper.asked or 0


def stopped_by(number: int) -> Stopped:
    """What to raise where another process of this run got the signal."""
    stopper = current()
    if stopper is not None:
        stopper.asked = number
    return Stopped()


@contextmanager
def deferred() -> Iterator[None]:
    """The first signal inside raises at the end of the block, which looks at `asked` and ends itself soon; a second one
    raises where it comes."""
    stopper = current()
    if stopper is None:
        yield
        return
    with stopper.deferring():
        yield


def is_command() -> bool:
    """Whether this process was started as `vitnas` or `python -m vitnas`."""
    words, own = getattr(sys, "orig_argv", []), (getattr(sys, "argv", None) or [""])[0]
    if own == "-m":  # while the package of a module that is to run is imported
        return "-m" in words and words[words.index("-m") + 1].partition(".")[0] == "vitnas"
    return os.path.basename(own).partition(".")[0] == "vitnas"


def listen() -> None:
    """Handle both signals from now on, where this process is the command; called before anything large is imported."""
    if is_command() and threading.current_thread() is threading.main_thread() and current() is None:
        stopper = Stopper()
        stopper.install()
        stopper.watch()


@contextmanager
def working() -> Iterator[Stopper]:
    """The Stopper of a command, which sets `works`; made and taken away again where `listen` was not called."""
    stopper = current()
    if stopper is not None:
        yield stopper
        return
    stopper, before = Stopper(), [signal.getsignal(number) for number in SIGNALS]
    tell = sys.unraisablehook
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        stopper.install()
    try:
        yield stopper
    finally:
        sys.unraisablehook = tell
        if logging.lastResort:
            logging.lastResort.removeFilter(_is_no_stop)
        for number, handler in zip(SIGNALS, before, strict=True):
            if is_main and signal.getsignal(number) is stopper:
                signal.signal(number, handler)

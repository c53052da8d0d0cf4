"""Signals that wait until the raw weights are back.

A checkpoint that a signal handler saves (SLURM requeue, SIGTERM) must not find merged weights in the model (P8), and
Ctrl-C must not break off the very code that puts them back. While signals are held, handlers written in Python run
after the block instead of inside it. This module knows signals and nothing of merging.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType

_HELD = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGINT") if hasattr(signal, name)
)


@dataclass
class _State:
    """Of the held block; there is one at a time, in the main thread.

    Attributes:
        pending: Signals that wait, in order of arrival.
        ctrl_c_raises: Whether Ctrl-C would raise `KeyboardInterrupt` outside the block, as Python has it.
        ctrl_c_may_break_in: Whether Ctrl-C may do so now.
        ctrl_c_broke_in: It did; the clean-up that runs because of it is not interrupted again.
    """

    pending: list[int] = field(default_factory=list)
    ctrl_c_raises: bool = False
    ctrl_c_may_break_in: bool = False
    ctrl_c_broke_in: bool = False


_state = _State()


def pending() -> bool:
    """Whether a held signal waits; long work should then come to its end."""
    return bool(_state.pending) or _state.ctrl_c_broke_in


@contextmanager
def deferred() -> Iterator[None]:
    """Hold signals that have a handler in Python; each is delivered once when the block has ended, Ctrl-C last."""
    global _state
    handlers = {signum: signal.getsignal(signum) for signum in _HELD}
    replaced = {signum: handler for signum, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread() or _hold in replaced.values():
        yield  # signals arrive in the main thread only, and an outer block holds them already
        return
    _state = _State(ctrl_c_raises=replaced.get(signal.SIGINT) is signal.default_int_handler)
    with ExitStack() as delivery:  # an exception from one handler does not keep the others from running
        try:
            for signum in replaced:
                signal.signal(signum, _hold)
            yield
        finally:
            for signum, handler in replaced.items():
                signal.signal(signum, handler)
            ended, _state = _state, _State()
            # a signal that came several times has one thing to say
            newest_first = list(dict.fromkeys(ended.pending))[::-1]
            for signum in sorted(newest_first, key=lambda signum: signum != signal.SIGINT):
                delivery.callback(signal.raise_signal, signum)  # last in, first out


@contextmanager
def keyboard_interrupt_allowed() -> Iterator[None]:
    """Inside a held block: code of the user's, which may take long and which Ctrl-C shall end at once."""
    if not _state.ctrl_c_raises or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        _state.ctrl_c_may_break_in = True
        if signal.SIGINT in _state.pending:
            _state.pending = [signum for signum in _state.pending if signum != signal.SIGINT]
            _hold(signal.SIGINT, None)
        yield
    finally:
        _state.ctrl_c_may_break_in = False


def _hold(signum: int, _: FrameType | None) -> None:
    # the clean-up after the first must end, however often the key is pressed
    if signum == signal.SIGINT and _state.ctrl_c_broke_in:
        return
    if signum == signal.SIGINT and _state.ctrl_c_may_break_in:
        _state.ctrl_c_broke_in, _state.ctrl_c_may_break_in = True, False
        raise KeyboardInterrupt
    _state.pending.append(signum)

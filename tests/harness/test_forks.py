"""A forked process leaves nobody behind: what it started would take a core from all tests that follow."""

import fcntl
import os
import sys
import time

import pytest
from harness.forks import run_forked


def start_another(path, how):
    """A second process, which like the first one holds a lock until it ends."""
    lock = open(path, "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print("started", flush=True)
    time.sleep(60 if how == "killed" else 0)
    sys.stdout.flush()
    os._exit(0)


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_what_a_forked_process_started_ends_with_it(tmp_path, how):
    for timeout in (0.5, 4, 32):  # on a busy machine it takes a while to begin
        code, printed = run_forked(start_another, str(tmp_path / "lock"), how, timeout=timeout)
        if printed:
            break
    assert (printed, code) == ("started\n", -9 if how == "killed" else 0)
    deadline = time.monotonic() + 20
    with open(tmp_path / "lock") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "still there"
                time.sleep(0.01)

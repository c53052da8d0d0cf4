"""Work beside training: what is handed over, what comes back, and that nobody waits."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain_merge.errors import ConfigError
from pretrain_merge.runtime.errands import Errand, Errands, refuse_command, refuse_missing_program

PYTHON = sys.executable


def outcomes(errands: Errands, number: int, *, within: float = 20.0) -> list[Any]:
    found: list[Any] = []
    until = time.monotonic() + within
    while len(found) < number and time.monotonic() < until:
        found += errands.ended()
        time.sleep(0.01)
    return found


def run(work: Any, folder: Path, *, timeout: float = 20.0, step: int = 40, log: Path | None = None) -> Any:
    errands = Errands(work, timeout, lambda errand: log)
    errands.add(Errand(folder, step, "sma"))
    (outcome,) = outcomes(errands, 1)
    errands.close()
    return outcome


def script(folder: Path, text: str) -> str:
    path = folder / "script.sh"
    path.write_text(text)
    return f"sh {path} {{folder}} {{step}} {{view}}"


def test_placeholders_are_words_and_no_shell_reads_them(tmp_path):
    folder = tmp_path / "a b; touch pwned $(touch pwned)"
    folder.mkdir()
    command = script(tmp_path, 'printf \'{"n": %d, "step": %d}\' "$#" "$2"; test "$1" = "$EXPECTED" || exit 3\n')
    os.environ["EXPECTED"] = str(folder)
    try:
        outcome = run(command, folder)
    finally:
        del os.environ["EXPECTED"]
    assert (outcome.failure, outcome.numbers) == ("", {"n": 3.0, "step": 40.0})
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("printed", "numbers"),
    [
        ('{"acc": 0.5}', {"acc": 0.5}),
        ('loading\n{"acc": 1}\ndone', {"acc": 1.0}),
        ('{"acc": 1}\n{"acc": 2}', {"acc": 2.0}),
        ('{\n "tasks": {"a": {"acc": 1, "name": "a"}},\n "ok": true, "list": [1]\n}', {"tasks/a/acc": 1.0}),
        ("no numbers", {}),
        ("[1, 2]", {}),
        ("", {}),
    ],
)
def test_the_numbers_that_a_command_prints_come_back(printed, numbers, tmp_path):
    (tmp_path / "printed").write_text(printed)
    outcome = run(script(tmp_path, f"cat {tmp_path}/printed; echo progress >&2"), tmp_path, log=tmp_path / "log")
    assert (outcome.failure, outcome.numbers) == ("", numbers)
    assert (tmp_path / "log").read_text() == f"progress\n{printed}"


def test_a_command_that_fails_says_so_with_its_last_words(tmp_path):
    outcome = run(script(tmp_path, "echo no such task >&2; exit 7\n"), tmp_path)
    assert outcome.failure == "RuntimeError: it ended with code 7: no such task"


def test_a_command_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    command = script(tmp_path, f"sleep 60 & echo $! > {tmp_path}/child; sleep 60\n")
    begun = time.monotonic()
    outcome = run(command, tmp_path, timeout=0.5)
    assert outcome.failure == "TimeoutError: it took more than 0.5 seconds and was ended"
    assert time.monotonic() - begun < 10
    with pytest.raises(ProcessLookupError):
        _until_gone(int((tmp_path / "child").read_text()))


def _until_gone(pid: int) -> None:
    for _ in range(200):
        os.kill(pid, 0)
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":  # nobody has asked for its end here
            raise ProcessLookupError
        time.sleep(0.02)


def test_a_command_is_not_a_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MODEL_RANK", "8")
    outcome = run(script(tmp_path, 'echo "{\\"n\\": $(env | grep -cE "RANK|MASTER")}"\n'), tmp_path)
    assert outcome.numbers == {"n": 1.0}


def test_a_function_may_return_numbers_or_nothing_or_fail(tmp_path):
    assert run(lambda folder, step: {"step": step, "in": {"x": 1}}, tmp_path).numbers == {"step": 40.0, "in/x": 1.0}
    assert run(lambda folder, step: None, tmp_path).numbers == {}
    assert run(lambda folder, step: 3, tmp_path).failure.startswith("TypeError: int was returned")
    assert run(lambda folder, step: time.sleep(30), tmp_path, timeout=0.1).failure.startswith("TimeoutError")


def test_whoever_hands_over_does_not_wait_and_a_folder_is_handed_over_once(tmp_path):
    errands = Errands(lambda folder, step: time.sleep(0.3), 20.0)
    begun = time.monotonic()
    for step in (1, 1, 2):
        errands.add(Errand(tmp_path / str(step), step, "sma"))
    assert time.monotonic() - begun < 0.2
    assert len(errands.open) == 2
    assert [outcome.errand.step for outcome in outcomes(errands, 2)] == [1, 2]
    assert not errands.open
    errands.close()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate {foldr}", r"\{foldr\} is not known\. .*did you mean \{folder\}"),
        ("evaluate 'x", "Close its quotes"),
        ("  ", "is empty"),
    ],
)
def test_a_command_that_cannot_be_run_is_refused(command, message):
    with pytest.raises(ConfigError, match=message):
        refuse_command(command)


def test_a_program_that_is_not_there_is_refused_before_training():
    with pytest.raises(ConfigError, match="'no-such-program' is not a program on this host"):
        refuse_missing_program("no-such-program {folder}")
    refuse_missing_program(f"{PYTHON} {{folder}}")
    refuse_missing_program(lambda folder, step: None)

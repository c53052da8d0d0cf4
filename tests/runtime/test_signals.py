"""Signals wait until the raw weights are back; tried in this process and with signals from outside."""

# ruff: noqa: PT012 - what is inside the block is what is tested

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import signalled_run
from harness.forks import run_forked
from harness.models import LIGHTNING_REMARKS, Recorder, Regression, rows, same_bits, trainer, weights

from pretrain_merge import ModelMerging, RollingMerger
from pretrain_merge.runtime import signals

pytestmark = LIGHTNING_REMARKS


@pytest.fixture
def delivered():
    """Signals that reached a handler of the user's, in order; the test process's own handlers are put back."""
    signals: list[str] = []
    kept = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    for signum in kept:
        signal.signal(signum, lambda number, _: signals.append(signal.Signals(number).name))
    yield signals
    for signum, handler in kept.items():
        signal.signal(signum, handler)


def test_a_held_signal_is_delivered_after_the_block(delivered):
    with signals.deferred():
        signal.raise_signal(signal.SIGTERM)
        assert delivered == []
        assert signals.pending()
    assert delivered == ["SIGTERM"]
    assert not signals.pending()


def test_without_a_block_a_signal_is_delivered_at_once(delivered):
    signal.raise_signal(signal.SIGTERM)
    assert delivered == ["SIGTERM"]


def test_each_waiting_signal_is_delivered_once_in_order_of_arrival(delivered):
    with signals.deferred():
        for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.raise_signal(signum)
    assert delivered == ["SIGUSR1", "SIGTERM", "SIGUSR2"]


def test_an_inner_block_leaves_delivery_to_the_outer_one(delivered):
    with signals.deferred():
        with signals.deferred():
            signal.raise_signal(signal.SIGTERM)
        assert delivered == []
    assert delivered == ["SIGTERM"]


def test_a_block_that_raises_delivers_too(delivered):
    with pytest.raises(KeyError), signals.deferred():
        signal.raise_signal(signal.SIGTERM)
        raise KeyError
    assert delivered == ["SIGTERM"]


def test_handlers_are_put_back(delivered):
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with signals.deferred():
        pass
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_handler_that_raises_does_so_after_the_block():
    def stop(*_: Any) -> None:
        raise SystemExit(3)

    kept, done = signal.signal(signal.SIGTERM, stop), []
    try:
        with pytest.raises(SystemExit), signals.deferred():
            signal.raise_signal(signal.SIGTERM)
            done.append("block")
    finally:
        signal.signal(signal.SIGTERM, kept)
    assert done == ["block"]
    assert not signals.pending()


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_for_the_end_of_a_block():
    done = []
    with pytest.raises(KeyboardInterrupt), signals.deferred():
        signal.raise_signal(signal.SIGINT)
        assert signals.pending()
        done.append("block")
    assert done == ["block"]
    assert not signals.pending()


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_users_code_at_once_and_the_clean_up_is_not_interrupted_again():
    cleaned = []
    with pytest.raises(KeyboardInterrupt), signals.deferred():
        try:
            with signals.keyboard_interrupt_allowed():
                signal.raise_signal(signal.SIGINT)
                cleaned.append("not reached")
        finally:
            signal.raise_signal(signal.SIGINT)
            with signals.keyboard_interrupt_allowed():
                signal.raise_signal(signal.SIGINT)
            cleaned.append("cleaned")
    assert cleaned == ["cleaned"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to be delivered
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.usefixtures("ctrl_c")
def test_users_code_does_not_start_where_ctrl_c_waits():
    started = []
    with pytest.raises(KeyboardInterrupt), signals.deferred():
        signal.raise_signal(signal.SIGINT)
        with signals.keyboard_interrupt_allowed():
            started.append(True)
    assert started == []


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_interrupts_again_in_the_next_block():
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), signals.deferred(), signals.keyboard_interrupt_allowed():
            signal.raise_signal(signal.SIGINT)


def test_a_handler_of_the_users_for_ctrl_c_is_called_after_the_block_and_nothing_is_raised():
    called: list[int] = []
    kept = signal.signal(signal.SIGINT, lambda number, _: called.append(number))
    try:
        with signals.deferred(), signals.keyboard_interrupt_allowed():
            signal.raise_signal(signal.SIGINT)
            assert called == []
    finally:
        signal.signal(signal.SIGINT, kept)
    assert called == [signal.SIGINT]


def test_a_handler_that_raises_keeps_no_other_from_running(delivered):
    def stop(*_: Any) -> None:
        raise SystemExit(3)

    signal.signal(signal.SIGUSR1, stop)
    with pytest.raises(SystemExit), signals.deferred():
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
    assert delivered == ["SIGTERM"]


def test_without_a_held_block_ctrl_c_is_pythons(ctrl_c):
    with pytest.raises(KeyboardInterrupt), signals.keyboard_interrupt_allowed():
        signal.raise_signal(signal.SIGINT)
    assert not signals.pending()


def test_a_signal_without_a_handler_in_python_keeps_its_meaning():
    kept = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with signals.deferred():
            assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR2, kept)


def test_in_another_thread_nothing_is_held(delivered):
    seen = []

    def work() -> None:
        with signals.deferred():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_a_block_with_merged_weights_at_once_and_raw_is_back():
    model, merger, done = torch.nn.Linear(1, 1), RollingMerger(window=2, every=1), []
    for step in (1, 2):
        torch.nn.init.constant_(model.weight, step)
        merger.observe(model, step)
    with pytest.raises(KeyboardInterrupt), merger.merged(model, "sma"):
        assert model.weight.item() == 1.5
        signal.raise_signal(signal.SIGINT)
        done.append("not reached")
    assert done == []
    assert model.weight.item() == 2.0


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("where", ["an evaluator", "validation"])
def test_ctrl_c_ends_a_long_evaluation_at_once_and_raw_is_back(where, tmp_path):
    done, raw = [], Recorder()

    def takes_long(module: Any) -> dict[str, float]:
        if not same_bits(weights(module), raw.run.weights[-1]):
            signal.raise_signal(signal.SIGINT)
            done.append("not reached")
        return {}

    class Module(Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if where == "validation":
                takes_long(self)

    module, evaluators = Module(), {"long": takes_long} if where == "an evaluator" else {}
    own = trainer(tmp_path, raw, ModelMerging(window=2, every=1, evaluators=evaluators), max_steps=4)
    with pytest.raises(SystemExit):
        own.fit(module, rows(), rows(4, seed=1))
    assert done == []
    assert same_bits(weights(module), raw.run.weights[1])


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    code, output = run_forked(signalled_run.main, str(folder), timeout=200)
    assert code == 0, output
    return folder


def report(folder: Path, scenario: str) -> dict[str, Any]:
    found = json.loads((folder / scenario / "report.json").read_text())
    assert "traceback" not in found, found["traceback"]
    return found


@pytest.mark.parametrize("scenario", signalled_run.SCENARIOS)
def test_a_signal_ends_the_evaluation_early_and_raw_is_back(scenario, reports):
    found = report(reports, scenario)
    assert found["merged batches evaluated"] % signalled_run.NUM_BATCHES > 0
    assert found["raw at the end"]
    assert found["callbacks are the user's"]


@pytest.mark.parametrize(
    ("scenario", "exception", "raised"),
    [("sigterm", "SIGTERMException", "SIGTERMException"), ("sigint", "KeyboardInterrupt", "SystemExit")],
)
def test_p08_a_checkpoint_saved_because_of_a_signal_holds_raw_weights(scenario, exception, raised, reports):
    found = report(reports, scenario)
    assert (found["exception"], found["raised"], found["step"]) == (exception, raised, 4)
    assert found["raw in on_exception"]
    (saved,) = found["checkpoints"].values()
    assert (saved["step"], saved["raw"]) == (4, True)
    assert "ModelMerging[merge]" in saved["callbacks"]
    assert found["merges"] == []  # a merge that was half measured is no record


def test_p08_a_slurm_requeue_saves_raw_weights_and_the_run_goes_on(reports):
    found = report(reports, "slurm_requeue")
    (name, saved), *others = found["checkpoints"].items()
    assert name.startswith("hpc_ckpt")
    assert not others
    assert (saved["step"], saved["raw"]) == (4, True)
    assert "ModelMerging[merge]" in saved["callbacks"]
    assert (reports / "slurm_requeue" / "scontrol.log").read_text() == "requeue 4711\n"
    assert (found["exception"], found["step"]) == (None, 6)
    assert found["merges"] == [4, 6]  # made again once the checkpoint is saved


def test_a_sigterm_that_slurm_sends_is_lightnings_to_handle(reports):
    found = report(reports, "slurm_sigterm")
    assert (found["exception"], found["step"]) == ("SIGTERMException", 4)
    assert all(saved["raw"] for saved in found["checkpoints"].values())


@pytest.mark.parametrize("moment", signalled_run.MOMENTS)
def test_p08_a_sigterm_at_any_moment_of_a_merge_point_ends_it_early_with_raw_weights(moment, reports):
    found = report(reports, f"SIGTERM in {moment}")
    assert found["arrived"]
    assert (found["exception"], found["step"]) == ("SIGTERMException", 4)
    assert found["raw in on_exception"]
    assert found["raw at the end"]
    assert found["callbacks are the user's"]
    (saved,) = found["checkpoints"].values()
    assert (saved["step"], saved["raw"]) == (4, True)
    assert found["merges"] == ([4] if moment == "the restore" else [])  # all was measured already
    assert found["merged"] == (["step-00000004-sma"] if moment == "the writing of a merged model" else [])


@pytest.mark.parametrize("moment", signalled_run.MOMENTS)
def test_p08_a_slurm_requeue_save_at_any_moment_of_a_merge_point_waits_for_raw(moment, reports):
    found = report(reports, f"SIGUSR1 in {moment}")
    assert found["arrived"]
    assert {name[:8]: (saved["step"], saved["raw"]) for name, saved in found["checkpoints"].items()} == {
        "hpc_ckpt": (4, True)
    }
    assert (found["exception"], found["step"]) == (None, 6)
    assert found["raw at the end"]
    assert found["merges"] == [4, 6]

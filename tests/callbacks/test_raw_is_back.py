"""Raw weights are back, in the model and in checkpoints, whatever broke off an evaluation."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.watching import RawAfterStep, records
from harness.models import LIGHTNING_REMARKS, MemoryLogger, Regression, Witness, rows, same_bits, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint

import pretrain_merge.callbacks.merge_point
import pretrain_merge.callbacks.run
import pretrain_merge.evaluation.evaluate
import pretrain_merge.evaluation.isolation
import pretrain_merge.merging.rolling_merger
import pretrain_merge.runtime.signals
import pretrain_merge.window.observed
from pretrain_merge import ModelMerging
from pretrain_merge.callbacks.run import Run
from pretrain_merge.errors import EvaluationError
from pretrain_merge.evaluation import isolation

pytestmark = LIGHTNING_REMARKS


class _Breaks(Regression):
    """Raises in the validation of the merged model, after its first batch."""

    error: Any = RuntimeError("validation broke")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 1 and not same_bits(weights(self), self.trainer.raw):
            raise self.error


def interrupted(folder: Path, module: Any, *callbacks: Any, error: Any, **options: Any) -> Any:
    merging = ModelMerging(**({"window": 2, "every": 2, "views": ["sma", "wma"]} | options))
    saving = ModelCheckpoint(folder / "kept", filename="at-exception", save_on_exception=True, save_top_k=0)
    own = trainer(folder, RawAfterStep(), merging, saving, *callbacks, max_steps=8)
    with pytest.raises(error):
        own.fit(module, rows(), rows(10, seed=1))
    assert own.global_step == 4
    return own


def raw_everywhere(own: Any, module: Any, folder: Path) -> bool:
    checkpoint = torch.load(folder / "kept" / "at-exception.ckpt", weights_only=True)
    return same_bits(weights(module), own.raw) and same_bits(dict(checkpoint["state_dict"]), own.raw)


def test_raw_is_back_and_saved_after_an_exception_in_validation(tmp_path):
    module = _Breaks()
    own = interrupted(tmp_path, module, error=RuntimeError)
    assert raw_everywhere(own, module, tmp_path)


def test_raw_is_back_and_saved_after_an_exception_in_an_evaluator(tmp_path):
    module, calls = Regression(), []

    def breaks(module: Any) -> dict[str, float]:
        calls.append(weights(module))
        return {"a": 1 / (3 - len(calls))}

    own = interrupted(tmp_path, module, error=ZeroDivisionError, evaluators={"breaks": breaks})
    assert not same_bits(calls[-1], own.raw)
    assert raw_everywhere(own, module, tmp_path)


@pytest.mark.parametrize("average", ["last", "block"])
def test_raw_is_back_after_an_evaluator_that_writes_into_the_weights(average, tmp_path):
    @torch.no_grad()
    def rounds(module: Any) -> dict[str, float]:
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
        return {"a": 1.0}

    module, raw = Regression(), RawAfterStep()
    own = trainer(
        tmp_path, raw, ModelMerging(window=2, every=2, average=average, evaluators={"rounds": rounds}), max_steps=4
    )
    own.fit(module, rows(), rows(4, seed=1))
    assert len(records(tmp_path)) == 1
    assert same_bits(weights(module), own.raw)


def test_raw_is_back_and_saved_after_a_keyboard_interrupt(tmp_path):
    module = _Breaks()
    module.error = KeyboardInterrupt
    own = interrupted(tmp_path, module, error=SystemExit)
    assert raw_everywhere(own, module, tmp_path)


def test_raw_is_back_and_saved_where_the_batches_change(tmp_path):
    class Moving(torch.utils.data.Dataset):
        reads = Witness()  # which an evaluation does not take back
        reads.append(0)

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            self.reads[0] += 1
            return torch.full((4,), float(self.reads[0])), torch.zeros(1)

    module = Regression()
    merging = ModelMerging(window=2, every=2)
    own = trainer(tmp_path, RawAfterStep(), merging, max_steps=8)
    with pytest.raises(EvaluationError):
        own.fit(module, rows(), torch.utils.data.DataLoader(Moving(), 4))
    assert same_bits(weights(module), own.raw)


def test_a_block_mean_gives_raw_back_too(tmp_path):
    module = _Breaks()
    own = interrupted(tmp_path, module, error=RuntimeError, average="block")
    assert raw_everywhere(own, module, tmp_path)


_OURS = {
    str(Path(module.__file__))
    for module in (
        pretrain_merge.callbacks.merge_point,
        pretrain_merge.callbacks.run,
        pretrain_merge.evaluation.evaluate,
        pretrain_merge.evaluation.isolation,
        pretrain_merge.window.observed,
        pretrain_merge.merging.rolling_merger,
        pretrain_merge.runtime.signals,
    )
}


def _with_signal(folder: Path, signum: int, at: tuple[str, int] | None) -> dict[str, Any]:
    """A run with a signal at the first visit of a line at a merge point: lines visited, and what it left behind."""
    module, visited, raised = Regression(), {}, False
    merging = ModelMerging(window=2, every=2, views=["sma", "wma"])
    saving = ModelCheckpoint(folder / "kept", filename="at-exception", save_on_exception=True, save_top_k=0)
    own = trainer(folder, RawAfterStep(), merging, saving, max_steps=4, logger=MemoryLogger(folder))
    callbacks, loggers = list(own.callbacks), list(own.loggers)
    measure, before = Run._measure, sys.gettrace()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored

    def trace(frame: Any, event: str, _: Any) -> Any:
        line = (frame.f_code.co_filename, frame.f_lineno)
        if line[0] not in _OURS:
            return None
        if event == "line" and line not in visited:
            visited[line] = True
            if line == at:
                signal.raise_signal(signum)
        return trace

    def traced(*arguments: Any) -> Any:
        sys.settrace(trace)
        try:
            return measure(*arguments)
        finally:
            sys.settrace(before)

    try:
        with isolation.replaced(Run, _measure=traced):
            own.fit(module, rows(8), rows(4, seed=1))
    except SystemExit:
        raised = True
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it after Ctrl-C
    return {
        "lines": list(visited),
        "interrupted": raised and own.global_step == 4,
        "raw": raw_everywhere(own, module, folder) if raised else same_bits(weights(module), own.raw),
        "whole": own.callbacks == callbacks and own.loggers == loggers,
    }


@pytest.mark.parametrize(("name", "first"), [("SIGINT", 0), ("SIGTERM", 16)])  # by turns: a run takes a second
def test_p08_raw_is_back_and_saved_after_a_signal_at_any_line_of_ours(name, first, tmp_path):
    signum = getattr(signal, name)
    lines = _with_signal(tmp_path / "none", signum, None)["lines"]
    assert len(lines) > 100
    for line in lines[first::32]:
        found = _with_signal(tmp_path / f"{Path(line[0]).stem}-{line[1]}", signum, line)
        assert found["interrupted"] or line not in found["lines"], f"no {name} at {line}"
        assert found["raw"], f"merged weights were left in the model or a checkpoint by {name} at {line}"
        assert found["whole"], f"stand-ins were left in the Trainer by {name} at {line}"


def test_the_window_is_freed_after_an_exception(tmp_path):
    module, merging = _Breaks(), ModelMerging(window=2, every=2)
    with pytest.raises(RuntimeError, match="validation broke"):
        trainer(tmp_path, RawAfterStep(), merging, max_steps=8).fit(module, rows(), rows(10, seed=1))
    assert merging._fits.run is None

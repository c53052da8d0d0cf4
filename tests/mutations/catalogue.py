"""The seeded faults: one line of the package broken at a time, and the tests that must notice."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """One break.

    Attributes:
        what: What goes wrong, in a few words.
        file: Module below `pretrain_merge/`.
        before: Text of the module, found exactly once.
        after: What it becomes.
        tests: Tests of which at least one must fail.
    """

    what: str
    file: str
    before: str
    after: str
    tests: str

    def check(self, root: Path) -> str:
        """The module's text, in which the fault has exactly one place; a stale fault is an error."""
        text = (root / "pretrain_merge" / self.file).read_text(encoding="utf-8")
        if text.count(self.before) != 1:
            raise ValueError(f"{self.what}: {self.before!r} is {text.count(self.before)} times in {self.file}")
        return text

    def break_(self, root: Path) -> None:
        """Put the fault into a copy of the repository."""
        broken = self.check(root).replace(self.before, self.after)
        (root / "pretrain_merge" / self.file).write_text(broken, encoding="utf-8")


_COEFFICIENTS = "tests/test_coefficients.py"
_CADENCE = "tests/test_cadence.py"
_WINDOW = "tests/window/test_window.py"
_BLOCK = "tests/window/test_block_mean.py"
_MERGER = "tests/merging/test_rolling_merger.py"
_SNAPSHOT = "tests/parameters/test_live.py"
_SWAP = "tests/merging/test_swap.py"
_VIEWS = "tests/merging/test_views.py"
_WHICH = "tests/callbacks/test_which_parameters.py"
_RECORDS = "tests/records/test_record.py"
_KERNELS = "tests/kernels/test_contract.py"
_SPREAD = "tests/kernels/test_spread.py"
_COMPILED = "tests/kernels/test_compiled.py"
_EVALUATE = "tests/evaluation/test_evaluate.py"
_CHECKPOINTS = "tests/callbacks/test_checkpoints_stay_raw.py"
_PLAN = "tests/plan"
_DURABLE = "tests/callbacks/test_kept_window.py"
_NON_INTERFERENCE = "tests/callbacks/test_non_interference.py"

FAULTS = (
    # coefficients
    Fault(
        "wma is one snapshot late", "coefficients.py", "for i in range(1, n + 1))", "for i in range(n))", _COEFFICIENTS
    ),
    Fault(
        "ema takes the share of the older side",
        "coefficients.py",
        "coefficients.append(left * share)\n        left *= 1.0 - share",
        "coefficients.append(left * (1.0 - share))\n        left *= share",
        _COEFFICIENTS,
    ),
    Fault("half-life in e-foldings", "coefficients.py", "-math.log(2.0) * ((after", "-1.0 * ((after", _COEFFICIENTS),
    Fault(
        "decay is reversed",
        "coefficients.py",
        "pairwise((1.0, *rates, 0.0))",
        "pairwise((1.0, *rates[::-1], 0.0))",
        _COEFFICIENTS,
    ),
    Fault(
        "decay ends on the newest snapshot",
        "coefficients.py",
        "* n / (n - 1)) for time",
        "or 1.0) for time",
        _COEFFICIENTS,
    ),
    Fault(
        "qam mixes the wrong way",
        "coefficients.py",
        "more[1:] += rate * chances",
        "more[:-1] += rate * chances",
        _COEFFICIENTS,
    ),
    Fault(
        "qam is computed again at each merge",
        "coefficients.py",
        "@lru_cache(maxsize=8)  #",
        "@lru_cache(maxsize=0)  #",
        _COEFFICIENTS,
    ),
    Fault(
        "a kind sees times that do not ascend",
        "coefficients.py",
        '        if takes_times:\n            parameters["times"] = _times(',
        '        if takes_times:\n            parameters["times"] = (lambda times, n: times or range(n))(',
        _COEFFICIENTS,
    ),
    Fault(
        "rounding is not made up for", "coefficients.py", "+= 1.0 - math.fsum(coefficients)", "+= 0.0", _COEFFICIENTS
    ),
    Fault(
        "the inverse is off by one",
        "coefficients.py",
        "math.fsum(checked[i:]) for i in range(1,",
        "math.fsum(checked[i - 1 :]) for i in range(1,",
        _COEFFICIENTS,
    ),
    Fault(
        "n_eff forgets to square",
        "coefficients.py",
        "1.0 / math.fsum(c * c for c",
        "1.0 / math.fsum(c for c",
        _COEFFICIENTS,
    ),
    Fault(
        "mean age counts from the oldest",
        "coefficients.py",
        "c * (taken[-1] - time)",
        "c * (time - taken[0])",
        _COEFFICIENTS,
    ),
    Fault(
        "1-sqrt is 1-square",
        "lr_schedules.py",
        "1.0 - math.sqrt(t)",
        "1.0 - t * t",
        f"tests/test_lr_schedules.py {_COEFFICIENTS}",
    ),
    # cadence
    Fault(
        "fires on the remainder only",
        "cadence.py",
        "return self.index(after) > last and",
        "return after.count(self.every.unit) % self.every.amount == 0 and",
        _CADENCE,
    ),
    Fault(
        "fires again at a standstill",
        "cadence.py",
        "return self.index(after) > last and",
        "return self.index(after) >= last and",
        _CADENCE,
    ),
    Fault("ignores start", "cadence.py", " and after.count(self.start.unit) >= self.start.amount", "", _CADENCE),
    Fault("B means a million", "cadence.py", '"B": 10**9', '"B": 10**6', _CADENCE),
    # window
    Fault(
        "the newest snapshot leaves, not the oldest",
        "window/window.py",
        "self._held.popleft().segment",
        "self._held.pop().segment",
        _WINDOW,
    ),
    Fault(
        "a full window writes over the newest slot",
        "window/window.py",
        "return self._held[0].slot",
        "return self._held[-1].slot",
        _WINDOW,
    ),
    Fault(
        "each step goes through the whole window",
        "window/window.py",
        "return self._held[-2] if len(self._held) > 1",
        "return self.snapshots[-2] if len(self._held) > 1",
        _WINDOW,
    ),
    Fault(
        "snapshots before a break are counted as valid",
        "window/window.py",
        "num_lost, self.num_valid = self.num_valid, 0",
        "num_lost = self.num_valid",
        _WINDOW,
    ),
    Fault(
        "a break does not end the segment",
        "window/window.py",
        "self.segment += 1",
        "self.segment += 0",
        f"{_WINDOW} {_MERGER}",
    ),
    # block means
    Fault(
        "the sum starts with the old one",
        "window/block_mean.py",
        "weighted_sum_(self.sums, [tensors], [1.0])",
        "weighted_sum_(self.sums, [self.sums, tensors], [1.0, 1.0])",
        _BLOCK,
    ),
    Fault(
        "the mean divides by one too many",
        "window/block_mean.py",
        "[1.0 / self.num_samples]",
        "[1.0 / (self.num_samples + 1)]",
        _BLOCK,
    ),
    Fault(
        "a block with a break in it stays complete",
        "window/block_mean.py",
        "self._is_valid = self._is_valid and self.num_seen == 0",
        "pass",
        _BLOCK,
    ),
    Fault(
        "sums in the dtype of the parameter",
        "window/block_mean.py",
        "return torch.float64 if tensor.dtype == torch.float64 else torch.float32",
        "return tensor.dtype",
        _BLOCK,
    ),
    # which tensors
    Fault(
        "frozen parameters are merged",
        "parameters/live.py",
        "if item.requires_grad or id(item) in stepped)",
        ")",
        _SNAPSHOT,
    ),
    Fault(
        "what is frozen at the moment is no longer merged",
        "parameters/live.py",
        "for name, parameter in parameters if name in self._names]",
        "for name, parameter in parameters if parameter.requires_grad]",
        f"{_SNAPSHOT} {_WHICH}",
    ),
    Fault(
        "what an optimizer stepped and was frozen again is not merged",
        "parameters/live.py",
        "item.requires_grad or id(item) in stepped",
        "item.requires_grad",
        _SNAPSHOT,
    ),
    Fault(
        "one name of a tied parameter does not leave it out",
        "parameters/live.py",
        "if id(parameter) not in left_out:",
        "if name in wanted:",
        _SNAPSHOT,
    ),
    Fault(
        "memory that is shared in part is merged twice",
        "parameters/live.py",
        "if device == other_device and start < end:",
        "if False:",
        _SNAPSHOT,
    ),
    Fault(
        "a resumed run merges what trains at its start",
        "resume/saved_window.py",
        "self._capture.trained.remember(manifest.parameters)",
        "pass",
        _WHICH,
    ),
    Fault("tied parameters are merged twice", "parameters/live.py", "if identity not in seen:", "if True:", _SNAPSHOT),
    Fault(
        "BatchNorm passes in silence",
        "parameters/live.py",
        'if statistics and batch_norm == "refuse":',
        "if False:",
        _SNAPSHOT,
    ),
    Fault(
        "names keep what compile added",
        "parameters/shards.py",
        'name = name.replace(added, "")',
        "pass",
        _SNAPSHOT,
    ),
    # merge and swap
    Fault(
        "a view takes the oldest snapshots",
        "merging/views.py",
        "chosen = valid[-(view.last or window.size) :]",
        "chosen = valid[: (view.last or window.size)]",
        _MERGER,
    ),
    Fault(
        "a view is resolved at each question",
        "merging/views.py",
        "if state != self._state:",
        "if True:",
        _VIEWS,
    ),
    Fault(
        "a view that was resolved does not see a new snapshot",
        "merging/views.py",
        "if state != self._state:",
        "if not self._state:",
        f"{_VIEWS} {_MERGER}",
    ),
    Fault(
        "every pass over the whole window measures the spread",
        "merging/swap.py",
        "is_new = merge.snapshots == valid != self._snapshots",
        "is_new = merge.snapshots == valid",
        _VIEWS,
    ),
    Fault(
        "the spread of a window that no view read is not measured",
        "merging/swap.py",
        "        if valid != self._snapshots:\n",
        "        if False:\n",
        _VIEWS,
    ),
    Fault(
        "a changed learning rate is no break",
        "window/breaks.py",
        "if self._settings.breaks.lr and _differs(",
        "if False and _differs(",
        _MERGER,
    ),
    Fault(
        "a slow drift of the learning rate is no break",
        "window/breaks.py",
        "            self.segment_lr = lr\n",
        "        self.segment_lr = lr\n",
        _MERGER,
    ),
    Fault(
        "non-finite snapshots are kept",
        "window/capture.py",
        "not num_partial and not num_non_finite",
        "True",
        _MERGER,
    ),
    Fault(
        "raw is not restored",
        "merging/swap.py",
        "                    self._restore()\n",
        "                    pass\n",
        f"{_MERGER} tests/callbacks/test_model_merging.py",
    ),
    Fault(
        "memory that an evaluator exchanged stays",
        "merging/swap.py",
        "                    self._places.put_back()\n",
        "                    pass\n",
        _SWAP,
    ),
    Fault(
        "merges are written into memory that an evaluator exchanged",
        "merging/swap.py",
        "        self._places.put_back()\n        measured",
        "        measured",
        _SWAP,
    ),
    Fault(
        "a parameter that an evaluator replaced stays replaced",
        "parameters/places.py",
        "place.owner[place.key] = place.tensor",
        "pass",
        _SWAP,
    ),
    Fault(
        "training goes on from parameters that were made of merged weights",
        "parameters/places.py",
        "if id(place.tensor) not in present]",
        "if False]",
        _SWAP,
    ),
    Fault(
        "a merge raises version counters",
        "merging/swap.py",
        "with signals.held(), self._places.versions_kept():",
        "with signals.held():",
        f"{_SWAP} {_WHICH}",
    ),
    Fault(
        "a pruned layer loses its zeros when pruning is made permanent",
        "merging/swap.py",
        "tensor.masked_fill_(zeros, 0)",
        "pass",
        f"{_SWAP} {_WHICH}",
    ),
    Fault(
        "tensors are merged by position",
        "window/stored.py",
        "return [live[name] for name in self._kinds]",
        "return list(live.values())",
        _SWAP,
    ),
    Fault(
        "a model of other parameters gets the merge",
        "merging/swap.py",
        "if others := stored.why_others(self._live):",
        "if others := None:",
        _SWAP,
    ),
    Fault(
        "a step inside a swap takes the slot of raw",
        "window/capture.py",
        "if self.stored.num_swaps:",
        "if False:",
        _MERGER,
    ),
    Fault(
        "raw is always taken from the newest slot",
        "window/stored.py",
        "if self.open_store().holds(newest.slot, self._in_order(live)) else None",
        "if True else None",
        f"{_MERGER} {_WHICH}",
    ),
    Fault(
        "raw is always copied",
        "window/stored.py",
        "if self.open_store().holds(newest.slot, self._in_order(live)) else None",
        "if False else None",
        _MERGER,
    ),
    Fault(
        "raw is known by its numbers, not its bits",
        "parameters/elements.py",
        "return all(map(_same_bits, tensors, others))",
        "return all(map(torch.equal, tensors, others))",
        f"tests/parameters/test_elements.py {_MERGER}",
    ),
    Fault(
        "the end of a tensor is not compared",
        "parameters/elements.py",
        "for start in range(0, len(ours), step):",
        "for start in range(0, len(ours) - 1, step):",
        "tests/parameters/test_elements.py",
    ),
    Fault(
        "merges are due without regard to merge_every",
        "merging/rolling_merger.py",
        "self._merge_cadence.crossed(",
        "self._views._cadence.crossed(",
        _MERGER,
    ),
    Fault(
        "a block keeps the iterate beyond its end",
        "window/capture.py",
        "        if not overshoots:\n",
        "        if True:\n",
        _MERGER,
    ),
    # the merge's arithmetic
    Fault(
        "sums in bfloat16",
        "kernels/reference.py",
        "torch.float64 if double else torch.float32\n    longest",
        "snapshots[0][0].dtype\n    longest",
        _KERNELS,
    ),
    Fault(
        "the last snapshot is left out",
        "kernels/reference.py",
        "zip(sources[1:], coefficients[1:], strict=True)",
        "zip(sources[1:-1], coefficients[1:-1], strict=True)",
        _KERNELS,
    ),
    Fault(
        "the spread is from zero",
        "kernels/reference.py",
        "pivot = sources[0].to(torch.float64, copy=True)",
        "pivot = torch.zeros_like(sources[0], dtype=torch.float64)",
        _SPREAD,
    ),
    Fault(
        "bfloat16 is truncated",
        "kernels/cpu_vectors.py",
        "b.lshr(b.add(b.add(bits, v.constant(I32, 0x7FFF)), is_odd), v.constant(I32, 16))",
        "b.lshr(bits, v.constant(I32, 16))",
        _KERNELS,
    ),
    Fault(
        "tiny deviations underflow",
        "kernels/spread.py",
        "num_snapshots * smallest <= self.squares",
        "0 <= self.squares",
        _SPREAD,
    ),
    Fault(
        "a residue of rounding is a distance",
        "kernels/spread.py",
        "0.0 if distance < 0.0 else distance",
        "distance",
        _SPREAD,
    ),
    Fault(
        "the spread is measured after the merge",
        "kernels/weighted_sum.py",
        "spread and group.replaces",
        "False",
        _SPREAD,
    ),
    Fault(
        "whole blocks are read under a mask",
        "kernels/cuda_kernel.py",
        "(length if masked else block)",
        "(length if masked else block + tl.minimum(num_snapshots, 0))",
        _COMPILED,
    ),
    Fault(
        "values in local memory",
        "kernels/cuda_kernel.py",
        "else (128 if spread else 64)",
        "else (80 if spread else 40)",
        _COMPILED,
    ),
    Fault("a kernel for each N", "kernels/cuda_kernel.py", '(do_not_specialize=["num_snapshots"])', "", _COMPILED),
    # evaluation
    Fault(
        "other random numbers at each pass",
        "evaluation/evaluate.py",
        "                if data is not None:\n                    random_state()\n",
        "                if data is not None:\n",
        _EVALUATE,
    ),
    Fault(
        "the run's generators move on",
        "evaluation/isolation.py",
        "        yield lambda: _set_rng_states(states)\n    finally:\n        _set_rng_states(states)\n",
        "        yield lambda: _set_rng_states(states)\n    finally:\n        pass\n",
        _NON_INTERFERENCE,
    ),
    Fault(
        "modules stay in eval mode",
        "evaluation/isolation.py",
        "            now.update({name: value for name, value in before.items() if now.get(name, now) is not value})",
        "            pass",
        _NON_INTERFERENCE,
    ),
    Fault(
        "users' callbacks hear of the evaluation",
        "evaluation/isolation.py",
        "deaf = [_deaf(callback) for callback in trainer.callbacks]",
        "deaf = trainer.callbacks",
        _EVALUATE,
    ),
    Fault(
        "users' loggers hear of the evaluation",
        "evaluation/isolation.py",
        "_loggers=silent",
        "_loggers=trainer.loggers",
        _EVALUATE,
    ),
    Fault(
        "other batches pass in silence",
        "evaluation/loaders.py",
        "self._first[place] != self._current[place]",
        "False",
        "tests/evaluation/test_loaders.py",
    ),
    Fault(
        "the users' persistent workers are used",
        "evaluation/loaders.py",
        "vars(own).update(_iterator=None, persistent_workers=False)",
        "own = loader",
        f"tests/evaluation/test_loaders.py {_NON_INTERFERENCE}",
    ),
    Fault(
        "a waiting signal does not end the pass",
        "evaluation/lockstep.py",
        "if num_more and num_interrupted:",
        "if False:",
        _EVALUATE,
    ),
    Fault(
        "signals are lost",
        "runtime/signals.py",
        "delivery.callback(signal.raise_signal, signum)",
        "pass",
        "tests/runtime/test_signals.py",
    ),
    # what is published and kept
    Fault(
        "a phase named before fit is forgotten",
        "callbacks/model_merging.py",
        "            self._phase_to_come = name\n",
        "            pass\n",
        "tests/callbacks/test_model_merging.py",
    ),
    Fault(
        "a rehearsal does not ask for the metric that is to be best",
        "callbacks/rehearsal.py",
        "refuse_unmeasured(fit.config.save.best, metrics)",
        "pass",
        "tests/callbacks/test_model_merging.py",
    ),
    Fault(
        "schedulers' next rate is taken for the one used",
        "callbacks/run.py",
        "self.merger.observe(self._fit.module, progress, lr=self.clock.lr)",
        "self.merger.observe(self._fit.module, progress, lr=self._fit.trainer.optimizers[0].param_groups[0]['lr'])",
        "tests/callbacks",
    ),
    Fault(
        "early stopping checks a stale value",
        "callbacks/monitors.py",
        "if self._num_published > seen:",
        "if self._num_published > 0:",
        "tests/callbacks/test_monitors.py",
    ),
    Fault(
        "early stopping checks a missing value",
        "callbacks/monitors.py",
        "if self._num_published > seen:",
        "if True:",
        "tests/callbacks/test_monitors.py",
    ),
    Fault(
        "the record carries the view's metric as raw",
        "records/record.py",
        "{RAW: self.raw, **self.views}",
        "{**self.views, RAW: next(iter(self.views.values()))}",
        _RECORDS,
    ),
    Fault(
        "W&B draws against its own step",
        "records/loggers.py",
        "step_metric=prefix + axes[0]",
        "step_metric=None",
        "tests/records/test_loggers.py",
    ),
    Fault(
        "the worst merged model is kept",
        "merged_models/retention.py",
        '-value if self._config.mode == "max" else value',
        'value if self._config.mode == "max" else -value',
        "tests/merged_models/test_retention.py",
    ),
    Fault(
        "an existing folder is overwritten",
        "files/folders.py",
        "if os.path.lexists(target):",
        "if False:",
        "tests/files/test_folders.py",
    ),
    Fault(
        "a misfit model is loaded as far as it fits",
        "merged_models/loading.py",
        "    if problems:\n",
        "    if False:\n",
        "tests/merged_models/test_merged.py",
    ),
    Fault(
        "a checkpoint asked for in an evaluation is written at once",
        "evaluation/isolation.py",
        "with replaced(trainer, save_checkpoint=wait):",
        "with replaced(trainer):",
        _CHECKPOINTS,
    ),
    Fault(
        "raw and every view write the same checkpoint",
        "evaluation/isolation.py",
        "if (args, kwargs) not in waiting:",
        "if True:",
        _CHECKPOINTS,
    ),
    Fault(
        "a rank that failed alone waits in a save for the others",
        "evaluation/isolation.py",
        "if ranks.num_ranks() > 1 and",
        "if False and",
        _CHECKPOINTS,
    ),
    Fault(
        "an evaluator's gradients stay",
        "evaluation/isolation.py",
        "            parameter.grad = gradient\n",
        "            pass\n",
        _NON_INTERFERENCE,
    ),
    Fault(
        "extra state is read and dropped",
        "merged_models/loading.py",
        "extra_states[name].set_extra_state(saved.whole(name))",
        "pass",
        "tests/merged_models/test_merged.py",
    ),
    # what survives
    Fault(
        "a checkpoint names what is deleted elsewhere",
        "merged_models/retention.py",
        "if not is_wanted and path.parent == self.folder and _NAME.fullmatch(path.name) and ranks.rank() == 0:",
        "if not is_wanted:",
        "tests/merged_models/test_retention.py",
    ),
    Fault(
        "a view loses its turn in a restart",
        "merged_models/retention.py",
        "self._start, self._last_merge = saved.start, dict(saved.last_merge)",
        "self._last_merge = dict(saved.last_merge)",
        "tests/merged_models/test_retention.py",
    ),
    Fault(
        "a slot that another store replaced is kept",
        "files/snapshot_file.py",
        "if identity_of(temporary) != identity:",
        "if False:",
        "tests/stores/test_disk_store.py",
    ),
    Fault(
        "a damaged snapshot is used",
        "files/snapshot_file.py",
        "if found != file.crc32:",
        "if False:",
        _DURABLE,
    ),
    Fault(
        "two processes share a folder",
        "files/folder_lock.py",
        "if error.errno in (errno.EACCES, errno.EAGAIN):",
        "if False:",
        f"tests/stores/test_disk_store.py {_DURABLE}",
    ),
    Fault(
        "a state that nobody saves pins its files",
        "callbacks/kept_window.py",
        "if self._sidecar is not None and self._checkpoint:",
        "if self._sidecar is not None:",
        _DURABLE,
    ),
    Fault(
        "a checkpoint without our state starts an empty window",
        "resume/sidecar.py",
        "return checkpoint in self._needs",
        "return False",
        _DURABLE,
    ),
    Fault(
        "another name starts an empty window",
        "callbacks/run_state.py",
        "if wanted not in states and lost:",
        "if False:",
        _DURABLE,
    ),
    Fault(
        "a step runs over a merge that is owed",
        "callbacks/run.py",
        "raise SIGTERMException",
        "pass",
        _DURABLE,
    ),
    Fault(
        "a complete run keeps owing its last merge",
        "callbacks/model_merging.py",
        "if self._run is None and self._state and",
        "if False and",
        _DURABLE,
    ),
    Fault(
        "a merge is lost to a signal after which the run goes on",
        "callbacks/run.py",
        "if record is None and not ranks.any_rank(self._fit.trainer.received_sigterm):",
        "if False:",
        _DURABLE,
    ),
    Fault(
        "a checkpoint owes no merge",
        "callbacks/run.py",
        "is_owed = state.last_merge < state.progress.step and self.merger.merge_is_due()",
        "is_owed = False",
        _DURABLE,
    ),
    Fault(
        "records after the resumed step stay",
        "records/jsonl.py",
        "            if record.step <= step:",
        "            if True:",
        "tests/records/test_jsonl.py tests/system/test_killed_runs.py",
    ),
    # the demo's check
    Fault(
        "the anneal sees other data", "demo/run.py", "first_step=branch.start", "first_step=0", "tests/demo/test_run.py"
    ),
    # ranks
    Fault(
        "what ranks hold alike counts in the spread once per rank",
        "window/capture.py",
        "name: whole / together if together else 1.0 for",
        "name: 1.0 for",
        "tests/system/test_layouts.py",
    ),
    Fault(
        "metrics are those of one rank's data",
        "evaluation/evaluate.py",
        "return reduction.over_ranks(parts)",
        "return {name: part.value for name, part in parts.items()}",
        "tests/system/test_metrics_over_ranks.py",
    ),
    Fault(
        "a rank that failed is waited for in an exchange that is no agreement",
        "runtime/ranks.py",
        '    _meet("exchange values")\n',
        "",
        "tests/system/test_failures_on_ranks.py",
    ),
    Fault(
        "a batch that one rank cannot count ends that rank alone",
        "callbacks/clock.py",
        "self._failure = self._failure or error",
        "raise",
        "tests/system/test_failures_on_ranks.py",
    ),
    Fault(
        "a failure while another is handled is not told",
        "runtime/ranks.py",
        "if error is None or error is handled:",
        "if error is None:",
        "tests/runtime/test_ranks.py",
    ),
    Fault(
        "a merge ends before a signal has reached all ranks",
        "evaluation/lockstep.py",
        "while num_signalled < ranks.num_ranks() and num_waiting:",
        "while False:",
        "tests/evaluation/test_lockstep.py",
    ),
    Fault(
        "a rank that has no batch of a loader runs ahead of the others",
        "evaluation/lockstep.py",
        "self._end_loaders(loop, until=dataloader_idx)",
        "self._loader = dataloader_idx",
        "tests/evaluation/test_lockstep.py",
    ),
    Fault(
        "a mean over ranks ignores how many rows each had",
        "evaluation/reduction.py",
        "total / sum(part.weight for part in parts)",
        "sum(values) / len(values)",
        "tests/evaluation/test_reduction.py",
    ),
    Fault(
        "a break on one rank is none on the others",
        "window/capture.py",
        "if num_broken and not has_broken:",
        "if False:",
        "tests/system/test_failures_on_ranks.py",
    ),
    Fault(
        "memory takes empty shards for tied weights",
        "merged_models/state.py",
        "ties = ranks.gather(ties)[0]",
        "pass",
        "tests/system/test_saved_by_ranks.py",
    ),
    Fault(
        "the slot that is being written needs no room",
        "stores/choose.py",
        "if num_bytes + slot_bytes > room:",
        "if num_bytes > room:",
        "tests/stores/test_choose.py",
    ),
    # plan
    Fault(
        "the plan's shards round down",
        "plan/shards.py",
        "own = -(-rows // self.shard)",
        "own = rows // self.shard",
        _PLAN,
    ),
    Fault(
        "the plan forgets the sum of a block",
        "plan/costs.py",
        "accumulator = elements * merging.accumulator_itemsize",
        "accumulator = elements * merging.slot_itemsize",
        _PLAN,
    ),
    Fault(
        "the plan forgets that a slot's old file stays", "plan/costs.py", "Place(window + slot,", "Place(window,", _PLAN
    ),
    Fault(
        "the plan forgets the scratch copy of narrow slots",
        "plan/inputs.py",
        "return self.in_blocks or self.slot_itemsize < self.itemsize",
        "return self.in_blocks",
        _PLAN,
    ),
    Fault(
        "the plan takes the pages of a copy aside for granted",
        "plan/times.py",
        "(4 if self.hardware.link_rate else 5)",
        "4",
        _PLAN,
    ),
    Fault(
        "the plan hides a core's arithmetic behind memory",
        "plan/times.py",
        "if rate is not None else ()",
        "if rate is None else ()",
        _PLAN,
    ),
    Fault(
        "the plan reads the paper's rows in straight lines",
        "plan/paper.py",
        "position = math.log(activated / below.parameters) / math.log(above.parameters / below.parameters)",
        "position = (activated - below.parameters) / (above.parameters - below.parameters)",
        _PLAN,
    ),
    # cost that grows
    Fault(
        "each save looks at all checkpoints",
        "resume/sidecar.py",
        "_NUM_LOOKED_AT = 64",
        "_NUM_LOOKED_AT = 10**9",
        "tests/resume/test_sidecar.py",
    ),
    Fault(
        "each save writes the needs of all checkpoints",
        "resume/needs.py",
        "if self._num_lines > max(_LEAST_LINES, 2 * len(self._needs)):",
        "if True:",
        "tests/resume/test_sidecar.py",
    ),
    Fault(
        "a run that was killed forgets what its last checkpoints need",
        "resume/needs.py",
        "            needs |= {checkpoint: names} if names else {}",
        "            needs |= {}",
        "tests/resume/test_sidecar.py",
    ),
    Fault(
        "a report prints every merge of a long run",
        "records/tables.py",
        "rows = measured if at_most is None else",
        "rows = measured if True else",
        "tests/cli/test_main.py",
    ),
    Fault(
        "the smallest accuracy is the best",
        "records/tables.py",
        'sign = 1.0 if mode == "min" else -1.0',
        "sign = 1.0",
        "tests/cli/test_main.py",
    ),
    Fault(
        "every rank holds the records of a resumed run",
        "callbacks/forecasts.py",
        "ranks.gather(self._asked(record) if ranks.rank() == 0 else ({}, {}))[0]",
        "self._asked(record)",
        "tests/callbacks/test_forecasts.py",
    ),
    Fault(
        "each file of a window waits for the disk alone",
        "resume/window_files.py",
        "return store.save(slot, self.folder, stem, batch=self._batch)",
        "return store.save(slot, self.folder, stem)",
        "tests/resume/test_saved_window.py",
    ),
    Fault(
        "a file of a batch has its name before it is on the disk",
        "files/atomic.py",
        "[path for path, _ in self._drafts]",
        "[]",
        "tests/files/test_atomic.py",
    ),
    Fault(
        "a snapshot counts as saved although the disk refused it",
        "resume/saved_window.py",
        "                    saved[item] = (files.folder, file)",
        "                    self._files[item] = saved[item] = (files.folder, file)",
        "tests/resume/test_saved_window.py",
    ),
    Fault(
        "each slot of a disk store keeps its file open",
        "stores/disk.py",
        "return torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8)",
        "return torch.frombuffer(__import__('mmap').mmap(os.open(path, os.O_RDONLY), 0, access=3), dtype=torch.uint8)",
        "tests/stores/test_disk_store.py",
    ),
    # forecasts
    Fault(
        "a forecast does not follow the merged curve",
        "forecast/law.py",
        "        -along,\n",
        "        -0.0 * along,\n",
        "tests/forecast",
    ),
    Fault(
        "an anneal that starts now is read as one that ends now",
        "forecast/law.py",
        'curves.step - steps if kind == "nowcast" else curves.step',
        "curves.step - steps",
        "tests/forecast",
    ),
    Fault(
        "block means are taken to span as little as snapshots",
        "forecast/history.py",
        'if average == "block" else float(between)',
        "if False else float(between)",
        "tests/forecast",
    ),
    Fault(
        "records of another learning rate are read",
        "forecast/history.py",
        "_LR_TOLERANCE = 1e-3",
        "_LR_TOLERANCE = 1e3",
        "tests/forecast",
    ),
    Fault(
        "records before a break are read",
        "forecast/history.py",
        "if not same_kind or record.step <= newest.since:",
        "if not same_kind:",
        "tests/forecast",
    ),
    Fault(
        "the noise that few snapshots leave stays in their mean",
        "forecast/curves.py",
        "way = losses[low, columns] - self.noise",
        "way = losses[low, columns] - 0.0",
        "tests/forecast",
    ),
    Fault(
        "a long run is not thinned, so a forecast costs more at each merge",
        "forecast/points.py",
        "if self._num > MOST and",
        "if self._num > MOST + 10**6 and",
        "tests/forecast/test_history.py",
    ),
    Fault(
        "the newest merge of a thinned run is kept as if it were one of every n-th",
        "forecast/points.py",
        "(self._num_seen - 1) % self._every:",
        "False:",
        "tests/forecast/test_history.py",
    ),
    Fault(
        "a resumed run holds all records in memory",
        "records/jsonl.py",
        "for number, line in enumerate(untrusted.lines(source), start=1):",
        "for number, line in list(enumerate(untrusted.lines(source), start=1)):",
        "tests/records/test_jsonl.py",
    ),
    Fault(
        "an interval is no wider outside of what was calibrated",
        "forecast/calibration.py",
        "factor = max(1.0, shortest / reading.share, (reading.share / longest) ** 2)",
        "factor = 1.0",
        "tests/forecast",
    ),
    Fault(
        "one's own anneals count for nothing",
        "forecast/fitting.py",
        "after = before + gain @ (target - terms @ before)",
        "after = before",
        "tests/forecast",
    ),
    Fault(
        "a resumed run forecasts without the records before",
        "records/jsonl.py",
        "                read(record)\n",
        "",
        "tests/callbacks/test_forecasts.py",
    ),
    Fault(
        "means that only forecasts need are saved",
        "callbacks/run.py",
        "if view not in self._not_saved:",
        "if True:",
        "tests/callbacks/test_forecasts.py",
    ),
    # files that others wrote, and names that lie where ours go
    Fault(
        "a temporary file is opened through a link",
        "files/atomic.py",
        "path = temporary_beside(target)",
        'path = target.with_name(f".{target.name}.{os.getpid()}.tmp")\n    path.touch()',
        "tests/attacks/test_links.py",
    ),
    Fault(
        "a link at a file's name is replaced in silence",
        "files/atomic.py",
        "if not stat.S_ISREG(mode):",
        "if False:",
        "tests/attacks/test_links.py",
    ),
    Fault(
        "a folder that is a link is filled",
        "files/atomic.py",
        "    refuse_link(folder)\n    folder.mkdir",
        "    folder.mkdir",
        "tests/attacks/test_links.py",
    ),
    Fault(
        "leftovers are deleted behind a link",
        "files/atomic.py",
        "    if folder.is_symlink():\n        return\n",
        "",
        "tests/attacks/test_links.py",
    ),
    Fault(
        "merged models keep the mode of safetensors",
        "files/folders.py",
        "path.chmod(mode)  # P38",
        "pass",
        "tests/attacks/test_links.py",
    ),
    Fault(
        "an URL of a file is followed whatever its scheme",
        "files/fingerprints.py",
        "if scheme is None or scheme not in self._schemes or scheme in self._silent:",
        "if False:",
        "tests/attacks/test_urls.py",
    ),
    Fault(
        "a chained URL counts as its first part",
        "files/fingerprints.py",
        'if separator and "::" not in place else None',
        "if separator else None",
        "tests/attacks/test_urls.py",
    ),
    Fault(
        "a silent server is waited for",
        "files/fingerprints.py",
        "self._silent.add(scheme)",
        "pass",
        "tests/attacks/test_urls.py",
    ),
    Fault(
        "JSON may hold any number of values",
        "files/untrusted.py",
        "> most_values:",
        "> 10**12:",
        "tests/attacks/test_crafted_files.py",
    ),
    Fault(
        "an alias is counted once however often it is named",
        "config/yaml_file.py",
        "return 1 + sum(map(self.of, node.value))",
        "return 1",
        "tests/attacks/test_crafted_files.py",
    ),
    Fault(
        "an export may claim any window",
        "records/read_run.py",
        "if number > _LARGEST_WINDOW:",
        "if False:",
        "tests/attacks/test_crafted_files.py",
    ),
    Fault(
        "an error speaks to the terminal",
        "errors.py",
        'return printable(super().__str__(), keep="\\n")',
        "return super().__str__()",
        "tests/attacks/test_terminal.py",
    ),
    # saving and loading
    Fault(
        "a damaged file is loaded",
        "merged_models/loading.py",
        '_refuse_damaged(folder, provenance["files"])',
        "pass",
        "tests/merged_models/test_odd_models.py",
    ),
    Fault(
        "a module that shows copies is written where nobody looks",
        "merged_models/loading.py",
        "if copies := _copies(module, wanted):",
        "if copies := []:",
        "tests/merged_models/test_odd_models.py",
    ),
    Fault(
        "every model of theirs is said to be readable by them",
        "merged_models/hugging_face.py",
        "            if not reason:\n",
        "            if True:\n",
        "tests/merged_models/test_odd_models.py",
    ),
    Fault(
        "odd dtypes are handed to safetensors as they are",
        "merged_models/state.py",
        "{name: as_integers(tensor) if name in odd else tensor for",
        "{name: tensor for",
        "tests/merged_models/test_odd_models.py",
    ),
    Fault(
        "a view that is conjugate is written back as it looks",
        "parameters/bits.py",
        "if target.is_conj() else (target, source)",
        "if False else (target, source)",
        "tests/parameters/test_bits.py",
    ),
)

"""The questions: from which state, with which optimizer, rate and batches a run goes on, beside which controls.

Every question is a function from the setup of a trunk to what became of its arms by name. The arms of a question see
the same batches, so that their differences are paired. This module knows no files and no pages.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from benchmarks.annealing import texts
from benchmarks.annealing.random_runs import validation_blocks
from benchmarks.collapse import Collapse
from benchmarks.restart.loop import (
    Followed,
    State,
    Training,
    batches,
    follow,
    merged,
    random_bytes,
    with_fresh_optimizer,
)
from benchmarks.restart.setups import (
    AFTER,
    DEEPER,
    REWARM,
    WINDOW,
    Setup,
)
from pretrain_merge.demo.corpus import Corpus
from pretrain_merge.demo.models import constant_after_warmup

Rate = Callable[[int], float]
DECAYS = (150, AFTER)
NEW_TEXT, LOW_RATE, SHORT = "headers", 0.1, 100  # share of the peak rate; steps
NOTICED = 15  # steps after the newest good snapshot, when a restart comes
_SHOCK = range(6, 11)  # of these, those with bad batches
_MEASURED = (0, 10, 20, 50, 100, 200, 350, AFTER)


@dataclass(frozen=True)
class Trunk:
    """A run up to where a restart comes.

    Attributes:
        setup: What was trained.
        states: Snapshots with optimizer states, oldest first.
        reached: Steps done.
        end: What it is then.
        collapse: What its training loss said.
        died: The step of its collapse; None where it never did.
    """

    setup: Setup
    states: list[State]
    reached: int
    end: State
    collapse: Collapse
    died: int | None

    def before(self, step: int) -> list[State]:
        """Snapshots up to a step."""
        return [state for state in self.states if state.step <= step]


@lru_cache(maxsize=2)
def trunk(setup: Setup) -> Trunk:
    """Train it, or take it from the question before."""
    training, text, collapse = Training(setup), batches(corpus(setup.text), setup), Collapse()
    states: list[State] = []
    factor = constant_after_warmup(setup.warmup_steps)
    for step in range(1, setup.num_steps + 1):
        loss, _ = training.step(text(step), lr=setup.lr * factor(step - 1), clip=setup.clip)
        if step % setup.every == 0:
            states = [*states, training.state(step)][-kept_snapshots(setup) :]
        if collapse.sees(step, loss) and step > 5 * setup.warmup_steps:
            return Trunk(setup, states, step, training.state(step), collapse, step)
    return Trunk(setup, states, step, training.state(step), collapse, None)


def kept_snapshots(setup: Setup) -> int:
    """A window that ends with the last sound snapshot, a deeper one, and what a collapse takes to be seen."""
    return WINDOW + 2 * math.ceil(DEEPER / setup.every)


@cache
def corpus(name: str) -> Corpus:
    """Read once a process."""
    return texts.TEXTS[name]()


class _Arms:
    """Follows restarts of one trunk, all on the same batches.

    Args:
        run: The trunk.
        num_steps: At most, of each.
        skipped: Steps after the trunk whose batches nobody sees again.
        new_text: Train and evaluate on this one, and evaluate on the trunk's, too.
    """

    def __init__(self, run: Trunk, num_steps: int, *, skipped: int = 0, new_text: str = "") -> None:
        text = replace(run.setup, text=new_text or run.setup.text)
        self._training, self._clip, self._num_steps = Training(run.setup), run.setup.clip, num_steps
        self._text, self._first = batches(corpus(text.text), text), run.reached + skipped + 1
        self._validation = validation_blocks([corpus(text.text)])
        self._other = validation_blocks([corpus(run.setup.text)]) if new_text else None
        self.found: dict[str, Followed] = {}

    def add(
        self,
        name: str,
        start: State,
        rate: Rate,
        *,
        num_steps: int = AFTER,
        clip: float | None = None,
        collapse: Collapse | None = None,
    ) -> None:
        num_steps = min(num_steps, self._num_steps)
        self.found[name] = follow(
            self._training,
            start,
            rate,
            self._text,
            first=self._first,
            num_steps=num_steps,
            validation=self._validation,
            other_validation=self._other,
            measured={place for place in _MEASURED if place < num_steps} | {num_steps},
            clip=self._clip if clip is None else clip,
            collapse=collapse,
        )


def optimizer(setup: Setup, num_steps: int) -> dict[str, Followed]:
    """The optimizer's state of an anneal that starts from a merge: dropped, the newest, averaged."""
    run = trunk(setup)
    arms = _Arms(run, num_steps)
    for steps in DECAYS:
        for name, start in _starts(run).items():
            arms.add(f"{name}, {steps} steps", start, _linear(run.setup.lr, steps), num_steps=steps)
        for name in ("merge", "raw"):
            start = with_fresh_optimizer(_starts(run)[f"{name}, newest"])
            rate = _rewarmed(_linear(run.setup.lr, steps))
            arms.add(f"{name}, fresh, re-warmed, {steps} steps", start, rate, num_steps=steps)
    return arms.found


def constant(setup: Setup, num_steps: int) -> dict[str, Followed]:
    """A merge is put back into the run, which goes on at its rate as if nothing had been."""
    run = trunk(setup)
    arms, rate = _Arms(run, num_steps), _constant(run.setup.lr)
    for name, start in _starts(run).items():
        arms.add(name, start, rate)
    arms.add("merge of 3, newest", merged(run.states[-3:], "newest"), rate)
    for name in ("merge", "raw"):
        arms.add(f"{name}, fresh, re-warmed", with_fresh_optimizer(_starts(run)[f"{name}, newest"]), _rewarmed(rate))
    return arms.found


def shock(setup: Setup, num_steps: int) -> dict[str, Followed]:
    """Five batches of noise; a snapshot is taken behind them, and then somebody notices."""
    run = trunk(setup)
    damaged, unharmed = (_trained_on(run, bad) for bad in (_SHOCK, range(0)))
    good, with_damaged = run.states[-WINDOW:], [*run.states[1 - WINDOW :], damaged]
    arms, rate = _Arms(run, num_steps, skipped=NOTICED), _constant(run.setup.lr)
    arms.add("never shocked", unharmed, rate)
    arms.add("no restart", damaged, rate)
    arms.add("rewind", good[-1], rate)
    arms.add("rewind deeper", _deeper(run.states), rate)
    for kind in ("newest", "average", "fresh"):
        arms.add(f"merge of 10, {kind}", merged(good, kind), rate)
    arms.add("merge of 3, newest", merged(good[-3:], "newest"), rate)
    arms.add("merge of 10 with the damaged, newest", merged(with_damaged, "newest"), rate)
    return arms.found


def continued(setup: Setup, num_steps: int) -> dict[str, Followed]:
    """Training goes on with another text and a fresh optimizer: a full schedule, and a short one at a low rate."""
    run = trunk(setup)
    peak = run.setup.lr
    full = _rewarmed(lambda done: peak * 0.5 * (1.0 + math.cos(math.pi * done / AFTER)))
    short = _rewarmed(_linear(LOW_RATE * peak, SHORT), SHORT // 10)
    starts = {
        "raw": run.states[-1],
        "raw deeper": _deeper(run.states),
        "merge": merged(run.states[-WINDOW:], "fresh"),
        "annealed": _annealed(run, min(DECAYS)),
    }
    arms = _Arms(run, num_steps, new_text=NEW_TEXT)
    for name, start in starts.items():
        arms.add(f"{name}, full", with_fresh_optimizer(start), full)
        arms.add(f"{name}, short", with_fresh_optimizer(start), short, num_steps=SHORT)
    return arms.found


def divergence(setup: Setup, num_steps: int) -> dict[str, Followed]:
    """The rate is too high, beta2 .999 and nothing is clipped."""
    return _after_collapse(trunk(setup), num_steps)


def creeping(setup: Setup, num_steps: int) -> dict[str, Followed]:
    """The rate is too high, beta2 .95: the loss rises slowly."""
    return _after_collapse(trunk(setup), num_steps)


QUESTIONS: Mapping[str, Callable[[Setup, int], dict[str, Followed]]] = {
    "optimizer": optimizer,
    "divergence": divergence,
    "constant": constant,
    "shock": shock,
    "continued": continued,
    "creeping": creeping,
}


def _after_collapse(run: Trunk, num_steps: int) -> dict[str, Followed]:
    """Restarts from before the collapse, at the same rate and at half of it, behind the batches that were seen."""
    if run.died is None:
        return {}
    arms = _Arms(run, num_steps)
    sound = run.before(run.collapse.sound_until)
    newest, merge = sound[-1], sound[-WINDOW:]
    starts = {
        "raw, newest": newest,
        "raw, fresh": with_fresh_optimizer(newest),
        "raw deeper, newest": _deeper(sound),
        "merge, newest": merged(merge, "newest"),
        "merge, average": merged(merge, "average"),
        "merge, fresh": merged(merge, "fresh"),
    }

    def add(name: str, start: State, rate: Rate, clip: float | None = None) -> None:
        arms.add(name, start, rate, clip=clip, collapse=Collapse(run.collapse.lowest))

    same = _constant(run.setup.lr)
    add("no restart, same rate", run.end, same)
    for name, start in starts.items():
        add(f"{name}, same rate", start, same)
    add("raw, newest, clipped, same rate", newest, same, clip=1.0)
    add("raw, fresh, re-warmed, same rate", starts["raw, fresh"], _rewarmed(same))
    add("raw, fresh, re-warmed, clipped, same rate", starts["raw, fresh"], _rewarmed(same), clip=1.0)
    for name, start in starts.items():
        add(f"{name}, half rate", start, _constant(0.5 * run.setup.lr))
    return arms.found


def _starts(run: Trunk) -> dict[str, State]:
    """Weights and optimizer states of a restart from a stable run, the controls last."""
    window, newest = run.states[-WINDOW:], run.states[-1]
    return {
        "merge, fresh": merged(window, "fresh"),
        "merge, newest": merged(window, "newest"),
        "merge, average": merged(window, "average"),
        "raw, fresh": with_fresh_optimizer(newest),
        "raw, newest": newest,
        "raw deeper, newest": _deeper(run.states),
    }


def _deeper(states: Sequence[State]) -> State:
    """The newest snapshot that is at least `DEEPER` steps older than the newest of all; else the oldest."""
    old = [state for state in states if state.step <= states[-1].step - DEEPER]
    return (old or states[:1])[-1]


def _trained_on(run: Trunk, bad: range) -> State:
    """Some steps on, of which some see noise."""
    training, setup = Training(run.setup), run.setup
    training.restore(run.states[-1])
    text, noise = batches(corpus(setup.text), setup), random_bytes(setup)
    for done in range(1, NOTICED + 1):
        step = run.reached + done
        training.step((noise if done in bad else text)(step), lr=setup.lr, clip=setup.clip)
    return training.state(run.reached + NOTICED)


def _annealed(run: Trunk, num_steps: int) -> State:
    """The run with its rate taken down to zero."""
    training, setup, rate = Training(run.setup), run.setup, _linear(run.setup.lr, num_steps)
    training.restore(run.states[-1])
    text = batches(corpus(setup.text), setup)
    for done in range(num_steps):
        training.step(text(run.reached + done + 1), lr=rate(done), clip=setup.clip)
    return training.state(run.reached + num_steps)


def _constant(lr: float) -> Rate:
    return lambda done: lr


def _linear(lr: float, num_steps: int) -> Rate:
    return lambda done: lr * (1.0 - done / num_steps)


def _rewarmed(rate: Rate, num_steps: int = REWARM) -> Rate:
    factor = constant_after_warmup(num_steps)
    return lambda done: rate(done) * factor(done)

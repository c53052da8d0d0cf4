"""How far a Trainer's run has come: steps, samples and tokens over all ranks, and the learning rate of each step.

This module knows batches and optimizers. A step is a batch in which at least one optimizer stepped, however many did.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities.data import _extract_batch_size
from torch import Tensor

from pretrain_merge.cadence import Cadence, Progress, Upcoming
from pretrain_merge.errors import ProgressError
from pretrain_merge.runtime import ranks

TokensPerBatch = int | str | Callable[[Any], int]


class Clock:
    """Counters of one run.

    Args:
        cadences: Everything that will be due by this clock. Samples or tokens are required if one of them counts them.
        tokens_per_batch: Tokens of one batch on one rank: a number, a key of the batch, or a function of the batch.
        start: Counters to go on from.
        pending: What a clock before this one had counted on this rank and not yet added to its counters.
        lr: Learning rates that it knew, by optimizer.
        share: Data-parallel replicas per rank: below 1 where several ranks read the same data.

    Attributes:
        has_stepped: Whether an optimizer stepped since the last batch ended, or was said to: a gradient scaler may skip
            a step, which then counts.
        num_batches: How many it has seen.
        num_steps: In how many of them an optimizer stepped.
        progress: Totals over all ranks.
        lr: Learning rates of the last step of each optimizer, per parameter group that has one.
    """

    def __init__(
        self,
        cadences: list[Cadence],
        tokens_per_batch: TokensPerBatch,
        start: Progress,
        pending: Mapping[str, int] | None = None,
        lr: Mapping[str, Sequence[float]] | None = None,
        *,
        share: float = 1.0,
    ) -> None:
        units = {quantity.unit for cadence in cadences for quantity in (cadence.every, cadence.start)}
        self._required = units - {"steps"}
        self._asks_tokens = "tokens" in self._required or not isinstance(tokens_per_batch, str)
        self._snapshots = Upcoming(cadences[0])
        self._tokens_per_batch = tokens_per_batch
        self._fixed_tokens = tokens_per_batch if isinstance(tokens_per_batch, int) else 0
        self._key = tokens_per_batch if isinstance(tokens_per_batch, str) else None
        self.has_stepped = False
        counted = pending or {}
        self._samples, self._tokens = counted.get("samples", 0), counted.get("tokens", 0)  # not yet in `progress`
        self._lr = {int(index): tuple(rates) for index, rates in (lr or {}).items()}
        self._failure: ProgressError | None = None
        self._share = share
        self.lr = self._listed()  # not at each reading: every step reads it, and few change it
        self.num_batches = self.num_steps = 0
        self.progress = start

    @property
    def lr_by_optimizer(self) -> dict[str, tuple[float, ...]]:
        """Learning rates of the last step of each optimizer, by its place among the Trainer's."""
        return {str(index): rates for index, rates in sorted(self._lr.items())}

    @property
    def pending(self) -> dict[str, int]:
        """Samples and tokens of this rank that are not yet in `progress`."""
        return {"samples": self._samples, "tokens": self._tokens}

    def optimizer_steps(self, place: int, optimizer: Any) -> None:
        """Call when an optimizer has stepped, before schedulers move its rate (P28), or when it is about to.

        Args:
            place: Among the optimizers of the run.
            optimizer: Its rate is that of this step.
        """
        self.has_stepped = True
        # parameter-free optimizers have no rate, and those with relative steps have None
        rates = []
        for group in optimizer.param_groups:  # not a comprehension, which is a call, and this is asked at every step
            if group.get("lr") is not None:
                rates.append(float(group["lr"]))
        if (known := tuple(rates)) != self._lr.get(place):
            self._lr[place] = known
            self.lr = self._listed()

    def _listed(self) -> tuple[float, ...]:
        return tuple(rate for _, rates in sorted(self._lr.items()) for rate in rates)

    def batch_ends(self, batch: Any, *, since: Progress = Progress()) -> Progress | None:  # noqa: B008 - frozen
        """Count a batch.

        Args:
            batch: The batch that this rank trained on.
            since: Where the window's segment began, for an interval that grows from there.

        Returns:
            Totals over all ranks if an optimizer stepped in this batch, else None: what accumulates between optimizer
            steps waits for the next one.

        Raises:
            ProgressError: A cadence counts samples or tokens and this batch does not tell them.
        """
        self.num_batches += 1
        samples, tokens, first, kind = 0, self._fixed_tokens, None, type(batch)
        try:
            # the simple answers of nearly every batch without further calls, each of which costs every step its time;
            # and by exact types: torch has a say in what is an instance of a tensor
            if kind is dict:
                found = batch.get(self._key)
                if type(found) is Tensor:
                    tokens = found.numel()
                first = next(iter(batch.values()), None)
            elif (kind is list or kind is tuple) and batch:
                first = batch[0]
            # not `len`, which takes three times as long where torch's code is no longer in a cache
            if type(first) is Tensor and not first.is_nested and (shape := first.shape):
                samples = shape[0]
            self._samples += samples or self._counted("samples", batch, _num_samples)
            # indexing a tensor by text makes torch complain on stderr, and no cadence asks
            if tokens:
                self._tokens += tokens
            elif self._asks_tokens or (kind is not list and kind is not tuple and hasattr(batch, "keys")):
                self._tokens += self._counted("tokens", batch, self._num_tokens)
        except ProgressError as error:
            self._failure = self._failure or error  # raised where all ranks are
        if not self.has_stepped:
            return None
        self.has_stepped = False
        self.num_steps += 1
        before = self.progress
        after = before.next_step()
        # a step cadence needs other counters only where a snapshot will carry them, so a reduction every step is saved
        upcoming = self._snapshots
        is_quiet = after.step in upcoming.quiet and since is upcoming.since
        if self._required or (not is_quiet and upcoming.crossed(before, after, since=since)):
            after = self._with_totals(after)
        self.progress = after
        return after

    def _with_totals(self, progress: Progress) -> Progress:
        counts = [self._samples, self._tokens, int(self._failure is not None)]
        samples, tokens, num_failed = ranks.sum_over_ranks(counts)
        if num_failed:
            raise self._failure or ProgressError("another rank could not count its batch; its message says why.")
        self._samples = self._tokens = 0
        return replace(
            progress,
            samples=progress.samples + round(samples * self._share),
            tokens=progress.tokens + round(tokens * self._share),
        )

    def _counted(self, unit: str, batch: Any, count: Callable[[Any], int]) -> int:
        try:
            number = count(batch)
        except Exception as error:
            if unit in self._required:
                raise ProgressError(
                    f"a cadence counts {unit}, and a batch of type {type(batch).__name__} does not tell how many it "
                    f"has ({type(error).__name__}: {error}). Set tokens_per_batch to a number, to a key of the batch "
                    f"whose elements are the tokens, or to a function of the batch; or count in steps."
                ) from error
            return 0
        if unit in self._required and number <= 0:
            raise ProgressError(f"a cadence counts {unit}, and this batch has {number}. Check tokens_per_batch.")
        return number

    def _num_tokens(self, batch: Any) -> int:
        source = self._tokens_per_batch
        if isinstance(source, int):
            return source
        if isinstance(source, str):
            if not hasattr(batch, "keys"):
                raise TypeError("a batch without keys")
            return int(batch[source].numel())
        return int(source(batch))


def _num_samples(batch: Any) -> int:
    # the first size that Lightning finds; its public function also warns where tensors of one batch differ in size
    return int(next(size for size in _extract_batch_size(batch) if size is not None))

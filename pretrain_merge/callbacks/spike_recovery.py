"""The Lightning callback that takes a diverged run back and goes on with a lower rate: its keys and its hooks.

This module knows the order of Lightning's hooks. What is watched, kept and done is `RecoveryRun`'s business.
"""

from typing import Any, NoReturn

from torch.optim.optimizer import Optimizer

from pretrain_merge.callbacks import refusals
from pretrain_merge.callbacks.both_libraries import CALLBACKS
from pretrain_merge.callbacks.lightning_cli import explain_errors
from pretrain_merge.callbacks.recovery_log import Recovery, RecoveryLog
from pretrain_merge.callbacks.recovery_run import RecoveryRun
from pretrain_merge.callbacks.recovery_state import RecoverySettings
from pretrain_merge.callbacks.resuming import has_begun
from pretrain_merge.callbacks.run_folder import refuse_remote_folder
from pretrain_merge.errors import ConfigError

explain_errors()  # LightningCLI imports this module while it reads what to build


class SpikeRecovery(*CALLBACKS):  # type: ignore[misc]
    """Goes back in memory when a run has diverged, skips the data since, and goes on with a lower rate and clipping.

    A run has diverged where its training loss stays out of bounds (`SpikeDetector`) for `confirm` steps, NaN included.
    Weights, buffers and optimizer state go back on every rank; steps, loaders and schedulers go on. The factor of the
    rate is applied for the time of each step, so that it lasts whatever sets the rate between steps. Until a run
    diverges, training is bit for bit that of a run without the callback.

    The weights of before tell the cause: where they see as high a loss at once, before they have moved, the data are to
    blame. Then the newest weights from before the onset are good, and so is the rate: the run goes on with those as
    soon as the data are better.

    Args:
        distrust: Steps before the onset that are taken as damaged: a run goes back at least so far, unless the data
            are to blame.
        lr: Factor of every learning rate from then on, once more with each attempt, unless the data are to blame.
        clip: Norm at which gradients are clipped from then on, beside the clipping of your own; None: no other.
        optimizer: "fresh": optimizers begin without state; "newest": with the state that the restart point has.
        rewarm: Steps in which the rate rises to its new value, linearly.
        weights: "raw": those of the newest restart point that is trusted; "merge": the mean of the newest `keep`.
        attempts: How often a run may go back; the divergence after that ends it with an error.
        confirm: Steps for which the loss must stay out of bounds: a spike that passes by itself costs nothing.
        every: Steps between restart points.
        keep: How many are kept of those that are `distrust` steps old or older; None: 1, and 4 to merge.
        store: Where restart points lie: in "host" memory or on "disk".
        store_folder: With "disk", where; None: `restart_points/` in the run's folder.
        in_checkpoints: Whether Lightning's checkpoints hold the restart points, so that a resumed run does exactly what
            the run before would have done. Off, a resumed run begins with its checkpoint as the first one.
        **options: None. A misspelt key is refused with the nearest known one.

    Raises:
        ConfigError: A key is unknown or a value impossible; the message starts with the key.
    """

    def __init__(
        self,
        distrust: int = 100,
        lr: float = 0.5,
        clip: float | None = 1.0,
        optimizer: str = "fresh",
        rewarm: int = 30,
        weights: str = "raw",
        attempts: int = 3,
        confirm: int = 20,
        every: int = 50,
        keep: int | None = None,
        store: str = "host",
        store_folder: str | None = None,
        in_checkpoints: bool = True,
        **options: NoReturn,
    ) -> None:
        diverged = {"confirm": confirm, "attempts": attempts}
        changes = {"lr": lr, "clip": clip, "optimizer": optimizer, "rewarm": rewarm, "weights": weights}
        points = {"distrust": distrust, "every": every, "keep": keep}
        kept = {"store": store, "store_folder": store_folder, "in_checkpoints": in_checkpoints}
        self.settings = RecoverySettings.of(diverged | changes | points | kept | options)
        self._run: RecoveryRun | None = None
        self._state: dict[str, Any] = {}
        self._recoveries: tuple[Recovery, ...] = ()

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        """What was done so far in this run, or in the one that ended last."""
        return self._run.recoveries if self._run is not None else self._recoveries

    def mark_phase(self, name: str) -> None:
        """Say that the data changed, and with them the loss: one that is higher from here on is not a divergence.

        Raises:
            ConfigError: No run has begun.
        """
        if self._run is None:
            raise ConfigError(f"mark_phase({name!r}) before training has begun. Call it from a hook of training.")
        self._run.mark_phase(name)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse set-ups in which a run cannot go back, before anything is trained."""
        if stage != "fit":  # nothing of ours in `validate`, `test` and `predict`
            return
        refusals.refuse_strategy(trainer.strategy)
        refuse_remote_folder(trainer)
        if not has_begun(trainer):
            self._state, self._recoveries = {}, ()  # of another run (P24)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse optimizers whose rate or gradients cannot be changed, and make the folder that of this run."""
        # not in `on_train_start`: a run whose checkpoint was its last step trains nothing more
        RecoveryLog(self.settings, trainer).remove_leftovers()
        for optimizer in trainer.optimizers:
            _refuse_optimizer(optimizer, trainer, self.settings)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin a run, or go on with one: P13 lets nothing be restored before."""
        if not trainer.fast_dev_run:  # too few steps to judge a loss by
            self._run = RecoveryRun(self.settings, trainer, pl_module, self._state)
            self._state = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Listen to optimizers after everybody else."""
        if self._run is not None:
            self._run.begin_batch()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Clip, once the run went back; the module's own clipping comes after this."""
        if self._run is not None:
            self._run.announce_step(optimizer)
            self._run.clip(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Watch the loss; keep a restart point, or go back."""
        if self._run is not None:
            self._run.end_batch(outputs)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lightning calls no `teardown` after an exception; a checkpoint may follow (`save_on_exception`)."""
        self._end(alone=True)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave optimizers alone; what a checkpoint or another `fit` may need is remembered."""
        if stage == "fit":
            self._end(alone=False)

    def state_dict(self) -> dict[str, Any]:
        """Attempts, what is known of the loss, and the restart points (P11: in every checkpoint, unless off)."""
        return self._run.state() if self._run is not None else dict(self._state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state of the run that is resumed."""
        self._state = dict(state_dict)

    def _end(self, *, alone: bool) -> None:
        if self._run is not None:
            self._state, self._recoveries = self._run.state(alone=alone), self._run.recoveries
            self._run.close()
            self._run = None


def _refuse_optimizer(optimizer: Any, trainer: Any, settings: RecoverySettings) -> None:
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"{kind} is not an optimizer of torch, and SpikeRecovery changes the rate within steps that torch tells "
            f"of. Allowed: subclasses of torch.optim.Optimizer."
        )
    has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
    if settings.clip is not None and has_scaler and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ConfigError(
            f"clip: {settings.clip:g}, and {kind} (fused) unscales gradients within its step, after which they cannot "
            f"be clipped. Allowed: clip=None, an optimizer without fused=True, or precision='bf16-mixed'."
        )

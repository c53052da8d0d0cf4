"""What merging costs a run: bytes on every rank and where they fit, seconds, and shares of the training time.

This module is arithmetic on sizes and rates, the formulas of the documentation's page on planning. It knows no tensors
and no files. Bytes are exact under DDP and FSDP2; under tensor parallelism as far as `Layout` says. Seconds are bytes
moved by the rate of what moves them; below some ten million elements per rank the cost of starting one operation per
tensor comes on top.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pretrain_merge.cadence import Quantity
from pretrain_merge.plan.hardware import Hardware
from pretrain_merge.plan.inputs import Merging, Question, Training
from pretrain_merge.plan.times import Move, Operations
from pretrain_merge.stores.budget import DEVICE_STAGING, HOST_STAGING, fastest_with_room

# Of training itself, each in the parameters' dtype: weights, gradients and the two moments of AdamW.
COPIES_IN_TRAINING = 4
# Operations per parameter and token, forward and in a whole step (Kaplan et al., arXiv 2001.08361, section 2.1).
FORWARD, STEP = 2, 6


@dataclass(frozen=True)
class Place:
    """Somewhere the window could lie.

    Attributes:
        needed: Bytes per rank there, with what goes along with the window.
        free: Bytes per rank beside weights, gradients and optimizer; activations and data workers are not counted.
    """

    needed: int
    free: int

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.needed <= self.free


@dataclass(frozen=True)
class Cost:
    """Something that a run does again and again.

    Attributes:
        moves: What the run waits for.
        period: Seconds of training between two of them.
        beside: What goes on while the run goes on.
        slack: Seconds after which the run waits for that too.
    """

    moves: tuple[Move, ...]
    period: float
    beside: tuple[Move, ...] = ()
    slack: float = 0.0

    @property
    def seconds(self) -> float:
        """How long the run waits, one time."""
        # what goes on beside costs nothing until it is not done when the next one begins
        late = sum(move.seconds for move in self.beside) - self.slack
        return sum(move.seconds for move in self.moves) + max(0.0, late)

    @property
    def share(self) -> float:
        """Of the training time."""
        return self.seconds / self.period


@dataclass(frozen=True)
class Plan:
    """All of it, for the fullest rank where ranks differ.

    Attributes:
        elements: Parameters on that rank.
        slot_bytes: One snapshot there.
        window_bytes: N of them.
        all_window_bytes: The windows of all ranks together, replicas counted.
        scratch_bytes: A copy of raw during an evaluation, on the device.
        accumulator_bytes: The open sum of `average: block`, on the device.
        staging_device_bytes: Buffers on the device for pieces of slots that lie elsewhere.
        staging_host_bytes: Buffers in host memory for pieces on their way to a disk.
        places: By store, what it needs and what is free.
        store: Where the window lies.
        slot_file_bytes_per_host: Slot files on one host, less their headers; 0 unless the store is the disk.
        saved_window_bytes: A window saved to resume from: every shard once, however many replicas there are.
        merged_model_bytes: One merged model, as `save` writes it.
        step_seconds: One optimizer step.
        steps_between_snapshots: V in steps.
        steps_between_merges: The same for merge points.
        costs: "capture" (finite check and copy), with blocks "sample", "merge" (all views, and raw back), "evaluation"
            (raw and all views).
    """

    elements: int
    slot_bytes: int
    window_bytes: int
    all_window_bytes: int
    scratch_bytes: int
    accumulator_bytes: int
    staging_device_bytes: int
    staging_host_bytes: int
    places: Mapping[str, Place]
    store: str
    slot_file_bytes_per_host: int
    saved_window_bytes: int
    merged_model_bytes: int
    step_seconds: float
    steps_between_snapshots: float
    steps_between_merges: float
    costs: Mapping[str, Cost]

    @property
    def share(self) -> float:
        """Of the training time, all costs together."""
        return sum(cost.share for cost in self.costs.values())


def make_plan(question: Question) -> Plan:
    """Sizes, places, times and shares of a run."""
    model, layout, hardware = question.model, question.layout, question.hardware
    merging = question.merging
    elements = layout.elements(model.shapes)
    # a run of fewer ranks than a host has room for shares its memory among those
    sharing = min(hardware.ranks_per_host, layout.num_ranks)
    slot = elements * merging.slot_itemsize
    scratch = elements * merging.itemsize if merging.has_scratch else 0
    accumulator = elements * merging.accumulator_itemsize if merging.in_blocks else 0
    places = _places(hardware, merging, elements, sharing, beside=scratch + accumulator)
    store = _chosen(places) if merging.store == "auto" else merging.store
    step = _step_seconds(question)
    between_snapshots, between_merges = _steps(merging, question.training)
    return Plan(
        elements=elements,
        slot_bytes=slot,
        window_bytes=merging.window * slot,
        all_window_bytes=merging.window * merging.slot_itemsize * layout.elements_of_all_ranks(model.shapes),
        scratch_bytes=scratch,
        accumulator_bytes=accumulator,
        # without a link the model is in host memory, and slots are read where they lie
        staging_device_bytes=DEVICE_STAGING if store != "device" and hardware.link_rate else 0,
        staging_host_bytes=HOST_STAGING if store == "disk" else 0,
        places=places,
        store=store,
        slot_file_bytes_per_host=sharing * places["disk"].needed if store == "disk" else 0,
        saved_window_bytes=merging.window * merging.slot_itemsize * model.total,
        merged_model_bytes=model.total * merging.itemsize,
        step_seconds=step,
        steps_between_snapshots=between_snapshots,
        steps_between_merges=between_merges,
        costs=_costs(
            Operations(elements, merging, hardware, store, sharing),
            question.training,
            step,
            between_snapshots * step,
            between_merges * step,
        ),
    )


def _places(hardware: Hardware, merging: Merging, elements: int, sharing: int, *, beside: int) -> dict[str, Place]:
    slot = elements * merging.slot_itemsize
    window = merging.window * slot
    in_training = COPIES_IN_TRAINING * elements * merging.itemsize
    # every rank of a host keeps a window there
    host = hardware.host_bytes // sharing
    if hardware.device_bytes is None:
        # there is one memory: what the one takes the other lacks
        device = host = max(0, host - in_training)
    else:
        # never below 0: a model that does not fit leaves no room, and the plan says so
        device = max(0, hardware.device_bytes - in_training)
    return {
        "device": Place(window + beside, device),
        "host": Place(window, host),
        # a slot's old file stays until the new one is whole
        "disk": Place(window + slot, hardware.disk_bytes // sharing),
    }


def _chosen(places: Mapping[str, Place]) -> str:
    window = places["host"].needed
    return fastest_with_room(window, free_device=places["device"].free, free_host=places["host"].free)


def _step_seconds(question: Question) -> float:
    training = question.training
    if training.step_seconds is not None:
        return training.step_seconds
    # of experts that rest, no operation is done
    operations = STEP * question.model.activated * training.tokens_per_step
    return operations / (question.layout.num_ranks * question.hardware.flops * training.utilisation)


def _steps(merging: Merging, training: Training) -> tuple[float, float]:
    """Steps between snapshots and between merges: either at most once per step, and merges at snapshots only."""

    def in_steps(quantity: Quantity) -> float:
        return quantity.amount if quantity.unit == "steps" else max(1.0, quantity.amount / training.tokens_per_step)

    # a count that one step crosses several times is due once: at most one snapshot per step
    every = in_steps(merging.every)
    return every, every if merging.merge_every is None else max(every, in_steps(merging.merge_every))


def _costs(
    operations: Operations, training: Training, step: float, between_snapshots: float, between_merges: float
) -> dict[str, Cost]:
    merging = operations.merging
    # P27: the next optimizer step waits for a copy to the host; the next capture waits for the disk
    slack = between_snapshots if operations.store == "disk" else step
    costs = {"capture": Cost(operations.capture(), between_snapshots, operations.after_capture(), slack)}
    if merging.in_blocks:
        costs["sample"] = Cost(operations.sample(), merging.sample_every * step)
    costs["merge"] = Cost(operations.merge(), between_merges)
    # raw is measured at each merge point, on the same batches
    passes = 1 + len(merging.views)
    # an evaluation runs forward only, at the rate of training's operations
    tokens_per_second = training.tokens_per_step / step * STEP / FORWARD
    evaluated = Move(passes * training.tokens_per_evaluation, tokens_per_second, "model")
    costs["evaluation"] = Cost((evaluated,), between_merges)
    return costs

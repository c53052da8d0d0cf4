"""What a checkpoint says of the window is read back exactly, or refused by an error of ours, whatever stands there."""

import contextlib
import copy
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain_merge.cadence import Progress
from pretrain_merge.callbacks.clock import Clock
from pretrain_merge.callbacks.run_state import RunState
from pretrain_merge.config import MergeConfig, SaveConfig, snapshot_cadence
from pretrain_merge.errors import CheckpointError
from pretrain_merge.files.snapshot_file import SnapshotFile
from pretrain_merge.merged_models.retention import MergedModels, SavedModels
from pretrain_merge.resume.manifest import Manifest, SavedBlock, SavedSnapshot, sealed
from pretrain_merge.window.window import Break

FILE = SnapshotFile("snapshot-00000004-0a1b2c3d.safetensors", 256, 0x0A1B2C3D)
HELD = SavedSnapshot(1, Progress(4, 16, 160), (0.1, 0.2), "", FILE)
MANIFEST = Manifest(
    settings={"every": "2 steps", "merge_buffers": []},
    progress=Progress(6, 24, 240),
    lr=(0.1, 0.2),
    segment_lr=(0.1, 0.2),
    phase="second",
    num_refused=1,
    segment=1,
    last_break=Break(Progress(3), "phase 'second'"),
    snapshot_is_new=True,
    parameters=("a", "b"),
    snapshots=(HELD, replace(HELD, progress=Progress(6, 24, 240))),
    block=SavedBlock(1, 1, True, replace(FILE, name="block-00000006-0a1b2c3d.safetensors")),
)
SAVED = SavedModels(
    Progress(1), {"sma": Progress(6, 24, 240)}, {"sma": ("step-00000004-sma",)}, "step-00000006-wma", 0.5
)
STATE = RunState(
    Progress(6, 24, 240), {"samples": 1}, {"0": (0.1,)}, "run", "run/window", MANIFEST.to_plain(), "", SAVED, 4
)

garbage = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KINDS = [(Manifest, MANIFEST), (RunState, STATE)]


def places(values, at=()):
    """Every place inside nested values."""
    yield at
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield from places(value, (*at, key))


def with_value(plain, place, value):
    changed = {"values": copy.deepcopy(plain["values"])}
    target = changed
    for key in ("values", *place)[:-1]:
        target = target[key]
    target[("values", *place)[-1]] = value
    return changed["values"]


@pytest.mark.parametrize(("kind", "value"), KINDS)
def test_what_was_written_is_read_back_also_through_a_checkpoint_without_pickles(kind, value):
    file = io.BytesIO()
    torch.save(value.to_plain(), file)
    file.seek(0)
    assert kind.from_plain(torch.load(file, weights_only=True)) == value


@pytest.mark.parametrize("kind", [Manifest, RunState])
@given(plain=garbage)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_garbage_is_an_error_of_ours(kind, plain):
    with pytest.raises(CheckpointError, match="Resume from another checkpoint"):
        kind.from_plain(plain)


@pytest.mark.parametrize(("kind", "value"), KINDS)
@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_garbage_under_a_right_checksum_is_read_or_an_error_of_ours(kind, value, data):
    plain = value.to_plain()
    place = data.draw(st.sampled_from(list(places(plain["values"]))))
    values = data.draw(garbage.filter(lambda item: place or isinstance(item, dict)))
    try:
        resealed = sealed(with_value(plain, place, values))
    except (TypeError, ValueError):  # bytes and the like, which no checksum of ours was ever made over
        return
    with contextlib.suppress(CheckpointError):
        read = kind.from_plain(resealed)
        if isinstance(read, RunState):  # and what was read can be gone on with
            Clock([snapshot_cadence(MergeConfig())], 1, read.progress, read.pending, read.lr)
            if read.saved is not None:
                MergedModels(Path("nowhere"), SaveConfig(), {}).resume_from(read.saved, Path(read.run_folder))


@pytest.mark.parametrize("place", list(places(MANIFEST.to_plain()["values"])), ids=str)
def test_any_value_that_changed_under_the_old_checksum_is_found(place):
    plain = MANIFEST.to_plain()
    with pytest.raises(CheckpointError, match="checksum"):
        Manifest.from_plain(plain | {"values": with_value(plain, place, "another")})


@pytest.mark.parametrize(
    "name", ["../outside-00000001-00000000.safetensors", "/etc/passwd", "snapshot-1-0.safetensors", "", "a\0b"]
)
def test_a_name_that_could_leave_the_folder_is_refused(name):
    changed = replace(MANIFEST, snapshots=(replace(HELD, file=replace(FILE, name=name)),))
    with pytest.raises(CheckpointError, match="not a name of a snapshot file"):
        Manifest.from_plain(changed.to_plain())


@pytest.mark.parametrize(
    "changed",
    [
        {"snapshots": MANIFEST.snapshots[::-1]},
        {"snapshots": (HELD, HELD)},
        {"snapshots": (replace(HELD, segment=2),)},
        {"progress": Progress(3)},
    ],
)
def test_values_that_cannot_be_together_are_refused(changed):
    with pytest.raises(CheckpointError, match="its snapshots are of"):
        Manifest.from_plain(replace(MANIFEST, **changed).to_plain())

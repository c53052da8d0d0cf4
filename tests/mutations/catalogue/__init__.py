"""The seeded faults: one file for each folder of the package, named like it, in the order of a snapshot's way."""

from tests.mutations.catalogue import (
    callbacks,
    cli,
    coefficients,
    config,
    demo,
    evaluation,
    files,
    forecast,
    integrations,
    kernels,
    loose,
    merged_models,
    merging,
    offline,
    parameters,
    plan,
    records,
    resume,
    runtime,
    spikes,
    stores,
    window,
)
from tests.mutations.catalogue.fault import Fault

__all__ = ["FAULTS", "STAGES", "Fault"]

STAGES = (
    loose, coefficients, parameters, window, stores, kernels, merging, evaluation, records, forecast, files, resume,
    merged_models, runtime, config, spikes, callbacks, integrations, offline, plan, cli, demo,
)  # fmt: skip
FAULTS = tuple(fault for stage in STAGES for fault in stage.FAULTS)

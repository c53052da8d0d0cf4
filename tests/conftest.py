"""One thread per test process: the suite runs in parallel, and bitwise comparisons want one reduction order."""

import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import harness.lighter  # noqa: F401
import hypothesis
import pytest

hypothesis.settings.register_profile("suite", max_examples=50)  # of each law; one that needs more says so
hypothesis.settings.load_profile("suite")


def pytest_collection_finish(session):
    import torch  # not by the process that only hands out tests

    torch.set_num_threads(1)
    gc.freeze()  # half a million objects of imported modules, which no collection needs to walk again


@pytest.fixture
def ctrl_c():
    """Python's own handler, whatever the shell gave to a process in the background."""
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, kept)


# Modules that make runs once for many of their tests. All of such a module goes to one test process, and first; of
# others, each test goes to whichever process is free. (The marks of `--dist loadgroup` have no effect in pytest 9.2.)
_WHOLE_MODULES = {
    "callbacks/test_spikes.py",
    "demo/test_run.py",
    "kernels/test_compiled.py",
    "system/test_failures_on_ranks.py",
    "runtime/test_signals.py",
    "system/test_layouts.py",
    "system/test_memory.py",
    "system/test_metrics_over_ranks.py",
    "system/test_random_design.py",
    "system/test_saved_by_ranks.py",
    "system/test_sharded.py",
    "system/test_sharded_window.py",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            module = nodeid.partition("::")[0]
            return module if module.removeprefix("tests/") in _WHOLE_MODULES else nodeid

    return Scheduling(config, log) if config.getoption("dist") == "load" else None

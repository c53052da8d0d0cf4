"""Faults of the process: ranks, signals, what was said."""

from tests.mutations.catalogue.fault import Fault

FAULTS = (
    Fault(
        "NumPy's generator moves on",
        "runtime/random_state.py",
        "        np.random.set_state(numpy)\n",
        "",
        "tests/merging/test_states.py",
    ),
    Fault(
        "the run's generators move on",
        "runtime/random_state.py",
        "        yield set_back\n    finally:\n        set_back()\n",
        "        yield set_back\n    finally:\n        pass\n",
        "tests/callbacks/test_non_interference.py tests/merging/test_states.py",
    ),
    Fault(
        "signals are lost",
        "runtime/signals.py",
        "delivery.callback(signal.raise_signal, signum)",
        "pass",
        "tests/runtime/test_signals.py",
    ),
    Fault(
        "a command is thought to be a rank",
        "runtime/errands.py",
        "if not _OF_A_RANK.fullmatch(name)",
        "if True",
        "tests/runtime/test_errands.py",
    ),
    Fault(
        "a shell reads the folder's name",
        "runtime/errands.py",
        "                words, stdin=subprocess.DEVNULL,",
        '                " ".join(words), shell=True, stdin=subprocess.DEVNULL,',
        "tests/runtime/test_errands.py",
    ),
    Fault(
        "a rank that failed is waited for in an exchange that is no agreement",
        "runtime/ranks.py",
        "    count()\n    return _gathered(value)",
        "    return _gathered(value)",
        "tests/system/test_failures_on_ranks.py",
    ),
    Fault(
        "a failure while another is handled is not told",
        "runtime/ranks.py",
        "if error is None or error is handled:",
        "if error is None:",
        "tests/runtime/test_ranks.py",
    ),
)

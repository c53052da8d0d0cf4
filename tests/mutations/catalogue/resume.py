"""Faults of the window as durable files."""

from tests.mutations.catalogue.fault import Fault

_SIDECAR = "tests/resume/test_sidecar.py"

FAULTS = (
    Fault(
        "a resumed run merges what trains at its start",
        "resume/saved_window.py",
        "self._capture.trained.remember(manifest.parameters)",
        "pass",
        "tests/merging/test_states.py",
    ),
    Fault(
        "files of old states stay for ever",
        "resume/states.py",
        "WindowFolder(folder, keep=self._keep)",
        "WindowFolder(folder)",
        "tests/merging/test_states.py",
    ),
    Fault(
        "a state that was gone back to is pruned as an old one",
        "resume/states.py",
        "            self._note(self._folder, manifest)\n\n    def close",
        "            pass\n\n    def close",
        "tests/merging/test_states.py",
    ),
    Fault(
        "the windows of all saves are kept, whatever the bound",
        "resume/sidecar.py",
        "        if old:\n            self._needs.update",
        "        if False:\n            self._needs.update",
        _SIDECAR,
    ),
    Fault(
        "a checkpoint without our state starts an empty window",
        "resume/sidecar.py",
        "return checkpoint in self._needs",
        "return False",
        "tests/callbacks/test_windows_that_are_refused.py",
    ),
    Fault(
        "each save looks at all checkpoints",
        "resume/sidecar.py",
        "_NUM_LOOKED_AT = 64",
        "_NUM_LOOKED_AT = 10**9",
        _SIDECAR,
    ),
    Fault(
        "each save writes the needs of all checkpoints",
        "resume/needs.py",
        "if self._num_lines > max(_LEAST_LINES, 2 * len(self._needs)):",
        "if True:",
        _SIDECAR,
    ),
    Fault(
        "a run that was killed forgets what its last checkpoints need",
        "resume/needs.py",
        "            needs |= {checkpoint: names} if names else {}",
        "            needs |= {}",
        _SIDECAR,
    ),
    Fault(
        "each file of a window waits for the disk alone",
        "resume/window_files.py",
        "return store.save(slot, self.folder, stem, batch=self._batch)",
        "return store.save(slot, self.folder, stem)",
        "tests/resume/test_saved_window.py",
    ),
    Fault(
        "a snapshot counts as saved although the disk refused it",
        "resume/saved_window.py",
        "                    saved[item] = (files.folder, file)",
        "                    self._files[item] = saved[item] = (files.folder, file)",
        "tests/resume/test_saved_window.py",
    ),
    Fault(
        "a resumed run has forgotten the losses before",
        "resume/saved_window.py",
        "self._spikes.load_state_dict(manifest.spikes)",
        "pass",
        "tests/callbacks/test_spikes.py",
    ),
)

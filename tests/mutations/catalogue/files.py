"""Faults of files: names, locks, checksums, what strangers wrote."""

from tests.mutations.catalogue.fault import Fault

_LINKS = "tests/attacks/test_links.py"
_URLS = "tests/attacks/test_urls.py"

FAULTS = (
    Fault(
        "an existing folder is overwritten",
        "files/folders.py",
        "if os.path.lexists(target):",
        "if False:",
        "tests/files/test_folders.py",
    ),
    Fault(
        "a slot that another store replaced is kept",
        "files/snapshot_file.py",
        "if identity_of(temporary) != identity:",
        "if False:",
        "tests/stores/test_disk_folders.py",
    ),
    Fault(
        "a damaged snapshot is used",
        "files/snapshot_file.py",
        "if found != file.crc32:",
        "if False:",
        "tests/callbacks/test_windows_that_are_refused.py",
    ),
    Fault(
        "two processes share a folder",
        "files/folder_lock.py",
        "if error.errno in (errno.EACCES, errno.EAGAIN):",
        "if False:",
        "tests/stores/test_disk_folders.py tests/callbacks/test_window_folder.py",
    ),
    Fault(
        "a file of a batch has its name before it is on the disk",
        "files/atomic.py",
        "[path for path, _ in self._drafts]",
        "[]",
        "tests/files/test_atomic.py",
    ),
    Fault(
        "a temporary file is opened through a link",
        "files/atomic.py",
        "path = temporary_beside(target)",
        'path = target.with_name(f".{target.name}.{os.getpid()}.tmp")\n    path.touch()',
        _LINKS,
    ),
    Fault(
        "a link at a file's name is replaced in silence",
        "files/atomic.py",
        "if not stat.S_ISREG(mode):",
        "if False:",
        _LINKS,
    ),
    Fault(
        "a folder that is a link is filled",
        "files/atomic.py",
        "    refuse_link(folder)\n    folder.mkdir",
        "    folder.mkdir",
        _LINKS,
    ),
    Fault(
        "leftovers are deleted behind a link",
        "files/atomic.py",
        "    if folder.is_symlink():\n        return\n",
        "",
        _LINKS,
    ),
    Fault(
        "merged models keep the mode of safetensors",
        "files/folders.py",
        "path.chmod(mode)  # P38",
        "pass",
        _LINKS,
    ),
    Fault(
        "an URL of a file is followed whatever its scheme",
        "files/fingerprints.py",
        "if scheme is None or scheme not in self._schemes or scheme in self._silent:",
        "if False:",
        _URLS,
    ),
    Fault(
        "a chained URL counts as its first part",
        "files/fingerprints.py",
        'if separator and "::" not in place else None',
        "if separator else None",
        _URLS,
    ),
    Fault(
        "a silent server is waited for",
        "files/fingerprints.py",
        "self._silent.add(scheme)",
        "pass",
        _URLS,
    ),
    Fault(
        "JSON may hold any number of values",
        "files/untrusted.py",
        "> most_values:",
        "> 10**12:",
        "tests/attacks/test_crafted_files.py",
    ),
)

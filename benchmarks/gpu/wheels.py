"""Libraries for a machine without network: wheels in a folder, for what is not installed there.

Knows files and names. All of `wheels.txt` is pure Python, so unpacking a wheel installs it.
"""

import atexit
import os
import re
import shutil
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def use(folder: Path) -> list[str]:
    """Make the wheels of a folder importable, here and in processes to come; what is installed already stays.

    Returns:
        Names of what is taken from there.
    """
    missing = [wheel for wheel in sorted(folder.glob("*.whl")) if not _is_installed(wheel.name.partition("-")[0])]
    if not missing:
        return []
    unpacked = tempfile.mkdtemp(prefix="wheels-")
    atexit.register(shutil.rmtree, unpacked, ignore_errors=True)
    for wheel in missing:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
    sys.path.append(unpacked)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), unpacked]))
    return [wheel.name.partition("-")[0] for wheel in missing]


def _is_installed(name: str) -> bool:
    try:
        version(re.sub(r"[-_.]+", "-", name))
    except PackageNotFoundError:
        return False
    return True

"""Which objects are state of a run, which are values, and which live by themselves: decided once for each type.

This module knows types and the libraries that they come from. It looks at classes only and never at what an object
says of itself: a user's `__getattr__`, `__class__` or `__eq__` may do anything.
"""

import datetime
import decimal
import fractions
import io
import pathlib
import re
import sys
import types
import uuid
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_MODULE: Any = type.__dict__["__module__"]

# immutable, and most of what there is: skipped before anything else is asked of them
VALUES = frozenset(
    {
        type(None), bool, int, float, complex, str, bytes, range, slice, type(...), type(NotImplemented),
        torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, re.Pattern, uuid.UUID,
        pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, decimal.Decimal, fractions.Fraction,
        datetime.datetime, datetime.date, datetime.time, datetime.timedelta,
        types.ModuleType, types.CodeType, types.GenericAlias, types.BuiltinFunctionType,
        types.WrapperDescriptorType, types.MethodWrapperType, types.MethodDescriptorType, types.GetSetDescriptorType,
        types.MemberDescriptorType, types.FrameType, types.TracebackType,
    }
)  # fmt: skip

TEXT = frozenset({str})

# what runs, waits or is connected outside Python's objects: rolled back, it would no longer fit its other half
_LIVING = frozenset(
    {
        "threading", "_thread", "queue", "_queue", "multiprocessing", "concurrent", "subprocess", "asyncio",
        "_asyncio", "socket", "_socket", "ssl", "_ssl", "io", "_io", "selectors", "select", "logging",
        "sqlite3", "mmap", "tempfile", "signal", "sched", "contextvars", "_contextvars", "http", "urllib",
        "ftplib", "smtplib", "socketserver", "zipfile", "tarfile", "gzip", "bz2", "lzma", "shelve", "dbm",
        "gc", "inspect", "traceback", "importlib", "os", "sys", "nt", "posix", "cProfile", "profile", "tracemalloc",
        "imaplib", "poplib", "nntplib", "telnetlib", "xmlrpc", "codecs", "csv", "fileinput", "mailbox", "wave",
    }
)  # fmt: skip
# those that write into their owner's attributes at any time: the owner is left alone with them
_WORKING = frozenset(
    {
        "threading", "_thread", "queue", "_queue", "multiprocessing", "concurrent", "subprocess", "asyncio",
        "_asyncio",
    }
)  # fmt: skip
# of these modules, what only waits: a counter that is safe for threads owns a lock, and is state all the same
_WAITING = frozenset(
    {
        "lock", "Lock", "RLock", "_RLock", "SemLock", "Condition", "Semaphore", "BoundedSemaphore", "Event", "Barrier",
        "local", "_local", "_localimpl",
    }
)  # fmt: skip
# of Python's own, what users' state is made of
_PLAIN_STDLIB = frozenset(
    {
        "builtins", "types", "argparse", "random", "collections", "functools", "dataclasses", "abc", "typing",
        "array", "weakref", "_weakrefset", "configparser",
    }
)  # fmt: skip
# clients of services, files and devices, and whatever draws: their state is that of something outside
_CLIENTS = frozenset(
    {
        "wandb", "mlflow", "comet_ml", "neptune", "tensorboard", "tensorboardX", "aim", "clearml", "swanlab",
        "trackio", "dvclive", "requests", "urllib3", "httpx", "httpcore", "aiohttp", "boto3", "botocore",
        "s3fs", "gcsfs", "fsspec", "google", "azure", "redis", "pymongo", "sqlalchemy", "psycopg", "psycopg2",
        "ray", "grpc", "h5py", "zarr", "lmdb", "pyarrow", "pandas", "polars", "duckdb", "datasets", "kafka",
        "zmq", "dask", "distributed", "joblib", "tqdm", "rich", "matplotlib", "plotly", "PIL", "psutil",
        "pynvml", "sentry_sdk", "prometheus_client", "opentelemetry", "triton", "numba", "jax", "tensorflow",
        "deepspeed", "loguru", "structlog", "IPython", "pytest", "_pytest",
    }
)  # fmt: skip
_LIGHTNING = frozenset({"lightning", "pytorch_lightning", "lightning_fabric"})
_LIGHTNINGS_STATE = (
    "core", "callbacks", "demos", "loops", "strategies", "trainer.trainer", "utilities.combined_loader",
    "loggers.logger",  # the abstract one: what a user's own logger keeps is his state; those that write are left alone
    "utilities.data", "utilities.parsing", "utilities.types",
    "utilities.device_dtype_mixin", "trainer.connectors.data_connector",
)  # fmt: skip
_LIGHTNINGS_LIVING = ("callbacks.progress", "loops.fetchers", "callbacks.rich", "callbacks.device_stats_monitor")
_TORCHS_STATE = (
    "nn", "optim", "utils.data", "amp", "cuda.amp", "distributions", "ao", "nested", "masked",
    "quasirandom",
)  # fmt: skip
_TENSORS = (torch.Tensor, torch._C.TensorBase)  # whose own modules are "torch" and "torch._C"
_KEPT_ALWAYS = (nn.Module, Optimizer, LRScheduler)
_LIBRARIES = (
    _LIGHTNING | _CLIENTS | {"torch", "torchmetrics", "numpy", "transformers", "peft", "timm", "pretrain_merge"}
)


@dataclass(frozen=True, slots=True)
class Kind:
    """What to do with the objects of one type.

    Attributes:
        is_state: Whether it is kept and searched; otherwise it is left alone with all that only it refers to.
        lives: Whether it is half of something outside Python's objects, and must never be dropped or rolled back.
        works: Whether it may write into its owner's attributes while an evaluation runs.
        may_own: Whether it is kept although it owns such a thing.
        has_dict: Whether it has an attribute dictionary.
        slots: Descriptors of its `__slots__`.
        is_script: Whether its attributes are kept outside of Python, as those of a `torch.jit.ScriptModule`.
        is_users: Whether its class is the user's own code.
        is_said: Whether the user is told where it is left alone: of a library's own he could do nothing about it.
    """

    is_state: bool
    lives: bool = False
    works: bool = False
    may_own: bool = False
    has_dict: bool = False
    slots: tuple[Any, ...] = ()
    is_script: bool = False
    is_users: bool = False
    is_said: bool = False


@lru_cache(maxsize=4096)
def kind_of(cls: type) -> Kind:
    """The kind of the objects of a type that is neither a value nor a container that the memento knows itself."""
    mro = type.__dict__["__mro__"].__get__(cls)  # past a metaclass
    if is_shared_memory(cls):
        return Kind(is_state=True)
    if is_buffer(cls):
        return Kind(is_state=True, has_dict=True)
    works = any(_top(base) in _WORKING and base.__name__ not in _WAITING for base in mro)
    lives = works or any(map(_lives, mro))
    # modules own streams and locks, and are what hooks aim at first
    always = any(base in mro for base in _KEPT_ALWAYS)
    if is_ours(module_of(cls)) or (not always and (lives or _is_value(mro) or not all(map(_may_be_state, mro)))):
        return Kind(is_state=False, lives=lives, works=works)
    is_users = not is_library(module_of(cls))
    return Kind(
        is_state=True,
        may_own=always or any(base.__name__ == "Trainer" for base in mro),
        has_dict=type.__dict__["__dictoffset__"].__get__(cls) != 0,
        slots=tuple(
            item
            for base in mro
            if "__slots__" in vars(base)
            for item in vars(base).values()
            if type(item) is types.MemberDescriptorType
        ),
        is_script=torch.jit.ScriptModule in mro,
        is_users=is_users,
        is_said=is_users or _top(cls) in _PLAIN_STDLIB,
    )


def lives(cls: type) -> bool:
    """Whether objects of a type must never be dropped or rolled back."""
    return cls not in VALUES and kind_of(cls).lives


def works(cls: type) -> bool:
    """Whether objects of a type may write into their owner's attributes at any time."""
    return cls not in VALUES and kind_of(cls).works


def is_shared_memory(cls: type) -> bool:
    """`multiprocessing.Value` and `Array`, and ctypes: an epoch that workers see. It has a lock and is not a worker."""
    mro = type.__dict__["__mro__"].__get__(cls)
    names = ("_SimpleCData", "Array", "Structure", "Union")
    return any(
        module_of(base) == "multiprocessing.sharedctypes" or (_top(base) == "_ctypes" and base.__name__ in names)
        for base in mro
    )


def is_buffer(cls: type) -> bool:
    """A file in memory, which nothing outside Python's objects knows."""
    mro = type.__dict__["__mro__"].__get__(cls)
    return io.StringIO in mro or io.BytesIO in mro


def is_table(cls: type) -> bool:
    """A data frame or a series, without importing what may not be installed."""
    mro = type.__dict__["__mro__"].__get__(cls)
    return any(_top(base) == "pandas" and base.__name__ in ("DataFrame", "Series") for base in mro)


def own_account(cls: type) -> Any:
    """How a class of Python's own that is made in C gives an object's state to whoever copies it; None: not at all.

    Other libraries are not asked: theirs may take long, as that of a tokenizer does.
    """
    for base in type.__dict__["__mro__"].__get__(cls):
        if _top(base) in sys.stdlib_module_names and base.__module__ != "builtins":
            for name in ("__getstate__", "__reduce__"):
                if type(method := vars(base).get(name)) is types.MethodDescriptorType:
                    return method
    return None


@cache
def is_library(module: str) -> bool:
    """Whether a module is Python's or an installed library, whose own globals and class attributes are not searched."""
    top = module.partition(".")[0]
    if top in _LIBRARIES or top in sys.stdlib_module_names:
        return top != "__main__" and not module.startswith("pretrain_merge.demo")
    # what is installed for editing is the user's own code
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def is_ours(module: str) -> bool:
    """Whether a module is of this package, whose own state goes on through an evaluation; the demo is a user."""
    return module.startswith("pretrain_merge") and not module.startswith("pretrain_merge.demo")


def module_of(cls: type) -> str:
    """Where a class was made; that of classes of C has no entry in their attributes."""
    module = _MODULE.__get__(cls)  # past a metaclass
    return module if isinstance(module, str) else "builtins"


def _top(cls: type) -> str:
    return module_of(cls).partition(".")[0]


def _is_value(mro: tuple[type, ...]) -> bool:
    return any(base in mro for base in (np.generic, BaseException))


def _lives(base: type) -> bool:
    top, _, rest = module_of(base).partition(".")
    if top in _LIGHTNING:
        return _in_lightning(rest).startswith(_LIGHTNINGS_LIVING)
    return top in _LIVING or top in _CLIENTS or "DataLoaderIter" in base.__name__


def _may_be_state(base: type) -> bool:
    top, _, rest = module_of(base).partition(".")
    # of Lightning and torch by a list: most of their objects are machinery that goes on by itself
    if top in _LIGHTNING:
        rest = _in_lightning(rest)
        is_iterator = rest == "utilities.combined_loader" and base.__name__ != "CombinedLoader"
        return rest.startswith(_LIGHTNINGS_STATE) and not is_iterator
    return top != "torch" or base in _TENSORS or rest.startswith(_TORCHS_STATE)


def _in_lightning(module: str) -> str:
    return module.removeprefix("pytorch.").removeprefix("fabric.")

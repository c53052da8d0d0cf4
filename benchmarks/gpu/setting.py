"""Where and how large: what every part is told. Knows devices and sizes, and nothing of what is measured."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

_T = TypeVar("_T")


@dataclass(frozen=True)
class Setting:
    """One run of the command.

    Attributes:
        rehearses: On the CPU, kernels in Triton's interpreter, everything small: the figures mean nothing.
        predicts: Print what the plan expects and measure nothing.
        hardware: A name in `pretrain_merge.plan.HARDWARE`.
        folder: For files; on the disk that is measured.
    """

    rehearses: bool
    predicts: bool
    hardware: str
    folder: Path

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearses else "cuda")

    @property
    def accelerator(self) -> str:
        """Lightning's word for it."""
        return "cpu" if self.rehearses else "gpu"

    @property
    def compiler(self) -> str:
        """The backend of `torch.compile`; a rehearsal traces and leaves out the C++ compiler, which may be missing."""
        return "eager" if self.rehearses else "inductor"

    def sized(self, whole: _T, small: _T) -> _T:
        return small if self.rehearses else whole

    def wait(self) -> None:
        """Until the device has done everything, side streams included."""
        if not self.rehearses:
            torch.cuda.synchronize()

    def free_bytes(self) -> int:
        return 2**20 if self.rehearses else torch.cuda.mem_get_info()[0]

    def seconds(self, action: object) -> float:
        """Of one call, with nothing of it left on the device."""
        assert callable(action)
        self.wait()
        start = time.perf_counter()
        action()
        self.wait()
        return time.perf_counter() - start

"""Slots in host memory: pinned where there is CUDA, captured on a side stream, merged through the device in pieces."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pretrain_merge import parameters
from pretrain_merge.files import snapshot_file
from pretrain_merge.files.atomic import Batch
from pretrain_merge.files.layout import Layout
from pretrain_merge.files.snapshot_file import SnapshotFile
from pretrain_merge.kernels.weighted_sum import Spread
from pretrain_merge.stores.streaming import merge_from_host_

# Elements of the largest and of the smallest part that tensors are cut into; see `_parts`.
_LARGEST_PART = 1 << 23
_SMALLEST_PART = 1 << 14


class HostStore:
    """A copy of every live tensor in host memory per slot, in parts.

    With CUDA a capture returns at once: the copy runs beside the next forward and backward pass, and the next optimizer
    step waits for it (P27), in whatever loop that optimizer is.
    """

    def __init__(self) -> None:
        self._slots: dict[int, list[Tensor]] = {}  # by number; the parts of all tensors, one after another
        self._shapes: dict[str, Tensor] = {}  # what the parts were cut from, without memory; a file has the whole
        self._captures: dict[torch.device, _AsyncCapture] = {}  # a stream belongs to one device

    def write(self, slot: int, tensors: Mapping[str, Tensor], dtypes: Sequence[torch.dtype]) -> None:
        """Copy tensors into a slot; with CUDA, on a side stream."""
        sources = list(_parts(tensors.values()))
        if slot not in self._slots:
            self._shapes = {
                name: torch.empty(tensor.shape, dtype=dtype, device="meta")
                for (name, tensor), dtype in zip(tensors.items(), dtypes, strict=True)
            }
            cut = [[dtype] * len(list(_parts([item]))) for item, dtype in zip(tensors.values(), dtypes, strict=True)]
            self._slots[slot] = [
                torch.empty_like(part, dtype=dtype, device="cpu", pin_memory=part.is_cuda, requires_grad=False)
                for part, dtype in zip(sources, (dtype for group in cut for dtype in group), strict=True)
            ]
        # a model may lie on several devices, and a multi-tensor copy wants one
        for device in dict.fromkeys(part.device for part in sources):
            rows = [row for row, part in enumerate(sources) if part.device == device]
            self._copy([self._slots[slot][row] for row in rows], [sources[row] for row in rows], device)

    def wait_for_copy(self) -> None:
        """Make what the device does next wait for the last capture, as an optimizer step does by itself."""
        for capture in self._captures.values():
            capture.delay_next_step()

    def merge_(
        self,
        out: Sequence[Tensor],
        slots: Sequence[int],
        coefficients: Sequence[float],
        *,
        spread: bool | Sequence[float] = False,
    ) -> Spread | None:
        """`weighted_sum_` of slots, oldest first, into `out`."""
        # the copy may still be on its way, and the host reads at once
        self._wait()
        held = [self._slots[slot] for slot in slots]
        if not isinstance(spread, bool):
            # each part counts as the tensor that it was cut from
            spread = [count for tensor, count in zip(out, spread, strict=True) for _ in _parts([tensor])]
        return merge_from_host_(list(_parts(out)), held, coefficients, spread=spread)

    def read_(self, out: Sequence[Tensor], slot: int) -> None:
        """Copy a slot into `out`."""
        self._wait()
        parameters.copy_(list(_parts(out)), self._slots[slot])

    def holds(self, slot: int, tensors: Sequence[Tensor]) -> bool:
        """Whether a slot is bit for bit what these tensors of its dtypes are."""
        self._wait()
        return parameters.all_same_bits(list(_parts(tensors)), self._slots[slot])

    def save(self, slot: int, folder: Path, stem: str, *, batch: Batch | None = None) -> SnapshotFile:
        """Write a slot to a file.

        Raises:
            CheckpointError: The disk refuses.
        """
        self._wait()
        parts = iter(self._slots[slot])
        tensors = {name: [next(parts) for _ in _parts([shape])] for name, shape in self._shapes.items()}
        layout = Layout.of(self._shapes, [shape.dtype for shape in self._shapes.values()])
        return snapshot_file.write(folder, stem, layout, tensors, batch=batch)

    def clear(self) -> None:
        """Give the memory of all slots back."""
        self._wait()
        for capture in self._captures.values():
            capture.close()
        self._captures.clear()
        self._slots.clear()

    def _copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor], device: torch.device) -> None:
        if device.type == "cuda":
            if device not in self._captures:
                self._captures[device] = _AsyncCapture(device)
            self._captures[device].copy_(targets, sources)
        else:
            parameters.copy_(targets, sources)

    def _wait(self) -> None:
        for capture in self._captures.values():
            capture.wait()


def _parts(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tensors as flat parts whose numbers of elements are powers of two, but for the last small one of each.

    torch rounds pinned memory up to a power of two, which would waste up to half of it. And a part that is rounded to
    another dtype on its way to the host takes memory on the device meanwhile: of one part then, not of an embedding.
    """
    for tensor in tensors:
        flat, start, size = tensor.view(-1), 0, _LARGEST_PART
        while start < flat.numel():
            left = flat.numel() - start
            while size > max(left, _SMALLEST_PART):
                size //= 2
            part = min(size, left)
            yield flat[start : start + part]
            start += part


class _AsyncCapture:
    """Copies from a CUDA device on a stream of its own, and makes every optimizer step wait for the last one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # a hook on all optimizers, since the store does not know the loop that steps them
        self._hook = torch.optim.optimizer.register_optimizer_step_pre_hook(lambda *_: self.delay_next_step())

    def copy_(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # the step that made these weights
        with torch.no_grad(), torch.cuda.stream(self._stream):
            torch._foreach_copy_(list(targets), list(sources), non_blocking=True)
        self._done.record(self._stream)

    def wait(self) -> None:
        """Block until the host holds the last capture."""
        self._done.synchronize()

    def delay_next_step(self) -> None:
        """Work that is issued from here on waits for the last capture; the host does not."""
        torch.cuda.current_stream(self._device).wait_event(self._done)

    def close(self) -> None:
        self._hook.remove()

"""The weighted sum in plain torch operations: the version to read, and the fallback on every device.

Knows tensors that were already checked, and nothing of how other backends do it. It walks the tensors in chunks of
bounded size, so that a merge never allocates anything of the size of a model, and so that a chunk stays in cache
between its N reads and its one write.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pretrain_merge.kernels.spread import Spread, Sums

# Elements per chunk. On the CPU the two float32 buffers are 1 MiB for each thread, the size of its L2 cache, up to a
# chunk of 4 MiB. On a device, where each operation is a launch, that chunk at once. Never more than 40 MiB, the
# spread's float64 buffers included.
_CHUNK_PER_THREAD = 1 << 17
_LONGEST_CHUNK = 1 << 20


def merge_(
    out: Sequence[Tensor],
    snapshots: Sequence[Sequence[Tensor]],
    coefficients: Sequence[float],
    *,
    double: bool,
    spread: bool,
) -> Spread | None:
    """Write `sum_j coefficients[j] * snapshots[j][i]` into every `out[i]`; see `weighted_sum_` for the promises.

    Args:
        out: Tensors of one device to be written, of any strides.
        snapshots: N sequences as long as `out`, oldest first.
        coefficients: N numbers.
        double: Accumulate in float64, else in float32.
        spread: Also measure how far the snapshots lie from their mean.

    Returns:
        The spread over all tensors if it was asked for, else None.
    """
    device, dtype = out[0].device, torch.float64 if double else torch.float32
    longest = _longest_chunk(out[0])
    length = min(longest, max(target.numel() for target in out))
    total, converted = torch.empty(2, length, dtype=dtype, device=device)
    measured = Spread(0.0, 0.0)
    for target, *sources in zip(out, *snapshots, strict=True):
        for target_chunk, *source_chunks in _chunks([target, *sources], longest):
            if spread:  # before the write: `target` may be one of the sources
                measured = measured + _chunk_spread(source_chunks)
            shape = target_chunk.shape
            sums = total[: target_chunk.numel()].view(shape)
            _sum_into(sums, converted[: target_chunk.numel()].view(shape), source_chunks, coefficients)
            target_chunk.copy_(sums)
    return measured if spread else None


def measure(snapshots: Sequence[Sequence[Tensor]]) -> Spread:
    """The spread alone, in float64, of any dtypes and strides: what kernels turn to where float32 cannot hold it."""
    longest = _longest_chunk(snapshots[0][0])
    measured = Spread(0.0, 0.0)
    for sources in zip(*snapshots, strict=True):
        for source_chunks in _chunks(list(sources), longest):
            measured = measured + _chunk_spread(source_chunks)
    return measured


def _longest_chunk(tensor: Tensor) -> int:
    return min(_CHUNK_PER_THREAD * torch.get_num_threads(), _LONGEST_CHUNK) if tensor.is_cpu else _LONGEST_CHUNK


def _sum_into(total: Tensor, converted: Tensor, sources: Sequence[Tensor], coefficients: Sequence[float]) -> None:
    # A product first, not zero plus a product: one snapshot with coefficient 1 then comes back bit for bit, -0.0
    # included.
    total.copy_(sources[0]).mul_(coefficients[0])
    for source, coefficient in zip(sources[1:], coefficients[1:], strict=True):
        # `add_` of a bfloat16 tensor to a float32 one is right but takes torch's slow mixed path: convert first.
        total.add_(source if source.dtype is total.dtype else converted.copy_(source), alpha=coefficient)


def _chunk_spread(sources: Sequence[Tensor]) -> Spread:
    num_snapshots = len(sources)
    pivot = sources[0].to(torch.float64, copy=True)
    sum_of_deviations = torch.zeros_like(pivot)
    sum_of_squares = torch.zeros_like(pivot)
    for source in sources[1:]:
        deviation = source.to(torch.float64) - pivot
        sum_of_deviations.add_(deviation)
        sum_of_squares.addcmul_(deviation, deviation)
    squares, squared_deviation = sum_of_squares.sum().item(), sum_of_deviations.square().sum().item()
    mean = pivot.add_(sum_of_deviations, alpha=1 / num_snapshots)
    return Sums(squares, squared_deviation, mean.square_().sum().item()).spread(num_snapshots)


def _chunks(tensors: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Cut tensors of one shape, whatever their strides, into the same views of at most `limit` elements."""
    shape = tensors[0].shape
    if tensors[0].numel() <= limit:
        yield tensors
        return
    dim = max(range(len(shape)), key=shape.__getitem__)
    half = shape[dim] // 2
    yield from _chunks([tensor.narrow(dim, 0, half) for tensor in tensors], limit)
    yield from _chunks([tensor.narrow(dim, half, shape[dim] - half) for tensor in tensors], limit)

"""What watching the loss costs a step: `python -m benchmarks.spikes.overhead`.

In seconds of this process, so that a busy machine slows it less than a clock would say: what a step notes, and what
reading at every tenth comes to for each; then beside a step of training, both in turns.
"""

import time
from statistics import median

import torch
from torch import nn

from benchmarks.annealing.decoder import Decoder
from pretrain_merge import RollingMerger
from pretrain_merge.spikes import READ_EVERY, SpikeDetector

_STEPS, _ROUNDS = 50, 3
_WATCHED = 2000  # steps of a detector alone, in each round


def main() -> None:
    torch.set_num_threads(1)
    for name, with_norm in (("loss", False), ("loss and gradient norm", True)):
        rounds = [_alone(with_norm=with_norm) for _ in range(_ROUNDS)]
        noting, reading = (median(values) for values in zip(*rounds, strict=True))
        print(f"{name}: {noting:.1f} us to note, {reading:.1f} us to read, of each step", flush=True)
    _beside_training()


def _alone(*, with_norm: bool) -> tuple[float, float]:
    """Microseconds a step of a run whose losses scatter: noting, and reading."""
    draws = torch.Generator().manual_seed(0)
    losses = (2.0 + 0.1 * torch.randn(_WATCHED, generator=draws)).unbind()
    norms = torch.randn(_WATCHED, generator=draws).exp().unbind()
    detector = SpikeDetector()
    noting = reading = 0
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
        begin = time.process_time_ns()
        detector.observe(step, loss, norm if with_norm else None)
        noted = time.process_time_ns()
        noting += noted - begin
        if step % READ_EVERY == 0:
            detector.read(step)
            reading += time.process_time_ns() - noted
    return noting / _WATCHED / 1e3, reading / _WATCHED / 1e3


def _beside_training() -> None:
    model = Decoder(width=96, depth=2, block_length=64, family="dense", dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    merger, watched = RollingMerger(window=2, every=10**9), nn.Linear(1, 1)
    ratios, step = [], 0
    for _ in range(_ROUNDS):
        training = watching = 0.0
        for _ in range(_STEPS):
            step += 1
            begin = time.process_time_ns()
            optimizer.zero_grad()
            loss = model(torch.randint(256, (16, 64)))
            loss.backward()
            optimizer.step()
            trained = time.process_time_ns()
            before = merger.progress
            merger.observe(watched, step)
            observed = time.process_time_ns()
            merger.judge(before, loss)
            training += trained - begin
            watching += time.process_time_ns() - observed
        ratios.append(watching / training)
        print(
            f"{watching / _STEPS / 1e3:.0f} us of {training / _STEPS / 1e6:.1f} ms a step: {ratios[-1]:.3%}", flush=True
        )
    print(f"median {sorted(ratios)[_ROUNDS // 2]:.3%}")


if __name__ == "__main__":
    main()

"""What watching the loss costs beside a step of training: `python -m benchmarks.spikes.overhead`.

In seconds of this process, both in turns, so that a busy machine slows both alike.
"""

import time

import torch
from torch import nn

from benchmarks.annealing.decoder import Decoder
from pretrain_merge import RollingMerger

_STEPS, _ROUNDS = 50, 3


def main() -> None:
    torch.set_num_threads(1)
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

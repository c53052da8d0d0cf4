"""`make demo`: pre-train a small language model with merging on, then check the merge against a real anneal.

The parts: `experiment` (the numbers), `corpus` (the text), `models`, `fitting` (one `Trainer.fit`), `report` (what is
said) and `run` (the order of it all). Importing this package imports none of them, nor torch, so that the setting below
still counts.
"""

import os

# Idle OpenMP threads spin by default. With other busy processes on two cores that made a training step of this demo ten
# times slower (50 -> 550 ms, measured); sleeping threads did not. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

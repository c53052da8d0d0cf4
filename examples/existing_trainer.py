"""A Lightning script that was there before. The two lines that end in `# new` add merging."""

import lightning as L
from tiny_lm import Text, TinyLM, show

from pretrain_merge import ModelMerging  # new

L.seed_everything(0)
trainer = L.Trainer(
    max_steps=200,
    val_check_interval=50,
    callbacks=[ModelMerging(window=10, every="1%")],  # new
)
trainer.fit(TinyLM(), Text())
show(trainer)

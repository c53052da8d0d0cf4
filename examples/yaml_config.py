"""The same, configured from a YAML file, and the best merged model read back from disk."""

from pathlib import Path

import lightning as L
from tiny_lm import Text, TinyLM, show

from pretrain_merge import ModelMerging, load_merged

merging = ModelMerging.from_config(Path(__file__).with_name("merge.yaml"))

L.seed_everything(0)
trainer = L.Trainer(max_steps=200, val_check_interval=50, callbacks=[merging])
trainer.fit(TinyLM(), Text())
show(trainer)

if merging.best_model_path is not None:
    best = TinyLM()
    provenance = load_merged(best, merging.best_model_path)
    print(f"best: {provenance['view']} of steps {provenance['steps']}, {provenance['metrics']}")

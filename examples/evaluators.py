"""Evaluations of your own, measured on the raw model and on every merge alike."""

import inspect
import json

import lightning as L
import torch
from tiny_lm import Blocks, Text, TinyLM, show

from pretrain_merge import ModelMerging

OTHER_TEXT = Blocks(inspect.getsource(json.decoder)).blocks


def other_code(module: TinyLM) -> dict[str, float]:
    """Loss and accuracy on a text that is neither trained on nor in the validation set.

    Called with the raw weights and again with each view's in the module, in evaluation mode and without gradients. A
    function like this is the place for lm-eval-harness.
    """
    logits, targets = module(OTHER_TEXT[:, :-1].to(module.device)), OTHER_TEXT[:, 1:].to(module.device)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return {"loss": float(loss), "accuracy": float((logits.argmax(-1) == targets).float().mean())}


L.seed_everything(0)
merging = ModelMerging(window=5, every="10 steps", start="100 steps", evaluators={"other_code": other_code})
trainer = L.Trainer(max_steps=200, val_check_interval=50, callbacks=[merging])
trainer.fit(TinyLM(), Text())
show(trainer)

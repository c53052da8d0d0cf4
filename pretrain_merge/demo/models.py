"""The demo's models: small decoders of real architecture families, and the LightningModule that trains them.

This module knows Hugging Face's model classes, the loss and the learning-rate schedule. It knows no text and no
merging: nothing in it is there for the callback's sake. Nothing is downloaded; the weights start random.
"""

import os
from collections.abc import Callable
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from pretrain_merge.demo.corpus import VOCAB_SIZE
from pretrain_merge.demo.experiment import FAMILIES, Experiment
from pretrain_merge.errors import ConfigError

_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "use_cache": False,
    # every byte is text: none begins, ends or pads
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def build_model(family: str, *, seed: int, width: int = 64, depth: int = 2) -> Any:
    """A Hugging Face model with random weights, about 123 thousand parameters (llama) or 197 thousand (moe).

    Args:
        family: "llama" for `LlamaForCausalLM`, "moe" for `MixtralForCausalLM` with 4 experts, 2 per token.
        seed: Draws the weights; the global random state is left as it was.
        width: Size of the hidden states, a multiple of 32: a head has 32 of them.
        depth: Number of layers.

    Raises:
        ConfigError: The family is unknown.
    """
    if family not in FAMILIES:
        raise ConfigError(f"model: {family!r} is not a model of the demo. Allowed: {', '.join(FAMILIES)}.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported; there is nothing to fetch
    import transformers

    heads = width // 32
    size = _SHARED | {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    # the weights are the seed's, and the caller's random numbers stay where they are
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, intermediate_size=3 * width))
        experts: dict[str, Any] = {
            "intermediate_size": 3 * width // 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        }
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**size, **experts))


def constant_after_warmup(warmup_steps: int) -> Callable[[int], float]:
    """Learning rate as a fraction of the peak: a linear warm-up, then constant. Takes the number of steps done.

    >>> factor = constant_after_warmup(4)
    >>> [factor(step) for step in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """

    # A function, not an object: LambdaLR stores an object's attributes in checkpoints and a branch would inherit them.
    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup_steps)

    return factor


def language_model(experiment: Experiment, lr_factor: Callable[[int], float]) -> "LanguageModel":
    """The experiment's model, with the schedule that it is trained by."""
    model = build_model(experiment.family, seed=experiment.seed)
    return LanguageModel(model, peak_lr=experiment.peak_lr, lr_factor=lr_factor)


def linear_anneal(start: int, num_steps: int) -> Callable[[int], float]:
    """Learning rate as a fraction of the peak: from 1 at `start` linearly to 0, reached after `num_steps` steps.

    >>> factor = linear_anneal(100, 4)
    >>> [factor(step) for step in range(100, 105)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    def factor(step: int) -> float:
        return max(0.0, 1.0 - (step - start) / num_steps)

    return factor


class LanguageModel(lightning.LightningModule):
    """Next-byte prediction with AdamW and a learning rate that is a function of the step.

    Logs `train_loss` and `val_loss`, both the mean cross entropy in nats per byte.

    Args:
        model: A Hugging Face causal language model.
        peak_lr: Learning rate where the schedule is 1.
        lr_factor: From steps done to the fraction of the peak that the next step uses.
    """

    def __init__(self, model: Any, *, peak_lr: float, lr_factor: Callable[[int], float]) -> None:
        super().__init__()
        self.model = model
        self._peak_lr = peak_lr
        self._lr_factor = lr_factor
        # Mixtral adds a loss that spreads tokens over its experts; it belongs to training, not to what is measured
        self._trained_with = {"output_router_logits": True} if hasattr(model.config, "num_local_experts") else {}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch, for a mixture of experts with its balancing loss."""
        loss: Tensor = self.model(**batch, labels=batch["input_ids"], **self._trained_with).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Cross entropy alone."""
        self.log("val_loss", self.model(**batch, labels=batch["input_ids"]).loss)

    def configure_optimizers(self) -> Any:
        """AdamW as language models are pre-trained with it."""
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self._peak_lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self._lr_factor), "interval": "step"},
        }

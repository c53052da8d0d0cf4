"""A Hugging Face model on a Hugging Face data set; the merged model is saved and read back by `from_pretrained`.

python huggingface_datasets.py                                        # Python's own source code, offline
python huggingface_datasets.py --dataset roneneldan/TinyStories       # needs `pip install datasets` and a network
"""

import argparse
import inspect

import lightning as L
import torch
from tiny_lm import Blocks, show
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pretrain_merge import ModelMerging

MAX_BYTES = 2_000_000


class Llama(L.LightningModule):
    """A small Llama over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch, labels=batch["input_ids"]).loss
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def read_text(dataset: str | None) -> str:
    """The first `MAX_BYTES` of a data set with a `text` column, or a text that is always there."""
    if dataset is None:
        return inspect.getsource(argparse)
    try:
        from datasets import load_dataset

        rows = load_dataset(dataset, split="train", streaming=True)
        text = ""
        for row in rows:
            text += row["text"]
            if len(text) > MAX_BYTES:
                break
    except Exception as error:
        raise SystemExit(
            f"cannot load the data set {dataset!r} ({type(error).__name__}: {error}). It needs `pip install datasets` "
            f"and a network. Without --dataset this example trains on text that is already here."
        ) from error
    return text


def main() -> None:
    """Train, and show what the merged model on disk says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="a data set of the Hugging Face hub with a `text` column")
    parser.add_argument("--steps", type=int, default=120)
    arguments = parser.parse_args()

    text = read_text(arguments.dataset)
    cut = len(text) * 7 // 8
    train, val = DataLoader(Blocks(text[:cut]), 16, shuffle=True), DataLoader(Blocks(text[cut:]), 64)

    L.seed_everything(0)
    merging = ModelMerging(window=5, every="10 steps", start="40 steps", save={"best": "val_loss"})
    trainer = L.Trainer(max_steps=arguments.steps, callbacks=[merging], limit_val_batches=4)
    trainer.fit(Llama(), train, val)
    show(trainer)

    merged = AutoModelForCausalLM.from_pretrained(merging.best_model_path)
    print(f"{merging.best_model_path} is a {type(merged).__name__} of {merged.num_parameters():,} parameters")


if __name__ == "__main__":
    main()

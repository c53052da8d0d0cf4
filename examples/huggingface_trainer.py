"""Hugging Face's Trainer with one more callback. Run it a second time with `--resume`, and it goes on."""

import argparse

import torch
from tiny_lm import Text
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from pretrain_merge.integrations import HuggingFaceMerging


class Rows(Dataset):
    """Blocks of text as a Trainer takes them."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=128, **sizes))
text = Text()
merging = HuggingFaceMerging(window=5, every="10 steps", start="50 steps", save={"best": "eval_loss"})
arguments = TrainingArguments(
    output_dir="runs/huggingface",
    max_steps=400 if options.resume else 200,
    learning_rate=3e-3,
    lr_scheduler_type="constant",
    eval_strategy="steps",
    eval_steps=50,
    save_steps=100,
    save_total_limit=2,
    logging_steps=50,
    dataloader_pin_memory=torch.cuda.is_available(),
    report_to=[],
)
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=Rows(text.train.blocks),
    eval_dataset=Rows(text.val.blocks),
    callbacks=[merging],
)
trainer.train(resume_from_checkpoint=options.resume)
if merging.last_record is not None:
    raw, merged = (metrics["eval_loss"] for metrics in (merging.last_record.raw, merging.last_record.views["sma"]))
    print(f"step {merging.last_record.step}  raw {raw:.4f}  merged {merged:.4f}  best in {merging.best_model_path}")

"""Hugging Face's Trainer over rows of a few tokens, with and without merging, and what a run left."""

import json
import random

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs accelerate (the extra huggingface)")

from torch.utils.data import Dataset  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments  # noqa: E402

from pretrain_merge.integrations import HuggingFaceMerging  # noqa: E402


class Text(Dataset):
    """Rows of tokens; reading one draws from the random numbers of the process, as augmentations do."""

    def __init__(self, size, seed):
        self.rows = torch.randint(0, 32, (size, 8), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index].roll(random.randrange(2) + int(torch.randint(2, ())))
        return {"input_ids": row, "labels": row}


class Plain(Text):
    """Rows that draw nothing, so that two evaluations at one step agree."""

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def model_of(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2))


def trainer_of(folder, merging=None, *, kind=Trainer, callbacks=(), model=None, data=None, rows=Text, **options):
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 5,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "use_cpu": True,
        }
        | options
    )
    return kind(
        model=model or model_of(),
        args=arguments,
        train_dataset=rows(64, 1),
        eval_dataset=data if data is not None else Text(16, 2),
        callbacks=[*callbacks, *([merging] if merging else [])],
    )


def merging_of(**options):
    return HuggingFaceMerging(**{"window": 3, "every": 2, "views": ["sma", "wsm"]} | options)


def trained(folder, merging=None, *, resume=None, **options):
    trainer = trainer_of(folder, merging, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def lines(folder):
    return [json.loads(line) for line in (folder / "merges.jsonl").read_text().splitlines()]

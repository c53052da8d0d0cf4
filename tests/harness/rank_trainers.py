"""A Trainer on the ranks that `ranks.on_ranks` started."""

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy


class Group(ClusterEnvironment):
    """The process group that is there already."""

    creates_processes_externally = True
    main_address, main_port = "unused", 0

    @staticmethod
    def detect():
        return False

    def world_size(self):
        return torch.distributed.get_world_size()

    def global_rank(self):
        return torch.distributed.get_rank()

    def local_rank(self):
        return self.global_rank()

    def node_rank(self):
        return 0

    def set_world_size(self, size):
        pass

    def set_global_rank(self, rank):
        pass


def strategy(kind):
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")


def trainer_on_ranks(kind, folder, *callbacks, **options):
    """A Trainer of those ranks that does nothing of its own accord: no logger, no checkpoint, no validation."""
    return pl.Trainer(
        accelerator="cpu", devices=torch.distributed.get_world_size(), strategy=strategy(kind), plugins=[Group()],
        default_root_dir=folder, callbacks=list(callbacks), num_sanity_val_steps=0, check_val_every_n_epoch=None,
        val_check_interval=1000, enable_progress_bar=False, enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False} | options,
    )  # fmt: skip

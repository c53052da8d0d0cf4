"""A Trainer on the ranks that `ranks.on_ranks` started."""

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

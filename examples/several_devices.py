"""One script for one process, DDP and FSDP2; merging is the same line in all of them.

python several_devices.py
python several_devices.py --strategy ddp --devices 2
torchrun --nproc-per-node 2 several_devices.py --strategy fsdp2 --devices 2
"""

import argparse

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny_lm import Text, TinyLM, show
from torch.distributed.fsdp import fully_shard

from pretrain_merge import ModelMerging

parser = argparse.ArgumentParser()
parser.add_argument("--strategy", choices=["auto", "ddp", "fsdp2"], default="auto")
parser.add_argument("--devices", type=int, default=1, help="processes on each node")
parser.add_argument("--nodes", type=int, default=1)
parser.add_argument("--steps", type=int, default=200)
options = parser.parse_args()


class Model(TinyLM):
    """Divided over the ranks where FSDP2 is asked for; a large model would call fully_shard on its blocks too."""

    def configure_model(self) -> None:
        if options.strategy == "fsdp2":
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


num_ranks = options.devices * options.nodes
fsdp2 = ModelParallelStrategy(data_parallel_size=num_ranks, tensor_parallel_size=1)

L.seed_everything(0)  # the same first weights on every rank
trainer = L.Trainer(
    strategy=fsdp2 if options.strategy == "fsdp2" else options.strategy,
    devices=options.devices,
    num_nodes=options.nodes,
    max_steps=options.steps,
    val_check_interval=50,
    check_val_every_n_epoch=None,
    enable_checkpointing=False,
    callbacks=[ModelMerging(window=5, every="10 steps", start="100 steps")],
)
trainer.fit(Model(), Text())
if trainer.is_global_zero:
    show(trainer)

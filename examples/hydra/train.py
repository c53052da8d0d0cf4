"""Hydra: the callback is one group of the configuration, in conf/callbacks/merge.yaml."""

import hydra
import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig
from tiny_lm import show


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Train what the configuration says."""
    L.seed_everything(config.seed)
    trainer = instantiate(config.trainer, callbacks=[instantiate(config.callbacks)])
    trainer.fit(instantiate(config.model), instantiate(config.data))
    show(trainer)


main()

"""LightningCLI needs no code for merging: the callback and all its keys are in config.yaml."""

from lightning.pytorch.cli import LightningCLI

LightningCLI()

"""The command `pretrain-merge export`: a merged folder or one snapshot to a file that another program reads.

This module knows the command's options. The work is that of `pretrain_merge.offline`.
"""

from typing import Literal

from pretrain_merge.cli.loading import loading


def export(
    folder: str,
    *,
    to: Literal["ckpt", "hf", "safetensors"],
    out: str,
    base: str | None = None,
    optimizer: Literal["newest", "average", "drop"] = "newest",
    allow: list[str] | None = None,
) -> None:
    """Write a merged folder, or any one checkpoint or snapshot, for Lightning, for Hugging Face, or plain.

    Args:
        folder: A merged folder, a snapshot of a window, or another checkpoint.
        to: ckpt: for `Trainer.test(ckpt_path=…)` and `fit(ckpt_path=…)`; hf: for `from_pretrained`; safetensors.
        out: The file or folder to be made; one that is there is never overwritten.
        base: A Lightning checkpoint of the run: loops, hyperparameters and optimizer for ckpt, missing tensors for all;
            for hf, a folder with config.json.
        optimizer: Of a ckpt: the base's, the averaged one of `merge --optimizer average`, or none.
        allow: Classes of your own that the base's hyperparameters hold, as package.module.Class: for ckpt imported and
            made, since they are written again.
    """
    # here, not above: `--help` must not wait for torch
    with loading():
        from pretrain_merge.offline import users_code
        from pretrain_merge.offline.export import export_checkpoint

    users_code.allow(allow or (), are_made=to == "ckpt")
    print(f"Exported: {export_checkpoint(folder, out, to=to, base=base, optimizer=optimizer)}")

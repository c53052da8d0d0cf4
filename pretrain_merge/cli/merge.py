"""The command `pretrain-merge merge`: checkpoints that are on disk to one merged folder.

This module knows the command's options, what it prints, and ranks that torchrun started. The work is that of
`pretrain_merge.offline`.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pretrain_merge.cli.loading import loading
from pretrain_merge.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from pretrain_merge.offline.merge import MergePlan

_GB = 1e9


def merge(
    checkpoints: list[str],
    *,
    out: str,
    view: dict[str, Any] | list[float] | str = "sma",
    steps: list[int] | None = None,
    base: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None,
    newest: list[str] | None = None,
    average: list[str] | None = None,
    allow: list[str] | None = None,
    on_missing: Literal["error", "newest"] = "error",
    optimizer: Literal["drop", "newest", "average"] = "drop",
    largest_file: int = 5 * 10**9,
    device: str = "cpu",
    plan: bool = False,
    quiet: bool = False,
) -> None:
    """Merge checkpoints that are on disk: .ckpt, .pt, .bin, safetensors, Hugging Face and DCP folders.

    Args:
        checkpoints: Files and folders; or the YAML of mergekit's `linear`.
        out: The folder to be made. One that is there is never overwritten; after a kill the same command goes on.
        view: As in the callback's `views`: sma, sma4, wsm, '{name: d, kind: decay, shape: linear}'; or coefficients,
            oldest first: '[-0.5, 1.5]'.
        steps: Of the checkpoints, where neither content nor name says them: '[1000, 2500]'.
        base: A checkpoint with tensors that snapshots of a window lack: buffers and frozen weights.
        dtype: Of the merged tensors; default: as they are.
        newest: Patterns of tensors to take from the newest checkpoint unmerged: "*running_*".
        average: Patterns of running statistics of BatchNorm to merge.
        allow: Classes of your own that checkpoints hold, as package.module.Class: passed over, never imported.
        on_missing: A tensor that some checkpoints lack is an error, or comes from the newest.
        optimizer: What becomes of optimizer states of Lightning checkpoints.
        largest_file: Bytes after which the weights go on in another file.
        device: Where sums are made: cpu or cuda.
        plan: Only say what would be read and written, and how long that takes.
        quiet: No progress bar.
    """
    with loading():
        from pretrain_merge.offline import merge as offline
        from pretrain_merge.offline import users_code

    users_code.allow(allow or ())
    options: dict[str, Any] = {
        "steps": steps, "base": base, "dtype": dtype, "newest": newest or (), "average": average or (),
        "on_missing": on_missing, "optimizer": optimizer, "largest_file": largest_file, "device": device,
    }  # fmt: skip
    sources: Sequence[str] = checkpoints
    if len(sources) == 1 and sources[0].endswith((".yaml", ".yml")):
        sources, view, options["dtype"] = read_mergekit(Path(sources[0]), dtype)
    if plan:
        _print_plan(offline.plan_merge(sources, out, view, **options))
        return
    with _ranks_of_torchrun() as is_first, _progress_bar(hidden=quiet or not is_first) as progress:
        about = offline.merge_checkpoints(sources, out, view, progress=progress, **options)
    if is_first:
        _print_result(out, about)


def read_mergekit(path: Path, dtype: str | None) -> tuple[list[str], list[float], str | None]:
    """Checkpoints, coefficients and dtype of a configuration of mergekit with `merge_method: linear`.

    Raises:
        ConfigError: It is another method, or has what a plain weighted sum has not.
    """
    import yaml

    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    values = plain if isinstance(plain, dict) else {}
    known = {"models", "merge_method", "parameters", "dtype", "out_dtype", "tokenizer_source"}
    models, method, parameters = values.get("models"), values.get("merge_method"), values.get("parameters") or {}
    # a key that is passed over would give another model than the file asks for
    if method != "linear" or not isinstance(models, list) or values.keys() - known:
        raise ConfigError(
            f"{path} is not a plain linear merge: merge_method is {method!r}, keys are {', '.join(map(str, values))}. "
            f"Allowed: models with a weight each, parameters.normalize, dtype. Use mergekit for other methods."
        )
    try:
        places = [str(model["model"]) for model in models]
        weights = [float((model.get("parameters") or {}).get("weight", 1.0)) for model in models]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: a model needs `model` and a number as `weight` ({error!r}).") from error
    total = sum(weights)
    # mergekit's default; weights that sum to 0 stay, and are refused by name further on
    if parameters.get("normalize", True) and total:
        weights = [weight / total for weight in weights]
    return places, weights, dtype or values.get("out_dtype") or values.get("dtype")


@contextmanager
def _ranks_of_torchrun() -> Iterator[bool]:
    """A process group where torchrun started several processes; says whether this is the first of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    import torch.distributed as dist

    # gloo: files are merged in host memory, whatever devices there are
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


@contextmanager
def _progress_bar(*, hidden: bool) -> Iterator[Any]:
    from tqdm import tqdm

    # None: shown on a terminal only
    with tqdm(unit="B", unit_scale=True, unit_divisor=1000, desc="read", disable=hidden or None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)  # tqdm takes what is new, we know what is done

        yield show


def _print_plan(plan: "MergePlan") -> None:
    print(f"read     {plan.bytes_read / _GB:.3g} GB")
    print(f"write    {plan.bytes_written / _GB:.3g} GB in {plan.files} files")
    print(f"tensors  {plan.merged} merged, {_counted(plan.copied)} copied{_some(plan.copied)}")
    print(f"memory   {plan.peak_memory / 2**20:.0f} MiB at most")
    print(f"time     {plan.seconds:.1f} s at the rates just measured" if plan.seconds else "time     moments")


def _print_result(out: str, about: dict[str, Any]) -> None:
    for source, coefficient in zip(about["sources"], about["coefficients"], strict=True):
        step = "" if source["step"] is None else f"step {source['step']}"
        print(f"{coefficient:+.4f}  {step:12}  {source['place']}")
    print(f"spread {about['spread']:.3g}, effective snapshots {about['n_eff']:.3g}, copied {_counted(about['copied'])}")
    print(f"Merged: {out}")


def _counted(names: Collection[str]) -> str:
    """How many tensors of the model; an optimizer's counters are copied also where all of the model is merged."""
    # states are named by their paths, whatever wrote the checkpoint: optimizer_states/0/…, optimizer/…
    of_optimizer = sum(name.startswith("optim") and "/" in name for name in names)
    return f"{len(names) - of_optimizer}" + (f" (and {of_optimizer} of the optimizer)" if of_optimizer else "")


def _some(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"

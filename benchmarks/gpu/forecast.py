"""(h) The forecast's test of scale: 30M and 100M models on source code, with anneals of 3 to 30% at two ends.

The records have the format of the annealing suite, so `benchmarks.forecast` can score them.
"""

import dataclasses
import platform
import sysconfig
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.annealing import records, texts, training
from benchmarks.annealing.setups import Anneal, Setup
from benchmarks.gpu.results import Report
from benchmarks.gpu.setting import Setting
from pretrain_merge.demo.corpus import split_by_name

_SHARES = (0.03, 0.1, 0.3)  # of the run's length, lengths of the anneals
_ENDS = (0.6, 1.0)
_MOST_BYTES = 250_000_000


@dataclasses.dataclass(frozen=True)
class _Scaled(Setup):
    """A run with few anneals, each of which costs as many seconds as it has steps."""

    @property
    def anneals(self) -> list[Anneal]:
        found = []
        for end in _ENDS:
            for share in _SHARES:
                steps = round(share * self.num_steps / self.every) * self.every
                found.append(Anneal(round(end * self.num_steps) - steps, steps))
        return found


def measure(setting: Setting, report: Report) -> None:
    if setting.predicts:
        return
    torch.set_float32_matmul_precision("high")  # TF32: without it, 100M would take ten minutes
    folder = setting.sized(Path("runs/gpu-forecast"), setting.folder)
    corpus = split_by_name(_sources(setting.sized(_MOST_BYTES, 2_000_000)))
    for setup in _setups(setting):
        result = training.train(setup, corpus, lambda text: print(text, flush=True), accelerator=setting.accelerator)
        about = {
            "command": "python -m benchmarks.gpu --forecast",
            "text_digest": texts.digest(corpus),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "lightning", "transformers")},
            "machine": setting.hardware,
        }
        path = folder / f"{setup.name}.json"
        records.write_run(path, setup.describe(), result, about)
        for anneal in result["anneals"]:
            case = f"{setup.name}: {anneal['steps']} steps to {anneal['start'] + anneal['steps']}"
            report("annealed loss", case, anneal["loss"], parameters=result["parameters"], record=str(path))


def _setups(setting: Setting) -> list[Setup]:
    common = {"text": "installed", "num_steps": setting.sized(1200, 120), "warmup_steps": setting.sized(60, 4)}
    sizes = setting.sized({"30m": (512, 9), "100m": (768, 14)}, {"tiny": (32, 1)})
    return [
        _Scaled(
            name=f"installed-{name}",
            width=width,
            depth=depth,
            batch_size=setting.sized(64, 2),
            block_length=setting.sized(256, 16),
            num_validation_blocks=setting.sized(512, 8),
            peak_lr=1e-3,
            seed=seed,
            **common,
        )
        for seed, (name, (width, depth)) in enumerate(sizes.items(), start=200)
    ]


def _sources(most_bytes: int) -> list[tuple[str, bytes]]:
    """Python files of installed packages and the standard library, in the order of their names."""
    found, total = [], 0
    for key in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(key))
        for path in sorted(root.rglob("*.py")):
            if total < most_bytes and path.is_file():
                content = path.read_bytes()
                total += len(content)
                found.append((path.relative_to(root).as_posix(), content))
    return found

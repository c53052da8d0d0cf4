"""What the package promises as a whole: its names, a light import, its layers, its errors, its wheel."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import pretrain_merge
from pretrain_merge import errors

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pretrain_merge"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

PUBLIC_NAMES = [
    "ModelMerging",
    "RollingMerger",
    "SpikeRecovery",
    "errors",
    "forecast_anneal",
    "is_evaluating_merge",
    "load_merged",
    "merge_checkpoints",
    "save_merged",
    "start_from_merged",
    "sweep_checkpoints",
]
OPTIONAL = {"matplotlib", "llvmlite", "triton", "transformers", "rich"}
HEAVY = {"torch", "lightning", "pytorch_lightning", "wandb", "numba"} | OPTIONAL
NO_TENSORS = [
    "errors",
    "runtime.log",
    "runtime.signals",
    "lr_schedules",
    "coefficients",
    "cadence",
    "records.record",
    "config",
    "plan",
]


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running the code."""
    probe = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True).stdout.split())


def lazy_imports(source: str) -> dict[str, str]:
    """Names that a facade imports for type checkers only, and their modules."""
    guarded = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    imports = [node for block in guarded for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def undrawn(drawing: str, classes: list[type]) -> list[str]:
    """Error classes whose line in the drawn tree is missing or names another built-in."""
    lines = {
        f"{cls.__name__} ({cls.__bases__[-1].__name__})" if len(cls.__bases__) > 1 else cls.__name__ for cls in classes
    }
    return sorted(line for line in lines if not re.search(rf"(^|[ ─]){re.escape(line)}($|\s)", drawing, re.M))


def broken_contracts(folder: Path) -> str:
    """What `lint-imports` says of a copy of the package; empty if it keeps every contract."""
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
        "--no-cache",
    ]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return "" if result.returncode == 0 else result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_public_names_are_these_and_each_one_loads():
    assert sorted(pretrain_merge.__all__) == PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(pretrain_merge, name).__name__.rpartition(".")[2] == name
    assert set(PUBLIC_NAMES) <= set(dir(pretrain_merge))


def test_type_checkers_see_the_names_that_are_loaded_lazily():
    assert lazy_imports((PACKAGE / "__init__.py").read_text()) == pretrain_merge._MODULE_OF


def test_a_name_without_its_import_for_type_checkers_would_be_seen():
    assert lazy_imports("if TYPE_CHECKING:\n    from a.b import C as C\nfrom d import E") == {"C": "a.b"}


def test_an_unknown_name_says_which_names_there_are():
    with pytest.raises(AttributeError, match=r"'ModelMergin'.*ModelMerging, RollingMerger"):
        _ = pretrain_merge.ModelMergin


def test_importing_the_package_loads_nothing_heavy():
    assert not loaded_by("import pretrain_merge") & HEAVY


@pytest.mark.parametrize("name", NO_TENSORS)
def test_numbers_and_names_load_no_torch(name):
    assert not loaded_by(f"import pretrain_merge.{name}") & HEAVY


def test_the_merger_loads_torch_and_no_trainer_nor_logger():
    loaded = loaded_by(
        "import torch\nfrom pretrain_merge import RollingMerger\n"
        "model, merger = torch.nn.Linear(1, 1), RollingMerger(window=2, every=1)\n"
        "print(merger.observe(model, 1), merger.observe(model, 2))\n"
        "with merger.merged(model, 'sma'): print(merger.spread)"
    )
    assert "torch" in loaded  # so the probe would see a heavy import
    assert not loaded & (HEAVY - {"torch", "triton", "llvmlite"})  # torch itself looks for triton, a merge for llvmlite


def test_the_import_contract_holds_and_names_every_module():
    assert broken_contracts(ROOT) == ""


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("coefficients.py", "import torch", "Numbers and names know no tensors BROKEN"),
        ("cadence.py", "from pretrain_merge import merging", "Lower layers never import higher ones BROKEN"),
        ("merging/rolling_merger.py", "import lightning", "Only the edges know a trainer BROKEN"),
        ("merging/rolling_merger.py", "import triton", "Compilers are known to the merge kernels only BROKEN"),
        ("records/record.py", "import matplotlib", "Figures are drawn in one place BROKEN"),
        (
            "evaluation/evaluate.py",
            "import transformers",
            "the integrations know a model BROKEN",
        ),
        ("helpers.py", "", "Lower layers never import higher ones BROKEN"),  # a module without a layer
    ],
)
def test_the_import_contract_sees_a_breach(tmp_path, module, line, broken):
    shutil.copytree(PACKAGE, tmp_path / "pretrain_merge", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    target = tmp_path / "pretrain_merge" / module
    target.write_text((target.read_text() if target.exists() else "") + f"\n{line}\n")
    assert broken in broken_contracts(tmp_path)


def test_every_error_is_in_the_drawn_tree_and_is_a_built_in_too():
    classes = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]
    assert len(classes) > 5
    assert undrawn(errors.__doc__, classes) == []
    for cls in classes:
        assert issubclass(cls, errors.PretrainMergeError)
        assert cls is errors.PretrainMergeError or cls.__bases__[1].__module__ == "builtins"


def test_an_error_missing_from_the_drawing_would_be_seen():
    class NewError(errors.PretrainMergeError, KeyError):
        pass

    class ConfigError(errors.PretrainMergeError, TypeError):
        pass

    assert undrawn(errors.__doc__, [NewError, ConfigError]) == ["ConfigError (TypeError)", "NewError (KeyError)"]


def pickle_readers(source: str) -> list[str]:
    """What in a module's text would read a pickle."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [f"{ast.unparse(node.value)}.{node.attr}" for node in nodes if isinstance(node, ast.Attribute)]
    return [
        name
        for name in names
        if name in ("pickle", "cloudpickle", "dill", "joblib", "torch.load", "numpy.load", "np.load")
    ]


# files of other programs, by allow lists, and a Lightning checkpoint with weights_only=True
READERS = {"run.py": ["torch.load"], "plain_pickle.py": ["pickle"], "lightning_file.py": ["torch.load"]}


def test_nothing_of_the_package_reads_a_pickle_but_restricted_readers():
    sources = {path.name: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert {name: found for name, source in sources.items() if (found := pickle_readers(source))} == READERS
    for path in ("offline/lightning_file.py", "demo/run.py"):
        assert "weights_only=True" in (PACKAGE / path).read_text()
    assert pickle_readers("import pickle\ntorch.load(path)") == ["pickle", "torch.load"]


def test_the_wheel_holds_every_file_of_the_package(wheel):
    source = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert "pretrain_merge/py.typed" in source
    assert packed == source
    assert wheel.name.startswith(f"pretrain_merge-{pretrain_merge.__version__}-")


def test_the_command_exists():
    for target in PYPROJECT["project"]["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))


def test_every_requirement_has_an_exact_version_in_the_constraints():
    pins = [
        Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"==[^,*+]+", str(pin.specifier)) for pin in pins)
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    wanted = {
        Requirement(text).name.lower() for group in (PYPROJECT["project"]["dependencies"], *extras) for text in group
    }
    assert wanted - {pin.name.lower() for pin in pins} == {"pretrain-merge"}

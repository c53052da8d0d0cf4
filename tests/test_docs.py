"""Every code block of README and docs runs, and the docs name what exists: keys, defaults, errors, commands.

Python blocks of one page share a namespace that starts with a model and its loaders, in an empty folder. A YAML block
goes through the door that it belongs to: the configuration schema, LightningCLI or Hydra.
"""

import ast
import inspect
import re
import shlex
import tomllib
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from textwrap import dedent

import lightning as L
import pytest
import torch
import yaml
from sybil import Document
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from torch.utils.data import DataLoader

from pretrain_merge import ModelMerging, config, errors
from pretrain_merge.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
INDEX = ROOT / "docs/index.md"
FENCE = re.compile(r"^ *```(\w+)", re.M)
HOURS_LONG = re.compile(r"\bmax_steps=2000\b")  # of a reader's run; what its blocks show, a tenth of it shows as well
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#[\w-]+)?\)")


class TinyModel(L.LightningModule):
    """The reader's module: one layer, a validation loss, AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def loss(self, batch):
        return (self.layer(batch) - batch.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def run_yaml(example):
    """Sybil's evaluator of a YAML block: through the door that its keys show."""
    text = dedent(example.parsed)
    values = yaml.safe_load(text)
    if named := re.match(r"# (\S+\.yaml)\n", text):
        path = Path(named[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if "trainer" in values:
        build_with_lightning_cli(values)
    elif "_target_" in values:
        hydra_utils = pytest.importorskip("hydra.utils")
        assert isinstance(hydra_utils.instantiate(values), ModelMerging)
    else:
        config.build(config.MergeConfig, values)


def build_with_lightning_cli(values):
    cli = pytest.importorskip("lightning.pytorch.cli")
    Path("values.yaml").write_text(yaml.safe_dump(values))
    built = cli.LightningCLI(TinyModel, args=["--config", "values.yaml"], run=False, save_config_callback=None)
    assert any(isinstance(callback, ModelMerging) for callback in built.trainer.callbacks)


def parse(path: Path) -> Document:
    return Document.parse(str(path), PythonCodeBlockParser(), CodeBlockParser("yaml", run_yaml))


def run(document: Document, folder: Path) -> None:
    """Runs a page's blocks in order; the first failure names its line."""
    train, val = (DataLoader(torch.randn(num_rows, 8), batch_size=8) for num_rows in (512, 32))
    document.namespace.update(model=TinyModel(), train_loader=train, val_loader=val)
    for example in document:
        example.evaluate()


def documented_keys(page: str) -> dict[str, str]:
    """Keys and defaults in the tables of the configuration page's section on keys."""
    section = page.partition("\n## Keys\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `([\w.]+)` \| `([^|]*)` \|", section, re.M))


def schema_keys(schema: type, prefix: str = "") -> dict[str, object]:
    """Keys and defaults of the schema, nested ones with dots; `breaks` stays one key."""
    defaults = schema()
    keys: dict[str, object] = {}
    for item in fields(schema):
        value = getattr(defaults, item.name)
        if item.name == "save":
            keys |= schema_keys(type(value), "save.")
        else:
            keys[prefix + item.name] = vars(value) if is_dataclass(value) else value
    return keys


@cache
def texts() -> tuple[str, ...]:
    """Every string of the package's code, with … where a value goes."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "pretrain_merge").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.Constant)]
    parts = [node.values if isinstance(node, ast.JoinedStr) else [node] for node in nodes]
    return tuple("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in text) for text in parts)


def is_said(quote: str) -> bool:
    pattern = re.compile(re.escape(quote).replace("…", ".*"))
    return any(pattern.search(text) for text in texts())


def named_examples(page: str) -> set[str]:
    """What a page's tables and lists name of `examples/`."""
    return set(re.findall(r"`(\w+\.py|\w+/)`", page.partition("`examples/`")[2]))


def first_screen(page: str) -> str:
    return page.partition("\n## ")[0].replace("](docs/", "](")


def test_the_code_blocks_of_the_first_page_are_those_of_the_readme_in_its_order():
    first, readme = ([example.parsed for example in parse(path)] for path in (INDEX, PAGES[0]))
    assert first
    assert first == readme[: len(first)]


@pytest.mark.parametrize("path", [path for path in PAGES if path != INDEX], ids=lambda path: path.name)
def test_every_code_block_runs(path, tmp_path, monkeypatch, merges_jsonl):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    if "read_records" in path.read_text():
        (tmp_path / "merges.jsonl").write_text(merges_jsonl)
    short = tmp_path / path.name
    short.write_text(HOURS_LONG.sub("max_steps=200", path.read_text()))
    document = parse(short)
    num_fences = sum(language in ("python", "yaml") for language in FENCE.findall(path.read_text()))
    assert len({example.region.start for example in document}) >= num_fences  # a doctest block is several examples
    run(document, tmp_path)


def shown_commands(page: str) -> dict[str, str]:
    """What a page shows that a command prints, by command."""
    return dict(re.findall(r"^```console\n\$ (pretrain-merge [^\n]+)\n(.*?)\n```$", page, re.M | re.S))


def printed(command: str, capsys, monkeypatch) -> str:
    """What the command prints on a terminal as wide as a page, less the empty lines at its end."""
    monkeypatch.setenv("COLUMNS", "118")
    monkeypatch.setattr("sys.argv", shlex.split(command))
    cli.main()
    return "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines()).rstrip("\n")


@pytest.mark.parametrize("gpus", [8, 64, 1024])
def test_a_plan_that_is_shown_is_what_the_command_prints(gpus, capsys, monkeypatch):
    shown = shown_commands((ROOT / "docs/plan.md").read_text())
    (command,) = [command for command in shown if f"--gpus {gpus} " in f"{command} "]
    assert shown[command] == printed(command, capsys, monkeypatch)


@pytest.fixture(scope="module")
def merges_jsonl(tmp_path_factory):
    """The records of a real short run."""
    folder = tmp_path_factory.mktemp("run")
    loader = DataLoader(torch.randn(512, 8), batch_size=8)
    merging = ModelMerging(window=4, every="10 steps")
    trainer = L.Trainer(
        max_steps=40, default_root_dir=folder, logger=False, enable_checkpointing=False, callbacks=[merging]
    )
    trainer.fit(TinyModel(), loader, loader)
    return (folder / "merges.jsonl").read_text()


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("```python\nassert False\n```", AssertionError),
        ("```yaml\nwindw: 3\n```", errors.ConfigError),
        ("```yaml\n_target_: pretrain_merge.ModelMerging\nwindow: 0\n```", Exception),
        (
            "```yaml\ntrainer: {callbacks: [{class_path: pretrain_merge.ModelMerging, init_args: {windw: 3}}]}\n```",
            SystemExit,
        ),
        ('=== "Tab"\n\n    ```python\n    assert False\n    ```', AssertionError),
    ],
)
def test_a_broken_block_would_be_seen(block, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    (tmp_path / "page.md").write_text(f"text\n\n{block}\n")
    with pytest.raises(error):
        run(parse(tmp_path / "page.md"), tmp_path)


def test_readme_and_docs_open_with_the_same_screen():
    assert first_screen(PAGES[0].read_text()) == first_screen(INDEX.read_text())


def test_every_key_is_documented_with_its_default():
    documented = documented_keys((ROOT / "docs/configuration.md").read_text())
    assert {key: yaml.safe_load(text) for key, text in documented.items()} == schema_keys(config.MergeConfig)


def test_every_argument_of_the_callback_is_on_the_configuration_page():
    page = (ROOT / "docs/configuration.md").read_text()
    arguments = [name for name in inspect.signature(ModelMerging).parameters if name != "options"]
    assert [name for name in arguments if f"`{name}`" not in page and f"`{name}." not in page] == []


@pytest.mark.parametrize("page", ["getting-started.md", "configuration.md"])
def test_every_example_that_is_named_exists(page):
    names = named_examples((ROOT / "docs" / page).read_text())
    assert len(names) >= 4
    assert [name for name in names if not (ROOT / "examples" / name).exists()] == []


def test_every_error_has_an_entry_in_troubleshooting():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    classes = [name for name, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]
    assert sorted(re.findall(r"^## (\w+Error)$", page, re.M)) == sorted(classes)


def test_messages_quoted_in_troubleshooting_are_messages_of_the_package():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^- \*([^*]+)\*", page, re.M)
    assert len(quoted) > 15
    assert [quote for quote in quoted if not is_said(quote)] == []


def test_a_message_that_nobody_says_would_be_seen():
    assert is_said("is no quantity") is False
    assert is_said("needs … snapshots and the window holds …")


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_every_link_and_command_leads_somewhere(path):
    text = path.read_text()
    assert [target for target in LINK.findall(text) if not (path.parent / target).exists()] == []
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`)(?:\w+=\S+ )?make ([a-z]+)", text, re.M)) <= targets


def test_the_layers_of_the_architecture_page_are_those_of_the_contract():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = {int(row[1]): re.findall(r"`(\w+)`", row[2]) for row in re.finditer(r"^\| (\d+) \| (.+) \|$", page, re.M)}
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    assert len(contract) == 10
    assert [rows[number] for number in range(10, 0, -1)] == [re.findall(r"\w+", layer) for layer in contract]


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_every_file_of_ours_that_a_page_names_exists(path):
    named = re.findall(r"`((?:tests|pretrain_merge)/[\w./-]*)`", path.read_text(encoding="utf-8"))
    if path.name == "architecture.md":  # which names files of the package without its folder
        named += [
            f"pretrain_merge/{name}"
            for name in re.findall(r"`((?!tests/|pretrain_merge/)[\w/]+/\w+\.py)`", path.read_text())
        ]
        assert len(named) > 20  # so the search finds them
    assert [name for name in named if not (ROOT / name).exists()] == []


def cited_pitfalls() -> set[int]:
    files = [path for folder in ("pretrain_merge", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    return {int(number) for path in files for number in re.findall(r"\bP(\d{1,2})\b", path.read_text(encoding="utf-8"))}


def test_every_pitfall_that_the_code_cites_has_its_row():
    page = (ROOT / "docs/lightning-pitfalls.md").read_text(encoding="utf-8")
    rows = [int(number) for number in re.findall(r"^\| P(\d+) \|", page, re.M)]
    assert sorted(rows) == sorted(set(rows))
    assert cited_pitfalls() <= set(rows)
    assert {6, 18} <= cited_pitfalls()  # so the search finds them

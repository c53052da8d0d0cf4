"""Every example runs as its reader would run it, and shows what it says it shows."""

import functools
import importlib
import json
import os
import re
import runpy
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.run as torchrun
from harness.forks import run_forked
from lightning.pytorch.strategies.launchers import subprocess_script

from pretrain_merge.config import MergeConfig, build

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .* does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(autouse=True)
def run_folder(tmp_path, monkeypatch):
    """An empty folder to run in, with the examples' folder on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    shorten_validation(monkeypatch)
    torch.manual_seed(0)
    return tmp_path


def shorten_validation(monkeypatch):
    """A third of the validation: three models or more at each of a dozen merges are most of what an example takes."""
    text = importlib.import_module("tiny_lm").Text
    whole = text.__init__

    @functools.wraps(whole)  # LightningCLI reads its arguments
    def shorter(self, *arguments, **options):
        whole(self, *arguments, **options)
        self.val.blocks = self.val.blocks[::3]

    monkeypatch.setattr(text, "__init__", shorter)


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def records(folder):
    (path,) = folder.rglob("merges.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_merging_helped(folder, view="sma"):
    last = records(folder)[-1]
    assert last["views"][view]["val_loss"] < last["raw"]["val_loss"]


def shown(output):
    """What `show` printed, as numbers by name."""
    return {name: float(value) for name, value in re.findall(r"^(merge/\S+) +(\S+)$", output, re.M)}


def test_existing_trainer(monkeypatch, run_folder, capsys):
    run(monkeypatch, "existing_trainer.py")
    assert_merging_helped(run_folder)
    metrics = shown(capsys.readouterr().out)
    assert 180 < metrics["merge/step"] <= 200  # the last time that the run had grown by a tenth
    assert metrics["merge/sma/val_loss"] < metrics["merge/raw/val_loss"]


def test_an_existing_trainer_needs_three_changed_lines_at_most(monkeypatch):
    lines = (EXAMPLES / "existing_trainer.py").read_text().splitlines()
    new = [line for line in lines if "pretrain_merge" in line or "ModelMerging" in line]
    assert [line for line in lines if line.endswith("# new")] == new
    assert 1 <= len(new) <= 3
    without = "\n".join(line for line in lines if line not in new)
    compile(without, "existing_trainer.py", "exec")
    assert "merg" not in without.partition('"""\n')[2]


def test_yaml_config(monkeypatch, run_folder, capsys):
    run(monkeypatch, "yaml_config.py")
    assert_merging_helped(run_folder)
    assert len(list(run_folder.rglob("model.safetensors"))) == 1
    assert re.search(r"^best: \w+ of steps \[\d+", capsys.readouterr().out, re.M)


def test_the_yaml_file_changes_what_the_defaults_say():
    assert build(MergeConfig, EXAMPLES / "merge.yaml") != MergeConfig()


def test_lightning_cli(monkeypatch, run_folder):
    pytest.importorskip("jsonargparse")
    run(monkeypatch, "lightning_cli/train.py", "fit", "--config", EXAMPLES / "lightning_cli/config.yaml")
    assert_merging_helped(run_folder)
    assert_merging_helped(run_folder, "cos3")


@pytest.mark.filterwarnings("ignore:register_new_resolver:UserWarning")  # Hydra 1.3 with OmegaConf 2.4
@pytest.mark.filterwarnings("ignore:Implicit conversion from Version:FutureWarning")
def test_hydra(monkeypatch, run_folder):
    pytest.importorskip("hydra")
    run(monkeypatch, "hydra/train.py", "callbacks.window=4", "trainer.max_steps=180")
    assert_merging_helped(run_folder)
    assert records(run_folder)[-1]["window"] == 4
    assert not (run_folder / "outputs").exists()


@pytest.mark.parametrize("name", ["plain_torch.py", "fabric.py", "accelerate_loop.py", "huggingface_trainer.py"])
def test_loops_of_your_own(monkeypatch, capsys, name):
    if name in ("accelerate_loop.py", "huggingface_trainer.py"):
        pytest.importorskip("accelerate")
    run(monkeypatch, name)
    raw, merged = re.findall(r"raw ([\d.]+)  (?:sma|merged) ([\d.]+)", capsys.readouterr().out)[-1]
    assert float(merged) < float(raw)


def test_evaluators(monkeypatch, run_folder):
    run(monkeypatch, "evaluators.py")
    last = records(run_folder)[-1]
    assert last["views"]["sma"]["other_code/loss"] < last["raw"]["other_code/loss"]
    assert last["views"]["sma"]["other_code/accuracy"] > 0


def test_huggingface_datasets(monkeypatch, run_folder, capsys):
    pytest.importorskip("transformers")
    run(monkeypatch, "huggingface_datasets.py", "--steps", 80)
    assert records(run_folder)[-1]["views"]["sma"]["val_loss"] > 0
    assert "is a LlamaForCausalLM of" in capsys.readouterr().out


def test_several_devices_on_one(monkeypatch, run_folder):
    run(monkeypatch, "several_devices.py", "--steps", 120)
    assert [record["window"] for record in records(run_folder)] == [2, 3]


def run_on_two_ranks(folder, launcher, strategy):
    """Records of a run and what it printed."""
    folder.mkdir()
    script = [str(EXAMPLES / "several_devices.py"), "--strategy", strategy, "--devices", "2", "--steps", "120"]
    code, printed = run_forked(launcher, str(folder), *script, timeout=140)
    assert code == 0, printed[-3000:]
    return records(folder), shown(printed)


def started_by_lightning(folder, script, *arguments):
    """`python SCRIPT`, which starts the second rank itself: the command and the environment are Lightning's."""
    in_reach_of_the_examples(folder)
    sys.argv = [script, *arguments]
    subprocess_script.subprocess = SimpleNamespace(Popen=ForkedScript)
    runpy.run_path(script, run_name="__main__")


class ForkedScript:
    """What Lightning needs of a `Popen` of `python SCRIPT ...`, which does without imports of its own."""

    def __init__(self, command, env, cwd):
        python, *self.argv = command
        assert (python, cwd) == (sys.executable, None)
        self.returncode, self.pid = None, os.fork()
        if self.pid == 0:
            self._run(env)

    def _run(self, env):
        code = 1
        try:
            os.environ.clear()
            os.environ.update(env)
            sys.argv = self.argv
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def poll(self):
        ended, status = os.waitpid(self.pid, os.WNOHANG) if self.returncode is None else (0, 0)
        if ended:
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, signum):
        if self.poll() is None:
            os.kill(self.pid, signum)


def started_by_torchrun(folder, *script):
    """`torchrun SCRIPT`, whose ranks are forked here: they do without imports of their own."""
    in_reach_of_the_examples(folder)
    torchrun.main(["--standalone", "--nproc-per-node", "2", "--start-method", "fork", "--run-path", *script])


def in_reach_of_the_examples(folder):
    os.chdir(folder)
    path = [str(EXAMPLES), str(EXAMPLES.parent)]
    sys.path[:0] = path
    os.environ["PYTHONPATH"] = os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])


def test_several_devices_on_two_ranks_started_by_lightning_and_by_torchrun(run_folder):
    ddp, shown_by_ddp = run_on_two_ranks(run_folder / "ddp", started_by_lightning, "ddp")
    fsdp2, shown_by_fsdp2 = run_on_two_ranks(run_folder / "fsdp2", started_by_torchrun, "fsdp2")
    for lines in (ddp, fsdp2):  # one file, of one rank
        assert [line["window"] for line in lines] == [2, 3]
    assert shown_by_ddp["merge/tokens"] == shown_by_fsdp2["merge/tokens"] > 1.9 * 120 * 8 * 33
    for one, other in zip(ddp, fsdp2, strict=True):  # one run, however its weights are divided
        assert one["raw"]["val_loss"] == pytest.approx(other["raw"]["val_loss"], rel=1e-3)
        assert one["views"]["sma"]["val_loss"] == pytest.approx(other["views"]["sma"]["val_loss"], rel=1e-3)


def test_a_data_set_that_cannot_be_loaded_is_said_with_the_way_out(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "huggingface_datasets.py", "--dataset", "nobody/nothing")
    message = str(caught.value)
    assert "cannot load the data set 'nobody/nothing'" in message
    assert "pip install datasets" in message
    assert "Without --dataset" in message


def test_every_example_is_in_the_list_and_tested():
    listed = (EXAMPLES / "README.md").read_text()
    tested = Path(__file__).read_text()
    scripts = [path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("*.py") if path.name != "tiny_lm.py"]
    assert len(scripts) == 11
    for script in scripts:
        assert str(script.parent if script.parent.name else script) in listed
        assert f'"{script}"' in tested

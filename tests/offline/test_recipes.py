"""Every command of the page on existing checkpoints, run as it stands there on small files of those names."""

import os
import re
import shlex
import sys
from pathlib import Path

import torch
from offline import writers
from offline.test_sweep import SCRIPT

from pretrain_merge.cli.main import main

PAGE = (Path(__file__).resolve().parents[2] / "docs/existing-checkpoints.md").read_text()


def commands(page):
    return [line for block in re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S) for line in block.splitlines()]


def make_checkpoints():
    Path("checkpoints").mkdir()
    Path("hub").mkdir()
    Path("outputs/checkpoint").mkdir(parents=True)
    for step in (100, 200, 400):
        writers.lightning(Path("checkpoints"), step, writers.tensors(step)).rename(f"checkpoints/step={step}.ckpt")
        writers.hugging_face(Path("hub"), step, {"w": torch.full((4,), float(step))})
        writers.dcp_folder(Path("outputs/checkpoint"), step, writers.tensors(step))
    Path("old-run").mkdir()
    for step in range(100, 900, 100):
        writers.safetensors_file(Path("old-run"), step, {"w": torch.tensor([3.0 + 100 / step, 1.0])})
    Path("evaluate.py").write_text(SCRIPT)
    (yaml,) = re.findall(r"^```yml\n(.*?)^```", PAGE, re.M | re.S)
    Path("linear.yaml").write_text(yaml)


def test_every_command_of_the_page_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    make_checkpoints()
    assert len(commands(PAGE)) == 12
    for command in commands(PAGE):
        monkeypatch.setattr("sys.argv", shlex.split(command))
        main()
        if out := re.search(r"--out (\S+)", command):
            assert Path(out[1]).exists() == ("--plan" not in command), command
    assert Path("swept/forecast.png").exists()
    assert writers.read("merged-linear")[0]["w"].tolist() == [175.0, 175.0, 175.0, 175.0]
    assert writers.read("merged-titan")[0]["embed.weight"].dtype == torch.bfloat16
    assert Path("merged-hf/config.json").exists()

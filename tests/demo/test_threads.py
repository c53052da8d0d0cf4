"""The demo's threads share two cores with whatever else runs there."""

import os
import subprocess
import sys


def test_threads_sleep_while_they_wait_and_that_is_set_before_torch_is_loaded():
    code = (
        "import os, sys, pretrain_merge.cli.main, pretrain_merge.demo.experiment; "
        "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["passive", "False"]

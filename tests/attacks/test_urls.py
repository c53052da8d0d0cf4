"""URLs in a file of the run's folder: followed only where the user's own Trainer writes, and not for ever."""

import json
import os
import socket
import threading

import fsspec
import pytest
from harness.models import Regression, rows, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pretrain_merge import ModelMerging
from pretrain_merge.files import fingerprints
from pretrain_merge.files.fingerprints import UNKNOWN, Fingerprints


@pytest.mark.parametrize(
    "url",
    [
        "reference://a::file:///evil.json",
        "http://localhost:1/a",
        "simplecache::memory://a",
        "memory://a::file:///etc/passwd",
        "file:///etc/passwd",
        "://",
        "s3://bucket/a",
        "MEMORY://a",
    ],
)
def test_no_url_of_a_scheme_that_the_trainer_does_not_use_reaches_fsspec(url, tmp_path, monkeypatch):
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *_, **__: pytest.fail("it was asked"))
    assert Fingerprints(tmp_path, ["/home/run", tmp_path, None]).of(url) == UNKNOWN


def test_a_chain_is_not_followed_though_it_begins_as_the_trainers_own(tmp_path, monkeypatch):
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *_, **__: pytest.fail("it was asked"))
    own = Fingerprints(tmp_path, ["memory://run"])
    own.trust("simplecache::s3://a")
    assert own.of("memory://a::file:///etc/passwd") == UNKNOWN
    assert own.of("simplecache://a") == UNKNOWN


def test_what_the_trainer_writes_is_told_apart(tmp_path):
    own = Fingerprints(tmp_path, ["memory://run"])
    assert own.of("memory://run/a.ckpt") is None
    fsspec.filesystem("memory").pipe("/run/a.ckpt", b"1")
    first = own.of("memory://run/a.ckpt")
    fsspec.filesystem("memory").pipe("/run/a.ckpt", b"22")
    assert first not in (None, UNKNOWN, own.of("memory://run/a.ckpt"))
    fsspec.filesystem("memory").rm("/run/a.ckpt")


def test_a_server_that_says_nothing_is_asked_once_and_not_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "PATIENCE", 0.2)
    asked = []
    silence = threading.Event()
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (asked.append(url), silence.wait(60)))
    own = Fingerprints(tmp_path, ["http://host/run"])
    assert [own.of(f"http://host/{number}.ckpt") for number in range(3)] == [UNKNOWN] * 3
    assert len(asked) == 1
    silence.set()


@pytest.mark.parametrize("path", ["a::b", "[a]", "a\nb", "ü", " "])
def test_a_local_path_is_a_path_whatever_it_looks_like(path, tmp_path, monkeypatch):
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *_, **__: pytest.fail("it was asked"))
    own = Fingerprints(tmp_path)
    assert own.of(path) is None
    (tmp_path / path).write_text("1")
    assert own.of(path) not in (None, UNKNOWN)


def test_a_path_that_no_file_system_takes_is_unknown_so_that_nothing_goes(tmp_path):
    assert [Fingerprints(tmp_path).of(path) for path in ("n" * 5000, "a\0b")] == [UNKNOWN] * 2


def test_a_run_neither_runs_nor_requests_what_a_file_beside_its_checkpoints_names(tmp_path):
    evil = {"version": 1, "templates": {"a": "{{ cycler.__init__.__globals__.os.system('touch pwned') }}"}, "refs": {}}
    (tmp_path / "evil.json").write_text(json.dumps(evil | {"gen": [], "refs": {"b": ["{{a}}"]}}))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.1)
        host = f"http://127.0.0.1:{server.getsockname()[1]}"
        keys = [
            f"{host}/a.ckpt",
            f"reference://b::file://{tmp_path}/evil.json",
            f"reference://b?fo={tmp_path}/evil.json",
        ]
        (tmp_path / "window").mkdir()
        needs = {key: [["snapshot-00000002-0a1b2c3d.safetensors"]] for key in keys}
        (tmp_path / "window" / "checkpoints.json").write_text(json.dumps(needs))
        saving = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=3)
        trainer(tmp_path, ModelMerging(window=2, every=2), saving, max_steps=6, enable_checkpointing=True).fit(
            Regression(), rows(), rows(4)
        )
        with pytest.raises(TimeoutError):
            server.accept()  # nobody came
    assert not os.path.exists("pwned")
    assert set(keys) <= json.loads((tmp_path / "window" / "checkpoints.json").read_text()).keys()

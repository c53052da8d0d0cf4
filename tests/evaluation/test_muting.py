"""Nobody hears of an evaluation, and yet every object that a hook finds is the user's own."""

import csv
import threading
from typing import Any

import lightning.pytorch as pl
import pytest
from harness.models import LIGHTNING_REMARKS, MemoryLogger, Regression, Witness, rows, trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import pretrain_merge
from pretrain_merge import ModelMerging
from pretrain_merge.evaluation import isolation, muting

pytestmark = LIGHTNING_REMARKS


class Client:
    """A tracker's client, with everything that such clients do."""

    def __init__(self) -> None:
        self.url, self.lines, self.summary = "http://here", [], Summary()

    def log(self, values: Any) -> int:
        self.lines.append(values)
        return len(self.lines)

    def log_artifact(self, artifact: Any) -> Any:
        raise AssertionError("uploaded")

    def get_id(self) -> str:
        return "id"

    def __setitem__(self, key: str, value: Any) -> None:
        self.lines.append((key, value))

    def __getitem__(self, key: str) -> Any:
        return self.lines


class Summary(dict):
    """What W&B shows of a run at a glance."""


class ClientLogger(MemoryLogger):
    def __init__(self) -> None:
        super().__init__()
        self.client = Client()

    @property
    def experiment(self) -> Client:
        return self.client


def test_a_client_keeps_its_face_and_records_nothing():
    logger = ClientLogger()
    client = logger.client
    with muting.muted([], [logger]):
        assert logger.experiment is client
        assert isinstance(client, Client)
        assert (client.url, client.get_id()) == ("http://here", "id")
        logger.log_metrics({"a": 1})
        client.log({"a": 1})
        client.log_artifact("a").wait().anything["else"] = 3
        client["a"] = 1
        client["a"].append(2)
        client.summary["best"] = 1
        client.summary.update(best=2)
    client.log({"b": 2})
    client["c"] = 3
    assert client.lines == [{"b": 2}, ("c", 3)]
    assert (logger.lines, client.summary) == ([], {})
    assert type(client) is Client


def test_a_thread_of_the_users_still_records():
    client = Client()
    logger = ClientLogger()
    logger.client = client
    with muting.muted([], [logger]):
        thread = threading.Thread(target=client.log, args=({"memory": 1},))
        thread.start()
        thread.join()
    assert client.lines == [{"memory": 1}]


def test_functions_of_a_trackers_module_are_silent_too(monkeypatch):
    wandb = pytest.importorskip("wandb")
    logged: list[Any] = []
    monkeypatch.setattr(wandb, "log", logged.append)
    with muting.muted([], []):
        wandb.log({"a": 1})
    wandb.log({"b": 1})
    assert logged == [{"b": 1}]


class Registering(pl.Callback):
    """A base that counts its subclasses and wants a keyword of each."""

    names: list[str] = []  # noqa: RUF012

    def __init_subclass__(cls, *, key: str) -> None:
        assert cls.__name__ not in Registering.names
        Registering.names.append(cls.__name__)


class Registered(Registering, key="a"):
    __slots__ = ("level",)

    def __init__(self) -> None:
        self.level, self.heard = 1, 0

    def on_validation_end(self, *_: Any) -> None:
        self.heard += 1


def test_a_muted_callback_is_the_same_object():
    callback = Registered()
    with muting.muted([callback], []):
        callback.on_validation_end(None, None)
        callback.on_validation_start(None, None)
        assert type(callback) is Registered
        assert callback.level == 1
    callback.on_validation_end(None, None)
    assert callback.heard == 1
    assert "on_validation_start" not in vars(callback)


class _Asks(Regression):
    """Appends to a file of its own unless a merge is evaluated, and notes what it finds."""

    def __init__(self, find: Any) -> None:
        super().__init__()
        self.find = find

    def on_validation_epoch_end(self) -> None:
        found = self.find(self)
        self.trainer.found.append((pretrain_merge.is_evaluating_merge(), found))


FACES = {
    "root_dir": lambda module: module.logger.root_dir,
    "version": lambda module: module.logger.version + 1,
    "name": lambda module: module.logger.name,
    "class": lambda module: isinstance(module.logger, CSVLogger),
    "folder of the client": lambda module: module.logger.experiment.log_dir,
    "callbacks": lambda module: module.trainer.callbacks[-1] is module.trainer.last,
    "train metrics": lambda module: "train_loss" in module.trainer.logged_metrics,
    "progress bar": lambda module: sorted(module.trainer.progress_bar_metrics),
}


@pytest.mark.parametrize("face", FACES)
def test_a_hook_finds_what_it_finds_in_a_validation(face, tmp_path):
    logger = CSVLogger(tmp_path, name="exp")
    last = pl.Callback()
    own = trainer(tmp_path, ModelMerging(window=2, every=3), last, logger=logger, log_every_n_steps=1)
    own.found, own.last = Witness(), last
    own.fit(_Asks(FACES[face]), rows(), rows(10, seed=1))
    asked = {evaluating for evaluating, _ in own.found}
    assert asked == {True, False}
    assert len({repr(found) for _, found in own.found}) == 1


def test_a_writer_held_since_the_start_gets_no_line_of_a_merge(tmp_path):
    class Holds(Regression):
        def on_fit_start(self) -> None:
            self.writer = self.logger.experiment

        def on_validation_epoch_end(self) -> None:
            self.writer.log_metrics({"mine": 1.0}, step=self.global_step)

    merging = ModelMerging(window=2, every=3)
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, merging, logger=logger, log_every_n_steps=1).fit(Holds(), rows(), rows(10, seed=1))
    with open(logger.experiment.metrics_file_path, encoding="utf-8") as file:
        mine = [line["step"] for line in csv.DictReader(file) if line["mine"]]
    assert mine == ["6", "12"]


def test_a_bar_of_the_users_own_making_is_no_trap(tmp_path):
    class Bar(pl.callbacks.ProgressBar):
        def disable(self) -> None: ...

        def enable(self) -> None: ...

    merging = ModelMerging(window=2, every=3)
    trainer(tmp_path, merging, Bar(), enable_progress_bar=True, max_steps=6).fit(Regression(), rows(), rows(4, seed=1))
    assert merging.last_record is not None


class _Owner:
    __slots__ = ("_level", "plain")
    on_class = 1

    def __init__(self) -> None:
        self.plain, self._level = 1, 1

    @property
    def level(self) -> int:
        return self._level

    @level.setter
    def level(self, value: int) -> None:
        self._level = value


def test_slots_properties_and_classes_can_be_borrowed():
    owner = _Owner()
    with isolation.replaced(owner, plain=2, level=3), isolation.replaced(_Owner, on_class=4, new=5):
        assert (owner.plain, owner.level, owner.on_class, _Owner.new) == (2, 3, 4, 5)
    assert (owner.plain, owner.level, _Owner.on_class, hasattr(_Owner, "new")) == (1, 1, 1, False)


def test_tensorboards_writer_keeps_its_folder(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    writer = logger.experiment
    with muting.muted([], [logger]):
        assert writer.get_logdir() == logger.log_dir
        writer.add_scalar("a", 1.0)
        writer.add_scalar("a", object())  # would raise

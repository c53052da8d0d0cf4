"""Faults in other trainers."""

from tests.mutations.catalogue.fault import Fault

_HUGGING_FACE = "tests/integrations/test_hugging_face.py"

FAULTS = (
    Fault(
        "the log that was due does not come",
        "integrations/trainer_run.py",
        "        self._trainer.control.should_log = should_log",
        "        pass",
        _HUGGING_FACE,
    ),
    Fault(
        "other callbacks hear of the evaluation",
        "integrations/trainer_evaluation.py",
        "        isolation.replaced(trainer.callback_handler, callbacks=[]),\n",
        "",
        _HUGGING_FACE,
    ),
    Fault(
        "the run's control object stays as the evaluation left it",
        "integrations/trainer_evaluation.py",
        "                kept.callback(memento.put_back)\n",
        "",
        _HUGGING_FACE,
    ),
    Fault(
        "the rate is that of the epoch's beginning",
        "integrations/hugging_face.py",
        "    def on_optimizer_step(",
        "    def on_epoch_begin(",
        _HUGGING_FACE,
    ),
    Fault(
        "the window of a checkpoint goes with the next one",
        "integrations/trainer_checkpoints.py",
        "        self._sidecar.register(checkpoint, self._held, self._fingerprint(checkpoint))\n",
        "",
        "tests/integrations/test_hugging_face_files.py",
    ),
    Fault(
        "a Hugging Face Trainer trains without a look at its loss",
        "integrations/trainer_run.py",
        "        self._loss.add(loss)\n",
        "        pass\n",
        _HUGGING_FACE,
    ),
)

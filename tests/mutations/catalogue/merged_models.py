"""Faults of merged models on disk."""

from tests.mutations.catalogue.fault import Fault

_MERGED = "tests/merged_models/test_merged.py"
_RETENTION = "tests/merged_models/test_retention.py"
_ODD_MODELS = "tests/merged_models/test_odd_models.py"
_STARTING = "tests/merged_models/test_starting.py"

FAULTS = (
    Fault(
        "a tensor that is called like the header of a file is found out at the save",
        "merged_models/state.py",
        "    if RESERVED in state:\n",
        "    if False:\n",
        _ODD_MODELS,
    ),
    Fault(
        "a changed provenance is believed",
        "merged_models/provenance.py",
        "    if written is not None and written != _checksum(values):\n",
        "    if False:\n",
        _MERGED,
    ),
    Fault(
        "the worst merged model is kept",
        "merged_models/best.py",
        '-value if self._config.mode == "max" else value',
        'value if self._config.mode == "max" else -value',
        _RETENTION,
    ),
    Fault(
        "a misfit model is loaded as far as it fits",
        "merged_models/loading.py",
        "    if problems:\n",
        "    if False:\n",
        _MERGED,
    ),
    Fault(
        "extra state is read and dropped",
        "merged_models/loading.py",
        "extra_states[name].set_extra_state(saved.whole(name))",
        "pass",
        _MERGED,
    ),
    Fault(
        "a folder is deleted while it is evaluated",
        "merged_models/retention.py",
        "self._surplus = [path for path in surplus if self.users.is_using(path)]",
        "self._surplus = []",
        "tests/callbacks/test_on_publish.py",
    ),
    Fault(
        "a checkpoint names what is deleted elsewhere",
        "merged_models/retention.py",
        "if path not in self._surplus and self._is_ours(path) and ranks.rank() == 0:",
        "if path not in self._surplus:",
        _RETENTION,
    ),
    Fault(
        "a view loses its turn in a restart",
        "merged_models/retention.py",
        "self._start, self._last_merge = saved.start, dict(saved.last_merge)",
        "self._last_merge = dict(saved.last_merge)",
        _RETENTION,
    ),
    Fault(
        "memory takes empty shards for tied weights",
        "merged_models/state.py",
        "ties = ranks.gather(ties)[0]",
        "pass",
        "tests/system/test_saved_by_ranks.py",
    ),
    Fault(
        "the last model goes by its name",
        "merged_models/choosing.py",
        '(int(found[path].get("step", 0)), path.stat().st_mtime_ns)',
        "path.name",
        "tests/offline/test_export.py",
    ),
    Fault(
        "a damaged file is loaded",
        "merged_models/loading.py",
        '_refuse_damaged(folder, provenance["files"])',
        "pass",
        _ODD_MODELS,
    ),
    Fault(
        "a merge is written into a fit whose checkpoint will replace it",
        "merged_models/starting.py",
        "if resumed := trainer.ckpt_path:",
        "if resumed := None:",
        _STARTING,
    ),
    Fault(
        "a merge is written under an optimizer that has stepped",
        "merged_models/starting.py",
        "    if trainer.global_step:",
        "    if not trainer:",
        _STARTING,
    ),
    Fault(
        "a module whose fit is over may not begin another from a merge",
        "merged_models/starting.py",
        ' or getattr(state, "status", None) != "running"',
        "",
        _STARTING,
    ),
    Fault(
        "a module that shows copies is written where nobody looks",
        "merged_models/loading.py",
        "if copies := _copies(module, wanted):",
        "if copies := []:",
        _ODD_MODELS,
    ),
    Fault(
        "every model of theirs is said to be readable by them",
        "merged_models/hugging_face.py",
        "            if not reason:\n",
        "            if True:\n",
        _ODD_MODELS,
    ),
    Fault(
        "odd dtypes are handed to safetensors as they are",
        "merged_models/state.py",
        "{name: as_integers(tensor) if name in odd else tensor for",
        "{name: tensor for",
        _ODD_MODELS,
    ),
    Fault(
        "a merge that holds damaged snapshots stays the best",
        "merged_models/retention.py",
        "self._surplus += self._best.withdraw(after)",
        "pass",
        "tests/merged_models/test_withdrawn.py",
    ),
    Fault(
        "nobody says which merges a spike took back",
        "merged_models/retention.py",
        "            self._note_withdrawn(taken, reason)\n",
        "            pass\n",
        "tests/merged_models/test_withdrawn.py",
    ),
    Fault(
        "a run that goes on from before a spike finds its merges withdrawn",
        "merged_models/retention.py",
        'if path.name not in self.withdrawn], "")',
        'if path.name in self.withdrawn], "")',
        "tests/merged_models/test_withdrawn.py",
    ),
    Fault(
        "names alone make a model a part of another",
        "merged_models/loading.py",
        "if path := _path_of_part(stored, here):",
        "if path := _path_of_part(dict.fromkeys(stored), dict.fromkeys(here)):",
        "tests/merged_models/test_loading.py",
    ),
)

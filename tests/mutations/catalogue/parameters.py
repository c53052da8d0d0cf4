"""Faults in the choice of tensors, and in comparing them."""

from tests.mutations.catalogue.fault import Fault

_LIVE = "tests/parameters/test_live.py"

FAULTS = (
    Fault(
        "of two parameters that have one name without wrappers one is merged",
        "parameters/shards.py",
        "if found.setdefault(name, tensor) is not tensor:",
        "if False:",
        _LIVE,
    ),
    Fault(
        "a part that a user named as a wrapper names what is inside is taken for the whole model",
        "parameters/shards.py",
        "if name in children and kind in kinds), None)",
        "if name in children), None)",
        _LIVE,
    ),
    Fault(
        "only parameters that the module lists itself are looked for where they were",
        "parameters/places.py",
        "set(map(id, all_tensors(self._module)))",
        "set(map(id, self._module.parameters()))",
        "tests/parameters/test_overridden_names.py",
    ),
    Fault(
        "frozen parameters are merged",
        "parameters/live.py",
        "if item.requires_grad or id(item) in stepped)",
        ")",
        _LIVE,
    ),
    Fault(
        "what is frozen at the moment is no longer merged",
        "parameters/live.py",
        "for name, parameter in parameters if name in self._names]",
        "for name, parameter in parameters if parameter.requires_grad]",
        f"{_LIVE} tests/callbacks/test_which_parameters.py",
    ),
    Fault(
        "what an optimizer stepped and was frozen again is not merged",
        "parameters/live.py",
        "item.requires_grad or id(item) in stepped",
        "item.requires_grad",
        _LIVE,
    ),
    Fault(
        "one name of a tied parameter does not leave it out",
        "parameters/live.py",
        "if id(parameter) not in left_out:",
        "if name in wanted:",
        _LIVE,
    ),
    Fault(
        "memory that is shared in part is merged twice",
        "parameters/live.py",
        "if device == other_device and start < end:",
        "if False:",
        _LIVE,
    ),
    Fault(
        "tied parameters are merged twice",
        "parameters/live.py",
        "if identity not in seen:",
        "if True:",
        _LIVE,
    ),
    Fault(
        "BatchNorm passes in silence",
        "parameters/live.py",
        'if statistics and batch_norm == "refuse":',
        "if False:",
        _LIVE,
    ),
    Fault(
        "a parameter that an evaluator replaced stays replaced",
        "parameters/places.py",
        "place.owner[place.key] = place.tensor",
        "pass",
        "tests/merging/test_swap.py",
    ),
    Fault(
        "training goes on from parameters that were made of merged weights",
        "parameters/places.py",
        "if id(place.tensor) not in present]",
        "if False]",
        "tests/merging/test_swap.py",
    ),
    Fault(
        "raw is known by its numbers, not its bits",
        "parameters/elements.py",
        "return all(map(_same_bits, tensors, others))",
        "return all(map(torch.equal, tensors, others))",
        "tests/parameters/test_elements.py tests/merging/test_copies_of_raw.py",
    ),
    Fault(
        "the end of a tensor is not compared",
        "parameters/elements.py",
        "for start in range(0, len(ours), step):",
        "for start in range(0, len(ours) - 1, step):",
        "tests/parameters/test_elements.py",
    ),
    Fault(
        "stages whose names collide share them",
        "parameters/several.py",
        "len(set(names)) < len(names)",
        "False",
        "tests/merging/test_several_modules.py",
    ),
    Fault(
        "a view that is conjugate is written back as it looks",
        "parameters/bits.py",
        "if target.is_conj() else (target, source)",
        "if False else (target, source)",
        "tests/parameters/test_bits.py",
    ),
    Fault(
        "what is put back is asked of mappings that are no dictionaries",
        "parameters/places.py",
        "    if place.key in place.owner and place.owner[place.key] is not place.tensor:",
        "    if place.owner.get(place.key, place.tensor) is not place.tensor:",
        "tests/merging/test_raw_comes_back.py",
    ),
)

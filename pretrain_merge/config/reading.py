"""Values into a schema: from YAML, OmegaConf or a mapping, with every key known and of its type.

OmegaConf checks names and types; what it finds is said again in our words: the key's path, what was given, what is
allowed. This module knows no key by name.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pretrain_merge.errors import ConfigError, nearest

_ConfigT = TypeVar("_ConfigT")
_MISSING = "???"  # OmegaConf's; itself it is imported where a configuration is read, since it takes as long as numpy


def read(values: object) -> Mapping[Any, Any]:
    """A mapping, an OmegaConf config or the YAML file of a path, as plain values.

    Raises:
        ConfigError: It cannot be read, or is not a mapping.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        if isinstance(values, str | Path):
            from pretrain_merge.config import yaml_file

            values = yaml_file.load(Path(values))
        container = (
            OmegaConf.to_container(values, resolve=True) if isinstance(values, DictConfig) else values  # P12
        )
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise ConfigError(f"{values}: cannot read a configuration ({error}). Give a YAML file of keys.") from error
    except RecursionError as error:  # an alias inside of what it names
        raise ConfigError(_endless(values)) from error
    except Exception as error:  # PyYAML's own errors have no common built-in base
        if not type(error).__module__.startswith("yaml"):
            raise
        raise ConfigError(f"{values}: not YAML ({' '.join(str(error).split())}). Give a YAML file of keys.") from error
    if not isinstance(container, Mapping):
        raise ConfigError(f"configuration: {container!r} is not a mapping of keys to values.")
    return container


def typed(schema: type[_ConfigT], given: Any, *, at: str) -> _ConfigT:
    """Check keys and types against a schema and fill in its defaults.

    Args:
        schema: A dataclass.
        given: A mapping.
        at: Path of the values inside a larger configuration, for messages; empty, or ending with a dot.

    Raises:
        ConfigError: Unknown key or wrong type; the message names the key's path.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    refuse_misfits(schema, given, at)
    try:
        # objects: the shape of a `decay` view may be a function where the configuration is Python
        overrides = OmegaConf.create(given, flags={"allow_objects": True})
        merged = OmegaConf.merge(_structured(schema), overrides)  # type: ignore[arg-type] # a class has a hash
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        path = getattr(error, "full_key", None) or "configuration"
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{at}{path}: {reason}. See the configuration page for the type of each key.") from error
    except RecursionError as error:
        raise ConfigError(_endless(at or "configuration")) from error


@cache
def _structured(schema: type) -> Any:
    """Its keys, types and defaults as OmegaConf has them; a merge copies what it is given."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(schema)


def require(config: object, key: str, holds: Callable[[Any], object], allowed: str, *, at: str = "") -> None:
    """Raise a `ConfigError` that says what is allowed, where the value of a key does not hold."""
    value = getattr(config, key)
    if not holds(value):
        raise ConfigError(f"{at}{key}: {value!r} is out of range. Allowed: {allowed}.")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`"; did you mean 'window'?"`, or `"."` where nothing known is near."""
    meant = nearest(given, known)
    return f"; did you mean {meant!r}?" if meant else "."


def refuse_misfits(schema: Any, values: Mapping[Any, Any], at: str = "") -> None:
    """Refuse unknown keys, and what OmegaConf refuses without saying what it was given, or takes for the default.

    Args:
        schema: A dataclass.
        values: A mapping.
        at: Path of the values inside a larger configuration, for messages; empty, or ending with a dot.

    Raises:
        ConfigError: The message names the key's path.
    """
    defaults = schema()
    known = {item.name: getattr(defaults, item.name) for item in fields(schema)}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{at}{key}: unknown key{did_you_mean(str(key), known)} Known keys: {', '.join(known)}.")
        default = known[key]
        if isinstance(value, str) and value == _MISSING:
            raise ConfigError(f"{at}{key}: {value!r} stands for a value that must be given. Give one, or drop the key.")
        if isinstance(default, list) and (isinstance(value, str) or not isinstance(value, Sequence)):
            raise ConfigError(f"{at}{key}: {value!r} is not a list. Allowed: a list, such as {default or ['*.bias']}.")
        if is_dataclass(default):
            if not isinstance(value, Mapping):
                allowed = ", ".join(item.name for item in fields(default))
                raise ConfigError(f"{at}{key}: {value!r} is not a mapping. Allowed: a mapping with keys of {allowed}.")
            refuse_misfits(type(default), value, f"{at}{key}.")


def _endless(where: object) -> str:
    return f"{where}: a value contains itself, or is nested too deep to read. Write it out."

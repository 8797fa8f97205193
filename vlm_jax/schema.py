"""Typed configuration: nested frozen dataclasses, their overrides, and sentences for what is wrong.

A config is a tree of frozen dataclasses. A sub-config that comes in several kinds (which source, which optimiser,
which objective) is a `Choice`: its family lists the kinds in a literal table, and the kind's name is what a command
line or a saved config holds. Nothing here knows what the configs are for; `vlm_jax.config` does.
"""

import ast
import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A config that can't be used: the sentence names the key, what is wrong with it and the remedy."""


class Choice:
    """Base of a family of sub-configs of which a config picks one by name.

    A family is a dataclass deriving from `Choice` that implements `kinds`; its members derive from the family.
    """

    @classmethod
    def kinds(cls) -> Mapping[str, type[Any]]:
        """The table name -> dataclass of the family that `cls` belongs to."""
        raise TypeError(f"{cls.__name__} belongs to no family of choices")

    @classmethod
    def kind(cls) -> str:
        """The name under which this class stands in its family's table."""
        return next(name for name, member in cls.kinds().items() if member is cls)


def to_dict(config: Any) -> Any:
    """The config as plain dicts, lists and scalars, ready for JSON; a `Choice` carries its name under `kind`."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"kind": config.kind(), **fields} if isinstance(config, Choice) else fields
    if isinstance(config, tuple | list):
        return [to_dict(item) for item in config]
    return config


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "config") -> T:
    """The inverse of `to_dict`: builds `cls` from plain data, every key and type checked.

    Raises:
        ConfigError: an unknown or missing key, or a value of another type; names the key.
    """
    return _convert(cls, data, where)


def leaves(config: Any, where: str = "config") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) of a config, a `Choice`'s own key with its kind.

    Items of a tuple of named sub-configs are keyed by their name.
    """
    if isinstance(config, Choice):
        yield where, config.kind()
    if dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            yield from leaves(getattr(config, field.name), f"{where}.{field.name}")
    elif isinstance(config, tuple) and any(dataclasses.is_dataclass(item) for item in config):
        for index, item in enumerate(config):
            yield from leaves(item, f"{where}.{getattr(item, 'name', index)}")
    else:
        yield where, config


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "config") -> Iterator[str]:
    """One line `key: old -> new` per leaf in which two `to_dict` trees differ."""
    for key in sorted({*old, *new}):
        a, b, path = old.get(key, "(absent)"), new.get(key, "(absent)"), f"{where}.{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, path)
        elif a != b:
            yield f"{path}: {a!r} -> {b!r}"


def validate(config: Any, where: str = "config") -> None:
    """Runs every sub-config's own `problems()`, innermost first, and raises the first one found.

    A dataclass may define `problems(self) -> Iterator[tuple[key, sentence]]`, keys relative to itself.
    """
    if isinstance(config, tuple):
        for index, item in enumerate(config):
            validate(item, f"{where}.{getattr(item, 'name', index)}")
    if not dataclasses.is_dataclass(config):
        return
    for field in dataclasses.fields(config):
        validate(getattr(config, field.name), f"{where}.{field.name}")
    for key, sentence in getattr(config, "problems", lambda: ())():
        raise ConfigError(f"{where}.{key} {sentence}")


def override(config: T, changes: Mapping[str, Any]) -> T:
    """The config with some values replaced.

    Args:
        config: a dataclass tree.
        changes: dotted key (without the leading `config.`) -> value. A string is read as the field's type, as on a
            command line; a value of the right type is taken as it is. Naming a kind (`"data.source": "tar"`)
            replaces the sub-config by that kind with its defaults. Items of a tuple are addressed by name or index.

    Raises:
        ConfigError: names the key, the nearest right one, or the type that was expected.
    """
    for key, value in changes.items():
        config = _replace(config, key.split("."), value, "config", root=config)
    return config


def _replace(node: Any, path: list[str], value: Any, where: str, root: Any) -> Any:
    name, rest = path[0], path[1:]
    if isinstance(node, tuple):
        names = [str(getattr(item, "name", index)) for index, item in enumerate(node)]
        chosen = [i for i, other in enumerate(names) if other == name]  # entries that share a name change together
        if not chosen and name.isdecimal() and int(name) < len(node):
            chosen = [int(name)]
        if not chosen or not rest:
            raise ConfigError(f"{where}.{name} is not one of the entries of {where}: {', '.join(names) or '(none)'}")
        key = f"{where}.{name}"
        return tuple(_replace(x, rest, value, key, root) if i in chosen else x for i, x in enumerate(node))
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        raise ConfigError(f"{where} is a plain value; it has no key {name!r}")
    hints = _hints(type(node))
    if name not in hints:
        raise ConfigError(_unknown_key(f"{where}.{'.'.join(path)}", hints, where, name, root))
    child, key = getattr(node, name), f"{where}.{name}"
    new = _replace(child, rest, value, key, root) if rest else _convert(hints[name], value, key)
    return dataclasses.replace(node, **{name: new})


def _unknown_key(key: str, siblings: Mapping[str, Any], where: str, name: str, root: Any) -> str:
    """A sentence with the nearest right name: a sibling, else a key elsewhere in the tree with the same last part."""
    everywhere = [path for path, _ in leaves(root)]
    near = difflib.get_close_matches(key, everywhere, n=1, cutoff=0.85)
    near += [f"{where}.{match}" for match in difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)]
    near += [path for path in everywhere if path.rsplit(".", 1)[1] == name]
    near += difflib.get_close_matches(key, everywhere, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"{where} has: {', '.join(siblings)}"
    return f"{key} is not a key of this config; {hint}"


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: hint for name, hint in typing.get_type_hints(cls).items() if name in names}


def _convert(expected: Any, value: Any, where: str) -> Any:
    """`value` as the type `expected`; strings are read the way a command line writes them."""
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        if value in args:
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{where} must be one of {', '.join(map(repr, args))}, not {value!r}{hint}")
    if origin is tuple:
        return _convert_tuple(args, value, where)
    if isinstance(expected, type) and issubclass(expected, Choice):
        return _convert_choice(expected, value, where)
    if dataclasses.is_dataclass(expected):
        return _convert_dataclass(typing.cast(type, expected), value, where)
    return _convert_scalar(expected, value, where)


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if type(None) in args and (value is None or value == "None"):
        return None
    errors = []
    for arg in args:
        if arg is type(None):
            continue
        try:
            return _convert(arg, value, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _convert_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = tuple(part for part in value.split(",") if part)
        value = value if isinstance(value, tuple | list) else (value,)
    if not isinstance(value, tuple | list):
        raise ConfigError(f"{where} must be a tuple, not {value!r}")
    kinds = (args[0],) * len(value) if args[1:] == (...,) else args
    if len(kinds) != len(value):
        raise ConfigError(f"{where} must have {len(kinds)} items, not {len(value)}")
    return tuple(_convert(kind, item, f"{where}.{i}") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _convert_choice(family: type[Choice], value: Any, where: str) -> Any:
    if isinstance(value, family) and not isinstance(value, str):
        return value
    kinds = family.kinds()
    name = value.get("kind") if isinstance(value, Mapping) else value
    if not isinstance(name, str) or name not in kinds:
        near = difflib.get_close_matches(str(name), kinds, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{where} must be one of {', '.join(kinds)}, not {name!r}{hint}")
    fields = {k: v for k, v in value.items() if k != "kind"} if isinstance(value, Mapping) else {}
    return _convert_dataclass(kinds[name], fields, where)


def _convert_dataclass(cls: type, value: Any, where: str) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{where} is a group of keys, it can't be {value!r}; set {where}.{next(iter(_hints(cls)), '')}"
        )
    hints = _hints(cls)
    for key in value:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            raise ConfigError(
                f"{where}.{key} is not a key of this config; "
                + (f"did you mean {where}.{near[0]}?" if near else f"{where} has: {', '.join(hints)}")
            )
    converted = {key: _convert(hints[key], item, f"{where}.{key}") for key, item in value.items()}
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in converted
    ]
    if required:
        raise ConfigError(f"{where}.{required[0]} must be set; {cls.__name__} has no default for it")
    return cls(**converted)


def _convert_scalar(expected: Any, value: Any, where: str) -> Any:
    wrong = ConfigError(f"{where} must be {_ARTICLES.get(expected, repr(expected))}, not {value!r}")
    if expected is bool:
        if isinstance(value, str) and value.lower() in _BOOLEANS:
            return _BOOLEANS[value.lower()]
        if isinstance(value, bool):
            return value
        raise wrong
    if expected is str:
        if isinstance(value, str):
            return value
        raise wrong
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        number = float(value)
    except ValueError:
        raise wrong from None
    if expected is float:
        return number
    if expected is int and number.is_integer():
        return int(value) if isinstance(value, int) or str(value).lstrip("+-").isdecimal() else int(number)
    raise wrong


_ARTICLES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}

__all__ = ["Choice", "ConfigError", "differences", "from_dict", "leaves", "override", "to_dict", "validate"]

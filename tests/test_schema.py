"""Typed configs: every kind of mistake is one sentence that names the key and the nearest right name."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pytest

from vlm_jax import schema
from vlm_jax.schema import Choice, ConfigError


@dataclasses.dataclass(frozen=True)
class Shape(Choice):
    name: str = "shape"

    @classmethod
    def kinds(cls) -> Mapping[str, type[Any]]:
        return {"circle": Circle, "square": Square}


@dataclasses.dataclass(frozen=True)
class Circle(Shape):
    radius: float = 1.0


@dataclasses.dataclass(frozen=True)
class Square(Shape):
    side: int = 2
    corners: tuple[int, int] = (1, 2)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.side < 0:
            yield "side", f"= {self.side} must not be negative"


@dataclasses.dataclass(frozen=True)
class Root:
    steps: int = 10
    rate: float = 0.1
    on: bool = False
    mode: Literal["fast", "slow"] = "fast"
    limit: float | None = None
    shape: Shape = Circle()
    many: tuple[Shape, ...] = (Circle("a"), Square("b"))
    words: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "12", 12),
        ("steps", "1e3", 1000),
        ("rate", "4e-4", 4e-4),
        ("rate", "3", 3.0),
        ("on", "True", True),
        ("on", "0", False),
        ("mode", "slow", "slow"),
        ("limit", "None", None),
        ("limit", "2.5", 2.5),
        ("words", "('a', 'b')", ("a", "b")),
        ("words", "a,b", ("a", "b")),
        ("words", "('a',)", ("a",)),
        ("shape.radius", "2", 2.0),
    ],
)
def test_overrides_are_read_as_the_fields_type(key: str, text: str, value: Any) -> None:
    config: Any = schema.override(Root(), {key: text})
    for part in key.split("."):
        config = getattr(config, part)
    assert config == value
    assert type(config) is type(value)


def test_naming_a_kind_replaces_the_sub_config() -> None:
    config = schema.override(Root(), {"shape": "square", "shape.side": "7", "shape.corners": "3,4"})
    assert config.shape == Square(side=7, corners=(3, 4))


def test_entries_of_a_tuple_are_addressed_by_name_or_index() -> None:
    config = schema.override(Root(), {"many.b.side": "5", "many.0.radius": "9"})
    assert config.many == (Circle("a", 9.0), Square("b", 5))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stepz": 1}, ["config.stepz", "did you mean config.steps?"]),
        ({"radius": 1}, ["config.radius", "did you mean config.shape.radius?"]),
        ({"shape.radiu": 1}, ["config.shape.radiu", "config.shape.radius"]),
        ({"steps": "ten"}, ["config.steps", "a whole number", "'ten'"]),
        ({"steps": 1.5}, ["config.steps", "a whole number"]),
        ({"rate": "x"}, ["config.rate", "a number"]),
        ({"rate": True}, ["config.rate", "a number"]),
        ({"on": "maybe"}, ["config.on", "true or false"]),
        ({"mode": "fats"}, ["config.mode", "did you mean 'fast'?"]),
        ({"shape": "sqare"}, ["config.shape", "did you mean 'square'?"]),
        ({"shape": 5}, ["config.shape", "circle, square"]),
        ({"many.c.side": 1}, ["config.many.c", "a, b"]),
        ({"steps.x": 1}, ["config.steps", "plain value"]),
        ({"shape": "square", "shape.corners": "1,2,3"}, ["config.shape.corners", "2 items, not 3"]),
    ],
)
def test_mistakes_name_the_key(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        schema.override(Root(), changes)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_problems_are_found_wherever_they_stand() -> None:
    config = schema.override(Root(), {"many.b.side": -1})
    with pytest.raises(ConfigError, match=r"config\.many\.b\.side = -1 must not be negative"):
        schema.validate(config)
    schema.validate(Root())


def test_plain_data_round_trips() -> None:
    config = schema.override(Root(), {"shape": "square", "words": "x,y", "limit": 1})
    data = schema.to_dict(config)
    assert data["shape"] == {"kind": "square", "name": "shape", "side": 2, "corners": [1, 2]}
    assert schema.from_dict(Root, data) == config


def test_plain_data_of_another_form_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config\.step is not a key .* did you mean config\.steps"):
        schema.from_dict(Root, {"step": 1})
    with pytest.raises(ConfigError, match=r"config\.shape must be one of circle, square"):
        schema.from_dict(Root, {"shape": {"kind": "line"}})


def test_differences_and_leaves() -> None:
    old, new = schema.to_dict(Root()), schema.to_dict(schema.override(Root(), {"steps": 3, "shape.radius": 4}))
    assert list(schema.differences(old, new)) == ["config.shape.radius: 1.0 -> 4.0", "config.steps: 10 -> 3"]
    assert dict(schema.leaves(Root()))["config.many.b.side"] == 2

"""How often a loop of a compiled program runs, by following its counters from their first values.

The compiler writes a trip count nowhere. It is found by running the scalar integers of condition and body, and
nothing else; a loop whose end depends on data is an error.
"""

import math
from collections.abc import Callable, Mapping

from vlm_jax.plan.hlo import Computation, HloError, Instruction, Module

# What is known of a value: an integer, a tuple of such knowledge by element, or nothing.
Known = int | Mapping[int, "Known"] | None

_LONGEST = 10_000_000
_UNARY: dict[str, Callable[[int], int]] = {"negate": lambda x: -x, "abs": abs, "sign": lambda x: (x > 0) - (x < 0)}
_BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: math.trunc(x / y),
    "remainder": lambda x, y: int(math.fmod(x, y)),
    "minimum": min,
    "maximum": max,
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "EQ": lambda x, y: x == y,
    "NE": lambda x, y: x != y,
    "LT": lambda x, y: x < y,
    "LE": lambda x, y: x <= y,
    "GT": lambda x, y: x > y,
    "GE": lambda x, y: x >= y,
}
_SAME = ("copy", "bitcast", "reshape", "convert", "broadcast", "opt-barrier", "copy-start", "copy-done")


class Scalars:
    """The integers that are known inside of a computation.

    Args:
        module: the program.
        computation: whose instructions are asked for.
        parameters: what is known of its parameters, by number.
    """

    def __init__(self, module: Module, computation: Computation, parameters: Mapping[int, Known]):
        self._module, self._computation, self._parameters = module, computation, parameters
        self._found: dict[str, Known] = {}

    def of(self, name: str) -> Known:
        """What is known of an instruction's result."""
        if name not in self._found:
            self._found[name] = self._evaluate(self._computation.instructions[name])
        return self._found[name]

    def integer(self, name: str) -> int | None:
        """`of`, unless it is a tuple."""
        known = self.of(name)
        return known if isinstance(known, int) else None

    def _evaluate(self, instruction: Instruction) -> Known:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "constant":
            return _literal(instruction.literal)
        if opcode == "parameter":
            return self._parameters.get(int(instruction.literal))
        if opcode == "tuple":
            return {index: known for index, name in enumerate(operands) if (known := self.of(name)) is not None}
        if opcode == "get-tuple-element":
            whole = self.of(operands[0])
            return whole.get(int(instruction.required("index"))) if isinstance(whole, Mapping) else None
        if opcode in _SAME:
            return self.of(operands[0])
        if opcode in ("fusion", "call"):
            callee = self._module.computation(instruction.called[0], instruction)
            known = {index: self.of(name) for index, name in enumerate(operands)}
            return Scalars(self._module, callee, known).of(callee.root.name)
        if opcode == "while":
            return loop_invariants(self._module, instruction, self)
        return self._arithmetic(instruction)

    def _arithmetic(self, instruction: Instruction) -> int | None:
        opcode, dtype = instruction.opcode, instruction.arrays[0].dtype if instruction.arrays else ""
        known = opcode in _UNARY or opcode in _BINARY or opcode in ("compare", "select", "not")
        # a counter in floating point would be rounded: not followed
        if not known or dtype[:1] not in ("s", "u", "p"):
            return None
        values = [self.integer(name) for name in instruction.operands]
        if opcode == "select" and values[0] is not None:
            return values[1] if values[0] else values[2]
        if any(value is None for value in values):
            return None
        numbers = [value for value in values if value is not None]
        if opcode == "compare":
            return int(_COMPARE[instruction.required("direction")](*numbers))
        if opcode == "not":
            return 1 - numbers[0] if dtype == "pred" else _wrapped(~numbers[0], dtype)
        if opcode in ("divide", "remainder") and numbers[1] == 0:
            return None
        return _wrapped(_UNARY[opcode](*numbers) if opcode in _UNARY else _BINARY[opcode](*numbers), dtype)


def _wrapped(value: int, dtype: str) -> int:
    """As an integer of that type overflows."""
    if dtype == "pred":
        return value & 1
    bits = int(dtype[1:])
    value &= 2**bits - 1
    return value - 2**bits if dtype[0] == "s" and value >> (bits - 1) else value


def _literal(text: str) -> int | None:
    if text in ("true", "false"):
        return int(text == "true")
    try:
        return int(text)
    except ValueError:
        return None


def loop_invariants(module: Module, loop: Instruction, scalars: Scalars) -> dict[int, Known]:
    """Elements of a loop's state that its body hands on untouched, with their values where those are known."""
    start = scalars.of(loop.operands[0])
    body = module.computation(loop.required("body").lstrip("%"), loop)
    root = body.root
    if not isinstance(start, Mapping) or root.opcode != "tuple":
        return {}
    return {index: known for index, known in start.items() if _hands_on(body, root.operands[index], index)}


def _hands_on(body: Computation, name: str, index: int) -> bool:
    instruction = body.instructions[name]
    while instruction.opcode in ("copy", "bitcast"):
        instruction = body.instructions[instruction.operands[0]]
    if instruction.opcode != "get-tuple-element" or instruction.attribute("index") != str(index):
        return False
    return body.instructions[instruction.operands[0]].opcode == "parameter"


def trip_count(module: Module, loop: Instruction, scalars: Scalars) -> int:
    """How often the body of a `while` runs.

    Args:
        module: the program.
        loop: the `while`.
        scalars: what is known in the computation that holds the loop.

    Raises:
        HloError: the end depends on more than integers that are known before the program runs.
    """
    declared = loop.config("known_trip_count")
    if declared and declared.isdecimal():
        return int(declared)
    condition = module.computation(loop.required("condition").lstrip("%"), loop)
    body = module.computation(loop.required("body").lstrip("%"), loop)
    state = scalars.of(loop.operands[0])
    read = _elements(condition) | _elements(body)
    for count in range(_LONGEST):
        more = Scalars(module, condition, {0: state}).integer(condition.root.name)
        if more is None:
            break
        if not more:
            return count
        state = _next(Scalars(module, body, {0: state}), body, read)
    raise HloError(
        f"how often the loop {loop.name} ({loop.operation or 'made by the compiler'}) runs can't be known before it "
        "runs: write it as a scan, or with a fixed number of iterations"
    )


def _elements(computation: Computation) -> set[int]:
    """Elements of its parameter that a computation reads as scalars."""
    return {
        int(instruction.required("index"))
        for instruction in computation.instructions.values()
        if instruction.opcode == "get-tuple-element" and instruction.arrays and not instruction.arrays[0].dims
    }


def _next(scalars: Scalars, body: Computation, read: set[int]) -> Known:
    if body.root.opcode != "tuple":
        return scalars.of(body.root.name)
    operands = body.root.operands
    return {index: scalars.of(operands[index]) for index in read if index < len(operands)}

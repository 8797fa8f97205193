"""Reads the text of an optimised HLO module into computations and instructions. What they cost is `hlo_cost`'s.

The text has no specification, so this reader believes nothing: an instruction that it can't place, or an operation that
matters and was not read, is an error. (A reader that skips what it does not know loses whole backward passes: raw line
breaks in a Pallas kernel's metadata, or a suffix after a computation's closing brace, are enough.)
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping


class HloError(ValueError):
    """A module that can't be accounted for; the sentence names the instruction."""


_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_BITS |= {f"{kind}{bits}": bits for kind in "su" for bits in (1, 2, 4, 8, 16, 32, 64)} | {"f4e2m1fn": 4}

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_PLACEHOLDER = re.compile(r'"(\d+)"')
_COMMENT = re.compile(r"/\*.*?\*/")
_OPENS = re.compile(r"[({\[]")
_CLOSES = re.compile(r"[)}\]]")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](\{[^}]*\})?")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_SPACE = re.compile(r"S\((\d+)\)")

# Operations that carry FLOPs, bytes on the wire or other computations: each must be read as often as it is written.
WATCHED = (
    *("convolution", "dot", "ragged-dot", "fft", "cholesky", "triangular-solve", "custom-call"),
    *("while", "conditional", "call", "fusion", "async-start", "send", "recv"),
    *("all-reduce", "all-reduce-start", "all-gather", "all-gather-start", "reduce-scatter", "all-to-all"),
    *("ragged-all-to-all", "collective-permute", "collective-permute-start", "collective-broadcast"),
)
_WRITTEN = re.compile(rf"[\])}}] ({'|'.join(WATCHED)})\(")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of an instruction's result.

    Attributes:
        dtype: as HLO calls it: `bf16`.
        dims: sizes.
        space: memory that it lies in: 0 HBM, 1 VMEM, 5 the host's; others are small.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        """Without the padding of tiles."""
        return -(-math.prod(self.dims) * _bits(self.dtype) // 8)

    def __str__(self) -> str:
        """As HLO writes it: `bf16[8,128]`."""
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def _bits(dtype: str) -> int:
    if dtype.startswith("f8"):
        return 8
    if dtype not in _BITS:
        raise HloError(f"the HLO text holds arrays of the unknown type {dtype!r}; add its size to hlo.py")
    return _BITS[dtype]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation.

    Attributes:
        name: unique in its module.
        opcode: what it does.
        arrays: its result, a tuple flattened.
        operands: names of what it reads.
        literal: what stands in the parentheses of a constant or parameter.
        tail: its attributes as text, strings replaced by numbers.
        strings: the strings of the module, by number.
        root: whether it is what its computation returns.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    tail: str
    strings: "list[str]" = dataclasses.field(repr=False, compare=False)
    root: bool = False

    def attribute(self, key: str) -> str | None:
        """The value of `, key=value`, strings back in place without their quotes; None where there is none."""
        found = re.search(rf"(?:^|[,{{] ?){re.escape(key)}=", self.tail)
        if found is None:
            return None
        end = _end_of_value(self.tail, found.end())
        return _PLACEHOLDER.sub(lambda match: self.strings[int(match[1])], self.tail[found.end() : end]).strip()

    def required(self, key: str) -> str:
        """`attribute`, where there must be one."""
        value = self.attribute(key)
        if value is None:
            raise HloError(f"the {self.opcode} {self.name} has no {key}; this HLO text is of an unknown form")
        return value

    def numbers(self, key: str) -> tuple[int, ...]:
        """The numbers of an attribute such as `dimensions={0,1}`; () where there is none."""
        return tuple(map(int, re.findall(r"\d+", self.attribute(key) or "")))

    def config(self, key: str) -> str | None:
        """The text or number that follows the first `"key":` in `backend_config`; None where there is none."""
        config = self.attribute("backend_config") or ""
        found = re.search(rf"{key}:(?:\{{n:)?([\w.\-]*)", config)
        return found[1] if found else None

    @property
    def operation(self) -> str:
        """Where the program asked for it: JAX's name stack, "" where the compiler made it."""
        return self.attribute("op_name") or ""

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it names, in order; for a conditional its branches."""
        names: list[str] = []
        for key in ("calls", "to_apply", "condition", "body", "true_computation", "false_computation"):
            names += [name.lstrip("%") for name in [self.attribute(key)] if name]
        for key in ("branch_computations", "called_computations"):
            names += re.findall(r"[\w.\-]+", self.attribute(key) or "")
        return tuple(names)


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions in the order in which they run.

    Attributes:
        name: unique in the module.
        instructions: by name, in order.
    """

    name: str
    instructions: Mapping[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """What it returns."""
        return next(instruction for instruction in self.instructions.values() if instruction.root)

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Name of each parameter by its number."""
        found = (each for each in self.instructions.values() if each.opcode == "parameter")
        return {int(instruction.literal): instruction.name for instruction in found}

    def operand_arrays(self, instruction: Instruction) -> tuple[Array, ...]:
        """All that an instruction reads, tuples flattened."""
        return tuple(array for name in instruction.operands for array in self.instructions[name].arrays)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program as one device runs it.

    Attributes:
        computations: by name.
        entry: the one that runs.
        device_count: devices that the replica groups count over: those of one slice.
    """

    computations: Mapping[str, Computation]
    entry: Computation
    device_count: int

    def computation(self, name: str, caller: Instruction) -> Computation:
        """A computation that an instruction names."""
        if name not in self.computations:
            raise HloError(f"{caller.opcode} {caller.name} calls {name}, which the HLO text does not hold")
        return self.computations[name]


def parse_hlo(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
        HloError: an instruction that can't be read or stands outside of a computation, or a watched operation that is
            written more often than it was read.
    """
    strings: list[str] = []

    def number(match: re.Match[str]) -> str:
        strings.append(match[0][1:-1])
        return f'"{len(strings) - 1}"'

    plain = _COMMENT.sub("", _STRING.sub(number, text))
    computations: dict[str, Computation] = {}
    entry: Computation | None = None
    for name, is_entry, lines in _computations(plain):
        parsed = (_parse_instruction(line, strings) for line in lines)
        computations[name] = Computation(name, {instruction.name: instruction for instruction in parsed})
        entry = computations[name] if is_entry else entry
    if entry is None:
        raise HloError("the HLO text has no ENTRY computation")
    _check_all_was_read(text, computations)
    partitions, replicas = (re.search(rf"\b{key}=(\d+)", plain) for key in ("num_partitions", "replica_count"))
    count = math.prod(int(found[1]) for found in (partitions, replicas) if found)
    return Module(computations, entry, count)


def _computations(plain: str) -> Iterator[tuple[str, bool, list[str]]]:
    """(name, whether it is the entry, one line per instruction) of each computation."""
    name, is_entry, lines, pending, depth = None, False, [], "", 0
    for line in plain.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header:
                name, is_entry, lines = header[2], bool(header[1]), []
            elif _INSTRUCTION.match(line):
                raise HloError(f"this line of the HLO text stands in no computation: {line.strip():.120}")
            continue
        # A line break inside of brackets belongs to the instruction: Pallas writes metadata over several lines.
        pending += line if not pending else f" {line}"
        depth += len(_OPENS.findall(line)) - len(_CLOSES.findall(line))
        if depth < 0:  # the brace that ends the computation; what may follow it (an execution thread) is of no matter
            yield name, is_entry, lines
            name, pending, depth = None, "", 0
        elif depth == 0:
            lines += [pending] if pending.strip() else []
            pending = ""
    if name is not None:
        raise HloError(f"the HLO text ends inside of the computation {name}")


def _parse_instruction(line: str, strings: list[str]) -> Instruction:
    start = _INSTRUCTION.match(line)
    if start is None:
        raise HloError(f"this line of the HLO text is no instruction: {line.strip():.120}")
    position = start.end()
    end = _end_of_group(line, position) if line[position] == "(" else _array_end(line, position)
    shape, opcode = line[position:end], _OPCODE.match(line, end)
    if opcode is None:
        raise HloError(f"this instruction of the HLO text has no operation: {line.strip():.120}")
    close = _end_of_group(line, opcode.end() - 1)
    inside = line[opcode.end() : close - 1]
    literal = inside if opcode[1] in ("constant", "parameter") else ""
    operands = () if literal or not inside.strip() else tuple(_operand(part) for part in _split(inside))
    arrays = tuple(_arrays(shape))
    return Instruction(
        start[2], opcode[1], arrays, operands, literal, line[close:].lstrip(", "), strings, bool(start[1])
    )


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = _SPACE.search(layout)
        yield Array(dtype, tuple(map(int, re.findall(r"\d+", dims))), int(space[1]) if space else 0)


def _array_end(line: str, position: int) -> int:
    found = _ARRAY.match(line, position)
    if found is None:
        raise HloError(f"this instruction of the HLO text has no shape: {line.strip():.120}")
    return found.end()


def _end_of_group(text: str, position: int) -> int:
    """The position after the bracket that closes the one at `position`."""
    depth = 0
    for match in re.compile(r"[(){}\[\]]").finditer(text, position):
        depth += 1 if match[0] in "({[" else -1
        if depth == 0:
            return match.end()
    raise HloError(f"brackets don't close in the HLO text: {text.strip():.120}")


def _end_of_value(text: str, position: int) -> int:
    """The end of an attribute's value: the comma, blank or closing bracket that no bracket encloses."""
    depth = 0
    for match in re.compile(r"[(){}\[\], ]").finditer(text, position):
        # blanks end a value of metadata, but stand between a mesh and its axes in `replica_groups`
        if depth == 0 and (match[0] in ",)}]" or (match[0] == " " and text[match.end() : match.end() + 1] != "{")):
            return match.start()
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(match[0], 0)
    return len(text)


def _split(text: str) -> list[str]:
    """The parts between the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for match in re.compile(r"[(){}\[\],]").finditer(text):
        if match[0] == "," and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
        elif match[0] != ",":
            depth += 1 if match[0] in "({[" else -1
    return [*parts, text[start:]]


def _operand(text: str) -> str:
    return text.split()[-1].lstrip("%")


def _check_all_was_read(text: str, computations: Mapping[str, Computation]) -> None:
    """Counts the watched operations in the raw text, independently of how it was taken apart."""
    written = Counter(_WRITTEN.findall(text))
    read = Counter(
        instruction.opcode
        for computation in computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode in WATCHED
    )
    for opcode in WATCHED:
        if written[opcode] != read[opcode]:
            raise HloError(
                f"the HLO text writes {written[opcode]} {opcode} operations, of which {read[opcode]} were read; "
                "its form is unknown to hlo.py"
            )

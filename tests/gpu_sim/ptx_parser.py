"""PTX text to statements with resolved operands, for the emulator in `ptx_emulator.py`.

Source: PTX ISA 8.8, chapters 4 (syntax) and 5 (state spaces); only what Triton 3.8.0 emits.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

# Shared memory does not start at 0, so that an address nobody computed faults; wgmma's swizzle
# works on address bits 4-9 and therefore asks for a multiple of 1024.
SHARED_BASE = 1024


@dataclass(frozen=True)
class Register:
    """A register: the width in bits of its file (1 for predicates) and its place there."""

    width: int
    index: int
    name: str


@dataclass(frozen=True)
class Immediate:
    """A literal; `float_width` is 32 or 64 for 0f and 0d literals, whose `value` is the bits."""

    value: int
    float_width: int = 0


@dataclass(frozen=True)
class Special:
    """A read-only register of the hardware, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]; the base is a register, a constant or a kernel parameter's name."""

    base: "Register | Immediate | str"
    offset: int


@dataclass(frozen=True)
class Sink:
    """The bit bucket `_`: a destination that throws its value away."""


Operand = Register | Immediate | Special | Address | Sink | str | tuple["Operand", ...]


@dataclass(frozen=True)
class Statement:
    """One instruction: `opcode` "ld", `modifiers` ("global", "v4", "b32"), operands, guard."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    guard_negated: bool
    line: int
    text: str

    def __str__(self) -> str:
        return f"PTX line {self.line}: {self.text}"

    def unsupported(self, what: str = "") -> NotImplementedError:
        return NotImplementedError(f"{self}{f' ({what})' if what else ''}")


@dataclass
class Listing:
    """A parsed kernel before its instructions are decoded."""

    name: str
    parameters: list[tuple[str, str]]
    num_threads: int
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    register_counts: dict[int, int] = field(default_factory=dict)
    local_bytes: int = 0
    static_shared_bytes: int = 0
    constants: list[np.ndarray] = field(default_factory=list)


_COMMENT = re.compile(r"//[^\n]*")
# Directives that end with their line rather than with a semicolon.
_LINE_DIRECTIVE = re.compile(r"^[ \t]*\.(loc|file)\b[^\n]*", re.MULTILINE)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
_PARAMETER = re.compile(r"\.param\s+\.(\w+)(?:\s+\.(?!b8)\w+(?:\s+\d+)?)*\s+([\w$]+)\s*(\[)?")
_LABEL = re.compile(r"\s*([\w$]+)\s*:(?!:)")
_GUARD = re.compile(r"@(!?)\s*([%\w$]+)\s+")
_VARIABLE = re.compile(
    r"(?:\.(?:extern|visible|weak)\s+)?\.(shared|local|global|const)(?:\s+\.align\s+(\d+))?"
    r"\s+\.(\w+)\s+([\w$]+)\s*(\[\s*(\d*)\s*\])?\s*(?:=\s*\{([^}]*)\})?"
)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")
_FLOAT = re.compile(r"0([fFdD])([0-9a-fA-F]{8,16})")
_SPECIAL = re.compile(r"%(n?tid|n?ctaid)\.[xyz]|%(laneid|warpid|nwarpid)")


def _width(type_name: str) -> int:
    """Bits of the register file that holds a type."""
    if type_name == "pred":
        return 1
    digits = re.search(r"(\d+)(x2)?$", type_name)
    if digits is None:
        raise NotImplementedError(f"register type .{type_name}")
    return int(digits[1]) * (2 if digits[2] else 1)


class _Scopes:
    """Names that a kernel declares: registers in nested blocks, and variables' addresses."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.registers: list[dict[str, Register]] = [{}]
        self.variables: dict[str, int] = {}

    def declare_registers(self, declaration: str) -> None:
        match = _REGISTERS.match(declaration)
        assert match, declaration
        width = _width(match[1])
        for item in match[2].split(","):
            name, count = re.fullmatch(r"\s*([%\w$]+)(?:<(\d+)>)?\s*", item).groups()  # type: ignore[union-attr]
            names = [name] if count is None else [f"{name}{i}" for i in range(int(count))]
            for name in names:
                index = self.listing.register_counts.get(width, 0)
                self.listing.register_counts[width] = index + 1
                self.registers[-1][name] = Register(width, index, name)

    def declare_variable(self, declaration: str) -> None:
        match = _VARIABLE.match(declaration)
        if match is None:
            raise NotImplementedError(f"PTX declaration: {declaration}")
        space, alignment, type_name, name, array, length, values = match.groups()
        align, element_bytes = int(alignment or 1), _width(type_name) // 8
        if array and not length:  # the dynamic shared memory, after all that is static
            self.variables[name] = -1
            return
        size = element_bytes * int(length or 1)
        listing = self.listing
        if space == "shared":
            start = -(-listing.static_shared_bytes // align) * align
            listing.static_shared_bytes = start + size
            self.variables[name] = SHARED_BASE + start
        elif space == "local":
            start = -(-listing.local_bytes // align) * align
            listing.local_bytes = start + size
            self.variables[name] = start
        else:
            given = [int(v, 0) for v in values.split(",")] if values else []
            raw = np.zeros(size // element_bytes, f"uint{8 * element_bytes}")
            raw[: len(given)] = np.array(given, dtype=raw.dtype)
            aligned = np.zeros(size + 16, np.uint8)
            offset = -aligned.ctypes.data % 16
            constant = aligned[offset : offset + size]
            constant[:] = raw.view(np.uint8)
            listing.constants.append(constant)
            self.variables[name] = constant.ctypes.data

    def place_dynamic_shared(self) -> None:
        start = -(-self.listing.static_shared_bytes // 128) * 128
        self.listing.static_shared_bytes = start
        for name, address in self.variables.items():
            if address == -1:
                self.variables[name] = SHARED_BASE + start

    def register(self, name: str) -> Register | None:
        for scope in reversed(self.registers):
            if name in scope:
                return scope[name]
        return None

    def scalar(self, text: str) -> Operand:
        """An operand without brackets, braces or bars; a str for a label or parameter name."""
        if register := self.register(text):
            return register
        if text == "_":
            return Sink()
        if match := _FLOAT.fullmatch(text):
            return Immediate(int(match[2], 16), 32 if match[1] in "fF" else 64)
        if _INTEGER.fullmatch(text):
            digits = text.removesuffix("U")
            is_decimal = re.fullmatch(r"-?\d+", digits)
            return Immediate(int(digits) if is_decimal else int(digits, 16))
        if _SPECIAL.fullmatch(text):
            return Special(text)
        if text in self.variables:
            return Immediate(self.variables[text])
        return text

    def operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return tuple(self.operand(item.strip()) for item in text[1:-1].split(","))
        if text.startswith("["):
            match = _ADDRESS.fullmatch(text)
            if match is None:
                raise NotImplementedError(f"PTX address {text}")
            base = self.scalar(match[1])
            assert isinstance(base, Register | Immediate | str), text
            return Address(base, int(match[2], 0) if match[2] else 0)
        if "|" in text:
            return tuple(self.scalar(item.strip()) for item in text.split("|"))
        return self.scalar(text)


def _split_operands(text: str) -> list[str]:
    """Splits at the commas that are outside brackets and braces."""
    return [item.strip() for item in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)]


def _matching_brace(text: str, start: int) -> int:
    depth = 1
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError("PTX: the kernel's closing brace is missing")


def _pieces(body: str, first_line: int) -> Iterator[tuple[str, int]]:
    """Yields "{", "}", "label:" and statements with the line where each begins."""
    position, line = 0, first_line
    skip = re.compile(r"\s*")
    while True:
        gap = skip.match(body, position)
        assert gap
        line += body.count("\n", position, gap.end())
        position = gap.end()
        if position == len(body):
            return
        if body[position] in "{};":
            yield body[position], line
            position += 1
            continue
        label = _LABEL.match(body, position)
        if label:
            yield label[1] + ":", line
            position = label.end()
            continue
        end = body.find(";", position)
        end = len(body) if end < 0 else end
        yield body[position:end].strip(), line
        line += body.count("\n", position, end)
        position = end + 1


def _parse_statement(text: str, line: int, scopes: _Scopes) -> Statement:
    text = " ".join(text.split())
    guard, negated, rest = None, False, text
    if match := _GUARD.match(text):
        guard = scopes.register(match[2])
        if guard is None or guard.width != 1:
            raise NotImplementedError(f"PTX line {line}: {text} (guard {match[2]})")
        negated, rest = bool(match[1]), text[match.end() :]
    opcode, _, arguments = rest.partition(" ")
    name, *modifiers = opcode.replace("::", "-").split(".")
    try:
        operands = tuple(scopes.operand(item) for item in _split_operands(arguments))
    except NotImplementedError as error:
        raise NotImplementedError(f"PTX line {line}: {text} ({error})") from None
    modifiers = [modifier.replace("-", "::") for modifier in modifiers]
    return Statement(name, tuple(modifiers), operands, guard, negated, line, text)


def parse_listing(ptx: str) -> Listing:
    """Parses the text of a module with one kernel.

    Raises:
        ValueError: There is no kernel, or it does not say how many threads it wants.
        NotImplementedError: A construct that this parser does not know.
    """
    text = _LINE_DIRECTIVE.sub("", _COMMENT.sub("", ptx))
    entry = _ENTRY.search(text)
    threads = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*1)*", entry[3]) if entry else None
    if entry is None or threads is None:
        raise ValueError("PTX: no .entry with .reqntid")
    if len(re.findall(r"\.(?:entry|func)\b", text)) > 1:
        raise NotImplementedError("PTX: more than one function in the module")
    if int(threads[1]) % 32:
        raise NotImplementedError(f"PTX: {threads[1]} threads are not whole warps")
    parameters = []
    for match in _PARAMETER.finditer(entry[2]):
        if match[3]:
            raise NotImplementedError(f"PTX: array parameter {match[2]}")
        parameters.append((match[1], match[2]))
    listing = Listing(entry[1], parameters, int(threads[1]))
    scopes = _Scopes(listing)
    for match in _VARIABLE.finditer(text[: entry.start()]):
        scopes.declare_variable(match[0])
    body = text[entry.end() : _matching_brace(text, entry.end())]
    pieces = list(_pieces(body, 1 + text.count("\n", 0, entry.end())))
    for piece, _ in pieces:
        if piece.startswith((".shared", ".local", ".extern")):
            scopes.declare_variable(piece)
    scopes.place_dynamic_shared()
    for piece, line in pieces:
        if piece == "{":
            scopes.registers.append({})
        elif piece == "}":
            scopes.registers.pop()
        elif piece.endswith(":"):
            listing.labels[piece[:-1]] = len(listing.statements)
        elif piece.startswith(".reg"):
            scopes.declare_registers(piece)
        elif piece.startswith((".pragma", ".shared", ".local", ".extern", ";")):
            continue
        elif piece.startswith("."):
            raise NotImplementedError(f"PTX line {line}: {piece}")
        else:
            listing.statements.append(_parse_statement(piece, line, scopes))
    return listing

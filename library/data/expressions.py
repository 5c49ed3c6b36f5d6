"""Safe reading of expressions that data set configurations hold: `lambda score: score > 4.5`.

An expression is parsed by Python's own parser and turned into closures, node by node, from a short list of what is
allowed; nothing is compiled, and nothing that the expression names is looked up anywhere but among its arguments.
Work and memory are bounded: by the size of the expression, and by limits on numbers and texts that operators make.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from library.errors import UserError

MAX_LENGTH = 500
MAX_NODES = 200
MAX_DEPTH = 20
MAX_NUMBER = 10**30
"""No whole number that takes part in arithmetic is larger."""
MAX_TEXT = 10_000
"""Characters that `+` may make, and that a number may be written with."""

GRAMMAR = (
    "Allowed are numbers, texts, True, False, None, lists of these, comparisons, in, and, or, not, + - * / // %, "
    "x if y else z, value['key'], len min max abs round int float str bool, and "
    ".get .lower .upper .strip .startswith .endswith"
)

Values = tuple[Any, ...]
Closure = Callable[[Values], Any]


class Rejected(ValueError):
    """Values for which an expression has no result within the limits."""


class Expression:
    """A function of some values, written as an expression; called like the lambda that it stands for.

    Args:
        source: `lambda a, b: a > b`, or `a > b` alone.
        names: What a bare expression may name, in the order of the values. A lambda names its own arguments and must
            have as many.
        where: What messages start with.

    Raises:
        UserError: it does not parse, is too large, or holds anything that is not allowed; the message has the column.
    """

    __slots__ = ("_body", "_names", "_where", "source")

    def __init__(self, source: str, names: Sequence[str], *, where: str) -> None:
        self.source = source
        self._names = tuple(names)
        self._where = where
        self._body = _Reader(source, where).read(self._names)

    def __call__(self, *values: Any) -> Any:
        """Return the result for as many values as there are names.

        Raises:
            Rejected: there is none; the values are of the wrong type, say.
        """
        try:
            return self._body(values)
        except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError) as error:
            raise Rejected(" ".join(str(error).split())[:200] or type(error).__name__) from error

    def __reduce__(self) -> tuple[Any, ...]:
        # Closures cannot be pickled; loader processes read the text anew.
        return _again, (self.source, self._names, self._where)

    def __repr__(self) -> str:
        return f"Expression({self.source!r})"


def _again(source: str, names: tuple[str, ...], where: str) -> Expression:
    return Expression(source, names, where=where)


class _Reader:
    """Turns one expression into closures; each method knows one kind of node."""

    def __init__(self, source: str, where: str) -> None:
        self._where = where
        if not isinstance(source, str):
            raise UserError(f"expected an expression in quotes, got {type(source).__name__}", where=where)
        if len(source) > MAX_LENGTH:
            raise UserError(f"has {len(source)} characters, the limit is {MAX_LENGTH}", where=where)
        self._text = source.lstrip(" \t\r\n")
        self._skipped = len(source) - len(self._text)
        self._places: Mapping[str, int] = {}
        self._nodes = 0

    def read(self, names: tuple[str, ...]) -> Closure:
        node: ast.AST = self._parsed()
        if isinstance(node, ast.Lambda):
            names, node = self._arguments(node, len(names)), node.body
        elif len(names) == 1:
            # One value needs no agreement on its name.
            used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} - set(_FUNCTIONS)
            names = tuple(used) if len(used) == 1 else names
        self._places = {name: place for place, name in enumerate(names)}
        return self._closure(node, 1)

    def _parsed(self) -> ast.expr:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(self._text, mode="eval").body
        except SyntaxError as error:
            column = (error.offset or 1) + self._skipped
            raise UserError(f"column {column}: {error.msg}", f"{GRAMMAR}.", where=self._where) from error
        except (ValueError, RecursionError, MemoryError) as error:
            reason = str(error) or "nested too deeply"
            raise UserError(f"column 1: cannot be read ({reason})", f"{GRAMMAR}.", where=self._where) from error

    def _arguments(self, node: ast.Lambda, count: int) -> tuple[str, ...]:
        found = node.args
        special = found.vararg or found.kwarg or found.kwonlyargs or found.defaults or found.kw_defaults
        if special:
            raise self._refused(node, "a lambda with anything but plain arguments")
        names = tuple(argument.arg for argument in (*found.posonlyargs, *found.args))
        if any("__" in name for name in names):
            raise self._refused(node, "a name with two underscores")
        if len(names) != count:
            raise self._refused(node, f"a lambda of {len(names)} arguments, where there are {count} values")
        return names

    def _refused(self, node: ast.AST, what: str) -> UserError:
        line, offset = getattr(node, "lineno", 1), getattr(node, "col_offset", 0)
        # Offsets count bytes of the line.
        lines = self._text.split("\n")
        before = sum(len(text) + 1 for text in lines[: line - 1])
        inside = len(lines[line - 1].encode()[:offset].decode(errors="ignore")) if line <= len(lines) else 0
        column = before + inside + self._skipped + 1
        return UserError(f"column {column}: {what} is not allowed", f"{GRAMMAR}.", where=self._where)

    def _closure(self, node: ast.AST, depth: int) -> Closure:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise self._refused(node, f"an expression of more than {MAX_NODES} parts")
        if depth > MAX_DEPTH:
            raise self._refused(node, f"nesting deeper than {MAX_DEPTH}")
        make = _KINDS.get(type(node))
        if make is None:
            raise self._refused(node, _NAMES.get(type(node), type(node).__name__))
        return make(self, node, depth + 1)

    def _closures(self, nodes: Sequence[ast.AST], depth: int) -> tuple[Closure, ...]:
        return tuple(self._closure(node, depth) for node in nodes)

    def _constant(self, node: ast.Constant, depth: int) -> Closure:
        value = node.value
        if not (value is None or isinstance(value, (bool, int, float, str))):
            raise self._refused(node, f"a value of type {type(value).__name__}")
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise self._refused(node, "a number of more than 30 digits")
        return lambda values: value

    def _name(self, node: ast.Name, depth: int) -> Closure:
        place = self._places.get(node.id)
        if place is None:
            known = ", ".join(self._places) or "none"
            raise self._refused(node, f"the name {node.id!r} (values are: {known})")
        return lambda values: values[place]

    def _bool_op(self, node: ast.BoolOp, depth: int) -> Closure:
        parts = self._closures(node.values, depth)
        stops_at = isinstance(node.op, ast.Or)

        def decide(values: Values) -> Any:
            result = None
            for part in parts:
                result = part(values)
                if bool(result) is stops_at:
                    break
            return result

        return decide

    def _unary_op(self, node: ast.UnaryOp, depth: int) -> Closure:
        function = _UNARY.get(type(node.op))
        if function is None:
            raise self._refused(node, _operator_name(node.op))
        operand = self._closure(node.operand, depth)
        return lambda values: function(operand(values))

    def _bin_op(self, node: ast.BinOp, depth: int) -> Closure:
        function = _BINARY.get(type(node.op))
        if function is None:
            raise self._refused(node, _operator_name(node.op))
        left, right = self._closures((node.left, node.right), depth)
        return lambda values: function(left(values), right(values))

    def _compare(self, node: ast.Compare, depth: int) -> Closure:
        first = self._closure(node.left, depth)
        rest = self._closures(node.comparators, depth)
        pairs = tuple(zip((_COMPARISONS[type(op)] for op in node.ops), rest, strict=True))

        def compare(values: Values) -> Any:
            left, result = first(values), True
            for function, part in pairs:
                right = part(values)
                result = function(left, right)
                if not result:
                    break
                left = right
            return result

        return compare

    def _if_exp(self, node: ast.IfExp, depth: int) -> Closure:
        test, body, orelse = self._closures((node.test, node.body, node.orelse), depth)
        return lambda values: body(values) if test(values) else orelse(values)

    def _sequence(self, node: ast.Tuple | ast.List | ast.Set, depth: int) -> Closure:
        parts = self._closures(node.elts, depth)
        make: Callable[..., Any] = {ast.Tuple: tuple, ast.List: list, ast.Set: set}[type(node)]
        return lambda values: make([part(values) for part in parts])

    def _subscript(self, node: ast.Subscript, depth: int) -> Closure:
        held, key = self._closure(node.value, depth), node.slice
        negative = isinstance(key, ast.UnaryOp) and isinstance(key.op, ast.USub)
        constant = getattr(key.operand if isinstance(key, ast.UnaryOp) and negative else key, "value", None)
        if type(constant) is not int and (negative or type(constant) is not str):
            raise self._refused(node, "an item whose key or number is not a constant")
        place = -constant if negative and isinstance(constant, int) else constant
        return lambda values: _item(held(values), place)

    def _call(self, node: ast.Call, depth: int) -> Closure:
        if node.keywords:
            raise self._refused(node, "a call with keywords")
        if isinstance(node.func, ast.Attribute):
            return self._method(node, node.func, depth)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        function = None if name in self._places else _FUNCTIONS.get(name)
        if function is None:
            raise self._refused(node, f"calling {name[:50] or 'what is no name'}")
        arguments = self._closures(node.args, depth)
        return lambda values: function(*[argument(values) for argument in arguments])

    def _method(self, node: ast.Call, called: ast.Attribute, depth: int) -> Closure:
        known = _METHODS.get(called.attr)
        if known is None:
            raise self._refused(node, f"the method .{called.attr[:50]}")
        kind, function = known
        holder = self._closure(called.value, depth)
        arguments = self._closures(node.args, depth)

        def call(values: Values) -> Any:
            held = holder(values)
            # Exactly: a subclass could bring methods of its own.
            if type(held) is not kind:
                raise TypeError(f"no .{called.attr} of {type(held).__name__}")
            return function(held, *[argument(values) for argument in arguments])

        return call


_KINDS: Mapping[type[ast.AST], Callable[[_Reader, Any, int], Closure]] = {
    ast.Constant: _Reader._constant,
    ast.Name: _Reader._name,
    ast.BoolOp: _Reader._bool_op,
    ast.UnaryOp: _Reader._unary_op,
    ast.BinOp: _Reader._bin_op,
    ast.Compare: _Reader._compare,
    ast.IfExp: _Reader._if_exp,
    ast.Tuple: _Reader._sequence,
    ast.List: _Reader._sequence,
    ast.Set: _Reader._sequence,
    ast.Subscript: _Reader._subscript,
    ast.Call: _Reader._call,
}
_NAMES: Mapping[type[ast.AST], str] = {
    ast.Attribute: "an attribute that is not called",
    ast.Lambda: "a lambda inside the expression",
    ast.ListComp: "a comprehension",
    ast.SetComp: "a comprehension",
    ast.DictComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.NamedExpr: "an assignment",
    ast.JoinedStr: "an f-string",
    ast.Starred: "a star",
    ast.Slice: "a slice",
    ast.Dict: "a dictionary",
}


def _operator_name(node: ast.AST) -> str:
    return {ast.Pow: "the operator **", ast.Invert: "the operator ~"}.get(
        type(node), f"the operator {type(node).__name__}"
    )


def _number(value: Any) -> Any:
    """Return a number as it is; anything else, and whole numbers beyond the limit, are not for arithmetic."""
    if type(value) not in (int, float, bool):
        raise TypeError(f"no arithmetic with {type(value).__name__}")
    if abs(value) > MAX_NUMBER and type(value) is int:
        raise Rejected("a number of more than 30 digits")
    return value


def _on_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *operands: _number(function(*[_number(operand) for operand in operands]))


def _plus(left: Any, right: Any) -> Any:
    if type(left) is str and type(right) is str:
        if len(left) + len(right) > MAX_TEXT:
            raise Rejected(f"a text of more than {MAX_TEXT} characters")
        return left + right
    return _number(_number(left) + _number(right))


def _item(held: Any, key: int | str) -> Any:
    if type(held) not in (dict, list, tuple, str):
        raise TypeError(f"no items in {type(held).__name__}")
    return held[key]


def _round(value: Any, digits: Any = None) -> Any:
    # Rounding a whole number to minus a billion digits would compute ten to the power of a billion.
    if digits is not None and not -30 <= _number(digits) <= 30:
        raise Rejected("rounding to more than 30 digits")
    return round(_number(value), digits)


def _short(value: Any) -> Any:
    """Return what `int` and `float` may read: numbers, and texts whose reading takes no time."""
    if type(value) is str and len(value) > MAX_TEXT // 100:
        raise Rejected("a number of more than 100 characters")
    return value if type(value) is str else _number(value)


def _text(value: Any = "") -> str:
    if not (value is None or type(value) in (str, int, float, bool)):
        raise TypeError(f"no text of {type(value).__name__}")
    return str(value if type(value) is str or value is None else _number(value))


_UNARY: Mapping[type[ast.AST], Callable[[Any], Any]] = {
    ast.Not: operator.not_,
    ast.USub: _on_numbers(operator.neg),
    ast.UAdd: _on_numbers(operator.pos),
}
_BINARY: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: _plus,
    ast.Sub: _on_numbers(operator.sub),
    ast.Mult: _on_numbers(operator.mul),
    ast.Div: _on_numbers(operator.truediv),
    ast.FloorDiv: _on_numbers(operator.floordiv),
    ast.Mod: _on_numbers(operator.mod),
}
_COMPARISONS: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "len": len,
    "min": min,
    "max": max,
    "abs": _on_numbers(abs),
    "round": _round,
    "int": lambda value=0: int(_short(value)),
    "float": lambda value=0: float(_short(value)),
    "str": _text,
    "bool": lambda value=False: bool(value),
}
_METHODS: Mapping[str, tuple[type, Callable[..., Any]]] = {
    "get": (dict, dict.get),
    "lower": (str, str.lower),
    "upper": (str, str.upper),
    "strip": (str, str.strip),
    "startswith": (str, str.startswith),
    "endswith": (str, str.endswith),
}

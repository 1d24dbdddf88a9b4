"""What every section of params.yaml shares: its kinds of values, its checks, and how problems are told."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StrictBool,
    StrictStr,
    TypeAdapter,
    ValidationError,
)


class Problem(NamedTuple):
    """What is wrong with a value: its key or an item in it, what was expected instead, and what it is."""

    key: str
    expected: str
    got: Any

    def __str__(self) -> str:
        return f"{self.key}: expected {self.expected}, got {self.got!r}"


class UndeclaredParameter(AttributeError):
    """A stage reads a parameter that dvc.yaml does not list for it, or that is not valid."""


def _whole(value: Any) -> Any:
    number = _number(value)
    if isinstance(number, float) and number != int(number):
        raise ValueError("not whole")
    return int(number)


def _number(value: Any) -> Any:
    # `dvc exp run -S` writes 1e-05, which YAML 1.1 reads as text.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("no number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return value if isinstance(value, int) else number


def no_is_text(value: object) -> object:
    """``no`` as it was meant: `dvc exp run -S` leaves out the quotes, and YAML 1.1 reads it as false."""
    return "no" if value is False else value


def _without_null(value: str) -> str:
    if "\0" in value:
        raise ValueError("holds a null byte")
    return value


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]
Text = Annotated[StrictStr, AfterValidator(_without_null)]
Flag = StrictBool
T = typing.TypeVar("T")
Several = Annotated[tuple[T, ...], MinLen(1)]
OneOrSeveral = Annotated[tuple[T, ...], BeforeValidator(_listed), MinLen(1)]


Check = Callable[[Any], Iterator[tuple[str, str]]]


def check(function: Check) -> Check:
    """Marks a method that looks at several values together; it yields keys, and what they should be.

    It is run where all values that it reads are valid by themselves.
    """
    function.__dict__["is_check"] = True
    return function


class Entry(BaseModel):
    """One of several things in a list: a field a key; those with a default may be left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Section(BaseModel):
    """One section: a field a key; defaults live in params.yaml, descriptions give unit and meaning."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)
    section: ClassVar[str]

    if not typing.TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:
                raise UndeclaredParameter(
                    f"{self.section}.{name}: dvc.yaml does not list it for this stage, so that a changed "
                    "value would not run the stage again; list it there and in the stage's run_stage"
                )
            return super().__getattr__(name)

    def only(self, keys: set[str]) -> Self:
        """A view in which other keys cannot be read."""
        return type(self).model_construct(**{key: value for key, value in vars(self).items() if key in keys})

    def _as_written(self, key: str) -> Any:
        value = getattr(self, key)
        is_one = _is_one_or_several(type(self).model_fields[key].rebuild_annotation()) and len(value) == 1
        return value[0] if is_one else value

    def problems(self) -> Iterator[Problem]:
        """What the checks find; a check that reads a value which is not there is left out."""
        for name in dir(type(self)):
            method = getattr(type(self), name, None)
            if not getattr(method, "is_check", False):
                continue
            try:
                for key, expected in list(method(self)):  # type: ignore[misc]  # a method, as it is marked
                    yield Problem(f"{self.section}.{key}", expected, self._as_written(key))
            except UndeclaredParameter:
                continue


S = typing.TypeVar("S", bound=Section)


def read_section(section: type[S], values: Mapping[str, Any]) -> tuple[S | None, list[Problem]]:
    """A section from the keys of a file that are known, and all that is wrong with them.

    Args:
        section: its class.
        values: of known keys; some may be missing, which is not reported here.
    """
    known = {key: value for key, value in values.items() if key in section.model_fields}
    try:
        whole = section.model_validate(known)
    except ValidationError as error:
        # A missing key is told by the file's reader, but for those of an item of a list.
        places = {each["loc"] for each in error.errors()}
        told = [
            each
            for each in error.errors()
            if (each["type"] != "missing" or len(each["loc"]) > 1)
            and not any(place[: len(each["loc"])] == each["loc"] != place for place in places)
        ]
        found = [_problem(section, each, known) for each in told]
        bad = {str(each["loc"][0]) for each in error.errors()}
        good = {key: _adapter(section, key).validate_python(known[key]) for key in known.keys() - bad}
        return None, [*found, *section.model_construct(**good).problems()]
    problems = list(whole.problems())
    return (None if problems else whole), problems


def _adapter(section: type[Section], key: str) -> TypeAdapter[Any]:
    return TypeAdapter(section.model_fields[key].rebuild_annotation())


def _problem(section: type[Section], error: Any, values: Mapping[str, Any]) -> Problem:
    """An error of pydantic's in the words of this project."""
    key, *path = error["loc"]
    kind: Any = section.model_fields[key].rebuild_annotation()
    place = f"{section.section}.{key}"
    may_be_null, may_be_list = _is_optional(kind), False
    if path and _is_one_or_several(kind) and not isinstance(values[key], list | tuple):
        kind, path, may_be_list = _item(kind), path[1:], True
    for part in path:
        if isinstance(part, int):
            kind, place = _item(kind), f"{place}[{part}]"
        elif isinstance(model := _bare(_arm(kind)), type) and issubclass(model, Entry):
            place = f"{place}.{part}"
            if part not in model.model_fields:
                return Problem(place, f"one of the keys {', '.join(model.model_fields)}", error["input"])
            if error["type"] == "missing":
                return Problem(place, "a value", None)
            kind = model.model_fields[part].rebuild_annotation()
        may_be_null = _is_optional(kind)
    is_bound = error["type"].startswith(("greater_than", "less_than"))
    expected = _bounds(kind) if is_bound else _kind(kind)
    expected += (", or a list of such" if may_be_list else "") + (", or null" if may_be_null else "")
    return Problem(place, expected, error["input"])


def _is_optional(kind: Any) -> bool:
    return types.NoneType in typing.get_args(_bare(kind))


def _is_one_or_several(kind: Any) -> bool:
    return BeforeValidator(_listed) in typing.get_args(_arm(kind))


def _bare(kind: Any) -> Any:
    """Without annotations, as far as they lie outside."""
    while typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    return kind


def _arm(kind: Any) -> Any:
    """Of a kind or null the kind, with its annotations."""
    bare = _bare(kind)
    if types.NoneType in typing.get_args(bare):
        return next(arm for arm in typing.get_args(bare) if arm is not types.NoneType)
    return kind


def _item(kind: Any) -> Any:
    return typing.get_args(_bare(_arm(kind)))[0]


def _kind(kind: Any) -> str:
    bare = _bare(_arm(kind))
    if typing.get_origin(bare) is Literal:
        return f"one of {', '.join(typing.get_args(bare))}"
    if typing.get_origin(bare) is tuple:
        return "a list of one or more values"
    if isinstance(bare, type) and issubclass(bare, Entry):
        return f"a mapping of {', '.join(bare.model_fields)}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[bare]


def _bounds(kind: Any) -> str:
    kind, limits = _arm(kind), []
    while typing.get_origin(kind) is Annotated:
        kind, *more = typing.get_args(kind)
        limits += more
    low = next((each for each in limits if isinstance(each, Ge | Gt)), None)
    high = next((each for each in limits if isinstance(each, Le | Lt)), None)
    ends = [end for end in (_end(low), _end(high)) if end is not None]
    text = (
        f"a number of {ends[0]:g} or more" if high is None else f"a number from {ends[0]:g} to {ends[-1]:g}"
    )
    left_out = [
        end for limit in (low, high) if isinstance(limit, Gt | Lt) and (end := _end(limit)) is not None
    ]
    return "".join([text, *(f", not {end:g}" for end in left_out)])


def _end(limit: Any) -> Any:
    match limit:
        case Ge(ge=end) | Gt(gt=end) | Le(le=end) | Lt(lt=end):
            return end
    return None

"""What goes wrong, said in three parts: what was asked, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel

    Schema = TypeVar("Schema", bound=BaseModel)

_FEW = 60  # names that a message can list


class SecateurError(Exception):
    """A failure with a message fit for the person who asked.

    Args:
        code: short stable identifier, e.g. ``"unknown-method"``.
        asked: what was asked for.
        found: what was found instead.
        hint: what to do about it.
    """

    exit_code = 1

    def __init__(self, code: str, asked: str, found: str, hint: str = "") -> None:
        self.code, self.asked, self.found, self.hint = code, asked, found, hint
        advice = f"; {hint}" if hint else ""
        super().__init__(f"{asked}: {found}{advice}")

    def as_dict(self) -> dict[str, str]:
        return {"code": self.code, "asked": self.asked, "found": self.found, "hint": self.hint}

    @staticmethod
    def revived(content: Mapping[str, str], exit_code: int) -> SecateurError:
        """The error that ``as_dict`` told of, from another process."""
        kind = RequestError if exit_code == RequestError.exit_code else InternalError
        return kind(content["code"], content["asked"], content["found"], content["hint"])


class RequestError(SecateurError):
    """The request or the input is at fault (exit code 2)."""

    exit_code = 2


class InternalError(SecateurError):
    """Secateur or the machine is at fault (exit code 1)."""


def near(name: str, known: Iterable[str]) -> str:
    """A hint naming the known names closest to ``name``, or all of them (unless there are too many) when none is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(names)}" if len(names) <= _FEW else f"none of the {len(names):,} known names is close"


def refuse(code: str, asked: str, found: str, hint: str = "") -> NoReturn:
    """Raise a :class:`RequestError`."""
    raise RequestError(code, asked, found, hint.rstrip("."))


def validated(schema: type[Schema], values: Mapping[str, Any], of: str = "", hint: str = "") -> Schema:
    """An object of ``schema`` from values by name.

    Args:
        schema: a pydantic model; its fields are the names there are.
        values: of each option; the word none is no value, but where it is one of the choices.
        of: whose options they are, for the message.
        hint: what to do about a bad value.

    Raises:
        RequestError: an unknown name (near matches), or a value of the wrong kind or out of range.
    """
    from pydantic import ValidationError

    owner = f" of {of}" if of else ""
    unknown = sorted(set(values) - set(schema.model_fields))
    if unknown:
        refuse(
            "unknown-option", f"option {unknown[0]!r}{owner}", "there is none", near(unknown[0], schema.model_fields)
        )
    fields = {key: schema.model_fields[key].annotation for key in values}
    given = {key: None if _no_value(value, fields[key]) else value for key, value in values.items()}
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "options"
        asked = f"option {key}={values.get(key)!r}{owner}"
        raise RequestError("bad-option", asked, first["msg"].removeprefix("Value error, "), hint) from error


def _no_value(value: Any, annotation: Any) -> bool:
    return isinstance(value, str) and value.lower() == "none" and value not in _choices(annotation)


def _choices(annotation: Any) -> list[Any]:
    """What stands in the brackets of a type, however deep."""
    return [choice for each in get_args(annotation) for choice in (_choices(each) or [each])]

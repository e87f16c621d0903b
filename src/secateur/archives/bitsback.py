"""Bits-back coding of the rotations that a sliced model leaves free (after arXiv:2410.01309).

A sliced model in any other basis of its stream is the same model, so a file need not say which one it holds. Writing,
at every interface: turn to the eigenvectors of a Gram matrix (a basis that everybody finds), take as many bits as the
next basis needs *off* what has been written, turn to the basis that they spell, round, write the tensors. Reading goes
backwards: take the tensors, find the eigenvectors again, read from them which basis was chosen, put those bits back.
What was taken off is what the file saves. Weights were rounded, so the eigenvectors are found up to an error: bits are
taken only as far as it allows, and what comes out wrong all the same is corrected.

Two forms:

* ``square``: a rotation of its own at every interface, as published. Shortcuts are square then.
* ``triangular``: one rotation, at the first interface; those that follow make every shortcut triangular, and half of
  it is not written. Models that share one basis have this form only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.archives.rotations import (
    BINS_OF_AN_ERROR,
    GUARD,
    codes_of,
    correct,
    pop_corrections,
    pop_rotation,
    push_corrections,
    push_rotation,
    restore,
)
from secateur.archives.stack import Stack
from secateur.cuts.gauge import FreeRotations
from secateur.errors import InternalError
from secateur.families.packing import Shape

Form = Literal["triangular", "square"]
FORMS: Final[tuple[Form, ...]] = ("triangular", "square")
Codes = NDArray[np.uint8]
_ATTEMPTS: Final = 8
_ELSEWHERE: Final = 1e-13  # of the largest entry of a Gram matrix: well above what machines differ by


@dataclass(frozen=True)
class Saved:
    """What one interface gave, in bits.

    Attributes:
        interface: its name.
        width: dimensions of the rotation.
        rows: of the rotation, those that carry bits.
        angles: numbers that carry bits, of width (width - 1) / 2.
        returned: bits taken off.
        corrections: bits that make the recovered numbers right (``corrected`` of them were wrong or nearly so).
        signs: one bit for every row, the sign of its eigenvector.
        table: bits that say how finely each row is counted.
    """

    interface: str
    width: int
    rows: int
    angles: int
    corrected: int
    returned: int
    corrections: int
    signs: int
    table: int

    @property
    def net(self) -> int:
        return self.returned - self.corrections - self.signs - self.table

    def as_dict(self) -> dict[str, int | str]:
        return {**asdict(self), "net": self.net}


def _directions(gram: Tensor) -> Tensor:
    """Eigenvectors of a Gram matrix in the columns, the largest eigenvalue first."""
    _, vectors = torch.linalg.eigh(gram)
    found: Tensor = vectors.flip(1)
    return found


def _haar(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    made: Tensor = q * r.diagonal().sign()
    return made


def _recovered(
    free: FreeRotations, interface: str, tensors: Mapping[str, Tensor], noise: float = 0.0
) -> NDArray[np.float64]:
    """The rows of the rotation that led from the eigenvectors to the basis of these tensors, up to signs.

    The sign of an eigenvector is arbitrary: entries of every row have a sum that is not negative.

    Args:
        noise: standard deviation of what is added to the Gram matrix, in units of its largest entry.
    """
    gram = free.gram(interface, tensors)
    if noise:
        made = torch.randn(gram.shape, dtype=gram.dtype, generator=torch.Generator().manual_seed(0))
        gram = gram + noise * float(gram.abs().max()) * (made + made.t())
    rows: NDArray[np.float64] = _directions(gram).t().numpy()
    return np.where(rows.sum(1, keepdims=True) < 0, -rows, rows)


def _lengths(found: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Length of the error of every row, whose sign does not count."""
    signs = np.sign((found * wanted).sum(1, keepdims=True))
    return np.asarray(np.linalg.norm(found * signs - wanted, axis=1))


def _fineness(free: FreeRotations, interface: str, tensors: Mapping[str, Tensor], canonical: Tensor) -> Codes:
    """How finely the rows of a rotation can be told apart: tried with two random ones.

    What other linear algebra may make of the same numbers must stay within the guard of a bin.
    """
    errors = np.zeros(free.width)
    for seed in (1, 2):
        trial = _haar(free.width, seed)
        turned = free.turn(interface, tensors, canonical @ trial)
        found = _recovered(free, interface, turned)
        elsewhere = _lengths(_recovered(free, interface, turned, _ELSEWHERE), found)
        errors = np.maximum(errors, np.maximum(_lengths(found, trial.numpy()), elsewhere / GUARD / BINS_OF_AN_ERROR))
    return codes_of(errors)


def _draw(
    stack: Stack, free: FreeRotations, interface: str, tensors: Mapping[str, Tensor]
) -> tuple[Stack, Tensor, Saved]:
    """Choose the basis of an interface by bits of the stack.

    Returns:
        The stack with the bits taken off and corrections put on, the rotation [k, k], and what it gave.
    """
    canonical = _directions(free.gram(interface, tensors))
    codes = _fineness(free, interface, tensors, canonical)
    for _ in range(_ATTEMPTS):
        trial = stack.copy()
        drawn = pop_rotation(trial, codes)
        rotation = canonical @ torch.from_numpy(drawn.rotation)
        made = correct(drawn, _recovered(free, interface, free.turn(interface, tensors, rotation)))
        if not made.failed:
            break
        codes = drawn.codes.copy()
        codes[made.failed] = 0
    else:
        raise InternalError("bits-back", f"choosing a basis at {interface}", "its directions are not found again")
    sizes = [stack.bits, trial.bits]
    rows = int((drawn.codes > 0).sum())
    table = push_corrections(trial, drawn, made)
    sizes.append(trial.bits)
    saved = Saved(
        interface=interface,
        width=free.width,
        rows=rows,
        angles=drawn.angles,
        corrected=int(made.wrong.sum()),
        returned=sizes[0] - sizes[1],
        corrections=sizes[2] - sizes[1] - rows - table,
        signs=rows,
        table=table,
    )
    return trial, rotation, saved


def _undraw(stack: Stack, free: FreeRotations, interface: str, tensors: Mapping[str, Tensor]) -> None:
    """Put the bits back by which the basis of an interface was chosen."""
    codes, corrections = pop_corrections(stack, free.width)
    push_rotation(stack, codes, restore(codes, _recovered(free, interface, tensors), corrections))


# -- tensors on the stack ----------------------------------------------------------------------------------------------


def _push(stack: Stack, tensor: Tensor) -> None:
    stack.push_bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _pop(stack: Stack, shape: Shape, dtype: torch.dtype) -> Tensor:
    count = int(np.prod(shape, dtype=np.int64))
    data = torch.from_numpy(stack.pop_bytes(count * dtype.itemsize))
    return data.view(dtype).reshape(shape)


@dataclass(frozen=True)
class Content:
    """All that a stack holds, apart from the form.

    Attributes:
        free: where the model can be rotated.
        shapes: of every canonical tensor (shortcuts as triangles).
        dtypes: of every canonical tensor.
    """

    free: FreeRotations
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, torch.dtype]

    def still(self) -> list[str]:
        """Tensors that no rotation changes."""
        return [name for name in self.shapes if name not in self.free.followers]

    def groups(self, form: Form) -> list[tuple[str, list[str]]]:
        """The interfaces at which a basis is chosen, and the tensors that are complete then, in order."""
        free = self.free
        if form == "triangular":
            return [(free.names[0], [name for name in self.shapes if name in free.followers])]
        found = []
        for index, interface in enumerate(free.names):
            closing = free.shortcuts[index - 1 : index] if index else []
            found.append((interface, [*(member.name for member in free.members[interface]), *closing]))
        return found

    def shape(self, name: str, form: Form) -> Shape:
        if form == "square" and name in self.free.shortcuts:
            return (self.free.width, self.free.width)
        return self.shapes[name]


def write(
    content: Content, tensors: Mapping[str, Tensor], form: Form, first: bytes, step: Callable[[int], None]
) -> tuple[Stack, dict[str, Tensor], list[Saved]]:
    """Put a model on a stack.

    Args:
        content: what it is made of.
        tensors: canonical tensors by name.
        form: which rotations are free.
        first: bytes that go on it before all else: there must be something to take bits off.
        step: told the number of interfaces done.

    Returns:
        The stack; the tensors as they are on it (rotated and rounded; shortcuts [k, k] in the square form); what each
        interface saved.
    """
    free, stack = content.free, Stack()
    stack.push_bytes(np.frombuffer(first, np.uint8))
    result = dict(tensors)
    for name in content.still():
        _push(stack, tensors[name])
    squares = free.squares(tensors)
    saved = []
    for index, (interface, names) in enumerate(content.groups(form)):
        stack, rotation, gave = _draw(stack, free, interface, tensors)
        saved.append(gave)
        if form == "triangular":
            result.update(free.triangular(tensors, rotation))
        else:
            result.update(free.turn(interface, tensors, rotation))
            if index:
                name = free.shortcuts[index - 1]
                result[name] = (squares[index - 1] @ rotation).to(content.dtypes[name])
            if index < len(squares):
                squares[index] = rotation.t() @ squares[index]
        for name in names:
            _push(stack, result[name])
        step(index + 1)
    return stack, result, saved


def read(content: Content, stack: Stack, form: Form, first: int) -> tuple[bytes, dict[str, Tensor]]:
    """Take a model off a stack: the inverse of ``write``.

    Args:
        first: how many bytes were put on it first.
    """
    tensors: dict[str, Tensor] = {}
    for interface, names in reversed(content.groups(form)):
        for name in reversed(names):
            tensors[name] = _pop(stack, content.shape(name, form), content.dtypes[name])
        _undraw(stack, content.free, interface, tensors)
    for name in reversed(content.still()):
        tensors[name] = _pop(stack, content.shapes[name], content.dtypes[name])
    return stack.pop_bytes(first).tobytes(), tensors

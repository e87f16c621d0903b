"""Packings are exact inverses; the writer's files are what safetensors would write."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from secateur.checkpoints.folder import DTYPES, Folder, TensorHeader
from secateur.checkpoints.writer import TensorWriter
from secateur.errors import InternalError
from secateur.families import Packed


@given(
    stacks=st.integers(1, 4),
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    columns=st.integers(0, 5),
    transposed=st.booleans(),
    stacked=st.booleans(),
)
def test_pack_and_unpack_are_inverses(
    stacks: int, rows: list[int], columns: int, transposed: bool, stacked: bool
) -> None:
    """For matrices and (``columns`` 0) biases, stacked or not, transposed or not."""
    count = stacks if stacked else 1
    parts = tuple(tuple(f"{s}.{r}" for r in range(len(rows))) for s in range(count))
    packed = Packed("packed", parts, stacked, transposed)
    shapes = {name: (rows[i], columns) if columns else (rows[i],) for group in parts for i, name in enumerate(group)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    whole = packed.pack(tensors)
    assert tuple(whole.shape) == packed.shape(shapes)
    assert whole.is_contiguous()
    found = packed.unpack(whole, shapes)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert torch.equal(packed.pack(found), whole)


_headers = st.lists(
    st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 2)),
    min_size=1,
    max_size=8,
)


@given(drawn=_headers, order=st.randoms())
def test_writer(drawn: list[tuple[str, list[int], int]], order: object) -> None:
    """Files of any headers, written in any order, read back with safetensors and hash as said."""
    headers = [TensorHeader(f"t{i}", f"model-{f}.safetensors", d, tuple(s)) for i, (d, s, f) in enumerate(drawn)]
    tensors = {h.name: torch.randint(0, 2, h.shape).to(DTYPES[h.dtype]) for h in headers}
    shuffled = list(headers)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        writer = TensorWriter(folder, headers)
        digests = {h.name: writer.write(h.name, tensors[h.name]) for h in shuffled}
        again = TensorWriter(folder, headers)  # reopening keeps what was written
        assert {name: again.digest(name) for name in again.names} == digests
        found = {}
        for file in folder.glob("*.safetensors"):
            found.update(load_file(file))
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        assert set(Folder(folder).headers) == set(tensors)


def test_writer_refuses_other_shapes(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path, [TensorHeader("t", "model.safetensors", "F32", (2, 3))])
    with pytest.raises(InternalError, match=r"writing t as \[2, 3\]"):
        writer.write("t", torch.zeros(3, 2))
    with pytest.raises(InternalError, match="float64"):
        writer.write("t", torch.zeros(2, 3, dtype=torch.float64))

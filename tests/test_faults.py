"""Faults of the machine and of others: resumed to the same bytes or refused; nothing lost, nothing half-written.

The rest of the faults, and kills at random moments, are in ``benchmarks/bench_faults.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import faults
from disturbed import Garden
from processes import NotHereError
from secateur.engine.journal import LOCK, locked, work_folder
from secateur.errors import RequestError


@pytest.fixture(scope="module")
def garden(tmp_path_factory: pytest.TempPathFactory) -> Garden:
    return Garden(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", [fault for fault in faults.faults() if fault.short], ids=str)
def test_fault(fault: faults.Fault, garden: Garden) -> None:
    try:
        assert fault.make(garden)
    except NotHereError as reason:
        pytest.skip(str(reason))


def test_a_lock_whose_file_was_deleted_keeps_nobody_out_and_is_not_held(tmp_path: Path) -> None:
    """Who waits with the file of the process before in hand must not work beside who comes after."""
    work = work_folder(tmp_path / "out")
    with locked(work):
        (work / LOCK).unlink()
        with locked(work), pytest.raises(RequestError, match="another process"), locked(work):
            raise AssertionError
    with locked(work):
        pass


def test_a_folder_that_was_refused_for_its_lock_stays(tmp_path: Path) -> None:
    work = work_folder(tmp_path / "out")
    with locked(work):
        with pytest.raises(RequestError, match="another process"), locked(work):
            raise AssertionError
        assert (work / LOCK).is_file()

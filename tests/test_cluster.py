"""A comparison on a local Ray cluster gives the results of one without."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import secateur
from conftest import Checkpoints
from secateur.api import comparing
from secateur.errors import RequestError

TIMED = ("seconds", "speed", "peak_rss_bytes")
SMALL: dict[str, Any] = {"samples": 4, "length": 16, "context": 32, "ratio": [0.15], "layout": "native"}

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'secateur[ray]'"
)


def told(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    return [{key: value for key, value in cell.items() if key not in TIMED} for cell in results["cells"]]


@needs_ray
def test_a_cluster_gives_the_same_results_and_resumes(
    checkpoint: Checkpoints, notes: Path, held_out: Path, tmp_path: Path
) -> None:
    asked = {"methods": ["magnitude", "wanda"], "data": str(notes), "text": str(held_out), **SMALL}
    script = "import json, secateur, sys; print(json.dumps(secateur.compare(**json.loads(sys.argv[1])), default=str))"
    found = []
    for name, cluster in (("ray", "ray"), ("alone", None)):
        given = {**asked, "model": str(checkpoint()), "output": str(tmp_path / name), "cluster": cluster}
        given = {key: value for key, value in given.items() if value is not None}
        run = [sys.executable, "-c", script, json.dumps(given)]
        places = os.pathsep.join(filter(None, sys.path))
        done = subprocess.run(
            run, capture_output=True, text=True, timeout=500, env={**os.environ, "PYTHONPATH": places}
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert told(found[0]) == told(found[1])
    assert found[0]["counts"]["done"] == len(found[0]["cells"])
    # what the cluster has done counts without it
    again = secateur.compare(checkpoint(), **asked, output=tmp_path / "ray")
    assert told(again) == told(found[0])


def test_without_ray_it_is_refused_by_name(
    checkpoint: Checkpoints, notes: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(comparing.Workers, "run", lambda *_: {"perplexity": 1.0, "params": 1, "data": None})
    with pytest.raises(RequestError, match="secateur\\[ray\\]"):
        secateur.compare(
            checkpoint(), methods="magnitude", data=notes, text=held_out, output=tmp_path / "o", cluster="ray", **SMALL
        )

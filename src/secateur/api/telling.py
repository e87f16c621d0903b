"""What is told of a prune of a network: what remains of every measure, and what keeps more from going."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from secateur.budgets.channels import Units, remaining
from secateur.budgets.targets import OF_NETWORKS
from secateur.errors import RequestError
from secateur.graph.spaces import Graph
from secateur.graph.verify import SINGLE

REASONS: Final = 3
"""How many an error gives, the commonest ones."""


def achieved_by(
    left: Graph, units: Units, latency: float | None = None, whole: Graph | None = None
) -> dict[str, float]:
    """What remains of every measure, and what there was; of the latency what was measured, as a share.

    Args:
        left: the network, or what remains of it.
        units: what goes of that.
        whole: the network, where that is another one.
    """
    told: dict[str, float] = {}
    for measure in OF_NETWORKS:
        if measure != "latency":
            told[measure] = remaining(left, measure, units)
            told[f"{measure}_before"] = remaining(whole or left, measure, {})
    return told if latency is None else told | {"latency": round(latency, 4), "latency_before": 1.0}


def with_reasons(error: RequestError, parts: str, refused: Iterable[str], more: Iterable[str] = ()) -> RequestError:
    """A target that is out of reach, with what is in the way; any other error as it is.

    Args:
        parts: what is cut or left out, in the plural.
        refused: for each part that could not go, the reason.
        more: further things that are in the way.
    """
    reasons = Counter(reason for reason in refused if reason != SINGLE).most_common(REASONS)
    told = [f"{count} of the {parts} left alone because {reason}" for reason, count in reasons] + [*more]
    if error.code != "target-out-of-reach" or not told:
        return error
    return RequestError(error.code, error.asked, f"{error.found} ({'; '.join(told)})", error.hint)

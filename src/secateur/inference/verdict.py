"""From a configuration to a family that is believed: propose, decide what is open by trying, keep what holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from typing import Any

from pydantic import ValidationError

from secateur.errors import RequestError, SecateurError, refuse
from secateur.families import LAYOUTS, Architecture, Family, Kind
from secateur.families.limits import refusals
from secateur.inference.attributes import sizes_read
from secateur.inference.disk import names_on_disk
from secateur.inference.proposal import Proposal, propose, with_turns
from secateur.inference.selfcheck import TOLERANCE, SelfCheck, difference
from secateur.inference.specimen import UNKNOWN, Specimen


@dataclass(frozen=True)
class Inferred:
    """A family nobody wrote down.

    Attributes:
        family: what is believed of the architecture; what did not hold is ``fixed`` in it.
        verified: kinds of spaces that can be cut in the native layout.
        refused: why the others cannot.
        written: whether somebody wrote the family down, beside the checkpoint.
    """

    family: Family
    verified: tuple[Kind, ...]
    refused: dict[Kind, str] = field(default_factory=dict)
    written: bool = False

    @property
    def summary(self) -> str:
        """One line for a person."""
        refused = "; ".join(f"{kind}: {why}" for kind, why in self.refused.items())
        spaces = ", ".join(self.verified) or "none"
        origin = "the family file beside it is verified" if self.written else "no family file: inferred and verified"
        return f"architecture {self.family.model_type!r}: {origin} (spaces {spaces}" + (
            f"; refused: {refused})" if refused else ")"
        )


def infer(raw: Mapping[str, Any]) -> Inferred:
    """The family of a stock decoder without a family file, with only the spaces that passed the self-check.

    Args:
        raw: the content of ``config.json``.

    Raises:
        RequestError: it is no stock decoder, or nothing that was tried fits.
    """
    return _infer(json.dumps(dict(raw), sort_keys=True, default=str))


def confirm(raw: Mapping[str, Any], family: Family) -> Inferred:
    """A family that somebody wrote for a configuration, with only the spaces that passed the self-check."""
    specimen = Specimen(raw)
    proposal = propose(specimen)
    return _judge(dict(raw), proposal, family, {}, written=True)


@lru_cache(maxsize=16)
def _infer(text: str) -> Inferred:
    raw = json.loads(text)
    try:
        return _from_scratch(raw)
    except SecateurError:
        raise
    except Exception as error:  # stock classes differ in ways nobody foresees
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        refuse(UNKNOWN, f"architecture {raw.get('model_type')!r}", f"its class is not understood ({reason})")


def _from_scratch(raw: dict[str, Any]) -> Inferred:
    proposal = propose(Specimen(raw))
    family = _settle_turns(proposal)
    read = sizes_read(proposal.anatomy, family, proposal.other)
    family = _family({**family.model_dump(), "attributes": read})
    check = _trial(proposal, family)
    found = {
        "disk": names_on_disk(proposal.anatomy, check.architecture),
        "constraints": _constraints(check),
    }
    family = _dense_blocks(proposal, _family({**family.model_dump(), **found}))
    return _judge(raw, proposal, family, proposal.notes)


def _dense_blocks(proposal: Proposal, family: Family) -> Family:
    """How the configuration says which blocks have no experts: the first way that survives a depth cut."""
    check = _trial(proposal, family)
    if len({bool(block.experts) for block in check.architecture.sizes.blocks}) < 2:
        return family
    counts = [key for key, value in proposal.small.items() if type(value) is int]
    lists = [key for key, value in proposal.small.items() if isinstance(value, list)]
    ways = [{"first": key} for key in counts if "dense" in key]
    ways += [{"listed": key, "step": step} for key in lists if "layer" in key for step in counts if "step" in step]
    for way in ways:
        tried = _family({**family.model_dump(), "dense_blocks": way})
        if _trial(proposal, tried).trouble("blocks", "native") is None:
            return tried
    return family


def _constraints(check: SelfCheck) -> list[dict[str, Any]]:
    """Widths that the stock class refuses where others are taken."""
    found: list[dict[str, Any]] = []
    if check.wants_heads_to_divide():
        why = "the stock configuration wants the stream's width divisible by the number of heads"
        found.append({"size": "residual", "multiple_of": "heads", "why": why})
    if any(entry.experts for entry in check.architecture.family.block.values()):
        why = "grouped matrix products of fused experts want rows of a multiple of 16 bytes"
        found += [{"size": size, "multiple_of_bytes": 16, "why": why} for size in ("ffn", "residual")]
    return found


def _family(raw: dict[str, Any]) -> Family:
    try:
        return Family.model_validate(raw)
    except ValidationError as error:
        refuse(UNKNOWN, f"architecture {raw['model_type']!r}", f"no family describes it ({error})")


def _trial(proposal: Proposal, family: Family) -> SelfCheck:
    try:
        return SelfCheck(proposal.small, family)
    except RequestError as error:
        refuse(UNKNOWN, f"architecture {family.model_type!r}", f"{error.asked}: {error.found}")


def _settle_turns(proposal: Proposal) -> Family:
    """Which fused modules hold their parts in turns: the first arrangement in which all spaces can be permuted."""
    plain = _family(proposal.raw)
    modules = sorted(proposal.fused)
    for kind in ("ffn", "kv"):
        of_kind = [name for name in modules if proposal.fused[name] == kind]
        for count in range(len(of_kind) + 1):
            for chosen in combinations(of_kind, count):
                family = _family(with_turns(proposal.raw, {name: proposal.fused[name] for name in chosen}))
                if _trial(proposal, family).permuted(kind) is None:
                    proposal.raw = with_turns(proposal.raw, {name: proposal.fused[name] for name in chosen})
                    plain = family
                    break
            else:
                continue
            break
        else:
            if of_kind:
                proposal.notes.setdefault(kind, "in no order of its fused rows can its units be permuted")
    return plain


def _judge(
    raw: dict[str, Any], proposal: Proposal, family: Family, notes: Mapping[str, str], written: bool = False
) -> Inferred:
    """The family with a ``fixed`` rule for every kind of space that does not hold."""
    check, reference = _trial(proposal, family), proposal.anatomy.logits
    asked = f"architecture {family.model_type!r}"
    trouble = check.replay()
    if not difference(reference, check.logits) < TOLERANCE:
        trouble = "put together again from its parts it gives other logits"
    if trouble is not None:
        refuse(UNKNOWN, asked, trouble)
    fixed = [rule.model_dump() for rule in family.fixed]
    if check.architecture.sizes.size("experts"):  # how a router chooses among others is not known
        fixed.append({"size": "experts", "why": "the self-check does not try what its router does without some"})
    verified: list[Kind] = []
    refused: dict[Kind, str] = {}
    for kind in check.kinds:
        native, layered = (notes.get(kind) or check.trouble(kind, layout) for layout in LAYOUTS)
        if native is None:
            verified.append(kind)
        else:
            refused[kind] = native
        # what follows from the family already needs no rule
        known = {layout for layout in LAYOUTS if refusals(check.architecture, kind, layout) and kind not in notes}
        if layered and "per-layer" not in known and native:
            fixed.append({"size": kind, "why": layered})
        elif native and "native" not in known and not layered:
            fixed.append({"size": kind, "native_only": True, "why": native})
        elif layered and not native:
            fixed.append({"size": kind, "per_layer_only": True, "why": layered})
    if len(refused) == len(check.kinds) and len([rule for rule in fixed if not rule.get("native_only")]):
        reasons = "; ".join(f"{kind}: {why}" for kind, why in refused.items())
        refuse(UNKNOWN, asked, f"no kind of space passed the self-check ({reasons})", "see: secateur families")
    final = _family({**family.model_dump(), "fixed": fixed})
    Architecture(raw, final)  # the real sizes must fit as well
    return Inferred(final, tuple(verified), refused, written)

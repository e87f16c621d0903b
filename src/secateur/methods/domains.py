"""Methods that keep what one domain needs, without losing what is general: two texts, one score."""

from __future__ import annotations

from pydantic import Field

from secateur.errors import refuse
from secateur.methods.saliency import Saliency


class Domain(Saliency):
    """``--data`` is the general text; the domain's stands beside it."""

    data = "text"
    group = "domain"

    domain: str | None = Field(None, description="text of the domain, needed: what --data takes")

    def texts(self) -> dict[str, str]:
        if self.domain is None:
            found = "it needs a text of the domain beside --data, and none is given"
            refuse("no-data", f"method {self.name}", found, "--set domain=law.txt")
        return {"domain": self.domain}

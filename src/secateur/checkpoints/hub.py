"""Find a model: a local folder, or a snapshot fetched from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from secateur.errors import refuse

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*"]


def locate(model: str) -> str:
    """Path of the folder that holds ``model``.

    Args:
        model: a local folder, or a hub id (``name`` or ``owner/name``), fetched into the hub's cache.

    Raises:
        RequestError: neither.
    """
    if Path(model).exists() or not _HUB_ID.fullmatch(model):
        return model
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, allow_patterns=_WANTED)
    except Exception as error:  # the hub client raises its own, httpx's and OSError
        reason = " ".join(str(error).split())[:160]
        refuse(
            "no-model",
            f"model {model!r}",
            f"there is no such folder, and the hub did not give it ({type(error).__name__}: {reason})",
            "check the path, or the hub id and the connection",
        )

"""Hugging Face folders: read as canonical tensors, written under the names they had."""

from secateur.checkpoints.checkpoint import Checkpoint, require_finite
from secateur.checkpoints.folder import Folder, TensorHeader
from secateur.checkpoints.layout import OutputLayout, output_layout
from secateur.checkpoints.writer import TensorWriter

__all__ = ["Checkpoint", "Folder", "OutputLayout", "TensorHeader", "TensorWriter", "output_layout", "require_finite"]

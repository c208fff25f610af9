"""Checkpoints: trees of arrays and QTensors, to files and back. One file per format.

native        our own: one safetensors file with a manifest (`save`, `load`, `read_metadata`)
safetensors   the container itself: named arrays in one file
"""

from jaxquant.io.native import SavedMetadata, load, read_metadata, save

__all__ = ["SavedMetadata", "load", "read_metadata", "save"]

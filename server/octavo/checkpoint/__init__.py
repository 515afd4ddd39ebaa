"""Finds, fetches and describes model files. Knows no tensor library; the front end uses it too."""

from octavo.checkpoint.hf_config import ModelSpec, RopeSpec, parse_config
from octavo.checkpoint.source import ModelFiles, resolve

__all__ = ["ModelFiles", "ModelSpec", "RopeSpec", "parse_config", "resolve"]

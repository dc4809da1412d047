"""Converter of native Molmo2 training checkpoints to folders that transformers loads, and back.

    from molmo2.convert import ConversionOptions, convert_checkpoint
    convert_checkpoint("runs/molmo2", "molmo2-hf", ConversionOptions(dtype="bfloat16"))

The command line, `python -m molmo2.convert --help`, does the same.
"""

from molmo2.convert.conversion import (
    ConversionOptions,
    ConversionPlan,
    add_remote_code,
    convert_checkpoint,
    ensure_remote_code,
    plan_conversion,
    remote_code_hashes,
)
from molmo2.convert.errors import CheckpointError, ConversionError, OutputError, UnsupportedError, VerificationError
from molmo2.convert.from_parts import Parts, build_from_parts

__all__ = [
    "CheckpointError",
    "ConversionError",
    "ConversionOptions",
    "ConversionPlan",
    "OutputError",
    "Parts",
    "UnsupportedError",
    "VerificationError",
    "add_remote_code",
    "build_from_parts",
    "convert_checkpoint",
    "ensure_remote_code",
    "plan_conversion",
    "remote_code_hashes",
]

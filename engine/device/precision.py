"""Names of precisions. Imports no torch, so that the command line starts quickly."""

from typing import Literal

Precision = Literal["bf16", "fp16", "fp32"]
"""Name of the dtype in which a network computes; bf16 and fp16 mean mixed precision."""

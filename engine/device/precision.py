"""Names of precisions. Knows nothing of tensors."""

from typing import Literal

Precision = Literal["bf16", "fp16", "fp32"]

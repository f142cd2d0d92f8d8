"""Which numbers a network multiplies with: decided once, asked of the hardware and not guessed."""

from functools import cache

import torch

from ancestral.errors import unknown

PRECISIONS = ("auto", "float32", "bfloat16")


@cache
def has_bfloat16() -> bool:
    """Whether what this process computes on multiplies bfloat16 in hardware: its GPU if there is one, else its CPU."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def lowered(precision: str) -> bool:
    """Whether a network of this precision multiplies in bfloat16.

    Raises:
        OptionError: if the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    return precision == "bfloat16" or (precision == "auto" and has_bfloat16())

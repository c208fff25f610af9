"""Sizes as people read them."""

from __future__ import annotations

__all__ = ["in_bytes", "in_millions"]


def in_bytes(n: float) -> str:
    """A number of bytes, in the largest unit of which it is one or more.

    Example:
      >>> in_bytes(512), in_bytes(1536), in_bytes(3 << 30)
      ('512 B', '1.5 KiB', '3.0 GiB')
    """
    unit, power = next((u, p) for u, p in (("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0)) if n >= 1 << p or p == 0)
    return f"{n / (1 << power):.1f} {unit}" if power else f"{n:.0f} B"


def in_millions(n: int) -> str:
    """A count, in billions or millions where it is one or more.

    Example:
      >>> in_millions(16_800), in_millions(1_705_216), in_millions(8_030_261_248)
      ('16,800', '1.71 million', '8.03 billion')
    """
    unit, power = ("billion", 9) if n >= 1e9 else ("million", 6)
    return f"{n / 10**power:.3g} {unit}" if n >= 1e6 else f"{n:,}"

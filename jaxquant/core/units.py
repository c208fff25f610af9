"""Sizes as people read them."""

from __future__ import annotations

__all__ = ["in_bytes"]


def in_bytes(n: float) -> str:
    """A number of bytes, in the largest unit of which it is one or more.

    Example:
      >>> in_bytes(512), in_bytes(1536), in_bytes(3 << 30)
      ('512 B', '1.5 KiB', '3.0 GiB')
    """
    unit, power = next((u, p) for u, p in (("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0)) if n >= 1 << p or p == 0)
    return f"{n / (1 << power):.1f} {unit}" if power else f"{n:.0f} B"

"""The configuration of one module, in formats whose modules may differ.

dynamic       GPTQModel: {"+:regex": {"bits": 8, ...}, "-:regex": {}}; the first that matches the beginning of the
              module's name counts. "+:" may be left out; "-:" leaves the module in float
extra_config  AutoRound: {name or regex: {"bits": 8, ...}}; the module's own name counts before expressions, which
              may match anywhere; 16 bits or more leave it in float
"""

from __future__ import annotations

import re
from collections.abc import Callable

from jaxquant.core.errors import QuantError
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.strict_json import Json

__all__ = ["matches", "overridden"]


def matches(
    match: Callable[..., re.Match[str] | None], pattern: Json, name: str, error: Callable[..., QuantError]
) -> bool:
    """Whether ``match`` (`re.match`, `re.search`) finds a pattern of the configuration in the name of a module."""
    try:
        return match(pattern, name) is not None
    except (re.error, TypeError, RecursionError, OverflowError) as reason:
        rule = f"a pattern of the configuration is not a regular expression ({reason})"
        raise error(rule, todo="Correct the configuration", pattern=pattern) from None


def overridden(checkpoint: HFCheckpoint, config: dict[str, Json], prefix: str) -> dict[str, Json] | None:
    """The configuration of one module of GPTQ, AWQ or AutoRound; None if it stays in float."""
    found = _dynamic(checkpoint, config, prefix)
    if found is None:
        return None
    found |= _extra(checkpoint, config, prefix)
    bits = found.get("bits")
    return None if type(bits) is int and bits >= 16 else config | found


def _dynamic(checkpoint: HFCheckpoint, config: dict[str, Json], prefix: str) -> dict[str, Json] | None:
    for key, entry in _table(checkpoint, config, "dynamic").items():
        if matches(re.match, key[2:] if key[:2] in ("+:", "-:") else key, prefix, checkpoint.error):
            return None if key.startswith("-:") else dict(entry)
    return {}


def _extra(checkpoint: HFCheckpoint, config: dict[str, Json], prefix: str) -> dict[str, Json]:
    table = _table(checkpoint, config, "extra_config")
    if prefix in table:
        return table[prefix]
    for key, entry in table.items():
        if key not in checkpoint.owners and entry and matches(re.search, key, prefix, checkpoint.error):
            return entry
    return {}


def _table(checkpoint: HFCheckpoint, config: dict[str, Json], key: str) -> dict[str, dict[str, Json]]:
    table = config.get(key)
    if table is None:
        return {}
    if not isinstance(table, dict) or not all(isinstance(entry, dict | None) for entry in table.values()):
        rule = f"{key} must be an object of objects"
        raise checkpoint.error(rule, todo="Correct the configuration", **{key: table})
    return {name: entry or {} for name, entry in table.items()}

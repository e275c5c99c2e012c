"""What of an encoder cannot be cut, and why: said where it is planned as well as where it is done."""

from __future__ import annotations

from edgemin.encoder.families import BY_NAME
from edgemin.errors import UserError


def check_ffn(family: str, networks: int) -> None:
    """Refuse to cut FFN units of layers that stack several feed-forward networks (MobileBERT)."""
    if networks > 1:
        raise UserError(
            f"ffn: cannot be cut for {family}, whose layers stack {networks} feed-forward networks, so that a unit's "
            "number does not say which of them it is in"
        )


def check_hidden(family: str, hidden: int) -> None:
    """Refuse to cut the hidden size of a family whose layers have a width of their own (MobileBERT)."""
    if BY_NAME[family].bottleneck is not None:
        raise UserError(
            f"hidden: cannot be cut for {family}, whose feature maps of {hidden} units are tied by bottlenecks to "
            "another width inside the layers"
        )

"""Names of the tensors of networks that the engine does not run."""

from pathlib import Path

_LISTS = Path(__file__).parents[1] / "archs" / "community_names.txt"

COMMUNITY_NAMES = {
    label: set(lines)
    for label, *lines in (block.replace("]", "").splitlines() for block in _LISTS.read_text().split("[")[1:])
}
"""Names of the tensors by network; a word behind the name of the network is a variant."""

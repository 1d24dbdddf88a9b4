"""All cases, and a tenth of them that is always the same."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator

from tests.bad_inputs import (
    captions,
    damaged_images,
    forms,
    names,
    other_tables,
    tables,
    tars,
    unusual_images,
    zips,
)
from tests.bad_inputs.cases import Case

_MODULES = (tars, zips, damaged_images, unusual_images, tables, other_tables, names, captions, forms)
_SLOW = ("MB of", "3000 rows", "2000 members", "65500 x", "60000 x", "9000 x", "65535 x", "20000 captions")


def all_cases() -> list[Case]:
    """Every case, in the order of the modules.

    Raises:
        ValueError: if two of a kind have one name.
    """
    found: dict[tuple[str, str], Case] = {}
    for case in _made():
        if (case.kind, case.name) in found:
            raise ValueError(f"two cases {case.name!r} of kind {case.kind}")
        found[case.kind, case.name] = case
    return list(found.values())


def tenth() -> list[Case]:
    """A tenth of each kind, chosen by the hash of the name; none that takes long."""
    of_kind: dict[str, list[Case]] = defaultdict(list)
    for case in all_cases():
        of_kind[case.kind].append(case)
    chosen = []
    for group in of_kind.values():
        quick = [case for case in group if not any(word in case.name for word in _SLOW)]
        chosen += sorted(quick, key=lambda case: hashlib.sha256(case.name.encode()).hexdigest())[
            : -(-len(group) // 10)
        ]
    return chosen


def _made() -> Iterator[Case]:
    for module in _MODULES:
        yield from module.cases()

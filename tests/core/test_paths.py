"""`folded`: repeated layers as one line, and nothing lost."""

import re

from hypothesis import given
from hypothesis import strategies as st

from jaxquant.core.paths import folded

PATHS = st.from_regex(r"\A(layers_[0-9]{1,2}/)?(expert_[0-9]/)?(w|b|norm2)\Z")


def spelled(label):
    """The paths that a label is for, from its text alone."""
    found = re.search(r"\{([^}]*)\}", label)
    if found is None:
        return [label]
    numbers = []
    for part in found[1].split(","):
        first, dots, last = part.partition("..")
        numbers += [str(n) for n in range(int(first), int(last) + 1)] if dots else [part]
    return [label.replace(found[0], number) for number in numbers]


@given(st.dictionaries(PATHS, st.integers(0, 1), max_size=40))
def test_labels_say_which_paths_they_are_for(entries):
    found = folded(entries)
    assert sorted(path for paths in found.values() for path in paths) == sorted(entries)
    for label, paths in found.items():
        assert sorted(spelled(label)) == sorted(paths)
        assert len({entries[path] for path in paths}) == 1
        assert len(paths) == 1 or len(paths) >= 3


def test_layers_experts_and_gaps():
    model = {f"layers_{i}/{name}": name for i in range(12) for name in ("w", "b")} | {"head/w": "w"}
    assert list(folded(model)) == ["layers_{0..11}/w", "layers_{0..11}/b", "head/w"]
    assert list(folded({f"h{i}": i == 2 for i in range(5)})) == ["h{0,1,3,4}", "h2"]
    experts = {f"layers_{i}/expert_{j}": 0 for i in range(2) for j in range(8)}
    assert list(folded(experts)) == ["layers_0/expert_{0..7}", "layers_1/expert_{0..7}"]
    assert list(folded({"a_01": 0, "a_1": 0, "a_2": 0})) == ["a_{01,1,2}"]
    assert list(folded({f"h{i}": 0 for i in (0, 1, 10, 11, 12, 2, 20)})) == ["h{0..2,10..12,20}"]  # as trees have them

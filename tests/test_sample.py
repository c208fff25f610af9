"""The choice of tests in a CI run: one of each slow function at least, and others with another salt."""

import dataclasses
from pathlib import Path

import pytest

CONFTEST = str(Path(__file__).with_name("conftest.py"))


@dataclasses.dataclass(frozen=True)
class Item:
    """A test, as far as the choice reads it."""

    nodeid: str
    keywords: frozenset


def function(name, slow, fast=0):
    """The parameter sets of a test function."""
    marks = [frozenset({"slow"})] * slow + [frozenset()] * fast
    return [Item(f"{name}[{i}]", mark) for i, mark in enumerate(marks)]


@pytest.fixture
def choose(request):
    return request.config.pluginmanager.get_plugin(CONFTEST)._slow_sample


def test_each_function_with_slow_sets_alone_runs(choose):
    functions = [*(function(f"alone{i}", slow=i + 1) for i in range(40)), function("both", slow=200, fast=1)]
    for salt in ("", "a"):
        chosen = {item.nodeid.split("[")[0] for item in choose(functions, 1000, salt)}
        assert {f"alone{i}" for i in range(40)} <= chosen
    assert choose(functions, 0, "") == set()


def test_one_in_n_and_others_by_another_salt(choose):
    functions = [function("a", slow=500, fast=1), function("b", slow=500, fast=2)]
    samples = [choose(functions, 100, salt) for salt in ("", "4f2a91", "c0ffee")]
    assert [len(sample) for sample in samples] == [10, 10, 10]
    assert len(set.union(*samples)) > 20
    assert samples[1] == choose(functions, 100, "4f2a91")


def test_fast_tests_rotate_as_slow_ones_do(request):
    choose, items = request.config.pluginmanager.get_plugin(CONFTEST)._fast_sample, function("a", slow=0, fast=500)
    samples = [choose(items, 100, salt) for salt in ("", "4f2a91", "c0ffee")]
    assert [len(sample) for sample in samples] == [5, 5, 5]
    assert len(set.union(*samples)) > 10

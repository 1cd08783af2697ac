"""What tests share: which cases of a test have each value of each of its parameters."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcm_kit.tests.helpers import each_value


@given(st.lists(st.fixed_dictionaries({name: st.integers(0, 4) for name in "abc"}), max_size=40))
def test_no_value_of_a_parameter_is_lost_and_no_case_is_there_twice(cases):
    kept = each_value(cases)
    assert kept == sorted(set(kept))
    for name in "abc":
        assert {cases[place][name] for place in kept} == {case[name] for case in cases}


@pytest.mark.parametrize("sizes", [(3, 20), (20, 3), (4, 4), (2, 3, 5), (7,), (1, 1)])
def test_of_all_combinations_as_many_are_left_as_the_longest_list_has_values(sizes):
    cases = [dict(enumerate(values)) for values in product(*map(range, sizes))]
    assert len(each_value(cases)) == max(sizes)


def test_a_test_without_parameters_is_kept():
    assert each_value([{}]) == [0]

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import replay.serialize
from r2vpo.records import Outcome, Trajectory, TrajectoryGroup
from replay.serialize import check_group, decode, encode, parse_key
from tests.replay.replay_groups import make_group, make_trajectory, same

any_text = st.text(st.characters())  # lone surrogates included: a decoded response may hold them
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=5,
)


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
"""None in its place is any bits."""


@st.composite
def trajectories(draw):
    length = draw(st.integers(0, 6))
    outcome = draw(st.sampled_from(Outcome))

    def array(dtype, elements=None):
        return draw(hnp.arrays(dtype, length, elements=elements))

    return Trajectory(
        token_ids_T=array(np.int32),
        loss_mask_T=array(np.bool_),
        behavior_logprob_T=array(np.float32, finite if outcome.has_reward else None),  # -0.0 included
        version_T=array(np.int32, st.integers(5, 9)),
        outcome=outcome,
        reward=draw(st.floats(allow_nan=False, allow_infinity=False)) if outcome.has_reward else None,
        response=draw(any_text),
    )


groups = st.builds(
    TrajectoryGroup,
    key=st.builds("{}.{}".format, st.integers(0, 10**18 - 1), st.integers(0, 10**18 - 1)),
    prompt=any_text,
    truth=any_json,
    trajectories=st.lists(trajectories(), min_size=1, max_size=4).map(tuple),
    worker=any_text,
    lease_version=st.integers(0, 5),
)


@settings(deadline=None)
@given(groups)
def test_a_group_is_read_back_bit_for_bit(group):
    assert same(decode(encode(group)), group)


def test_equal_groups_give_equal_bytes():
    assert encode(make_group(3)) == encode(make_group(3))


def test_the_smallest_reward_and_a_negative_zero_survive():
    group = make_group(rewards=(5e-324, -0.0))
    first, second = decode(encode(group)).trajectories
    assert first.reward == 5e-324
    assert math.copysign(1, second.reward) == -1


@pytest.mark.parametrize("key", ["", "3", "0.", ".1", "0.01", "00.1", "-1.2", "0.1.2", " 0.1", "0.1\n", "a.b", "0.٣"])
def test_a_malformed_key_is_refused(key):
    with pytest.raises(ValueError, match=r"is malformed: it must be EPOCH\.INDEX"):
        check_group(make_group(key))


def test_parse_key_gives_epoch_and_index():
    assert parse_key("2.17") == (2, 17)


def test_an_array_of_another_type_is_refused_by_name():
    trajectory = dataclasses.replace(make_trajectory(), token_ids_T=np.arange(5, dtype=np.int64))
    group = dataclasses.replace(make_group(), trajectories=(make_trajectory(), trajectory))
    with pytest.raises(ValueError, match=r"group 0\.0, trajectory 1: token_ids_T is int64 .* must be int32"):
        check_group(group)


@pytest.mark.parametrize("truth", [(1, 2), {1: "a"}, {1, 2}, np.int64(3), float("nan")])
def test_a_truth_that_json_would_change_is_refused(truth):
    with pytest.raises(ValueError, match=r"truth of group 0\.0 is no JSON value"):
        check_group(dataclasses.replace(make_group(), truth=truth))


def test_a_token_older_than_the_lease_is_refused():
    with pytest.raises(ValueError, match=r"token of version 3, older than its lease_version=4"):
        check_group(make_group(version=3, lease_version=4))


def test_another_format_is_refused(monkeypatch):
    monkeypatch.setattr(replay.serialize, "FORMAT", 2)
    payload = encode(make_group())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="payload has format 2, this version of r2vpo reads format 1"):
        decode(payload)

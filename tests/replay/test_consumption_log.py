import sqlite3

import pytest

from r2vpo.records import BatchPlan, Draw, Kind
from replay.consumption import ConsumptionLog
from replay.errors import ReplayError
from replay.shard import ShardStore


@pytest.fixture
def path(tmp_path):
    return tmp_path / "consumption.sqlite3"


@pytest.fixture
def log(path):
    log = ConsumptionLog(path, shards=2)
    yield log
    log.close()


def plan(step, *ids, stale=()):
    """A plan of fresh ``ids`` and of stale ones, given as (id, uses, weight)."""
    fresh = [Draw(group_id=i, kind=Kind.FRESH) for i in ids]
    return BatchPlan(
        step=step,
        draws=(*fresh, *(Draw(group_id=i, kind=Kind.STALE, uses=u, weight=w) for i, u, w in stale)),
    )


def train(log, step, *ids, stale=()):
    batch = plan(step, *ids, stale=stale)
    log.choose(batch)
    log.commit(step=step, group_ids=batch.group_ids)
    return batch


def test_a_choice_is_remembered_until_it_is_committed(log, path):
    assert log.chosen() is None
    batch = plan(0, 3, 1, stale=[(7, 2, 0.25)])
    log.choose(batch)
    log.close()
    again = ConsumptionLog(path)
    assert again.chosen() == batch
    again.commit(step=0, group_ids=(1, 3, 7))
    assert (again.chosen(), again.version) == (None, 1)
    again.close()


def test_a_new_choice_takes_the_place_of_the_former_one(log):
    log.choose(plan(0, 1, 2))
    log.choose(plan(0, 2, 3))
    assert log.chosen() == plan(0, 2, 3)
    log.drop_choice()
    assert log.chosen() is None


@pytest.mark.parametrize("step", [0, 2])
def test_only_the_next_step_can_be_chosen(log, step):
    train(log, 0, 1)
    with pytest.raises(ValueError, match=f"step {step} cannot be chosen: the next step of .* is 1"):
        log.choose(plan(step, 5))


@pytest.mark.parametrize("ids", [(), (1, 1)])
def test_a_step_trains_on_each_group_once_and_on_one_at_least(log, ids):
    with pytest.raises(ValueError, match="each once, at least one"):
        log.choose(plan(0, *ids))


def test_a_commit_raises_the_version_and_may_be_repeated(log):
    train(log, 0, 1, 2)
    log.commit(step=0, group_ids=[2, 1])
    assert log.version == 1
    assert log.stats() == {"version": 1, "uses": {"fresh": 2, "stale": 0}, "aside": {}}


@pytest.mark.parametrize("ids", [(1,), (1, 1), (1, 2, 2), (1, 2, 3), (1, 4), ()])
def test_a_commit_of_other_groups_than_were_sampled_is_refused(log, ids):
    log.choose(plan(0, 1, 2))
    with pytest.raises(ValueError, match=r"step 0 was sampled as groups \[1, 2\]"):
        log.commit(step=0, group_ids=ids)
    assert log.version == 0
    log.commit(step=0, group_ids=(1, 2))
    with pytest.raises(ValueError, match=r"step 0 was committed with groups \[1, 2\]"):
        log.commit(step=0, group_ids=ids)


def test_steps_are_committed_in_order_and_only_once_chosen(log):
    log.choose(plan(0, 1))
    with pytest.raises(ValueError, match="step 1 cannot be committed before step 0"):
        log.commit(step=1, group_ids=(1,))
    log.drop_choice()
    with pytest.raises(ValueError, match=r"step 0 was sampled as groups \[\], not with \[1\]"):
        log.commit(step=0, group_ids=(1,))


def test_a_committed_plan_is_given_back_as_it_was(log):
    first = train(log, 0, 5, 3)
    second = train(log, 1, 9, stale=[(3, 1, 0.5)])
    assert (log.plan(0), log.plan(1)) == (first, second)
    with pytest.raises(LookupError, match="no committed step 2; it knows 2 steps"):
        log.plan(2)


def test_uses_are_counted_per_group(log):
    train(log, 0, 5, 3)
    train(log, 1, 9, stale=[(3, 1, 1.0)])
    assert log.uses().tolist() == [[3, 2], [5, 1], [9, 1]]
    assert log.uses(oldest_id=5).tolist() == [[5, 1], [9, 1]]
    assert log.uses(oldest_id=10).shape == (0, 2)
    assert log.consumed_since(1) == {3, 9}
    assert log.consumed_since(2) == set()


def test_a_rewind_undoes_later_steps_and_nothing_else(log):
    first = train(log, 0, 1)
    train(log, 1, 2, stale=[(1, 1, 1.0)])
    log.choose(plan(2, 3))
    log.set_aside({4: "late", 5: "ahead", 6: "damaged"})
    log.rewind(1)
    assert (log.version, log.chosen(), log.plan(0)) == (1, None, first)
    assert log.uses().tolist() == [[1, 1]]
    assert log.aside() == {5: "ahead", 6: "damaged"}
    assert log.stats()["uses"] == {"fresh": 1, "stale": 0}
    assert train(log, 1, 2) == log.plan(1)


@pytest.mark.parametrize("step", [-1, 2])
def test_a_log_cannot_go_on_where_it_has_not_been(log, step):
    train(log, 0, 1)
    with pytest.raises(ValueError, match=rf"knows 1 committed steps and cannot go on at step {step}: checkpoint and"):
        log.rewind(step)


def test_a_new_reason_replaces_the_old_one(log):
    log.set_aside({4: "late", 5: "late"})
    log.set_aside({4: "damaged"})
    log.set_aside({})
    assert log.aside() == {4: "damaged", 5: "late"}
    assert log.stats()["aside"] == {"damaged": 1, "late": 1}


def test_the_number_of_shards_is_noted_and_compared(log, path):
    log.close()
    reader = ConsumptionLog(path, read_only=True)
    assert reader.shards == 2
    reader.close()
    with pytest.raises(ValueError, match=r"replay\.shards=3, but .* was written with replay\.shards=2"):
        ConsumptionLog(path, shards=3)
    ConsumptionLog(path, shards=2).close()


def test_it_knows_on_which_machine_each_shard_lies(log, path):
    assert log.hosts == {}
    log.set_hosts({0: "node-a", 1: "node-b"})
    log.close()
    again = ConsumptionLog(path)
    assert again.hosts == {0: "node-a", 1: "node-b"}
    again.close()


def test_a_reader_beside_the_writer_counts_what_was_committed(log, path):
    reader = ConsumptionLog(path, read_only=True)
    train(log, 0, 1, 2)
    assert reader.stats() == log.stats()
    assert reader.version == 1
    with pytest.raises(ReplayError, match="readonly database"):
        reader.drop_choice()
    reader.close()


def test_verify_names_what_contradicts_itself(log, path):
    train(log, 0, 1, 2)
    train(log, 1, 3, stale=[(1, 1, 1.0)])
    assert list(log.verify()) == []
    with sqlite3.connect(path) as db:
        db.execute("UPDATE consumption SET uses = 4 WHERE step = 1 AND group_id = 1")
        db.execute("INSERT INTO steps VALUES (3, 0.0)")
        db.execute("INSERT INTO choice VALUES (0, 2, 9, 'fresh', 0, 1.0)")
        db.execute("INSERT INTO consumption VALUES (8, 9, 'fresh', 0, 0, 1.0)")
    db.close()
    problems = [problem.split(": ", 1)[1] for problem in log.verify()]
    assert problems == [
        "row 5 of table consumption has no row in table steps",
        "3 committed steps, but the next one is 4: a step is missing",
        "step 3 is committed without any group",
        "a batch is chosen for step 2, but the next one is 4",
        "step 1 notes 4 earlier uses of group 1, but 1 earlier steps consumed it",
    ]


def test_a_shard_is_not_taken_for_a_log(tmp_path):
    ShardStore(tmp_path / "shard-000.sqlite3").close()
    with pytest.raises(ReplayError, match="is another kind of file of a replay store: no table choice"):
        ConsumptionLog(tmp_path / "shard-000.sqlite3")

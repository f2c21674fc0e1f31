"""Every rule of the audit against a store that breaks it and nothing else, and against stores that break none."""

import asyncio
import shutil
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
import xxhash

from r2vpo.records import prompt_key
from replay.audit import audit_store
from replay.audit_rules import Order, StepSettings
from replay.config import ReplayConfig
from replay.local import LocalStore
from replay.rows import shard_of_key
from replay.schema import CONSUMPTION_FILE, shard_file
from replay.serialize import encode
from tests.replay.replay_groups import make_group, make_trajectory, unscored_group
from tests.replay.stored_runs import StoredRun, tamper

SHARD, LOG = shard_file(0), CONSUMPTION_FILE
ORDER = Order(seed=0, num_prompts=50)
KEYS = [prompt_key(0, index) for index in ORDER.of_epoch(0).tolist()]
SETTINGS = StepSettings(
    first_step=0,
    max_lag=1,
    max_replay_lag=4,
    min_verdicts=2,
    groups_per_step=3,
    num_fresh=2,
    max_outstanding=1,
    may_evict=False,
)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Eleven groups of versions 0 0 1 1 1 1 3 3 0 3 1, of which 9 was late and 11 is unscored.

    Steps 0 to 2 trained on [1, 2], [3, 4, stale 1] and [5, 6, stale 1]; [7, 8, stale 2] is chosen for step 3.
    """
    folder = tmp_path_factory.mktemp("template")
    with StoredRun(folder) as run:
        versions = (0, 0, 1, 1, 1, 1, 3, 3, 0, 3)
        run.append(*(make_group(key, version=v) for key, v in zip(KEYS, versions, strict=False)))
        run.append(unscored_group(KEYS[10], version=1))
        run.train(0, fresh=[1, 2])
        run.train(1, fresh=[3, 4], stale=[1])
        run.train(2, fresh=[5, 6], stale=[1])
        run.log.set_aside({9: "late"})
        run.choose(3, fresh=[7, 8], stale=[2])
    return folder


@pytest.fixture
def stored(template, tmp_path):
    return shutil.copytree(template, tmp_path / "replay")


def look(directory, *, settings=(SETTINGS,), resume_step=0, order=ORDER, acknowledged=None):
    return audit_store(
        directory, settings=settings, resume_step=lambda: resume_step, order=order, acknowledged=acknowledged
    )


def found(directory, **how):
    return [(violation.rule, violation.sentence) for violation in look(directory, **how).violations]


def remake(file, table, *sql):
    """Replace a table by a copy without keys and uniqueness, and change that."""
    tamper(file, f"CREATE TABLE copy AS SELECT * FROM {table}")
    tamper(file, f"DROP TABLE {table}")
    tamper(file, f"ALTER TABLE copy RENAME TO {table}")
    for statement in sql:
        tamper(file, statement)


def put(file, group_id, group):
    """Replace a payload, with its checksum."""
    payload = encode(group)
    tamper(
        file,
        "UPDATE payloads SET payload = ?, checksum = ? WHERE group_id = ?",
        payload,
        xxhash.xxh3_128_hexdigest(payload),
        group_id,
    )


def test_a_sound_store_holds_and_is_counted(stored):
    audit = look(stored, acknowledged=KEYS[:11])
    assert audit.violations == ()
    assert (audit.version, audit.num_groups, audit.num_payloads, audit.num_evicted) == (3, 11, 11, 0)
    assert audit.num_trained == 8
    assert audit.batches == {0: (2, 0), 1: (3, 1), 2: (3, 1)}
    assert (audit.notes, audit.skipped) == ((), ())


@pytest.mark.parametrize(
    ("rule", "file", "sql", "sentences"),
    [
        (
            "places",
            SHARD,
            "UPDATE groups SET prompt_index = 49 WHERE id = 5",
            [f"group 5 ({KEYS[4]}) says that it answers prompt 0.49"],
        ),
        ("places", SHARD, "UPDATE meta SET value = '2' WHERE key = 'shards'", ["says that it is shard 0 of 2"]),
        (
            "steps",
            LOG,
            "DELETE FROM steps WHERE step = 1",
            ["step 1 is not committed, but step 2 is", "step 1 consumed groups, but is not committed"],
        ),
        ("steps", LOG, "DELETE FROM consumption WHERE step = 2", ["step 2 is committed without any group"]),
        (
            "uses",
            LOG,
            "UPDATE consumption SET uses = 5 WHERE step = 2 AND group_id = 1",
            [f"step 2 notes 5 earlier uses of group 1 ({KEYS[0]}), but 2 earlier steps trained on it"],
        ),
        (
            "batches",
            LOG,
            "UPDATE consumption SET kind = 'stale' WHERE step = 2 AND group_id = 5",
            ["step 2 trained on 1 fresh groups, its settings ask for 2"],
        ),
        (
            "batches",
            LOG,
            "UPDATE consumption SET position = 7 WHERE step = 2 AND group_id = 5",
            ["the groups of step 2 are not at positions 0, 1, 2, …"],
        ),
        (
            "batches",
            LOG,
            "UPDATE consumption SET weight = -1 WHERE step = 2 AND group_id = 1",
            [f"step 2 gave group 1 ({KEYS[0]}) the weight -1.0"],
        ),
        (
            "batches",
            LOG,
            "INSERT INTO consumption VALUES (2, 3, 'stale', 3, 1, 1.0)",
            ["step 2 trained on 4 groups, more than learner.groups_per_step=3"],
        ),
        (
            "lags",
            LOG,
            "UPDATE consumption SET group_id = 9 WHERE step = 2 AND group_id = 5",
            [f"step 2 trained on fresh group 9 ({KEYS[8]}) of version 0: lag 2 is above replay.max_lag=1"],
        ),
        (
            "future",
            LOG,
            "UPDATE consumption SET group_id = 10 WHERE step = 2 AND group_id = 5",
            [f"step 2 trained on group 10 ({KEYS[9]}), which holds a token of version 3: that did not exist yet"],
        ),
        (
            "verdicts",
            LOG,
            "UPDATE consumption SET group_id = 11 WHERE step = 2 AND group_id = 5",
            [f"step 2 trained on group 11 ({KEYS[10]}) with 1 verdicts, fewer than replay.min_verdicts=2"],
        ),
        (
            "trained",
            LOG,
            "UPDATE consumption SET group_id = 99 WHERE step = 2 AND group_id = 5",
            ["step 2 trained on group 99, which the store does not hold"],
        ),
        (
            "aside",
            LOG,
            "INSERT INTO set_aside VALUES (5, 'ahead')",
            [f"step 2 trained on group 5 ({KEYS[4]}), which is set aside as ahead"],
        ),
        ("aside", LOG, "INSERT INTO set_aside VALUES (99, 'late')", ["group 99 is set aside as late, but the store"]),
        ("aside", LOG, "INSERT INTO set_aside VALUES (5, 'tired')", ["is set aside as tired, which is no reason"]),
        ("choice", LOG, "UPDATE choice SET step = 9", ["a batch is chosen for step 9, but the next step is 3"]),
        ("choice", LOG, "UPDATE choice SET group_id = 99 WHERE group_id = 7", ["group 99 is chosen for step 3"]),
        (
            "payloads",
            SHARD,
            "UPDATE payloads SET payload = X'00' WHERE group_id = 5",
            [f"group 5 ({KEYS[4]}): the bytes of its payload do not match their checksum"],
        ),
        (
            "payloads",
            SHARD,
            "DELETE FROM payloads WHERE group_id = 10",
            [f"group 10 ({KEYS[9]}): its payload is missing"],
        ),
        (
            "payloads",
            SHARD,
            "UPDATE payloads SET group_id = 99 WHERE group_id = 9",
            ["holds a payload of group 99, but no such group", "group 9 (", "its payload is missing"],
        ),
        (
            "payloads",
            SHARD,
            "UPDATE groups SET newest_version = 2 WHERE id = 9",
            [f"group 9 ({KEYS[8]}): its row says newest_version=2, its payload 0"],
        ),
        (
            "payloads",
            SHARD,
            "UPDATE payloads SET payload = 'text', checksum = '' WHERE group_id = 9",
            ["do not match their checksum"],
        ),
    ],
)
def test_what_is_changed_behind_its_back_is_named_by_the_one_rule_that_it_breaks(stored, rule, file, sql, sentences):
    tamper(stored / file, sql)
    violations = found(stored)
    assert {name for name, _ in violations} == {rule}
    text = "\n".join(sentence for _, sentence in violations)
    assert all(sentence in text for sentence in sentences), text


def test_a_key_with_two_groups_is_named(stored):
    remake(
        stored / SHARD,
        "groups",
        "INSERT INTO groups SELECT 12, key, epoch, prompt_index, worker, lease_version, oldest_version, newest_version,"
        " num_trajectories, num_tokens, num_sampled_tokens, num_with_reward, has_signal, reward_mean, reward_spread,"
        " num_scored, num_truncated, num_no_verdict, num_timeout, num_error, num_bytes, appended_s, evicted_s"
        " FROM groups WHERE id = 4",
        "INSERT INTO payloads SELECT 12, payload, checksum FROM payloads WHERE group_id = 4",
    )
    assert found(stored) == [("keys", f"key {KEYS[3]} has 2 groups: 4, 12")]


def test_a_key_with_groups_in_two_shards_is_named(tmp_path):
    key = next(key for key in KEYS if shard_of_key(key, 2) == 0)
    with StoredRun(tmp_path, shards=2) as run:
        run.append(make_group(key))
    file = tmp_path / shard_file(1)
    connection = sqlite3.connect(file)
    connection.execute("ATTACH ? AS other", (str(tmp_path / shard_file(0)),))
    names = [row[1] for row in connection.execute("PRAGMA table_info(groups)")][1:]
    with connection:
        listed = ", ".join(names)
        connection.execute(f"INSERT INTO groups (id, {listed}) SELECT 2, {listed} FROM other.groups")
        connection.execute("INSERT INTO payloads SELECT 2, payload, checksum FROM other.payloads")
    connection.close()
    assert {rule for rule, _ in found(tmp_path)} == {"keys", "places"}
    assert ("keys", f"key {key} has 2 groups: 1, 2") in found(tmp_path)


def test_a_group_that_a_step_consumed_twice_is_named(stored):
    remake(
        stored / LOG,
        "consumption",
        "INSERT INTO consumption SELECT * FROM consumption WHERE step = 1 AND group_id = 1",
    )
    assert found(stored) == [("once", f"step 1 trained on group 1 ({KEYS[0]}) more than once")]


def test_a_group_that_was_fresh_twice_is_named(stored):
    tamper(stored / LOG, "UPDATE consumption SET kind = 'fresh' WHERE step = 1 AND group_id = 1")
    tamper(stored / LOG, "UPDATE consumption SET kind = 'stale' WHERE step = 1 AND group_id = 4")
    assert found(stored) == [("fresh", f"step 1 trained on group 1 ({KEYS[0]}) as fresh, but step 0 had trained on it")]


def test_a_stale_lag_is_held_against_the_settings_of_the_start_that_trained_it(stored):
    # Group 1 of version 0 was trained as stale at steps 1 and 2.
    strict = replace(SETTINGS, max_replay_lag=1)
    sentence = f"step 2 trained on stale group 1 ({KEYS[0]}) of version 0: lag 2 is above replay.max_replay_lag=1"
    assert found(stored, settings=[strict]) == [("lags", sentence)]
    assert found(stored, settings=[strict, replace(SETTINGS, first_step=2)]) == []
    assert found(stored, settings=[SETTINGS, replace(strict, first_step=2)]) == [("lags", sentence)]
    # A start that was killed before its first step has bound nothing, wherever it would have begun.
    assert found(stored, settings=[SETTINGS, replace(strict, first_step=2, started_s=4e9)]) == []


def test_a_group_that_was_trained_on_and_is_gone_is_named(stored):
    for sql in ("DELETE FROM payloads WHERE group_id = 5", "DELETE FROM groups WHERE id = 5"):
        tamper(stored / SHARD, sql)
    assert found(stored) == [("trained", "step 2 trained on group 5, which the store does not hold")]


def test_an_eviction_is_lawful_only_where_a_setting_asks_for_it_and_no_resume_needs_the_group(stored):
    evicting = [replace(SETTINGS, may_evict=True)]
    for sql in ("DELETE FROM payloads WHERE group_id = 4", "UPDATE groups SET evicted_s = 1.0 WHERE id = 4"):
        tamper(stored / SHARD, sql)
    audit = look(stored, settings=evicting, resume_step=2)
    assert (audit.violations, audit.num_evicted, audit.num_payloads) == ((), 1, 10)
    assert found(stored, settings=evicting, resume_step=1) == [
        ("trained", f"group 4 ({KEYS[3]}) is evicted, but step 1 trained on it and a resume goes back to step 1")
    ]
    assert found(stored, resume_step=2) == [
        ("trained", f"group 4 ({KEYS[3]}) is evicted, although no setting asks for it")
    ]


def test_a_payload_that_is_there_although_its_group_is_evicted_is_named(stored):
    tamper(stored / SHARD, "UPDATE groups SET evicted_s = 1.0 WHERE id = 4")
    assert found(stored, settings=[replace(SETTINGS, may_evict=True)], resume_step=2) == [
        ("payloads", f"group 4 ({KEYS[3]}): it is marked as evicted, but its payload is there")
    ]


def test_prompts_that_were_passed_over_are_named_once_they_are_more_than_may_be_in_flight(stored):
    tamper(stored / SHARD, "DELETE FROM payloads WHERE group_id = 10")
    tamper(stored / SHARD, "DELETE FROM groups WHERE id = 10")
    assert found(stored) == []  # it may be in flight
    for sql in ("DELETE FROM payloads WHERE group_id = 9", "DELETE FROM groups WHERE id = 9"):
        tamper(stored / SHARD, sql)
    tamper(stored / LOG, "DELETE FROM set_aside")
    assert found(stored) == [
        (
            "prompts",
            f"2 prompts were passed over ({KEYS[8]}, {KEYS[9]}): later ones of the order are answered, and at most 1 "
            "may be in flight at once",
        )
    ]


def test_another_order_than_the_seeds_passes_prompts_over(stored):
    assert {rule for rule, _ in found(stored, order=Order(seed=1, num_prompts=50))} == {"prompts"}


@pytest.mark.parametrize(
    ("change", "rule", "sentence"),
    [
        ({"behavior_logprob_T": (3, np.nan)}, "tokens", "1 token sampled without a finite log-prob, the first in"),
        (
            {"behavior_logprob_T": (3, 0.5)},
            "tokens",
            "1 token sampled with a log-prob above 0, the first",
        ),
        ({"behavior_logprob_T": (0, -0.5)}, "tokens", "1 token of the prompt with a log-prob"),
        ({"version_T": (3, -1)}, "tokens", "1 token sampled without a version"),
        ({"version_T": (0, 1)}, "tokens", "1 token of the prompt with a version"),
        ({"version_T": (2, 2)}, "spans", "version 1 follows version 2 in trajectory 0: versions of a trajectory never"),
    ],
)
def test_a_token_that_is_not_what_it_should_be_is_named(tmp_path, change, rule, sentence):
    # Two prompt tokens, then three sampled at versions 1, 1 and 2.
    sound = make_trajectory(1.0, version=[1, 1, 2])
    arrays = {name: getattr(sound, name).copy() for name in change}
    group = make_group(KEYS[0], version=1, newest=2)
    with StoredRun(tmp_path) as run:
        run.append(group)
    broken = replace(group, trajectories=(replace(sound, **arrays), group.trajectories[1]))
    for name, (at, value) in change.items():  # behind the back of the record, which refuses some of them
        arrays[name][at] = value
    lease = min(broken.oldest_version, group.lease_version)  # the encoder refuses an older token
    put(tmp_path / SHARD, 1, replace(broken, lease_version=lease))
    violations = [(name, text) for name, text in found(tmp_path) if name != "payloads"]
    assert [name for name, _ in violations] == [rule]
    assert sentence in violations[0][1]


def test_a_token_older_than_its_lease_is_named(tmp_path):
    group = make_group(KEYS[0], version=1, newest=2, lease_version=0)
    with StoredRun(tmp_path) as run:
        run.append(group)
    payload = encode(group).replace(b'\\"lease_version\\": 0', b'\\"lease_version\\": 2')
    tamper(
        tmp_path / SHARD, "UPDATE payloads SET payload = ?, checksum = ?", payload, xxhash.xxh3_128_hexdigest(payload)
    )
    tamper(tmp_path / SHARD, "UPDATE groups SET lease_version = 2")
    assert found(tmp_path) == [
        (
            "spans",
            f"group 1 ({KEYS[0]}): a token of version 1 in trajectory 0 is older than the lease, which was given at "
            "version 2",
        )
    ]


def test_an_acknowledged_group_that_is_lost_is_named(stored):
    assert found(stored, acknowledged=[KEYS[3], KEYS[20]]) == [
        ("acknowledged", f"the group of prompt {KEYS[20]} was acknowledged, but the store does not hold it")
    ]
    [(rule, sentence)] = found(stored, acknowledged=["0.017"])
    assert rule == "acknowledged"
    assert "0.017" in sentence


def test_a_shard_that_cannot_be_read_is_named_and_the_others_are_looked_at(tmp_path):
    with StoredRun(tmp_path, shards=2) as run:
        ids = run.append(*(make_group(key) for key in KEYS[:6]))
        run.train(0, fresh=ids)
    here = [key for key in KEYS[:6] if shard_of_key(key, 2) == 0]
    (tmp_path / shard_file(1)).write_bytes(b"no database" * 400)
    settings = [replace(SETTINGS, groups_per_step=6, num_fresh=6)]
    audit = look(tmp_path, settings=settings, acknowledged=KEYS[:6])
    assert [violation.rule for violation in audit.violations] == ["files"]
    assert shard_file(1) in audit.violations[0].sentence
    assert audit.num_payloads == len(here)
    assert audit.notes == (f"{6 - len(here)} acknowledged groups belong to shards that could not be looked at",)


def test_a_shard_of_another_host_is_a_note(tmp_path):
    with StoredRun(tmp_path, shards=2) as run:
        run.append(*(make_group(key) for key in KEYS[:6]))
        run.log.set_hosts({0: "here", 1: "node-b"})
    (tmp_path / shard_file(1)).unlink()
    audit = look(tmp_path)
    assert audit.violations == ()
    assert audit.notes == (f"{shard_file(1)} is not here, it lies on host node-b: its groups were not looked at",)


def test_without_settings_no_bound_is_checked_and_that_is_said(stored):
    tamper(stored / LOG, "UPDATE consumption SET group_id = 9 WHERE step = 2 AND group_id = 5")
    audit = look(stored, settings=(), order=None)
    assert audit.violations == ()
    assert audit.skipped == ("batches", "lags", "verdicts", "prompts", "acknowledged")


class Driven:
    """A store driven as a job drives it, through any number of lives."""

    def __init__(self, directory, **config):
        self.config = ReplayConfig(**{"max_lag": 2, "stale_fraction": 0.5, "max_replay_lag": 4, **config})
        self._directory = directory
        self.acknowledged: list[str] = []

    async def live(self, steps, *, resume_step=None, kept_from=0, before_commit=lambda store, step: None):
        """Train ``steps``, four groups each; a group that is still under way at the end is dropped."""
        run = {"num_prompts": 11, "groups_per_step": 4, "steps": 1000, "seed": 7}
        store = LocalStore(self._directory, config=self.config, resume_step=resume_step, **run)
        await store.open()
        for step in steps:
            leases = (await store.lease(worker="r0", stamp=(0, step), count=4, timeout_s=0)).leases
            for lease in leases:
                group = make_group(lease.key, version=step, rewards=(0.0, 1.0, 0.0))
                await store.append(group)
                self.acknowledged.append(lease.key)
            before_commit(store, step)
            batch = await store.sample(step=step, timeout_s=0)
            await store.commit(step=step, group_ids=batch.group_ids)
            if step >= kept_from:
                await store.service.keep_from(step=step)
                while (sweep := store.service._sweep) is not None and not sweep.done():
                    await asyncio.sleep(0)
        await store.close()

    @property
    def settings(self):
        return StepSettings(
            first_step=0,
            max_lag=self.config.max_lag,
            max_replay_lag=self.config.max_replay_lag,
            min_verdicts=2,
            groups_per_step=4,
            num_fresh=2,
            max_outstanding=6,
            may_evict=self.config.capacity_groups is not None,
        )


@pytest.mark.parametrize("shards", [1, 3])
async def test_a_store_that_was_resumed_evicted_from_and_damaged_holds(tmp_path, shards):
    driven = Driven(tmp_path, shards=shards, capacity_groups=40)
    await driven.live(range(12), kept_from=1)
    await driven.live(range(8, 30), resume_step=8, kept_from=9)

    def flip(store, step):
        if step == 33:  # in a group that waits, and that the step will draw
            victim = min(store.service._index.dispatcher.waiting)
            file = tmp_path / shard_file((victim - 1) % shards)
            connection = sqlite3.connect(file)
            with connection:
                connection.execute("UPDATE payloads SET payload = zeroblob(8) WHERE group_id = ?", (victim,))
            connection.close()

    await driven.live(range(30, 34), resume_step=30, kept_from=31, before_commit=flip)
    audit = look(
        tmp_path,
        settings=[driven.settings],
        resume_step=33,
        order=Order(seed=7, num_prompts=11),
        acknowledged=driven.acknowledged,
    )
    assert audit.violations == ()
    assert audit.version == 34
    assert audit.num_evicted > 0
    assert any("never trained on and is set aside as damaged" in note for note in audit.notes)
    assert audit.skipped == ()


async def test_a_store_whose_writers_still_have_it_open_holds(tmp_path):
    driven = Driven(tmp_path)
    audits = []
    await driven.live(
        range(4),
        before_commit=lambda store, step: audits.append(
            look(tmp_path, settings=[driven.settings], order=Order(seed=7, num_prompts=11))
        ),
    )
    assert [(audit.version, audit.violations) for audit in audits] == [(0, ()), (1, ()), (2, ()), (3, ())]


def test_the_audit_leaves_no_file_behind(stored):
    before = sorted(path.name for path in stored.iterdir())
    look(stored)
    assert sorted(path.name for path in stored.iterdir()) == before

from dataclasses import replace

import pytest

from benchmarks.faults.outcomes import DrilledRunResult, Outcome, figures, keep, kept
from benchmarks.faults.roles import IN_QUICK, ROLES, Drill, all_drills

DRIVER = Drill(role="driver", phase="append", by="SIGKILL", seed=0)
WORKER = Drill(role="rollout worker", phase="append", by="SIGKILL", seed=0)
LEARNER = Drill(role="learner rank", phase="append", by="SIGSTOP", seed=0)


def test_all_drills_are_every_role_in_each_of_its_phases_by_both_signals_and_in_another_order_for_every_seed():
    drills = all_drills(range(3))
    pairs = sum(len(role.phases) for role in ROLES.values())
    assert len(drills) == len(set(drills)) == pairs * 2 * 3
    size = pairs * 2
    of_seed = [[replace(drill, seed=0) for drill in drills[n * size : (n + 1) * size]] for n in range(3)]
    assert set(of_seed[0]) == set(of_seed[1]) == set(of_seed[2])
    assert of_seed[0] != of_seed[1] != of_seed[2]
    assert set(IN_QUICK) <= set(drills)


def runs():
    """Two runs in which all went well."""
    replaced = [
        Outcome(drill=WORKER, went_on=True, in_phase=True, replaced=ratio, stepped_meanwhile=True)
        for ratio in (0.9, 1.1, 1.9)
    ]
    undone = [Outcome(drill=LEARNER, went_on=True, in_phase=True, steps_lost=0, steps_redone=steps) for steps in (3, 1)]
    killed = [Outcome(drill=replace(DRIVER, seed=seed), went_on=True, in_phase=False) for seed in range(2)]
    return [
        DrilledRunResult(outcomes=[*replaced, killed[0]], has_ended=True),
        DrilledRunResult(outcomes=[*undone, killed[1]], has_ended=True),
    ]


def rows(of):
    return {row.name.removeprefix("drills: "): row for row in figures(of)}


def test_figures_of_runs_in_which_all_went_well():
    found = rows(runs())
    assert all(row.ok for row in found.values())
    assert found["worker killed to successor ready"].value == 1.1
    assert found["the same, the slowest"].value == 1.9
    assert found["steps undone by a learner's death"].value == 3
    assert (found["faults"].value, found["faults whose phase was seen"].value) == (7, 5 / 7)


def test_one_run_that_does_not_end_is_a_miss_and_so_is_each_violation():
    first, second = runs()
    second.has_ended = False
    first.violations, second.violations = {"acknowledged": 2, "lags": 1}, {"once": 1, "lags": 3}
    found = rows([first, second])
    assert (found["runs that reach their target step"].value, found["runs that reach their target step"].ok) == (0.5, 0)
    assert [found[name].value for name in ("acknowledged groups lost", "groups trained twice in a step")] == [2, 1]
    assert (found["other violations"].value, found["other violations"].ok) == (4, False)


@pytest.mark.parametrize(
    ("run", "outcome", "change", "row"),
    [
        (1, 2, {"went_on": False}, f"{DRIVER.name}: the run went on"),
        (1, 0, {"steps_lost": 1}, "checkpointed steps undone by a learner's death"),
        (0, 1, {"stepped_meanwhile": False}, "the learner stepped meanwhile"),
    ],
)
def test_one_fault_that_is_not_cured_as_it_should_be_is_a_miss(run, outcome, change, row):
    found = runs()
    found[run].outcomes[outcome] = replace(found[run].outcomes[outcome], **change)
    missed = [name for name, of in rows(found).items() if not of.ok]
    assert missed == [row]


def test_runs_are_kept_and_read_again_as_they_were(tmp_path):
    file = tmp_path / "build" / "runs.jsonl"
    assert kept(file) == []
    for run in runs():
        keep(run, file)
    assert kept(file) == runs()

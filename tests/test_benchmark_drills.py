from collections import Counter
from dataclasses import replace
from signal import SIGKILL, SIGSTOP

from benchmarks.faults.drills import IN_QUICK, ROLES, Drill, Findings, all_drills, figures


def test_all_drills_are_every_role_in_each_of_its_phases_by_both_signals_and_in_another_order_for_every_seed():
    drills = all_drills(seeds=3)
    pairs = sum(len(role.phases) for role in ROLES.values())
    assert len(drills) == len(set(drills)) == pairs * 2 * 3
    size = pairs * 2
    of_seed = [[replace(drill, seed=0) for drill in drills[n * size : (n + 1) * size]] for n in range(3)]
    assert set(of_seed[0]) == set(of_seed[1]) == set(of_seed[2])
    assert of_seed[0] != of_seed[1] != of_seed[2]
    assert {Drill(role=role, phase=phase, by=by, seed=0) for role, phase, by in IN_QUICK} <= set(drills)


def rows(**changes):
    found = Findings(
        runs=2,
        ended=2,
        survived={Drill(role="driver", phase="append", by=SIGKILL, seed=0).name: [True, True]},
        in_phase=[True, False],
        replaced=[0.9, 1.1, 1.9],
        stepped_meanwhile=[True, True],
        steps_lost=[0, 0],
        steps_redone=[3, 1],
    )
    return {row.name.removeprefix("drills: "): row for row in figures(replace(found, **changes))}


def test_figures_of_runs_in_which_all_went_well():
    found = rows()
    assert all(row.ok for row in found.values())
    assert found["worker killed to successor ready"].value == 1.1
    assert found["steps undone by a learner's death"].value == 3
    assert found["faults whose phase was seen"].value == 0.5


def test_one_run_that_does_not_end_one_group_lost_and_one_fault_not_cured_are_misses():
    assert not rows(ended=1)["runs that reach their target step"].ok
    lost = rows(violations=Counter(acknowledged=2, once=1, lags=4))
    assert [lost[name].value for name in ("acknowledged groups lost", "groups trained twice in a step")] == [2, 1]
    assert (lost["other violations"].value, lost["other violations"].ok) == (4, False)
    name = Drill(role="raylet", phase="append", by=SIGSTOP, seed=1).name
    assert not rows(survived={name: [True, False]})[f"{name}: the run went on"].ok
    assert not rows(steps_lost=[0, 1])["checkpointed steps undone by a learner's death"].ok
    assert not rows(stepped_meanwhile=[True, False])["the learner stepped meanwhile"].ok

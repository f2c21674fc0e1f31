import math

import pytest

from r2vpo.job.differences import closing, compare, first_difference, table

RECORDED = {"step": 7, "time/step_s": 1.0, "replay/groups": 40, "step/loss": -0.25, "dual/second_moment": 2e-4}
FLOAT32 = 1e-6


def at(step=7, *, recorded=RECORDED, rounding=FLOAT32, **recomputed):
    """The comparison of ``recorded`` with itself, except for what is given as ``room__name=value``."""
    same = {name: value for name, value in recorded.items() if name.startswith(("step/", "dual/", "train/"))}
    changed = {name.replace("__", "/"): value for name, value in recomputed.items()}
    return compare(step, recorded=recorded, recomputed={**same, "time/step_s": 9.0, **changed}, rounding=rounding)


def reading(comparison, name):
    return next(r for r in comparison.readings if r.name == name)


def test_only_what_the_learner_says_is_compared_and_no_times():
    assert [r.name for r in at().readings] == ["step/loss", "dual/second_moment"]


def test_equal_numbers_are_identical():
    comparison = at()
    assert comparison.is_same
    assert comparison.num_identical == 2
    assert {r.verdict for r in comparison.readings} == {"identical"}


@pytest.mark.parametrize(
    ("v", "verdict"),
    [
        (2e-4, "identical"),
        (2e-4 + 0.5e-9, "same"),  # below the floor of 1e-9, although 2.5e-6 relative
        (2e-4 + 2e-9, "DIFFERS"),  # 1e-5 relative
        (math.nan, "DIFFERS"),
    ],
)
def test_small_figures_are_compared_relatively(v, verdict):
    assert reading(at(dual__second_moment=v), "dual/second_moment").verdict == verdict


def test_the_loss_is_compared_with_1_because_it_cancels():
    assert reading(at(step__loss=-0.25 + 9e-7), "step/loss").is_same  # 3.6e-6 relative
    assert not reading(at(step__loss=-0.25 + 2e-6), "step/loss").is_same


def test_on_a_gpu_five_percent_are_the_same_but_counts_stay_exact():
    recorded = {"dual/lambda": 2.0, "train/tokens": 100.0}
    near = at(recorded=recorded, rounding=5e-2, dual__lambda=2.09, train__tokens=100.0)
    far = at(recorded=recorded, rounding=5e-2, dual__lambda=2.11, train__tokens=100.0)
    assert [near.is_same, far.is_same] == [True, False]
    assert not at(recorded=recorded, rounding=5e-2, dual__lambda=2.0, train__tokens=101.0).is_same


def test_a_recorded_null_equals_what_json_cannot_hold():
    recorded = {"step/loss": None}
    assert at(recorded=recorded, step__loss=math.inf).is_same
    assert not at(recorded=recorded, step__loss=0.5).is_same


def test_a_metric_that_only_one_side_has_differs():
    extra = at(step__grad_norm=1.0)
    assert [r.name for r in extra.differing] == ["step/grad_norm"]
    assert "step/grad_norm – recorded, 1 recomputed" in str(extra.differing[0])
    lost = compare(7, recorded=RECORDED, recomputed={"step/loss": -0.25, "dual/lambda": 0.0}, rounding=FLOAT32)
    assert {r.name for r in lost.differing} == {"dual/second_moment", "dual/lambda"}


def test_a_difference_of_the_batch_comes_first_and_is_called_one():
    recorded = {"step/loss": 1.0, "train/tokens": 384.0}
    comparison = at(recorded=recorded, step__loss=1.5, train__tokens=380.0)
    assert [r.name for r in comparison.differing] == ["train/tokens", "step/loss"]
    sentence = closing([comparison], origin="the model itself", rounding=FLOAT32)
    assert sentence == (
        "step 7, recomputed from the model itself, DIFFERS in 2 of 2 metrics: the batch is not the one that was "
        "recorded: train/tokens 384 recorded, 380 recomputed, 1.0e-02 relative"
    )


def test_the_sentence_names_the_first_step_that_differs_and_where_it_begins():
    comparisons = [at(5), at(6, step__loss=-0.5), at(7, step__loss=-0.75, dual__second_moment=1e-3)]
    wrong = first_difference(comparisons)
    assert wrong is not None
    assert wrong.step == 6
    assert closing(comparisons, origin="checkpoint step-000005", rounding=FLOAT32) == (
        "step 7, recomputed from checkpoint step-000005 through 3 steps, DIFFERS in 2 of 2 metrics; first at step 6: "
        "on the same batch, step/loss -0.25 recorded, -0.5 recomputed, 1.0e+00 relative"
    )


def test_a_step_that_is_the_same_after_one_that_was_not_is_no_full_success():
    sentence = closing([at(6, step__loss=-0.5), at(7)], origin="x", rounding=FLOAT32)
    assert "is the same within 1e-06, but step 6 on the way differs" in sentence


def test_the_sentence_of_a_success_says_how_close_it_is():
    assert closing([at()], origin="x", rounding=FLOAT32).endswith("all 2 metrics are identical to the last bit")
    close = closing([at(6, step__loss=-0.2500008), at()], origin="x", rounding=FLOAT32)
    assert close.endswith("difference at step 6, step/loss -0.25 recorded, -0.2500008 recomputed, 3.2e-06 relative")


def test_the_table_fits_and_shows_what_differs_even_if_it_is_not_usually_shown():
    recorded = {"step/loss": 1.0, "step/odd": 2.0, "step/even": 3.0}
    lines = table(at(recorded=recorded, step__odd=2.5), width=60).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["step/loss", "1", "1", "0", "identical"],
        ["step/odd", "2", "2.5", "+5.0e-01", "DIFFERS"],
    ]
    assert max(map(len, lines)) <= 60
    assert max(map(len, table(at(recorded=recorded, step__odd=2.5), width=20).splitlines())) == 20

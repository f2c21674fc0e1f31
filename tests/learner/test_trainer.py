"""The learner on the real DeepSpeed engine, on one rank and on two; `scenarios.py` measures, this file judges."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.learner.batches import sampled_batches

pytestmark = pytest.mark.engine

TWO_RANKS = [
    *(f"trained-zero{stage}" for stage in (0, 1, 2, 3)),
    "trained-one-by-one-zero3",
    "trained-sequences",
    "trained-early",
    "bad-step-zero0",
    "bad-step-zero3",
    "broken-weights-zero2",
    "broken-weights-zero3",
    "no-room-zero0",
    "no-room-zero3",
    "empty-zero3",
    "resumed-zero3",
    "published-zero3",
    "memory-zero3",
]


def measure(directory, ranks, scenarios):
    """Run scenarios on ``ranks`` processes of their own: DeepSpeed and its process group are global to a process."""
    sampled_batches(directory / "model", steps=0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Pieces of memory above 1 MiB go back to the system once they are freed, so that a peak is what was held at once.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-m", "tests.learner.scenarios"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(port), str(directory), *scenarios],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(p.returncode == 0 for p in processes), "\n".join(errors[-4000:] for _, errors in outputs)
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)}


@pytest.fixture(scope="module")
def one_rank(directories):
    from tests.learner.scenarios import SCENARIOS

    return Results(measure(directories[1], 1, SCENARIOS))


@pytest.fixture(scope="module")
def two_ranks(directories):
    return Results(measure(directories[2], 2, TWO_RANKS))


class Results(dict):
    def __getitem__(self, name):
        result = super().__getitem__(name)
        assert not (isinstance(result, dict) and "error" in result), result["error"]
        return result


def weights(directory, name):
    with np.load(directory / f"{name}.npz") as saved:
        return dict(saved)


def assert_alike(first, second, *, tolerance):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=0, atol=tolerance, err_msg=name)


def plain_run(name):
    """The scenario with the same settings of the algorithm on one rank, without sharding, in passes of some size."""
    return (
        name
        if name == "trained-early"
        else "trained-sequences"
        if name.startswith("trained-sequences")
        else "trained-zero0"
    )


ALGORITHMS = ["r2vpo", "grpo", "grpo_decoupled", "sequences", "constant"]
REFERENCES = [*ALGORITHMS, "early", "zero1", "zero2", "zero3", *(f"weighted-{name}" for name in ALGORITHMS)]


@pytest.mark.parametrize("case", REFERENCES)
def test_the_learner_takes_the_steps_of_the_synchronous_reference(one_rank, case):
    result = one_rank[f"reference-{case}"]
    assert result["optimizer_steps"] == 12 if case != "early" else 4 <= result["optimizer_steps"] < 24
    assert 0 < result["proximal_tokens"] < result["tokens"]
    assert result["moved"] > 1e-3
    assert all(gap <= 1e-5 for gap in result["gaps"].values()), result["gaps"]


@pytest.mark.parametrize(
    "name",
    [
        "trained-large-micro-batches",
        "trained-one-by-one-zero0",
        "trained-checkpointing",
        "trained-zero3",
        "trained-sequences-large-micro-batches",
    ],
)
def test_packing_and_sharding_do_not_change_the_step(one_rank, directories, name):
    base = plain_run(name)
    plain, other = one_rank[base], one_rank[name]
    assert_alike(plain[-1], other[-1], tolerance=1e-4)
    assert other[-1]["step/loss"] == pytest.approx(plain[-1]["step/loss"], abs=1e-5)
    before, after = (weights(directories[1], f"{n}-ranks1") for n in (base, name))
    assert_alike(before, after, tolerance=1e-5)


@pytest.mark.parametrize("name", [name for name in TWO_RANKS if name.startswith("trained")])
def test_two_ranks_take_the_step_of_one(one_rank, two_ranks, directories, name):
    base = plain_run(name)
    one, two = one_rank[base], two_ranks[name]
    for ours, theirs in zip(one, two, strict=True):
        for key in ("step/loss", "dual/second_moment", "dual/lambda", "control/scale", "step/lr", "step/entropy"):
            assert theirs[key] == pytest.approx(ours[key], abs=1e-5), key
        assert_alike(ours, theirs, tolerance=1e-4)
    before, after = weights(directories[1], f"{base}-ranks1"), weights(directories[2], f"{name}-ranks2")
    assert_alike(before, after, tolerance=1e-5)


@pytest.mark.parametrize("stage", [0, 3])
def test_bfloat16_trains_with_float32_master_weights_close_to_float32(one_rank, directories, stage):
    exact, rounded = one_rank["trained-zero0"], one_rank[f"trained-bfloat16-zero{stage}"]
    assert rounded[-1]["step/loss"] == pytest.approx(exact[-1]["step/loss"], abs=0.01)
    assert rounded[-1]["dual/second_moment"] == pytest.approx(exact[-1]["dual/second_moment"], rel=0.1)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 3)])
def test_a_step_that_is_not_finite_moves_nothing_and_the_next_one_works(request, ranks, stage):
    results = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")
    assert_survived(results[f"bad-step-zero{stage}"])


def test_a_step_that_is_not_finite_moves_nothing_in_bfloat16(one_rank):
    assert_survived(one_rank["bad-step-bfloat16"])


def assert_survived(result):
    assert result["bad_steps"] == 1
    assert result["unchanged"] == 0
    assert result["after_bad"] == [0, 1.0, 1.0, 1]  # optimiser steps, λ, s, version
    assert "step/loss" not in result["keys"]
    assert result["bad_steps_then"] == 0
    assert result["moved_then"] > 1e-5
    assert np.isfinite(result["loss_then"])
    [line] = result["log"]
    assert line.startswith(
        "learner step 0: optimiser step 1 of 1 was discarded, not finite: behaviour log-prob of 1 token; loss nan, "
    )
    assert line.endswith("; groups (prompts): 0 (0.0)")


@pytest.mark.parametrize("part", ["loss", "gradient"])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_is_discarded_if_either_its_loss_or_its_gradient_is_not_finite(one_rank, stage, part):
    assert one_rank[f"half-bad-zero{stage}"][part] == {"bad_steps": 1, "unchanged": 0, "cause": part}


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 2), (1, 3), (2, 2), (2, 3)])
def test_weights_that_are_not_finite_are_neither_published_nor_saved(request, ranks, stage):
    results = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")[f"broken-weights-zero{stage}"]
    assert results["at_once"].startswith("WeightsNotFinite: model.path=")
    for use in ("published", "saved"):
        assert results[use].startswith("WeightsNotFinite: version 2 of the weights holds numbers that are not finite")
    assert results["left"] == ["step-000001"]


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 2), (1, 3), (2, 0), (2, 3)])
def test_a_checkpoint_for_which_there_is_no_room_leaves_the_earlier_one_and_a_learner_that_goes_on(
    request, ranks, stage
):
    results = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")[f"no-room-zero{stage}"]
    for rank in {0, ranks - 1}:
        if (rank, stage) != (1, 0):  # with stage 0 rank 0 alone writes
            sentence = f"SaveFailed: the checkpoint of version 1 was not written (rank {rank}: "
            assert results[f"rank{rank}"].startswith(sentence)
    assert all(left == ["step-000000"] or stage == 0 for left in results["left"])
    assert np.isfinite(results["loss_then"])
    assert results["path_then"] == "step-000002"


def test_a_damaged_checkpoint_is_refused_by_name_and_with_a_way_on(one_rank):
    results = one_rank["damaged-checkpoint"]
    for part in ("overwritten", "text", "flipped"):
        assert "damaged-checkpoints/step-000000/deepspeed/mp_rank_00_model_states.pt is damaged" in results[part]
    assert "step-000000 is damaged (its state lacks 'budget'); restore it, or remove " in results["lacking"]


def test_a_learner_with_other_settings_goes_on_from_a_checkpoint_with_them(one_rank):
    result = one_rank["changed-on-resume"]
    assert result["optimizer"] == [0.5, 0.8, 0.9, 1e-4]
    assert result["moments"] == 0
    assert result["lambda"] == 0.7
    [line] = result["log"]
    assert line.startswith("the budget starts anew: the state of the dual has the entries ['lam', 'smoothed']")


@pytest.mark.parametrize("stage", [0, 3])
def test_with_a_learning_rate_of_0_nothing_moves_and_no_actuator_acts(one_rank, stage):
    result = one_rank[f"control-zero{stage}"]
    assert result["moved"] == 0
    assert result["second_moment"] < 1e-10  # rounding: the two forward passes are packed differently
    assert (result["scale"], result["lambda"], result["lr"]) == (1, 1.0, 0)
    assert result["optimizer_steps"] == [6, 6, 6, 6]  # 3 minibatches, twice


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 3), (2, 3)])
def test_a_minibatch_without_verdicts_makes_no_optimiser_step(request, ranks, stage):
    results = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")
    result = results[f"empty-zero{stage}"]
    assert result["half"]["learner/empty_minibatches"] == 1
    assert result["half"]["train/tokens"] == 6
    assert result["half"]["train/without_verdict"] == 2
    assert "step/loss" in result["half"]
    assert result["none"]["learner/empty_minibatches"] == 2
    assert result["none"]["train/tokens"] == 0
    assert not {"step/loss", "train/reward_mean", "train/lag_max"} & result["none"].keys()
    assert result["flat"]["train/zero_signal_fraction"] == 1
    assert result["flat"]["learner/empty_minibatches"] == 0
    assert result["scale_kept"]


def test_with_an_inexact_engine_the_first_optimiser_step_starts_at_the_proximal_policy(one_rank):
    exact, inexact = (one_rank["first-second-moment"][str(flag)] for flag in (True, False))
    assert exact["train/proximal_tokens"] == 0
    assert exact["dual/second_moment"] > 1e-2  # the behaviour log-probs are noisy and at another temperature
    assert inexact["train/proximal_tokens"] == inexact["train/tokens"]
    assert inexact["dual/second_moment"] < 1e-9
    assert inexact["ratio/ratio_second_moment"] == pytest.approx(exact["ratio/ratio_second_moment"], rel=1e-4)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 1), (1, 2), (1, 3), (2, 3)])
def test_a_resumed_run_repeats_its_steps_bit_for_bit(request, ranks, stage):
    result = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")[f"resumed-zero{stage}"]
    assert result["path"] == f"checkpoints-{stage}/step-000002"
    assert result["left"] == ["step-000002"]
    assert result["same_metrics"]
    assert result["same_state"]
    assert result["gap"] == 0


def test_a_checkpoint_of_learners_laid_out_differently_is_refused(one_rank):
    assert one_rank["refused-checkpoint"] == (
        "learner.zero_stage=2, but the checkpoint was written with 0; resume with learner.zero_stage=0"
    )


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 3), (2, 3)])
def test_published_and_exported_weights_are_those_of_the_learner(request, ranks, stage):
    result = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")[f"published-zero{stage}"]
    assert result["version"] == 2
    assert result["buckets"] > 2
    assert result["dtypes"] == ["float32"]
    assert result["decoded_gap"] == 0
    assert result["exported_gap"] == 0
    assert result["canary_gap"] < 1e-5
    assert result["canary_length"] == 24
    assert "lm_head.weight" not in result["names"]  # tied to the embedding, which travels once
    assert len(set(result["names"])) == len(result["names"]) == 26
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= set(result["exported_files"])
    assert result["tokenized"] == [1, 2, 10, 3, 11]


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 3), (2, 3)])
def test_a_publication_takes_two_buckets_of_memory_at_most_whatever_the_models_size(request, ranks, stage):
    result = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")[f"memory-zero{stage}"]
    assert sum(result["sizes"]) > 6 * result["bucket"]
    assert result["taken"] <= 2 * result["bucket"]


def test_a_bfloat16_model_is_published_and_exported_in_its_type(one_rank):
    result = one_rank["published-bfloat16"]
    assert result["dtypes"] == ["bfloat16"]
    assert result["exported_dtype"] == "torch.bfloat16"
    assert result["decoded_gap"] == result["exported_gap"] == 0
    assert result["canary_gap"] < 5e-2


def test_dropout_of_the_models_config_is_off(one_rank):
    with_dropout, without = one_rank["dropout"]
    assert with_dropout == without


def test_a_model_that_ignores_position_ids_is_packed_with_a_mask_or_refused(one_rank):
    one_by_one, together = one_rank["masks"]["losses"]
    assert together == pytest.approx(one_by_one, rel=1e-5)
    refusal = one_rank["masks"]["without_mask"]
    assert "OPTForCausalLM lets trajectories that share a forward pass see each other" in refusal


def test_a_token_outside_its_bound_stops_the_learner(one_rank):
    result = one_rank["violations"]
    assert result["fresh"].startswith("LagViolation: step 5 was given the fresh group 0 (prompt 0.0)")
    assert result["stale"].startswith("LagViolation: step 5 was given the stale group 1 (prompt 0.1)")
    assert result["future"].endswith("its weights do not exist yet")
    assert result["other"] == "ValueError: the batch of step 4 was given to a learner whose next step is 5"

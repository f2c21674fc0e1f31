"""The harness of the comparisons: it is the product's mathematics, and its figures can be redone."""

import json
from dataclasses import replace
from math import isinf, isnan
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.evidence import loop, runs, studies, system
from benchmarks.evidence.learner import BETAS, GRAD_CLIP, WARMUP_STEPS, Learner
from benchmarks.evidence.methods import MAIN
from benchmarks.evidence.model import Decoder, sample
from benchmarks.evidence.pool import Groups, ReplayList, systematic_draw
from benchmarks.evidence.report import Results, figures
from benchmarks.evidence.setting import Setting
from benchmarks.evidence.statistics import bootstrap, bootstrap_ratio, interquartile_mean, rollouts_to, smoothed
from benchmarks.evidence.tasks import Addition, Sorting, is_held_out, prompts, rewards
from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.algorithm.reference import ReferenceTrainer
from r2vpo.records import Kind, Outcome, SampledBatch, SampledGroup, Trajectory, TrajectoryGroup

TASK = Addition(2)


def make_model(seed=0, dtype=torch.float64):
    """A model with random weights everywhere, for additions of two digits."""
    model = Decoder(size="0.1M", vocabulary=12, prompt_tokens=6, answer_tokens=3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1, generator=generator)
    return model.to(dtype)


def make_groups(model, *, step, count, seed, members=4):
    """Groups sampled from the model, with rewards that differ inside most of them."""
    rng = np.random.default_rng(seed)
    prompt_BP = torch.from_numpy(prompts(TASK, rng, count, held_out=False))
    sampled = sample(model, prompt_BP, members, torch.Generator().manual_seed(seed))
    return Groups(
        prompt_BP=prompt_BP,
        answer_BnT=sampled.answer_BnT,
        behavior_logp_BnT=sampled.logp_BnT.float().double(),  # what a trajectory keeps has 32 bits
        reward_Bn=torch.from_numpy(rng.integers(0, 2, size=(count, members)).astype(np.float64)),
        version_B=torch.full((count,), step),
        born_B=torch.full((count,), step),
        draw_weight_B=torch.ones(count, dtype=torch.float64),
    )


class AsCausalModel(nn.Module):
    """The decoder as the reference trainer calls it: one token sequence in, logits of all positions out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        num_prompt = self.model.prompt_tokens
        logits = self.model.logits(input_ids[:, :num_prompt], input_ids[:, None, num_prompt:])[:, 0]
        nothing = torch.zeros(1, num_prompt - 1, logits.shape[-1], dtype=logits.dtype)
        return SimpleNamespace(logits=torch.cat([nothing, logits, nothing[:, :1]], dim=1))


def sampled_batch(groups, *, step):
    """The same groups as the records of the product."""
    return SampledBatch(
        step=step,
        groups=tuple(
            SampledGroup(
                group_id=i,
                kind=Kind.FRESH if groups.born_B[i] == step else Kind.STALE,
                uses=int(groups.born_B[i] < step),
                weight=float(groups.draw_weight_B[i]),
                group=TrajectoryGroup(
                    key=f"0.{i}",
                    prompt="",
                    truth=None,
                    trajectories=tuple(trajectory(groups, i, m) for m in range(groups.reward_Bn.shape[1])),
                ),
            )
            for i in range(len(groups))
        ),
    )


def trajectory(groups, i, m):
    prompt_P, answer_T = groups.prompt_BP[i].numpy(), groups.answer_BnT[i, m].numpy()
    mask_T = np.arange(len(prompt_P) + len(answer_T)) >= len(prompt_P)
    logprob_T = np.zeros(len(mask_T), np.float32)
    logprob_T[mask_T] = groups.behavior_logp_BnT[i, m].numpy()
    return Trajectory(
        token_ids_T=np.concatenate([prompt_P, answer_T]).astype(np.int32),
        loss_mask_T=mask_T,
        behavior_logprob_T=logprob_T,
        version_T=np.where(mask_T, int(groups.version_B[i]), -1).astype(np.int32),
        outcome=Outcome.SCORED,
        reward=float(groups.reward_Bn[i, m]),
    )


def test_the_log_probs_of_sampling_are_those_of_the_full_pass():
    model = make_model(dtype=torch.float32)
    prompt_BP = torch.from_numpy(prompts(TASK, np.random.default_rng(0), 16, held_out=False))
    sampled = sample(model, prompt_BP, 8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(sampled.logp_BnT, model.logp(prompt_BP, sampled.answer_BnT), rtol=0, atol=1e-5)


def test_members_of_a_group_do_not_see_each_other():
    model = make_model()
    prompt_BP = torch.from_numpy(prompts(TASK, np.random.default_rng(0), 4, held_out=False))
    answer_BnT = torch.from_numpy(np.random.default_rng(1).integers(0, 12, size=(4, 3, 3)))
    alone = torch.cat([model.logp(prompt_BP, answer_BnT[:, m : m + 1]) for m in range(3)], dim=1)
    torch.testing.assert_close(model.logp(prompt_BP, answer_BnT), alone)


def test_sampling_draws_a_token_as_often_as_its_probability_says():
    model = make_model()
    prompt_BP = torch.tensor([[1, 2, 10, 3, 4, 11]]).expand(5_000, -1)
    first_B = sample(model, prompt_BP, 1, torch.Generator().manual_seed(0)).answer_BnT[:, 0, 0]
    with torch.no_grad():
        p = model.logits(prompt_BP[:1], torch.zeros(1, 1, 3, dtype=torch.long))[0, 0, 0].softmax(-1)
    # One standard deviation of a share is at most sqrt(.25 / 5,000) = .007.
    torch.testing.assert_close(torch.bincount(first_B, minlength=12) / 5_000, p.float(), rtol=0, atol=0.028)


def test_answers_of_the_tasks():
    assert Addition(2).solve(np.array([[9, 5, 10, 1, 7, 11]])).tolist() == [[2, 1, 1]]  # 95 + 17 = 112
    assert Sorting(4).solve(np.array([[3, 0, 9, 3, 10]])).tolist() == [[0, 3, 3, 9]]
    answers = np.array([[[2, 1, 1], [2, 1, 0]]])
    assert rewards(Addition(2), np.array([[9, 5, 10, 1, 7, 11]]), answers).tolist() == [[1.0, 0.0]]


def test_held_out_prompts_are_one_in_sixteen_and_never_drawn_for_training():
    rng = np.random.default_rng(0)
    assert abs(is_held_out(Addition(4).draw(rng, 20_000)).mean() - 1 / 16) < 0.006  # three standard deviations
    assert not is_held_out(prompts(Addition(4), rng, 500, held_out=False)).any()
    assert is_held_out(prompts(Addition(4), rng, 500, held_out=True)).all()


@pytest.mark.parametrize(
    "algorithm",
    [
        {},
        {"name": "grpo"},
        {"name": "grpo_decoupled", "step_control": True, "advantage": "batch_whitened"},
        {"name": "m2po", "m2_limit": 0.01},
        {"name": "gspo", "loss_mean": "sequence"},
        {"name": "r2vpo_sequence", "advantage": "mean", "dual": "fixed", "loss_mean": "constant", "loss_length": 3},
    ],
    ids=str,
)
def test_a_learner_step_is_that_of_the_reference_trainer(algorithm):
    setting = Setting(reuse=2, minibatches=3, passes=2, lr=1e-3, seed=5, algorithm=algorithm)
    model, twin = make_model(), make_model()
    old = make_model(seed=1)
    learner = Learner(model, setting)
    reference = ReferenceTrainer(
        AsCausalModel(twin),
        algorithm=AlgorithmConfig(**algorithm),
        lr=setting.lr,
        warmup_steps=WARMUP_STEPS,
        weight_decay=0.0,
        betas=BETAS,
        eps=1e-8,
        grad_clip=GRAD_CLIP,
        minibatches=setting.minibatches,
        passes=setting.passes,
        temperature=1.0,
        seed=setting.seed,
    )
    for step in (3, 4):
        stale = make_groups(old, step=1, count=4, seed=step)
        stale.draw_weight_B[:2] = 1.5
        batch = loop.concatenate([make_groups(model, step=step, count=5, seed=10 + step), stale])
        report, expected = learner.step(batch, step=step), reference.step(sampled_batch(batch, step=step))
        assert report.second_moments == pytest.approx(expected["second_moments"], rel=1e-6)
        assert report.grad_norms == pytest.approx(expected["grad_norm"], rel=1e-6)
        assert (report.lam, report.step_scale) == pytest.approx((expected["lam"], expected["step_scale"]))
    assert max(report.second_moments) > 1e-3  # the steps were long enough for the objectives to differ
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


def test_leaving_groups_without_signal_out_of_the_passes_is_the_same_step_of_a_clip():
    models = []
    for skip in (False, True):
        model = make_model()
        batch = make_groups(model, step=0, count=8, seed=0)
        batch.reward_Bn[2:] = 1.0
        setting = Setting(minibatches=2, skip_no_signal=skip, algorithm={"name": "grpo"})
        tokens = Learner(model, setting).step(batch, step=0).tokens
        assert tokens == 8 * 4 * 3
        models.append(model)
    for whole, short in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(whole, short, rtol=0, atol=1e-8)


def test_a_learner_step_ends_once_its_budget_is_exceeded():
    model = make_model()
    learner = Learner(model, Setting(passes=3, minibatches=2, lr=1e-2, algorithm={"delta": 1e-9}))
    learner.step(make_groups(model, step=0, count=4, seed=0), step=0)
    assert learner.num_optimizer_steps == 2  # of 6: the first measures V = 0


def test_the_replay_list_keeps_groups_with_signal_up_to_an_age_and_draws_none_twice():
    model, replay = make_model(), ReplayList(max_age=2, priority="uniform", rng=np.random.default_rng(0))
    assert replay.draw(3) == []
    for step in range(3):
        groups = make_groups(model, step=step, count=4, seed=step)
        groups.reward_Bn[:] = torch.tensor([0.0, 1.0, 0.0, 1.0])
        groups.reward_Bn[0] = 1.0
        replay.append(groups)
    (drawn,) = replay.draw(100)
    assert sorted(drawn.born_B.tolist()) == [1, 1, 1, 2, 2, 2]
    (drawn,) = replay.draw(4)
    assert len({tuple(row) for row in drawn.prompt_BP.tolist()}) == 4


def test_uses_are_counted_while_the_list_fills_up():
    model, replay = make_model(), ReplayList(max_age=3, priority="uses", rng=np.random.default_rng(0))
    drawn = []
    for step in range(2):
        groups = make_groups(model, step=step, count=1, seed=step)
        groups.reward_Bn[:] = torch.tensor([0.0, 1.0, 0.0, 1.0])
        replay.append(groups)
        drawn += replay.draw(1)
    # Uses are 2 and 1 (each was trained on when fresh), so the weights are 1/3 and 1/2, and of one draw from two groups
    # the importance weight is 1 / (2·π) with π = 2/5 or 3/5.
    assert float(drawn[1].draw_weight_B[0]) == pytest.approx(5 / 4 if int(drawn[1].born_B[0]) == 0 else 5 / 6)


def test_draws_by_weight_have_the_chances_and_importance_weights_of_the_pool():
    rng, counts, mean = np.random.default_rng(0), np.zeros(3), 0.0
    for _ in range(2_000):
        rows, weight = systematic_draw(np.array([1.0, 1.0, 2.0]), 2, rng)
        counts[rows] += 1
        mean += (weight * rows).mean() / 2_000
        assert sorted(weight.round(6)) == [0.666667, 1.333333]
    assert counts / 2_000 == pytest.approx([0.5, 0.5, 1.0], abs=0.04)
    assert mean == pytest.approx(1.0, abs=0.04)  # of the row numbers 0, 1, 2


@pytest.fixture
def short_runs(monkeypatch):
    """Runs start from random weights, so that no warm-up is needed."""
    monkeypatch.setattr(loop, "start_model", lambda task, size, seed: make_start())
    monkeypatch.setattr(loop, "FINAL_PROMPTS", 64)


def make_start():
    model = Decoder(size="0.1M", vocabulary=12, prompt_tokens=10, answer_tokens=5, seed=0)
    nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def test_a_run_is_the_same_twice_and_another_with_another_seed(short_runs):
    setting = {"iterations": 3, "reuse": 2, "flip": 0.3, "lag": 1, "priority": "advantage"}
    first, again, other = (loop.run(Setting(**setting, seed=seed)) for seed in (0, 0, 1))
    assert (first["curve"], first["final"]) == (again["curve"], again["final"])
    assert first["curve"]["entropy"] != other["curve"]["entropy"]
    assert first["curve"]["rollouts"] == [256, 512, 768]
    assert first["curve"]["optimizer_steps"] == [4, 8, 12]


def test_settings_survive_json_and_have_one_id():
    setting = Setting(reuse=4, algorithm={"name": "grpo", "clip_high": 0.28})
    again = Setting.from_json(json.loads(json.dumps(setting.to_json())))
    assert (again, again.id) == (setting, setting.id)
    assert setting.to_json() == {"reuse": 4, "algorithm": {"name": "grpo", "clip_high": 0.28}}
    assert Setting(seed=1).id != Setting(seed=2).id
    with pytest.raises(ValueError, match="reuze"):
        Setting.from_json({"reuze": 4})
    with pytest.raises(ValueError, match="gpro"):
        Setting(algorithm={"name": "gpro"})


def test_finished_runs_are_not_run_again_even_after_a_kill_in_the_middle_of_a_line(tmp_path, monkeypatch):
    file, ran = tmp_path / "x.jsonl", []

    def finished(settings, jobs):
        ran.append([s.seed for s in settings])
        for s in settings:
            yield {"id": s.id, "setting": s.to_json(), "final": {"accuracy": 0.5}, "wall_s": 1.0}

    monkeypatch.setattr(runs, "_finished", finished)
    settings = [Setting(seed=seed) for seed in range(3)]
    runs.run_all(settings[:2], file, jobs=1)
    file.write_text(file.read_text()[:-9])
    runs.run_all(settings, file, jobs=1)
    runs.run_all(settings, file, jobs=1)
    assert ran == [[0, 1], [1, 2], []]
    assert [r["id"] for r in runs.results(file)] == [s.id for s in settings]


def test_kept_runs_are_the_same_bytes_in_any_order_and_are_added_to_what_is_there(tmp_path):
    lines = [
        {"id": name, "setting": {}, "curve": {"entropy": [0.123456]}, "final": {"accuracy": 0.123456}} for name in "ab"
    ]
    for order, kept in ((lines, "one.gz"), (lines[::-1], "two.gz")):
        file = tmp_path / "runs.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in order))
        runs.keep(file, tmp_path / kept)
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()
    file = tmp_path / "other.jsonl"
    file.write_text(json.dumps({"id": "b", "mine": True}) + "\n")
    runs.unpack(tmp_path / "one.gz", file)
    mine, added = runs.results(file)
    assert mine == {"id": "b", "mine": True}
    assert (added["id"], added["curve"], added["final"]) == ("a", {"entropy": [0.1235]}, {"accuracy": 0.123456})


def test_rollouts_to_a_target_are_counted_at_the_end_of_the_window():
    rollouts = [256.0 * (i + 1) for i in range(8)]
    curve = [0.0, 0.0, 0.6, 0.6, 0.6, 0.6, 0.9, 0.9]
    assert smoothed(curve, 3) == pytest.approx([0.2, 0.4, 0.6, 0.6, 0.7, 0.8])
    assert rollouts_to(0.6, train_reward=curve, rollouts=rollouts, window=3) == 5 * 256
    assert isinf(rollouts_to(0.9, train_reward=curve, rollouts=rollouts, window=3))
    assert isinf(rollouts_to(0.1, train_reward=curve[:2], rollouts=rollouts[:2], window=3))


def test_interquartile_mean_and_its_interval():
    assert interquartile_mean([100.0, 1.0, 2.0, 3.0]) == 2.5
    assert interquartile_mean([1.0, 2.0, 3.0]) == 2.0  # nothing to cut of three
    # Two values, resampled: the mean is 0, 1 or 2 with chances ¼, ½, ¼, so 95 % of it is all of it.
    assert (bootstrap([0.0, 2.0]).low, bootstrap([0.0, 2.0]).high) == (0.0, 2.0)
    assert isnan(bootstrap([]).value)
    same = bootstrap_ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
    assert (same.value, same.low, same.high) == (0.5, 0.5, 0.5)  # paired: each seed has the ratio one half


def test_an_id_depends_on_the_algorithm_s_defaults_too():
    assert Setting(algorithm={"delta": AlgorithmConfig().delta}).id == Setting().id
    assert Setting(algorithm={"delta": 0.5}).id != Setting().id


def made_run(setting, *, reaches, accuracy):
    """A run whose sampled accuracy is 0 and then, from iteration ``reaches`` on, 1."""
    rewards = [float(i >= reaches) for i in range(setting.iterations)]
    ones = [0.005] * setting.iterations
    return {
        "id": setting.id,
        "setting": setting.to_json(),
        "curve": {
            "train_reward": rewards,
            "rollouts": [256.0 * (i + 1) for i in range(setting.iterations)],
            "second_moment": ones,
            "second_moment_max": ones,
            "entropy": ones,
            "optimizer_steps": ones,
        },
        "evaluations": [[0, 0.0]],
        "final": {"accuracy": accuracy, "pass_at_8": 1.0, "greedy_accuracy": 1.0},
    }


def test_the_figures_compare_each_method_at_its_best_learning_rate_on_the_fresh_seeds():
    scale = replace(studies.QUICK, lrs=studies.LRS, tuning_seeds=(0,))
    reaches = {(False, "R²VPO"): 14, (True, "R²VPO"): 4, (False, "GRPO"): 14, (True, "GRPO"): 8}
    runs = []
    for task in (studies.TUNED_ON, studies.CHECKED_ON):
        for base in (studies.on_policy(scale, task), studies.with_replay(scale, task)):
            for name in ("R²VPO", "GRPO"):
                for lr in studies.LRS:
                    best = lr == 3e-4
                    at = reaches[base.reuse > 1, name] if best else 99
                    for s in studies.at(base, MAIN[name], (*scale.tuning_seeds, *scale.seeds), lr=lr):
                        runs.append(
                            made_run(s, reaches=at, accuracy=(0.6 if name == "R²VPO" else 0.5) if best else 0.0)
                        )
    found = Results(scale, runs)
    assert found.best_lr(studies.on_policy(scale, "addition4"), "GRPO") == 3e-4
    rows = {row.name: row for row in list(figures(found)) if row.name.startswith("addition4")}
    # The target is 0.9 of what GRPO gains on-policy, 0 → 1: the first window of 6 whose mean is 0.9 or more is the one
    # that begins where the curve is 1. On-policy that ends with iteration 14 + 6, with replay with 4 + 6 and 8 + 6.
    ratios = [row.value for row in rows.values() if row.unit == "ratio" and "interval" not in row.name]
    assert ratios == pytest.approx([10 / 20, 10 / 14, 0.6 / 0.5, 0.6 / 0.5])
    assert [row.ok for row in rows.values() if "interval" not in row.name] == [False, True, True, True]


def test_the_whole_system_is_reported_by_method_and_over_its_lags(monkeypatch):
    def made(method, seed, *, reaches):
        rewards = [float(i >= reaches) for i in range(system.STEPS)]
        lag = {"0": dict.fromkeys(("tokens", *system.OF_A_BUCKET), 2.0)}
        accuracy = {"before": 0.0, "after": 0.6 if method == "R²VPO" else 0.5}
        return {"method": method, "seed": seed, "reward": rewards, "accuracy": accuracy, "lag": lag,
                "second_moment": [0.01], "wall_s": 1.0}  # fmt: skip

    monkeypatch.setattr(system, "STEPS", 60)
    reaches = {"R²VPO": 4, "GRPO": 8, "GRPO, on-policy": 14}
    found = [made(m, seed, reaches=at) for m, at in reaches.items() for seed in system.SEEDS]
    # The target is 0.9: the first window of six steps that is all ones ends with step 4 + 6, 8 + 6 and 14 + 6.
    ratios = [row.value for row in system.figures(found) if "interval" not in row.name]
    assert ratios == pytest.approx([10 / 14, 0.6 / 0.5, 10 / 20, 0.6 / 0.5])
    (_, _, methods), (_, _, lags) = system.tables(found)
    assert [line[0] for line in methods] == list(reaches)
    assert lags == [[m, "0", str(2 * len(system.SEEDS)), "2", "2", "2", "2"] for m in ("R²VPO", "GRPO")]

"""The synchronous reference trainer on models small enough to redo its steps."""

from itertools import pairwise
from math import isnan
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from r2vpo.algorithm.config import OBJECTIVES, AlgorithmConfig
from r2vpo.algorithm.reference import ReferenceTrainer
from r2vpo.records import Outcome

SETTINGS = {
    "lr": 0.1,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "grad_clip": 1.0,
    "minibatches": 1,
    "temperature": 1.0,
    "seed": 0,
}


class Bigram(nn.Module):
    """Logits of the next token are a row of a table."""

    def __init__(self, vocabulary=3, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=generator))
        self.num_forwards = 0

    def forward(self, input_ids):
        self.num_forwards += 1
        return SimpleNamespace(logits=self.table[input_ids])

    def logprobs(self, token_ids, temperature=1.0):
        """Log-probs of all tokens but the first."""
        logp = torch.log_softmax(self.table.detach() / temperature, -1)
        return np.array([logp[a, b].item() for a, b in pairwise(token_ids)], np.float32)


def make_trainer(model, *, algorithm=None, **settings):
    return ReferenceTrainer(model, algorithm=algorithm or AlgorithmConfig(), **{**SETTINGS, **settings})


def sample_group(model, make_trajectory, rewards, *, seed, length=8, version=0, temperature=1.0):
    """Trajectories ``0, a, b, ..`` sampled from the model, with its log-probs and the rewards given."""
    rng, members = np.random.default_rng(seed), []
    p = torch.softmax(model.table.detach().double() / temperature, -1).numpy()
    for reward in rewards:
        tokens = [0]
        for _ in range(length):
            tokens.append(int(rng.choice(len(p), p=p[tokens[-1]])))
        logprob = model.logprobs(tokens, temperature)
        members.append(make_trajectory(tokens[1:], logprob=logprob, version=version, reward=reward))
    return members


def policy_gradient(table, groups, advantages, *, num_tokens, temperature=1.0):
    """Gradient of ``-(1/num_tokens) Σ A·log π`` over all tokens but the first of each trajectory."""
    table = table.detach().clone().requires_grad_()
    gain = torch.zeros(())
    for group, advantage_G in zip(groups, advantages, strict=True):
        for trajectory, advantage in zip(group, advantage_G, strict=True):
            tokens = torch.tensor(trajectory.token_ids_T, dtype=torch.long)
            gain = gain + advantage * torch.log_softmax(table / temperature, -1)[tokens[:-1], tokens[1:]].sum()
    return torch.autograd.grad(-gain / num_tokens, table)[0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_on_policy_step_is_policy_gradient_with_adamw(make_batch, make_trajectory, name):
    model, twin = Bigram(), Bigram()
    temperature = 0.7
    groups = [
        sample_group(model, make_trajectory, [1.0, 0.0], seed=1, temperature=temperature),
        sample_group(model, make_trajectory, [0.0, 1.0], seed=2, length=6, temperature=temperature),
    ]
    trainer = make_trainer(
        model,
        algorithm=AlgorithmConfig(name=name),
        temperature=temperature,
        weight_decay=0.01,
        warmup_steps=4,
        grad_clip=0.05,
        eps=1.0,  # not small, so that the step shows the length of the clipped gradient
    )
    result = trainer.step(make_batch(groups))

    # By hand: advantages are ±1, 28 tokens train, REINFORCE = -(1/28) Σ A·log π; then clipping and AdamW's first step,
    # p ← p - lr·wd·p - lr·g/(|g| + eps), at a quarter of lr by warm-up.
    gradient = policy_gradient(twin.table, groups, [(1, -1), (-1, 1)], num_tokens=28, temperature=temperature)
    norm = gradient.norm()
    assert norm > 0.05
    gradient = gradient * 0.05 / (norm + 1e-6)
    lr = 0.1 / 4
    expected = twin.table.detach() * (1 - lr * 0.01) - lr * gradient / (gradient.abs() + 1.0)
    torch.testing.assert_close(model.table.detach(), expected, rtol=0, atol=2e-6)
    assert result["grad_norm"] == [pytest.approx(norm.item(), rel=1e-5)]
    # On-policy u = 1: the loss is -(1/28) Σ A = -(8 - 8 - 6 + 6)/28 and V is 0. Three have
    # another value with the same gradient.
    if name not in ("cispo", "sapo", "truncated_is"):
        assert result["loss"] == pytest.approx(0.0, abs=1e-6)
    assert result["second_moment"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("mean", "weights"),
    # two answers of 8 and two of 4 tokens: 24 tokens, 4 trajectories; a token's weight in the loss
    [
        ({"loss_mean": "token"}, (1 / 24, 1 / 24)),
        ({"loss_mean": "sequence"}, (1 / 8 / 4, 1 / 4 / 4)),
        ({"loss_mean": "constant", "loss_length": 16}, (1 / 64, 1 / 64)),
    ],
)
def test_the_mean_of_the_loss_and_the_advantages_of_the_whole_batch(make_batch, make_trajectory, mean, weights):
    model = Bigram()
    groups = [
        sample_group(model, make_trajectory, [3.0, 1.0], seed=1),
        sample_group(model, make_trajectory, [0.0, 6.0], seed=2, length=4),
    ]
    algorithm = AlgorithmConfig(advantage="batch_whitened", **mean)
    result = make_trainer(model, algorithm=algorithm).step(make_batch(groups))
    scale = 5**0.5  # centred ±1 and ±3
    advantages = [[a * w / scale for a in pair] for pair, w in zip([(1, -1), (-3, 3)], weights, strict=True)]
    expected = policy_gradient(Bigram().table, groups, advantages, num_tokens=1)
    assert result["grad_norm"] == [pytest.approx(expected.norm().item(), rel=1e-5)]


def test_m2po_masks_by_the_whole_minibatch_not_by_trajectory(make_batch, make_trajectory):
    model = Bigram()
    near, far = model.logprobs([0, 1]) - 0.1, model.logprobs([0, 2]) - 0.3
    old = [
        make_trajectory([1], logprob=near, reward=1.0),
        make_trajectory([2], logprob=far, reward=1.0),
        make_trajectory([0], logprob=model.logprobs([0, 0]) - 5.0, reward=-2.0),
    ]
    # log ρ = 0.1 and 0.3 with A = 1: the mean square 0.05 exceeds 0.04, so the second is masked, though 0.09 alone is
    # above the limit as well; at 0.06 both train, which no mask by trajectory would give. The third moves against A.
    advantages = [(1.0, 1.0, -2.0)]
    for limit, kept in ((0.04, (1, 0, 1)), (0.06, (1, 1, 1))):
        trained = Bigram()
        algorithm = AlgorithmConfig(name="m2po", m2_limit=limit, advantage="mean")
        result = make_trainer(trained, algorithm=algorithm).step(make_batch([old], step=1, stale={0}))
        ratios = np.exp([0.1, 0.3, 5.0])
        weights = [[a * r * m for a, r, m in zip(advantages[0], ratios, kept, strict=True)]]
        expected = policy_gradient(Bigram().table, [old], weights, num_tokens=3)
        assert result["grad_norm"] == [pytest.approx(expected.norm().item(), rel=1e-4)]


def test_several_on_policy_steps_are_adam_on_the_policy_gradient(make_batch, make_trajectory):
    model = Bigram()
    trainer = make_trainer(model, algorithm=AlgorithmConfig(advantage="mean"), betas=(0.6, 0.7), grad_clip=1e9)
    table = model.table.detach().clone()
    mean, square = torch.zeros_like(table), torch.zeros_like(table)
    for step in range(3):
        group = sample_group(model, make_trajectory, [1.0, 0.0], seed=step, version=step)
        result = trainer.step(make_batch([group], step=step))

        gradient = policy_gradient(table, [group], [(0.5, -0.5)], num_tokens=16)
        mean = 0.6 * mean + 0.4 * gradient
        square = 0.7 * square + 0.3 * gradient**2
        unbiased_mean, unbiased_square = mean / (1 - 0.6 ** (step + 1)), square / (1 - 0.7 ** (step + 1))
        table = table - 0.1 * unbiased_mean / (unbiased_square.sqrt() + 1e-8)
        torch.testing.assert_close(model.table.detach(), table, rtol=0, atol=1e-5)
        assert result["grad_norm"] == [pytest.approx(gradient.norm().item(), rel=1e-4)]


def test_it_learns_which_arm_of_a_bandit_pays(make_batch, make_trajectory):
    model = Bigram()
    model.table.data.zero_()
    rng = np.random.default_rng(0)
    trainer = make_trainer(model, algorithm=AlgorithmConfig(step_control=False), lr=0.1, minibatches=2)
    for step in range(25):
        p = torch.softmax(model.table.detach()[0].double(), -1).numpy()
        groups = [
            [
                make_trajectory([arm], logprob=np.log(p[arm]), version=step, reward=float(arm == 2))
                for arm in rng.choice(3, size=8, p=p)
            ]
            for _ in range(4)
        ]
        trainer.step(make_batch(groups, step=step))
    assert torch.softmax(model.table.detach()[0], -1)[2] > 0.9


def test_lambda_and_the_scale_follow_the_measured_second_moments(make_batch, make_trajectory):
    model = Bigram()
    trainer = make_trainer(model, algorithm=AlgorithmConfig(delta=0.02, end_early=False), minibatches=4, lr=0.02)
    groups = [sample_group(model, make_trajectory, [1.0, 0.0, 0.0], seed=g) for g in range(4)]
    result = trainer.step(make_batch(groups))
    v = result["second_moments"]
    assert len(v) == len(result["losses"]) == len(result["grad_norm"]) == 4
    assert v[0] == pytest.approx(0.0, abs=1e-10)  # nothing has moved before the first optimiser step
    assert min(v[1:]) > 0
    assert result["second_moment"] == pytest.approx(sum(v) / 4)

    share = 4 / 36  # four groups with a signal, none solved
    smoothed, lam = 0.02, 1.0
    for x in v[1:]:
        smoothed = 0.9 * smoothed + 0.1 * min(x / share, 0.1)
        lam = min(max(lam * np.exp(0.1 * np.clip(smoothed / 0.02 - 1, -1, 1)), 0.7), 1.5)
    assert result["lam"] == pytest.approx(lam)
    spent = 0.7 + 0.3 * min(np.mean(v[1:]) / (0.02 * share), 5)
    assert spent < 1  # less than the budget was spent: the scale rises, by the gain of a scale that has not settled
    assert result["step_scale"] == pytest.approx(np.exp(-0.6 * np.clip(np.log(spent), -1, 1)))


def test_a_step_that_exceeds_its_budget_ends_there_and_its_passes_with_it(make_batch, make_trajectory):
    groups = [sample_group(Bigram(), make_trajectory, [1.0, 0.0, 0.0], seed=g) for g in range(4)]
    full = make_trainer(
        Bigram(), algorithm=AlgorithmConfig(dual="fixed", end_early=False), minibatches=4, lr=0.02, passes=2
    )
    v = full.step(make_batch(groups))["second_moments"]
    assert len(v) == 8
    most = next(j for j in range(2, 7) if v[j] > 1.05 * max(v[:j]))
    budget = v[most] / 2.02  # of which that optimiser step alone measures more than twice
    assert max(v[:most]) < 2 * budget
    config = AlgorithmConfig(delta=budget * 36 / 4, dual="fixed")  # four groups with a signal, none solved
    early = make_trainer(Bigram(), algorithm=config, minibatches=4, lr=0.02, passes=2)
    assert early.step(make_batch(groups))["second_moments"] == pytest.approx(v[: most + 1], rel=1e-6)


def test_the_scale_of_a_step_multiplies_the_next_learning_rate(make_batch, make_trajectory):
    model, twin = Bigram(), Bigram()
    batch = make_batch([sample_group(model, make_trajectory, [1.0, 0.0], seed=3)])
    scaled, doubled = make_trainer(model, lr=0.01), make_trainer(twin, lr=0.02)
    scaled.budget.step_control.scale = 2.0
    scaled.step(batch)
    doubled.step(batch)
    torch.testing.assert_close(model.table, twin.table, rtol=0, atol=0)
    assert (model.table - Bigram().table).abs().max().item() == pytest.approx(0.02, rel=1e-3)


def test_the_brake_can_be_chosen(make_batch, make_trajectory):
    groups = [sample_group(Bigram(), make_trajectory, [1.0, 0.0], seed=g) for g in range(2)]

    def losses(**settings):
        trainer = make_trainer(Bigram(), algorithm=AlgorithmConfig(**settings), minibatches=2, lr=0.1)
        return trainer.step(make_batch(groups))["losses"]

    assert losses() == losses(brake="asymmetric")
    assert losses() != losses(brake="everywhere")


def test_the_seed_decides_the_minibatches(make_batch, make_trajectory):
    groups = [sample_group(Bigram(), make_trajectory, [1.0, 0.0], seed=g) for g in range(8)]
    first = {make_trainer(Bigram(), minibatches=4, seed=s).step(make_batch(groups))["grad_norm"][0] for s in range(5)}
    assert len(first) > 1


def test_stale_trajectories_are_judged_against_the_policy_at_the_start_of_the_step(make_batch, make_trajectory):
    model = Bigram()
    old = sample_group(Bigram(seed=9), make_trajectory, [1.0, 0.0], seed=4, version=0)
    result = make_trainer(model).step(make_batch([old], step=3, stale={0}))
    # u = 1 exactly, although behaviour and current policy differ: V = 0 and the loss is -(1/N) Σ w·A with w ≤ 2
    assert result["second_moment"] == 0.0
    weights = [np.minimum(np.exp(Bigram().logprobs(t.token_ids_T) - t.behavior_logprob_T[1:]), 2.0).sum() for t in old]
    assert abs(weights[0] - weights[1]) > 0.05
    assert result["loss"] == pytest.approx(-(weights[0] - weights[1]) / 16, rel=1e-5)


def test_the_proximal_logprobs_do_not_follow_the_minibatches(make_batch, make_trajectory):
    model = Bigram()
    groups = [sample_group(model, make_trajectory, [1.0, 0.0], seed=g) for g in range(2)]
    result = make_trainer(model, minibatches=2).step(make_batch(groups, step=1, stale={0, 1}))
    assert result["second_moments"][0] == 0.0
    assert result["second_moments"][1] > 1e-4  # measured against the start, after one optimiser step


def test_the_proximal_forward_is_made_only_where_a_token_lags(make_batch, make_trajectory):
    model = Bigram()
    fresh = sample_group(model, make_trajectory, [1.0, 0.0], seed=1, version=2)
    lagging = sample_group(model, make_trajectory, [1.0, 0.0], seed=2, length=3, version=[2, 1, 2])
    make_trainer(model).step(make_batch([fresh, lagging], step=2))
    assert model.num_forwards == 4 + 2


def test_a_trajectory_without_verdict_contributes_nothing(make_batch, make_trajectory):
    model, twin = Bigram(), Bigram()
    scored = sample_group(model, make_trajectory, [1.0, 0.0], seed=5)
    lost = make_trajectory([1, 1, 2], logprob=-3.0, reward=None, outcome=Outcome.TIMEOUT)
    result = make_trainer(model).step(make_batch([[scored[0], lost, scored[1]]]))
    expected = make_trainer(twin).step(make_batch([scored]))
    assert result == expected
    assert result["grad_norm"][0] > 0.01
    torch.testing.assert_close(model.table, twin.table, rtol=0, atol=0)


def test_a_draw_of_weight_3_moves_the_policy_like_three_draws_of_the_same_group(make_batch, make_trajectory):
    old = [sample_group(Bigram(seed=g), make_trajectory, [1.0, 0.0], seed=g) for g in (8, 9)]
    losses, tables = [], []
    # Three copies among four groups have the same sums; the count of tokens is 4/2 times that of two groups.
    for groups, weights in (([old[0], old[1]], {1: 3.0}), ([old[0], old[1], old[1], old[1]], None)):
        model = Bigram()
        batch = make_batch(groups, step=3, stale=range(len(groups)), weights=weights)
        result = make_trainer(model, betas=(0.0, 0.0), eps=1e6, grad_clip=1e9, lr=1e6).step(batch)
        losses.append(result["loss"])
        tables.append(model.table.detach() - Bigram().table.detach())
    assert losses[0] == pytest.approx(2 * losses[1], rel=1e-5)
    torch.testing.assert_close(tables[0], 2 * tables[1], rtol=1e-4, atol=1e-6)
    assert tables[1].abs().max() > 0.01


def test_the_budget_counts_a_group_by_the_weight_of_its_draw(make_batch, make_trajectory):
    # Two minibatches of one group each; the second is measured after one optimiser step.
    groups = [sample_group(Bigram(), make_trajectory, [1.0, 0.0], seed=g) for g in range(2)]

    def second_moments(weight):
        batch = make_batch(groups, step=1, stale={0, 1}, weights={0: weight, 1: weight})
        trainer = make_trainer(Bigram(), minibatches=2, eps=1e-12, grad_clip=1e9)
        return trainer.step(batch)["second_moments"]

    # Adam's first step does not depend on the length of the gradient, so that u is the same: V is 2.5 times as large.
    plain, weighted = second_moments(1.0), second_moments(2.5)
    assert plain[0] == weighted[0] == 0.0
    assert weighted[1] == pytest.approx(2.5 * plain[1], rel=1e-4)


def test_a_truncated_trajectory_trains(make_batch, make_trajectory):
    model = Bigram()
    cut = make_trajectory([1, 2], logprob=model.logprobs([0, 1, 2]), reward=0.0, outcome=Outcome.TRUNCATED)
    good = make_trajectory([2, 1], logprob=model.logprobs([0, 2, 1]), reward=1.0)
    before = model.table.detach().clone()
    make_trainer(model).step(make_batch([[cut, good]]))
    moved = (model.table.detach() - before)[1, 2]  # only the truncated one goes from 1 to 2
    assert moved < 0


def test_a_minibatch_without_tokens_makes_no_optimiser_step_but_is_counted(make_batch, make_trajectory):
    model = Bigram()
    trainer = make_trainer(model, minibatches=2)
    lost = [make_trajectory([1], reward=None)] * 2
    result = trainer.step(make_batch([sample_group(model, make_trajectory, [1.0, 0.0], seed=6), lost]))
    assert (len(result["losses"]), result["empty_minibatches"], trainer.num_optimizer_steps) == (1, 1, 1)


def test_a_batch_without_any_verdict_changes_nothing(make_batch, make_trajectory):
    model = Bigram()
    trainer = make_trainer(model)
    before = model.table.detach().clone()
    result = trainer.step(make_batch([[make_trajectory([1], reward=None)]]))
    assert isnan(result["loss"])
    assert (result["lam"], result["step_scale"], result["empty_minibatches"]) == (1.0, 1.0, 1)
    torch.testing.assert_close(model.table.detach(), before, rtol=0, atol=0)


def test_batches_without_signal_do_not_move_the_scale_although_momentum_moves_the_policy(make_batch, make_trajectory):
    model = Bigram()
    trainer = make_trainer(model, minibatches=2, lr=0.01)
    groups = [sample_group(model, make_trajectory, [1.0, 0.0], seed=g) for g in range(2)]
    scale = trainer.step(make_batch(groups))["step_scale"]
    solved = [sample_group(model, make_trajectory, [1.0, 1.0], seed=g, version=1) for g in range(2)]
    result = trainer.step(make_batch(solved, step=1))
    assert result["second_moments"][1] > 0
    assert result["step_scale"] == scale


def test_a_gradient_that_is_not_finite_stops_the_trainer(make_batch, make_trajectory):
    model = Bigram()
    batch = make_batch([sample_group(model, make_trajectory, [1.0, 0.0], seed=7)])
    model.table.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="non-finite"):
        make_trainer(model).step(batch)


def test_the_same_seed_gives_the_same_run_bit_for_bit(make_batch, make_trajectory):
    runs = []
    for _ in range(2):
        model = Bigram()
        groups = [sample_group(model, make_trajectory, [1.0, 0.0], seed=g) for g in range(5)]
        trainer = make_trainer(model, minibatches=3)
        runs.append([trainer.step(make_batch(groups, step=step, stale={3, 4})) for step in range(3)])
    assert runs[0] == runs[1]

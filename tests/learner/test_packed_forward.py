"""A packed row gives every trajectory the log-probs and gradients that it has alone."""

import pytest
import torch

from learner.collate import pack_row
from learner.logprobs import token_logprobs
from tests.learner.batches import trajectory
from tests.tiny_models import CLASSES, make_model

TRAJECTORIES = [
    trajectory([5, 6, 12], prompt=(1, 2, 3)),
    trajectory([], prompt=(4,)),
    trajectory([7, 12], prompt=(1,)),
    trajectory([8, 9, 10, 11, 12], prompt=(2, 3)),
]


def logp(model, members):
    row = pack_row(members)
    logits = model(
        input_ids=row.token_ids_T[None],
        position_ids=row.position_ids_T[None],
        use_cache=False,
        logits_to_keep=row.index_N,
    ).logits[0]
    return token_logprobs(logits, row.target_N, 0.7)[0]


@pytest.mark.parametrize("kind", CLASSES)
def test_packing_changes_neither_log_probs_nor_gradients(kind, tmp_path):
    model = make_model(tmp_path, kind=kind)
    packed = logp(model, TRAJECTORIES)
    alone = torch.cat([logp(model, [t]) for t in TRAJECTORIES])
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5)
    upstream = torch.linspace(-1, 1, len(packed))
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad((values * upstream).sum(), parameters) for values in (packed, alone)]
    for together, apart in zip(*gradients, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_without_restarting_positions_trajectories_would_see_each_other(tmp_path):
    model = make_model(tmp_path)
    row = pack_row(TRAJECTORIES)
    with torch.no_grad():
        logits = model(input_ids=row.token_ids_T[None], use_cache=False, logits_to_keep=row.index_N).logits[0]
        leaked = token_logprobs(logits, row.target_N, 0.7)[0]
        assert (leaked - logp(model, TRAJECTORIES)).abs().max() > 0.1

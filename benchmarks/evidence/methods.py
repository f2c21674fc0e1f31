"""What is compared: R²VPO with its parts, and the rivals, as settings of the algorithm room.

Every rival runs as its paper has it, as far as the paper says. The tuning budget is the same for all: each is run at
every learning rate of one grid, on the same seeds, and reported at its best on seeds that nothing was chosen on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Method = Mapping[str, Any]

R2VPO: Method = {"name": "r2vpo"}
GRPO: Method = {"name": "grpo"}
OURS = "R²VPO"

CLIPS: Mapping[str, Method] = {
    "GRPO": GRPO,
    "clip-higher (DAPO)": {"name": "grpo", "clip_high": 0.28},
}
"""The clips that R²VPO is measured against."""

MAIN: Mapping[str, Method] = {OURS: R2VPO, **CLIPS}

OTHERS: Mapping[str, Method] = {
    "decoupled clip": {"name": "grpo_decoupled"},
    # Answers have one length here, so Dr.GRPO's constant denominator is a token mean.
    "Dr.GRPO": {"name": "grpo", "advantage": "mean"},
    "GSPO": {"name": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "loss_mean": "sequence"},
    "GSPO, clip 0.2": {"name": "gspo", "loss_mean": "sequence"},
    "CISPO": {"name": "cispo", "clip_low": 1.0, "clip_high": 0.28},
    "SPO": {"name": "spo"},
    "SAPO": {"name": "sapo"},
    "M2PO": {"name": "m2po"},
    "truncated IS": {"name": "truncated_is"},
    "plain IS": {"name": "plain_is"},
}
"""The other rivals."""

ABLATIONS: Mapping[str, Method] = {
    "all parts": R2VPO,
    "clip in λ's place": {"name": "grpo", "step_control": True},
    "decoupled clip in λ's place": {"name": "grpo_decoupled", "step_control": True},
    "λ alone": {**R2VPO, "step_control": False},
    "step size alone": {"name": "plain_is", "step_control": True, "end_early": False},
    "fixed λ": {**R2VPO, "dual": "fixed"},
    "additive dual": {**R2VPO, "dual": "additive"},
    "floor of λ at 0.25": {**R2VPO, "lambda_min": 0.25},
    "pulls back both ways": {**R2VPO, "brake": "gated"},
    "lets go both ways": {**R2VPO, "brake": "saturating"},
    "brakes everywhere": {**R2VPO, "brake": "everywhere"},
    "never ends early": {**R2VPO, "end_early": False},
    "sequence ratio": {**R2VPO, "name": "r2vpo_sequence"},
    "w at most 1": {**R2VPO, "weight_cap": 1.0},
}
"""R²VPO with one part changed, at the learning rate in the middle of the grid."""

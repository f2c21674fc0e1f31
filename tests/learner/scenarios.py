"""What the real DeepSpeed engine does, measured in processes of its own; ``test_trainer.py`` runs this file and judges.

    python -m tests.learner.scenarios RANK RANKS PORT DIRECTORY SCENARIO…

Every rank runs the scenarios in order; rank 0 prints one JSON object with the result of each by name.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import resource
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.utils import logging as transformers_logging

from learner import checkpoint, engine
from learner.checkpoint import SaveFailed, newest
from learner.collate import LagViolation
from learner.config import LearnerConfig
from learner.engine import init_distributed
from learner.errors import WeightsNotFinite
from learner.trainer import LearnerTrainer
from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.algorithm.reference import ReferenceTrainer
from r2vpo.checksum import verify_bucket
from r2vpo.records import SampledBatch
from tests.learner.batches import batch, sampled_batches, trajectory
from tests.tiny_models import log_probs, make_model

CONFIG = LearnerConfig(
    groups_per_step=6,
    minibatches=3,
    lr=4e-4,
    warmup_steps=4,
    weight_decay=0.1,
    micro_batch_tokens=40,
    # The gradient of a key's bias is zero but for rounding; Adam with a small eps would make a step of it.
    adam_eps=1e-5,
)


ALGORITHMS = {
    "r2vpo": {},
    "grpo": {"name": "grpo"},
    "grpo_decoupled": {"name": "grpo_decoupled"},
    "sequences": {
        "name": "r2vpo_sequence",
        "loss_mean": "sequence",
        "advantage": "batch_whitened",
        "dual": "additive",
    },
    "constant": {
        "name": "gspo",
        "loss_mean": "constant",
        "loss_length": 4,
        "advantage": "leave_one_out",
        "step_control": True,
    },
}
"""Settings of the algorithm under which the learner is compared with the reference, or with itself on two ranks."""

EVERY_STEP = AlgorithmConfig(end_early=False)
"""The tiny model's V is far above any budget; all but one scenario go through all minibatches nevertheless."""


def make_trainer(model: Path, *, algorithm: AlgorithmConfig | None = None, exact: bool = True, **changes):
    return LearnerTrainer(
        dataclasses.replace(CONFIG, **changes),
        algorithm or EVERY_STEP,
        model_path=str(model),
        temperature=0.8,
        max_lag=3,
        max_replay_lag=3,
        exact_engine=exact,
        seed=3,
    )


def weights(trainer: LearnerTrainer) -> dict[str, torch.Tensor]:
    return trainer.engine.gather([spec.name for spec in trainer.engine.tensors], engine.copied) or {}


def largest_gap(a, b) -> float:
    return max((float((a[name] - b[name]).detach().abs().max()) for name in a), default=0.0)


def run(trainer: LearnerTrainer, batches) -> list[dict[str, float]]:
    metrics = [trainer.step(b) for b in batches]
    return [{k: v for k, v in m.items() if not k.startswith("time/")} for m in metrics]


def reference(directory: Path, **settings):
    """Losses, V, λ, s and parameters against the reference trainer, over four steps, the last two with stale groups."""
    algorithm = dataclasses.replace(EVERY_STEP, **settings.pop("algorithm", {}))
    model_path = directory / "model"
    batches = sampled_batches(model_path, steps=4, weighted=settings.pop("weighted", False))
    trainer = make_trainer(model_path, algorithm=algorithm, **settings)
    passes = settings.get("passes", 1)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    other = ReferenceTrainer(
        model,
        algorithm=algorithm,
        lr=CONFIG.lr,
        warmup_steps=CONFIG.warmup_steps,
        weight_decay=CONFIG.weight_decay,
        betas=(CONFIG.adam_beta1, CONFIG.adam_beta2),
        eps=CONFIG.adam_eps,
        grad_clip=CONFIG.grad_clip,
        minibatches=CONFIG.minibatches,
        temperature=0.8,
        seed=3,
        passes=passes,
    )
    gaps = dict.fromkeys(("loss", "second_moment", "lambda", "scale", "grad_norm", "weights"), 0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for b in batches:
        ours, theirs = trainer.step(b), other.step(b)
        now = {
            "loss": abs(ours["step/loss"] - theirs["loss"]),
            "second_moment": abs(ours["dual/second_moment"] - theirs["second_moment"]),
            "lambda": abs(ours["dual/lambda"] - theirs["lam"]),
            "scale": abs(ours["control/scale"] - theirs["step_scale"]),
            "grad_norm": abs(ours["step/grad_norm"] / np.mean(theirs["grad_norm"]) - 1),
            "weights": largest_gap(weights(trainer), dict(model.named_parameters())),
        }
        gaps = {name: max(gap, now[name]) for name, gap in gaps.items()}
    return {
        "gaps": gaps,
        "moved": largest_gap(before, dict(model.named_parameters())),
        "proximal_tokens": ours["train/proximal_tokens"],
        "tokens": ours["train/tokens"],
        "optimizer_steps": trainer.num_optimizer_steps,
    }


def trained(directory: Path, **settings):
    """Metrics of four steps; the weights after them go to a file that the test reads."""
    name = settings.pop("name")
    algorithm = dataclasses.replace(EVERY_STEP, **settings.pop("algorithm", {}))
    trainer = make_trainer(directory / "model", algorithm=algorithm, **settings)
    metrics = run(trainer, sampled_batches(directory / "model", steps=4))
    after = weights(trainer)
    if trainer.engine.rank == 0:
        np.savez(directory / f"{name}.npz", **{k: v.float().numpy() for k, v in after.items()})
    return metrics


def bad_step(directory: Path, **settings):
    """One NaN among the behaviour log-probs, as damage in memory might make it, then a good batch."""
    trainer = make_trainer(directory / "model", minibatches=1, **settings)
    good = sampled_batches(directory / "model", steps=2)
    broken = batch([[trajectory([3, 4], reward=r) for r in (0.0, 1.0)]])
    # The record itself refuses to be made so.
    broken.groups[0].group.trajectories[1].behavior_logprob_T[-1] = float("nan")
    before = weights(trainer)
    with logged() as lines:
        bad = trainer.step(broken)
    between = weights(trainer)
    after_bad = (trainer.num_optimizer_steps, trainer.budget.lam, trainer.budget.scale, trainer.version)
    fine = trainer.step(good[1])
    return {
        "bad_steps": bad["learner/bad_steps"],
        "keys": sorted(bad),
        "unchanged": largest_gap(before, between),
        "after_bad": after_bad,
        "bad_steps_then": fine["learner/bad_steps"],
        "moved_then": largest_gap(between, weights(trainer)),
        "loss_then": fine["step/loss"],
        "log": lines,
    }


@contextmanager
def logged():
    """The lines that the learner writes to its log meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("learner.trainer").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("learner.trainer").removeHandler(handler)


def half_bad(directory: Path, **settings):
    """A loss of 0 whose gradient is not finite, and an infinite loss whose gradient is."""
    losses = {
        "gradient": lambda tokens, n, lam: (tokens.logp_N - tokens.logp_N.detach()).abs().sqrt().sum(),
        "loss": lambda tokens, n, lam: tokens.logp_N.sum() + math.inf,
    }
    trainer = make_trainer(directory / "model", minibatches=1, **settings)
    before, results = weights(trainer), {}
    for b, (name, loss) in zip(sampled_batches(directory / "model", steps=2), losses.items(), strict=True):
        trainer._objective = loss
        with logged() as lines:
            metrics = trainer.step(b)
        results[name] = {
            "bad_steps": metrics["learner/bad_steps"],
            "unchanged": largest_gap(before, weights(trainer)),
            "cause": lines[0].partition("not finite: ")[2].partition(";")[0],
        }
    return results


def broken_weights(directory: Path, **settings):
    """A weight of the last rank becomes infinite after a step; then one of the model itself is."""
    checkpoints = directory / f"checkpoints-broken-{settings['zero_stage']}"
    trainer = make_trainer(directory / "model", **settings)
    results = {"at_once": refusal(lambda: break_weights(make_trainer(directory / "model", **settings)).publish(len))}
    run(trainer, sampled_batches(directory / "model", steps=1))
    trainer.save(checkpoints)
    run(trainer, sampled_batches(directory / "model", steps=2)[1:])
    break_weights(trainer)
    results["published"] = refusal(lambda: trainer.publish(len))
    results["saved"] = refusal(lambda: trainer.save(checkpoints))
    return results | {"left": sorted(p.name for p in checkpoints.iterdir())}


def break_weights(trainer: LearnerTrainer) -> LearnerTrainer:
    if trainer.engine.rank == trainer.engine.world_size - 1:
        parameter = next(iter(trainer.engine._model.parameters()))
        shard = parameter.ds_tensor if trainer._config.zero_stage == 3 else parameter.data
        shard.view(-1)[0] = math.inf
    return trainer


def refusal(work) -> str:
    try:
        work()
    except (WeightsNotFinite, SaveFailed, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def no_room(directory: Path, **settings):
    """A disk that refuses more than 4 KiB per file, on the last rank or on rank 0; then one with room again."""
    checkpoints = directory / f"checkpoints-full-{settings['zero_stage']}"
    trainer = make_trainer(directory / "model", **settings)
    trainer.save(checkpoints)
    run(trainer, sampled_batches(directory / "model", steps=1))
    results, left = {}, []
    for rank in {0, trainer.engine.world_size - 1}:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if trainer.engine.rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            results[f"rank{rank}"] = refusal(lambda: trainer.save(checkpoints))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        left.append(sorted(p.name for p in checkpoints.iterdir()))
    metrics = run(trainer, sampled_batches(directory / "model", steps=2)[1:])
    path = trainer.save(checkpoints)
    return results | {"left": left, "loss_then": metrics[0]["step/loss"], "path_then": path.name}


def damaged_checkpoint(directory: Path):
    """Files of DeepSpeed overwritten in the middle, and a state that lacks λ."""
    trainer = make_trainer(directory / "model")
    path = trainer.save(directory / "damaged-checkpoints")
    [file] = (path / "deepspeed").glob("*model_states.pt")
    sound = file.read_bytes()
    results = {}
    for name, content in {
        "overwritten": sound[:200] + bytes(len(sound) - 200),
        "text": b"x" * len(sound),
        "flipped": sound[: len(sound) // 2] + bytes([sound[len(sound) // 2] ^ 1]) + sound[len(sound) // 2 + 1 :],
    }.items():
        file.write_bytes(content)
        results[name] = refusal(lambda: make_trainer(directory / "model").load(path))
    file.write_bytes(sound)
    state = json.loads((path / "trainer.json").read_text())
    checkpoint.begin(path.parent, 0)
    (checkpoint.temporary_path(path.parent, 0) / "deepspeed").mkdir()
    del state["budget"]
    checkpoint.commit(path.parent, 0, state)
    return results | {"lacking": refusal(lambda: make_trainer(directory / "model").load(path))}


def changed_on_resume(directory: Path):
    """A checkpoint loaded by a learner with another optimiser and another dual, as ``--allow-change`` lets one."""
    trainer = make_trainer(directory / "model")
    run(trainer, sampled_batches(directory / "model", steps=2))
    path = trainer.save(directory / "changed-checkpoints")
    changed = dataclasses.replace(EVERY_STEP, dual="fixed", lambda_init=0.7)
    again = make_trainer(
        directory / "model", algorithm=changed, weight_decay=0.5, adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-4
    )
    with logged() as lines:
        again.load(path)
    [group] = again.engine._optimizer.param_groups
    return {
        "optimizer": [group["weight_decay"], *group["betas"], group["eps"]],
        "moments": largest_gap(moments(trainer), moments(again)),
        "lambda": again.budget.lam,
        "log": lines,
    }


def moments(trainer: LearnerTrainer) -> dict[str, torch.Tensor]:
    """Adam's first moments."""
    return {str(i): state["exp_avg"] for i, state in trainer.engine._optimizer.state_dict()["state"].items()}


def control(directory: Path, **settings):
    """A learning rate of 0, with weight decay: nothing may move."""
    trainer = make_trainer(directory / "model", lr=0.0, algorithm=AlgorithmConfig(), passes=2, exact=False, **settings)
    before = weights(trainer)
    metrics = run(trainer, sampled_batches(directory / "model", steps=4))
    return {
        "moved": largest_gap(before, weights(trainer)),
        "second_moment": max(m["dual/second_moment_max"] for m in metrics),
        "scale": metrics[-1]["control/scale"],
        "lambda": metrics[-1]["dual/lambda"],
        "optimizer_steps": [m["learner/optimizer_steps"] for m in metrics],
        "lr": metrics[-1]["step/lr"],
    }


def empty_minibatches(directory: Path, **settings):
    """A group without verdicts beside a scored one, then a batch without any verdict, then one without signal."""
    trainer = make_trainer(directory / "model", minibatches=2, **settings)
    scored = [trajectory([3, 4, 5], reward=r) for r in (0.0, 1.0)]
    silent = [trajectory([3, 4, 5], reward=None) for _ in range(2)]
    equal = [trajectory([3, 4, 5], reward=1.0) for _ in range(2)]
    half = trainer.step(batch([scored, silent]))
    none = trainer.step(batch([silent, silent], step=1))
    scale = trainer.budget.scale
    flat = trainer.step(batch([equal, equal, equal, equal], step=2))
    return {"half": half, "none": none, "flat": flat, "scale_kept": trainer.budget.scale == scale}


def first_second_moment(directory: Path):
    """V of a first optimiser step with lag 0: what the engine's log-probs differ by, or nothing."""
    only = sampled_batches(directory / "model", steps=1)
    return {
        str(exact): run(make_trainer(directory / "model", minibatches=1, exact=exact), only)[0]
        for exact in (True, False)
    }


def resumed(directory: Path, **settings):
    """Two steps, a checkpoint, two more; then the last two again from the checkpoint."""
    model_path, checkpoints = directory / "model", directory / f"checkpoints-{settings['zero_stage']}"
    batches = sampled_batches(model_path, steps=4)
    trainer = make_trainer(model_path, **settings)
    run(trainer, batches[:2])
    path = trainer.save(checkpoints)
    straight = run(trainer, batches[2:])
    again = make_trainer(model_path, **settings)
    again.load(newest(checkpoints))
    replayed = run(again, batches[2:])
    state, later = trainer.state_dict(), again.state_dict()
    return {
        "path": str(path.relative_to(directory)),
        "left": sorted(p.name for p in checkpoints.iterdir()),
        "same_metrics": straight == replayed,
        "same_state": state == later,
        "gap": largest_gap(weights(trainer), weights(again)),
    }


def refused_checkpoint(directory: Path):
    """A checkpoint of ZeRO stage 0 given to stage 2."""
    trainer = make_trainer(directory / "model")
    path = trainer.save(directory / "other-checkpoints")
    try:
        make_trainer(directory / "model", zero_stage=2).load(path)
    except ValueError as error:
        return str(error)


def publication_memory(directory: Path, **settings):
    """MiB that the first publication takes at its peak beyond what the process held, and what it published."""
    where, bucket_mb = directory / "larger", 16.0
    if dist.get_rank() == 0:
        make_model(where, hidden=512, intermediate=1536, layers=8)
    dist.barrier()
    trainer = make_trainer(where, bucket_mb=bucket_mb, **settings)
    canary = trainer.canary()
    trainer.canary = lambda: canary  # a forward pass takes what it takes in every step
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here on
    before = memory_mib("VmRSS")
    result = trainer.publish(len)
    taken = memory_mib("VmHWM") - before
    sizes = result[1] if result else []
    return {"taken": taken, "bucket": bucket_mb, "sizes": [size / 2**20 for size in sizes]}


def memory_mib(field: str) -> float:
    """A figure of this process from /proc."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def published(directory: Path, **settings):
    """Two buckets or more, decoded again; the canary against the exported model."""
    target = directory / f"exported-{settings.get('zero_stage', 0)}-{settings.get('dtype', 'auto')}"
    trainer = make_trainer(directory / "model", bucket_mb=0.05, **settings)
    run(trainer, sampled_batches(directory / "model", steps=2))
    result = trainer.publish(bytes)
    own = weights(trainer)
    trainer.export(target)
    if result is None:
        return None
    manifest, payloads = result
    for payload, spec in zip(payloads, manifest.buckets, strict=True):
        verify_bucket(payload, spec)
    decoded = {name: t for payload in payloads for name, t in load(payload).items()}
    model = AutoModelForCausalLM.from_pretrained(target, dtype="auto").eval()
    loaded = dict(model.state_dict())
    canary_gap = log_probs(model, list(manifest.canary.token_ids)) - torch.tensor(manifest.canary.logprobs)
    return {
        "version": manifest.version,
        "buckets": len(payloads),
        "names": [spec.name for bucket in manifest.buckets for spec in bucket.tensors],
        "dtypes": sorted({spec.dtype for bucket in manifest.buckets for spec in bucket.tensors}),
        "decoded_gap": largest_gap(own, decoded),
        "exported_gap": largest_gap(own, loaded),
        "exported_files": sorted(p.name for p in target.iterdir()),
        "exported_dtype": str(model.dtype),
        "canary_gap": float(canary_gap.abs().max()),
        "canary_length": len(manifest.canary.token_ids),
        "tokenized": AutoTokenizer.from_pretrained(target)("12+3=")["input_ids"],
    }


def dropout(directory: Path):
    """A model whose config asks for dropout: the learner must not sample noise into its log-probs."""
    path = directory / "with-dropout"
    make_model(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    only = sampled_batches(directory / "model", steps=1)
    with_dropout = run(make_trainer(path), only)[0]["step/loss"]
    return [with_dropout, run(make_trainer(directory / "model"), only)[0]["step/loss"]]


def masks(directory: Path):
    """A model that ignores position ids: it takes a mask, and without one it cannot be packed."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=14, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32
    )
    model = OPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(directory / "opt")
    only = sampled_batches(directory / "model", steps=1)
    losses = [run(make_trainer(directory / "opt", micro_batch_tokens=size), only)[0]["step/loss"] for size in (1, 64)]
    masked, engine._block_causal_mask = engine._block_causal_mask, lambda position_ids_T, dtype: None
    try:
        make_trainer(directory / "opt")
    except ValueError as error:
        return {"losses": losses, "without_mask": str(error)}
    finally:
        engine._block_causal_mask = masked


def violations(directory: Path):
    """Tokens outside their bounds, and a batch of another step."""
    trainer = make_trainer(directory / "model")
    trainer.version = 5
    group = lambda version: [trajectory([3], reward=r, version=version) for r in (0.0, 1.0)]  # noqa: E731
    given = {
        "fresh": batch([group(1)], step=5),
        "stale": batch([group(5), group(1)], step=5, stale=[1]),
        "future": batch([group(6)], step=5),
        "other": batch([group(5)], step=4),
    }
    return {name: message(trainer, b) for name, b in given.items()}


def message(trainer: LearnerTrainer, b: SampledBatch) -> str:
    try:
        trainer.step(b)
    except (LagViolation, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


SCENARIOS = {
    **{f"reference-{name}": (reference, {"algorithm": settings}) for name, settings in ALGORITHMS.items()},
    "reference-early": (reference, {"algorithm": {"end_early": True}, "passes": 2}),
    **{f"reference-zero{stage}": (reference, {"zero_stage": stage}) for stage in (1, 2, 3)},
    **{
        f"reference-weighted-{name}": (reference, {"algorithm": settings, "weighted": True})
        for name, settings in ALGORITHMS.items()
    },
    **{f"trained-zero{stage}": (trained, {"zero_stage": stage}) for stage in (0, 1, 2, 3)},
    **{
        f"trained-one-by-one-zero{stage}": (trained, {"zero_stage": stage, "micro_batch_tokens": 1}) for stage in (0, 3)
    },
    "trained-early": (trained, {"algorithm": {"end_early": True}, "passes": 2}),
    "trained-sequences": (trained, {"algorithm": ALGORITHMS["sequences"]}),
    "trained-sequences-large-micro-batches": (
        trained,
        {"algorithm": ALGORITHMS["sequences"], "micro_batch_tokens": 4096},
    ),
    "trained-large-micro-batches": (trained, {"micro_batch_tokens": 4096}),
    "trained-checkpointing": (trained, {"gradient_checkpointing": True, "zero_stage": 3}),
    **{f"trained-bfloat16-zero{stage}": (trained, {"dtype": "bfloat16", "zero_stage": stage}) for stage in (0, 3)},
    **{f"bad-step-zero{stage}": (bad_step, {"zero_stage": stage}) for stage in (0, 1, 2, 3)},
    "bad-step-bfloat16": (bad_step, {"dtype": "bfloat16"}),
    **{f"half-bad-zero{stage}": (half_bad, {"zero_stage": stage}) for stage in (0, 2)},
    **{f"empty-zero{stage}": (empty_minibatches, {"zero_stage": stage}) for stage in (0, 3)},
    "first-second-moment": (first_second_moment, {}),
    **{f"resumed-zero{stage}": (resumed, {"zero_stage": stage}) for stage in (0, 1, 2, 3)},
    "refused-checkpoint": (refused_checkpoint, {}),
    **{f"published-zero{stage}": (published, {"zero_stage": stage}) for stage in (0, 3)},
    "published-bfloat16": (published, {"dtype": "bfloat16"}),
    **{f"broken-weights-zero{stage}": (broken_weights, {"zero_stage": stage}) for stage in (0, 2, 3)},
    **{f"no-room-zero{stage}": (no_room, {"zero_stage": stage}) for stage in (0, 2, 3)},
    "damaged-checkpoint": (damaged_checkpoint, {}),
    "changed-on-resume": (changed_on_resume, {}),
    **{f"control-zero{stage}": (control, {"zero_stage": stage}) for stage in (0, 3)},
    **{f"memory-zero{stage}": (publication_memory, {"zero_stage": stage}) for stage in (0, 3)},
    "dropout": (dropout, {}),
    "masks": (masks, {}),
    "violations": (violations, {}),
}


def main(rank: int, ranks: int, port: int, directory: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    init_distributed(rank=rank, world_size=ranks, address="127.0.0.1", port=port, timeout_s=120)
    results = {}
    for name in names:
        scenario, settings = SCENARIOS[name]
        if scenario is trained:
            settings = settings | {"name": f"{name}-ranks{ranks}"}
        try:
            results[name] = scenario(directory, **settings)
        except Exception:  # noqa: BLE001 - the test that asks for this scenario shows it
            results[name] = {"error": traceback.format_exc()}
    if rank == 0:
        print(json.dumps(results, default=lambda value: math.nan))


if __name__ == "__main__":
    own_rank, num_ranks, meeting_port, where, *wanted = sys.argv[1:]
    main(int(own_rank), int(num_ranks), int(meeting_port), Path(where), wanted)

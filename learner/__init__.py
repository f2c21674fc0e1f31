"""Learner: turns groups of trajectories into weights with DeepSpeed; never imports rollout or replay.

Read `trainer.py` first; `engine.py` is the only place that knows DeepSpeed, `actor.py` the only one that knows Ray.
"""

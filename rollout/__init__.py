"""Rollout: makes trajectories. One vLLM engine per worker, tasks and rewards; never imports learner or replay.

Read `worker.py` first; `engine.py` and `weight_transfer.py` are the only places that know vLLM, `actor.py` the only
one that knows Ray.
"""

"""The mathematics: objectives, dual variable, step control, advantages, diagnostics by lag, a synchronous reference.

Pure functions of tensors; no ray, vllm or deepspeed. Read `objectives.py` first.
"""

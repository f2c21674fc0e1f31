"""R²VPO: RL fine-tuning of language models under a budget on the variance of the policy ratio.

`records.py` holds the words, `algorithm/` the mathematics (neither knows Ray, vLLM or DeepSpeed); `job/` and `cli.py`
are the roof that introduces the rooms `rollout`, `replay` and `learner` to each other. Read `records.py` first, then
`job/driver.py`.
"""

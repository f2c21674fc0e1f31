"""Tasks: where prompts and verdicts come from. Read `base.py` first."""

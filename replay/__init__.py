"""Replay: the durable, versioned store of trajectory groups, its prompt ledger and its lag limiter.

Plain Python over SQLite, except for `actor.py`, the only module that knows Ray. Read `store.py` first.
"""

"""What faults cost, and what insurance against them does; every part in a process of its own.

Read `__main__.py` first.
"""

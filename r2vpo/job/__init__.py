"""A job's life: configuration, driver, supervisor, what a run leaves. The only code that knows all rooms.

Read `driver.py` first.
"""

"""What the replay store must show: it loses nothing, says what is wrong, keeps up, and does not slow down as it grows.

``__main__`` runs the parts; each part is a module whose ``measure`` yields rows. Read ``crash.py`` first.
"""

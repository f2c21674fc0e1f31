"""What a job on a cluster must show, on one machine with a cluster of its own.

``__main__`` runs the parts; each part is a module whose ``measure`` yields rows. Read ``submit.py`` first.
"""

"""A reward's module that fails while it is imported."""

raise RuntimeError("no licence file")

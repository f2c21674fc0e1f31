"""Evidence for the algorithm: many short runs of the product's own mathematics, compared over seeds.

A run (`loop`) is synchronous, in one process, and takes seconds on one core; `runs` makes many of them, and
`statistics` says what they show. Read `setting` first, then `loop`.
"""

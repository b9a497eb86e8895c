"""`python -m rewards`: the rewards of this package, what each needs and what it costs to fetch."""

from .registry import table

print(table())

"""Functions of a model and a processor: ask, draw, plan."""

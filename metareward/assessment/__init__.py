"""How good a model is, held against people: the judge's scores against quality labels."""

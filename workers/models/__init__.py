"""Model families: registry.py names them, spec.py holds their numbers, one file per family computes them."""

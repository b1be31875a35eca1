"""Studies that train and compare variants at matched cost: `python -m eval ablate NAME`."""

"""Training: `python -m train --recipe NAME --output DIR`; its settings: `train/recipes.py`."""

"""What methods learn from: `training/x.py` makes what `methods/x.py` needs."""

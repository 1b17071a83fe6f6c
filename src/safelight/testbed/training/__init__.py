"""How every bundled weight is made."""

"""What runs: rewrites of a packed network."""

"""Steps after the first codes: each is kept only if held-out examples agree."""

"""`python -m subbyte`, which is what torchrun starts."""

from subbyte.cli import main

main()

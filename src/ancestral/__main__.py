"""`python -m ancestral` and `torchrun -m ancestral` are the command."""

from ancestral.apps.cli import main

main()

"""`python -m simclr`, and `torchrun -m simclr`: the same as the command `simclr`."""

from simclr.cli.main import main

main()

"""`python -m latentgen`: the command line."""

from latentgen.cli import main

main()

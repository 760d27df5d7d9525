"""`python -m latentgen.cli`, and what `accelerate launch -m` starts."""

from latentgen.cli import main

main()

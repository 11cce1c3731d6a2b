"""`python -m tuner`, and `accelerate launch -m tuner`."""

from tuner.cli.main import main

main()

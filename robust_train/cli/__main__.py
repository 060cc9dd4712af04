"""``python -m robust_train.cli``."""

from robust_train.cli import main

main()

"""`python -m metareward` and `torchrun -m metareward`."""

from metareward.cli import main

if __name__ == "__main__":
    main()

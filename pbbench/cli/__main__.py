"""``python -m pbbench.cli``, for torchrun and wherever the script is not on the path."""

from pbbench.cli import main

if __name__ == "__main__":
    main()

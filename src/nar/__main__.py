"""`python -m nar`: the command `nar`, where its script is not on the path."""

from nar.cli import main

if __name__ == "__main__":
    main()

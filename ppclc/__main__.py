"""`python -m ppclc`."""

from ppclc.cli import main

if __name__ == "__main__":
    main()

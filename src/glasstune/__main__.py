"""`python -m glasstune` is the command line."""

from glasstune.cli.main import entry

if __name__ == "__main__":
    entry()

"""`python -m glasstune`."""

from glasstune.cli.main import entry

if __name__ == "__main__":
    entry()

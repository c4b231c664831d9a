"""``python -m compressm``: the command."""

from compressm.cli import main

if __name__ == "__main__":
    main()

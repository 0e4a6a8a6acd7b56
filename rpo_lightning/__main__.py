"""``python -m rpo_lightning``."""

from rpo_lightning.cli.main import main

if __name__ == "__main__":
    main()

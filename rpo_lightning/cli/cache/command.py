"""``rpo-lightning cache``: finds the command of the cache and runs it."""

from __future__ import annotations

from rpo_lightning.cli.commands import CACHE_COMMANDS, cache_overview
from rpo_lightning.core.errors import ConfigurationError


def cache(arguments: list[str]) -> None:
    """Run a command of the cache; each is imported when it is called.

    Raises:
        ConfigurationError: The first argument is no command.
    """
    command = arguments[0] if arguments else ""
    if command in ("-h", "--help"):
        print(cache_overview())
    elif command == "build":
        from rpo_lightning.cli.cache.build import build

        build(arguments[1:])
    elif command == "export":
        from rpo_lightning.cli.cache.export_import import run_export

        run_export(arguments[1:])
    elif command == "import":
        from rpo_lightning.cli.cache.export_import import run_import

        run_import(arguments[1:])
    elif command in ("show", "stats"):
        from rpo_lightning.cli.cache.show import run

        run(arguments)
    else:
        problem = f"cache {command}: no such command" if command else "cache: no command given"
        raise ConfigurationError(f"{problem}; the commands are {', '.join(CACHE_COMMANDS)}")

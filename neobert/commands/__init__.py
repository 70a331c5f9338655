"""Subcommands of ``neobert`` and what they share; each is imported only when it is called."""

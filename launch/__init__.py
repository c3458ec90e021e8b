"""How a job starts: entry points and scripts for the machines it runs on."""

__all__: list[str] = []

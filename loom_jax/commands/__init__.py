"""The commands behind `loom`, one file each. They parse and print; `--help` imports nothing heavy."""

__all__: list[str] = []

"""PyTorch releases into Orbax folders and back, and parity against recorded references."""

__all__: list[str] = []

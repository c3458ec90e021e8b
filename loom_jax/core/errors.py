"""Errors that name the thing, what was found, what was expected and the way out.

`InputError` and its children are the user's to mend: the command line prints them as one line and exits with 2.
Any other `LoomError` is a job that failed: exit 1.
"""


class LoomError(Exception):
    """A job failed for a reason this framework knows."""


class InputError(LoomError):
    """Something that the user gave cannot be used: a flag, a file, a prompt, an image, a size."""


class ConfigError(InputError):
    """A configuration has an unknown key, a wrong type, or values that contradict each other."""


class CheckpointError(InputError):
    """A checkpoint folder lacks something, holds something unknown, or disagrees with its configuration."""


class TokenizerError(InputError):
    """Tokenizer files are missing, unreadable, or do not hold the tokens that the model needs."""


class ImageError(InputError):
    """An image cannot be read, or is too large to be read safely."""

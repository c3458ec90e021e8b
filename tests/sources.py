"""The files that belong to the project."""

import fnmatch
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tracked(*folders: str) -> list[str]:
    """Returns the paths, relative to the checkout, of the files that git tracks below some folders (all without any).

    Where there is no git, or no repository, they are the files that .gitignore does not name.
    """
    if shutil.which("git") and (ROOT / ".git").exists():
        # A checkout may belong to another user than the one who tests it; reading its index is harmless.
        command = ["git", "-c", "safe.directory=*", "ls-files", "-z", *folders]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        names = [name for name in listed.split("\0") if name]
    else:
        paths = [path for top in folders or ["."] for path in [ROOT / top, *(ROOT / top).rglob("*")]]
        names = [str(path.relative_to(ROOT)) for path in paths if path.is_file()]
        ignored = [line.strip("/\n") for line in (ROOT / ".gitignore").read_text().splitlines() if line] + [".git"]
        names = [name for name in names if not any(fnmatch.filter(Path(name).parts, rule) for rule in ignored)]
    return sorted(name for name in names if (ROOT / name).exists())

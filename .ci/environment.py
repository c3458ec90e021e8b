"""Makes the environment `.venv/` in the checkout, once: run by the Makefile with the interpreter that the user chose.

It is made anew when the interpreter, the pins or the place of the checkout change; the package itself is only installed
again when setup.py or pyproject.toml change. Must start, and complain clearly, on an interpreter that is too old.
"""

import hashlib
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")


def main():
    """Brings `.venv/` up to date; returns the exit status."""
    if sys.version_info < (3, 11):
        return complain("Python %d.%d is too old: loom_jax needs 3.11 or newer" % sys.version_info[:2])
    pins = os.path.join("requirements", "py311.txt" if sys.version_info < (3, 12) else "py312.txt")
    # The interpreter below any virtual environment: `python3` may be the one of the very .venv that is to be replaced.
    base = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    environment_key = digest([pins], sys.version, base, ROOT)
    if read_stamp("environment") != environment_key:
        print("making .venv with Python %d.%d.%d and %s" % (sys.version_info[:3] + (pins,)), flush=True)
        shutil.rmtree(VENV, ignore_errors=True)
        if run(base, "-m", "venv", VENV):
            return complain("%s cannot make virtual environments: install its venv module (python3-venv)" % base)
        if pip("-r", pins):
            return complain("pip could not install %s: its own words stand above" % pins)
        write_stamp("environment", environment_key)
    package_key = digest(["setup.py", "pyproject.toml"])
    if read_stamp("package") != package_key:
        if pip("--no-build-isolation", "-e", "."):
            return complain("pip could not install the package: its own words stand above")
        write_stamp("package", package_key)
    return 0


def pip(*arguments):
    """Installs into `.venv/` and returns pip's exit status; the pins are complete, so nothing is resolved."""
    python = os.path.join(VENV, "bin", "python")
    return run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *arguments)


def run(*command):
    """Runs a command in the checkout and returns its exit status."""
    return subprocess.call(command, cwd=ROOT)


def digest(files, *texts):
    """Returns one key for some texts and the content of some files of the checkout."""
    key = hashlib.sha256("\0".join(texts).encode())
    for name in files:
        with open(os.path.join(ROOT, name), "rb") as file:
            key.update(file.read())
    return key.hexdigest()


def read_stamp(name):
    """Returns the key that the last complete run left, or None."""
    path = os.path.join(VENV, "." + name)
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return file.read()


def write_stamp(name, key):
    """Notes that a step is complete, so that an interrupted one is begun anew."""
    with open(os.path.join(VENV, "." + name), "w") as file:
        file.write(key)


def complain(message):
    """Prints one line and returns the exit status of a failure."""
    sys.stderr.write("loom_jax: %s; choose another interpreter with PYTHON=/path/to/python3\n" % message)
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""The pins are for every Python that the README promises, not only for the one at hand."""

import re
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from tests.sources import ROOT

OLDEST = "3.11.0" if sys.version_info < (3, 12) else "3.12.0"
PINS = ROOT / "requirements" / ("py311.txt" if sys.version_info < (3, 12) else "py312.txt")


def pinned() -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in PINS.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def test_every_pin_names_one_version():
    assert len(pinned()) > 50
    assert not [str(pin) for pin in pinned() if not re.fullmatch(r"==[^*,]+", str(pin.specifier))]


@pytest.mark.parametrize("pin", pinned(), ids=lambda pin: pin.name)
def test_a_pin_can_be_installed_on_the_oldest_python(pin):
    if pin.marker is not None and not pin.marker.evaluate():
        pytest.skip(f"not for this machine: {pin.marker}")
    try:
        needs = metadata.metadata(pin.name).get("Requires-Python")
    except metadata.PackageNotFoundError:
        pytest.skip("not installed here")
    assert needs is None or OLDEST in Requirement(f"python{needs}").specifier

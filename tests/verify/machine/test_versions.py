"""The versions check-env shows, and what it says of a package that is missing or too old."""

import platform
from importlib.metadata import version

import pytest

from portmoe.verify.machine import versions as module
from portmoe.verify.machine.versions import check_versions, versions


def test_the_versions_are_those_installed():
    shown = versions()
    assert shown["python"] == platform.python_version()
    assert shown["system"].split()[0] == platform.system()
    for name in ("torch", "numpy", "click", "pydantic"):
        assert shown[name] == version(name)
    (found,) = check_versions()
    assert found.status == "pass"
    assert f"torch {version('torch')}" in found.detail


@pytest.mark.parametrize(
    ("installed", "shown", "said"),
    [(None, "none", "numpy is not installed"), ("1.25.9", "1.25.9", "numpy 1.25.9 is older than 1.26")],
)
def test_a_package_that_is_missing_or_too_old_is_named(monkeypatch, installed, shown, said):
    monkeypatch.setattr(
        module, "installed_version", lambda name: installed if name == "numpy" else version(name)
    )
    assert versions()["numpy"] == shown
    (found,) = check_versions()
    assert (found.status, found.detail, found.fix) == ("fail", said, "pip install 'numpy>=1.26'")

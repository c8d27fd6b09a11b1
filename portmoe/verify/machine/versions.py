"""Versions of what portmoe itself needs, from package metadata."""

import platform
import re
from importlib.metadata import requires

import portmoe
from portmoe.accelerator.probing import installed_version, release
from portmoe.result import Result


def versions() -> dict[str, str]:
    """portmoe, Python, the system, and every package portmoe requires."""
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    found = {"portmoe": portmoe.__version__, "python": platform.python_version(), "system": system}
    return found | {name: installed_version(name) or "none" for name in _oldest()}


def check_versions() -> list[Result]:
    """A finding per required package that is missing or too old; one that all is well otherwise."""
    findings = []
    for name, oldest in _oldest().items():
        found = installed_version(name)
        if found is None or release(found) < release(oldest):
            what = f"{name} {found} is older than {oldest}" if found else f"{name} is not installed"
            findings.append(Result("fail", "packages", what, f"pip install '{name}>={oldest}'"))
    if findings:
        return findings
    listed = ", ".join(f"{name} {installed_version(name)}" for name in _oldest())
    return [Result("pass", "packages", listed)]


def _oldest() -> dict[str, str]:
    """The oldest version portmoe works with, of each package it requires without an extra."""
    matches = (re.fullmatch(r"([\w.-]+)\s*>=\s*([\d.]+)", line) for line in requires("portmoe") or ())
    return {match[1]: match[2] for match in matches if match}

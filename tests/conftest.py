"""A way to install tiny packages that register entry points, without pip."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``install(package, source, group, name)`` puts a one-module package with an entry point on the path.

    This process and its children find it.
    """
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def place(package: str, source: str, group: str, name: str, attribute: str = "accelerator") -> Path:
        (tmp_path / f"{package}.py").write_text(source, encoding="utf-8")
        metadata = tmp_path / f"{package}-1.5.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {package}:{attribute}\n")
        return tmp_path

    return place

"""Make the pictures of the README anew, from real runs: ``python docs/pictures/make.py [terminal] [report]``.

terminal.svg is what ``portmoe train`` shows on a terminal of 100 columns; report.png is the page that
``portmoe compare`` writes of two runs. The second needs a Chromium, and is left as it is without one.
"""

import io
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
COLUMNS, LINES = 100, 50
PORTMOE = [sys.executable, "-m", "portmoe"]
CODE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b\][^\x07]*\x07")


def recorded(command: list[str], folder: Path) -> str:
    """Run ``command`` on a terminal of its own; everything it wrote."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ.update(COLUMNS=str(COLUMNS), LINES=str(LINES), TERM="xterm-256color")
        for name in ("NO_COLOR", "CI"):
            os.environ.pop(name, None)
        os.execv(command[0], command)
    output = b""
    while select.select([terminal], [], [])[0]:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        output += part
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(output.decode(errors="replace"))
    return output.decode()


def screen(output: str) -> str:
    """What is left on the screen: lines that were written again stand there once; colours are kept."""
    lines, at = [""], 0
    for written in re.split(r"(\r|\n|\x1b\[\d*[AK]|\x1b\[2K)", CODE.sub(_kept, output)):
        if written == "\n":
            at += 1
            lines += [""] * (at == len(lines))
        elif written.endswith("A") and written.startswith("\x1b["):
            at = max(0, at - int(written[2:-1] or 1))
        elif written.endswith("K") and written.startswith("\x1b["):
            lines[at] = ""
        elif written != "\r":
            lines[at] += written
    return "\n".join(lines).rstrip()


def _kept(code: re.Match[str]) -> str:
    """Colours, clearing of a line and going up; what hides the cursor or names the window is dropped."""
    return code[0] if code[2] in ("m", "K", "A") and not (code[1] or "").startswith("?") else ""


def terminal(folder: Path) -> None:
    """Write terminal.svg."""
    shown = screen(recorded([*PORTMOE, "train"], folder)).replace(str(folder), "")
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print("[bold green]$[/] portmoe train")
    console.print(Text.from_ansi(shown))
    # The font is the reader's: the picture loads nothing.
    text = console.export_svg(title="portmoe train")
    text = re.sub(r"@font-face \{.*?\}", "", text, flags=re.DOTALL)
    (HERE / "terminal.svg").write_text(text, encoding="utf-8")


def report(folder: Path) -> None:
    """Write report.png."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("report.png is left as it is: no chromium is installed")
        return
    common = ["--backend", "cpu", "--set", "data.total_steps=60"]
    compiled = "ops.disable=[rms_norm.compiled, swiglu.silu, dispatch.compiled, combine.compiled]"
    for name, more in (("reference", ()), ("port", ("--set", compiled))):
        command = [*PORTMOE, "train", *common, "--set", f"run.directory=runs/{name}", *more]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    page = folder / "compare.html"
    command = [*PORTMOE, "compare", "runs/reference", "runs/port", "--out", str(page)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    size = ["--window-size=1120,860", f"--screenshot={HERE / 'report.png'}"]
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    home = f"--user-data-dir={folder / 'chromium'}"
    subprocess.run(
        [chromium, *quiet, home, *size, page.as_uri()], check=True, capture_output=True, timeout=120
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        for picture in sys.argv[1:] or ("terminal", "report"):
            {"terminal": terminal, "report": report}[picture](Path(made))

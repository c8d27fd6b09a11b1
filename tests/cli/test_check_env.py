import json
import os
import subprocess
import sys

PORTMOE = [sys.executable, "-c", "from portmoe.cli.main import main; main()"]


def check_env(*arguments, **environment):
    done = subprocess.run(
        [*PORTMOE, "check-env", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


def test_a_healthy_backend_is_reported_as_json_and_as_a_page_with_exit_code_0(tmp_path):
    page = tmp_path / "page.html"
    done = check_env("--backend", "cpu", "--json", "--out", str(page))
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert report["can_train"] is True
    assert report["versions"].keys() >= {"portmoe", "python", "torch", "numpy"}
    checks = {check["check"]: check for check in report["backends"]["cpu"]["checks"]}
    assert {"device", "memory", "float32", "bfloat16", "float16", "collectives"} <= checks.keys()
    assert all(check["level"] == "OK" or check["fix"] for check in checks.values())
    operations = report["backends"]["cpu"]["operations"]
    for operation in operations.values():
        assert all(candidate["reason"] for candidate in operation["candidates"])
    assert report["provenance"]["command"].endswith(f"check-env --backend cpu --json --out {page}")
    text = page.read_text(encoding="utf-8")
    assert "✓ passed</span> This machine can train on cpu.</h1>" in text
    assert all(f"<td>{operation}</td>" in text for operation in operations)


ABSENT = """
def accelerator():
    from dataclasses import replace
    from portmoe.accelerator import Probe
    from portmoe.backends import cpu
    from portmoe.backends.cpu.device import CpuDevice

    class Absent(CpuDevice):
        def probe(self):
            probe = Probe({"driver": "none"})
            probe.fail("no toy card", "buy one")
            return probe

    return replace(cpu.accelerator(), name="absent", device=Absent())
"""


def test_a_backend_that_cannot_train_ends_with_exit_code_3_and_a_fix_line(install, tmp_path):
    install("absent_package", ABSENT, "portmoe.backends", "absent")
    page = tmp_path / "page.html"
    done = check_env("--backend", "absent", "--out", str(page))
    assert done.returncode == 3
    for part in ("[FAIL]", "no toy card", "fix: buy one", "driver: none"):
        assert part in done.stdout
    before, _, after = page.read_text(encoding="utf-8").partition("</header>")
    assert "✗ failed</span> This machine cannot train on absent.</h1>" in before
    assert "<tr class=fail><td>probe</td><td>no toy card</td><td>buy one</td></tr>" in before
    assert "cannot train" in after


def test_a_backend_nobody_registered_is_a_usage_error():
    done = check_env("--backend", "ccpu")
    assert done.returncode == 2
    assert "did you mean 'cpu'" in done.stderr


def test_a_plug_in_that_breaks_import_torch_is_named_and_the_rest_still_checked(install):
    source = "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')"
    install("torch_toyplugin", source, "torch.backends", "torch_toyplugin", "autoload")
    done = check_env("--backend", "cpu")
    assert done.returncode == 3
    first_failure = next(line for line in done.stdout.splitlines() if line.startswith("[FAIL]"))
    assert "plug-in torch_toyplugin 1.5 is broken: CANN's libhccl.so is not found" in first_failure
    for part in ("set_env.sh", "export TORCH_DEVICE_BACKEND_AUTOLOAD=0", "the checks below ran with that"):
        assert part in done.stdout
    assert "[OK]   collectives" in done.stdout


def test_the_command_itself_never_imports_torch():
    code = "import sys; import portmoe.cli.check_env; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

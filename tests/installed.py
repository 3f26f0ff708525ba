"""The installed wheel, tried by an environment that holds nothing else: `make wheel` runs this outside the checkout."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import toruslab

POINT = ["--model", "palm-540b-h64", "--slice", "v4:4x4x4", "--batch", "64", "--context", "2048", "--weights", "int8"]


def ran(*command: str) -> str:
    """What a command prints on standard output."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Checks what the wheel put where, and that commands run from it."""
    package = Path(toruslab.__file__).parent
    distribution = importlib.metadata.distribution("toruslab")
    files = [Path(str(f)) for f in distribution.files or ()]
    tops = {f.parts[0] for f in files if not f.parts[0].startswith("..") and ".dist-info" not in f.parts[0]}
    assert package.is_relative_to(sys.prefix), f"toruslab is imported from {package}, not from the wheel"
    assert tops == {"toruslab"}, f"the wheel puts {sorted(tops)} at the top level"
    assert (package / "py.typed").exists(), "py.typed is missing"
    assert any(f.name == "LICENSE" for f in files), "the licence is missing"
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    assert distribution.version == toruslab.__version__

    command = str(Path(sys.executable).parent / "toruslab")
    assert ran(command, "--version").split()[-1] == toruslab.__version__
    found = json.loads(ran(sys.executable, "-m", "toruslab", "estimate", *POINT, "--json"))
    point = toruslab.Point.from_json(found["point"])
    assert toruslab.estimate(point).latency_s == found["latency_s"]
    assert ran(command, "explain", *POINT)
    n = sum(f.suffix == ".py" for f in files)
    print(f"1 passed: {n} modules, {command} {toruslab.__version__}, {found['latency_s'] * 1e3:.2f} ms")


if __name__ == "__main__":
    main()

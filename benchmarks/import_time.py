"""How long `import kitrocket` takes, beside the libraries it stands on, each in a fresh interpreter, interleaved.

    python benchmarks/import_time.py

Goal: less than 0.5 s on a quiet machine.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 15
IMPORTS = {
    "nothing": "pass",
    "pydantic": "import pydantic; pydantic.BaseModel",
    "piccolo": "import piccolo.table, piccolo.engine.postgres",
    "kitrocket": "import kitrocket",
}


def seconds(code: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begin


def main() -> None:
    for code in IMPORTS.values():
        seconds(code)  # compiled files are written once
    taken: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(ROUNDS):
        for name, code in IMPORTS.items():
            taken[name].append(seconds(code))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    for name, median in medians.items():
        print(f"{name:10} {median * 1000:6.0f} ms   {median / medians['piccolo']:.2f} x piccolo")


if __name__ == "__main__":
    main()

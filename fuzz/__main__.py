"""Runs the fuzz targets one after the other: ``python -m fuzz --seconds 600 [TARGET …]``.

Stops at the first crash and names the file that reproduces it, for
``python -m fuzz --replay TARGET FILE``.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Found inputs are kept there and are the start of the next run.
WORK = ROOT / ".nearfar" / "fuzz"
MAX_INPUT_BYTES = 16384
#: An input that takes longer than that is a finding.
TIMEOUT_S = 10
#: First argument of the process that fuzzes one target; the engine's own arguments follow.
_ENGINE = "--engine"
MEMORY_MB = 2048


def main() -> int:
    if sys.argv[1:2] == [_ENGINE]:
        return _fuzz(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help="default: all")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--replay", action="store_true", help="TARGET FILE: run one input")
    options = parser.parse_args()
    # Not above: what is fuzzed must be imported under instrumentation first.
    from fuzz import corpus

    names = list(corpus.SEEDS)
    if options.replay:
        from fuzz.targets import TARGETS

        target, file = options.targets
        TARGETS[target](Path(file).read_bytes())
        print(f"{target}: {file} is taken well")
        return 0
    unknown = set(options.targets) - set(names)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    for name in options.targets or names:
        if _run(name, options.seconds):
            return 1
    return 0


def _run(name: str, seconds: int) -> int:
    """One target in a process of its own; nonzero when it crashed."""
    from fuzz import corpus

    found, crashes = WORK / name / "corpus", WORK / name / "crashes"
    crashes.mkdir(parents=True, exist_ok=True)
    count = corpus.write(name, found)
    dictionary = WORK / name / "words.dict"
    has_words = corpus.write_dictionary(name, dictionary)
    print(f"{name}: {seconds} s from {count} seeds", flush=True)
    log = WORK / name / "log.txt"
    command = [
        sys.executable, "-m", "fuzz", _ENGINE, name, str(found),
        f"-max_total_time={seconds}", f"-max_len={MAX_INPUT_BYTES}", f"-timeout={TIMEOUT_S}",
        f"-rss_limit_mb={MEMORY_MB}", f"-artifact_prefix={crashes}/", "-print_final_stats=1",
    ]  # fmt: skip
    if has_words:
        command.append(f"-dict={dictionary}")
    with log.open("w") as output:
        code = subprocess.run(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    lines = log.read_text(errors="replace").splitlines()
    if code == 0:
        runs = [line.rpartition(":")[2].strip() for line in lines if "executed_units" in line]
        print(f"{name}: clean after {runs[0] if runs else '?'} inputs", flush=True)
        return 0
    print("\n".join(lines[-40:]))
    newest = max(crashes.iterdir(), key=lambda path: path.stat().st_mtime, default=None)
    where = newest.relative_to(ROOT) if newest else f"none was written; see {log}"
    print(f"{name}: CRASH (exit status {code}). Input: {where}")
    print(f"Again: python -m fuzz --replay {name} {where}", flush=True)
    return 1


def _fuzz(name: str, engine_options: list[str]) -> int:
    """Inside the process of one target."""
    import atheris

    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=["nearfar", "sdk", "cloud_runtime", "fuzz"]):
        from fuzz.targets import TARGETS
    atheris.Setup([sys.argv[0], *engine_options], TARGETS[name])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())

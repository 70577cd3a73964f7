"""Requests made from /openapi.json against a real server: no 5xx, no status that is not documented.

    pip install 'schemathesis>=4,<5'
    python benchmarks/schema.py --examples 100

A server of the bundled model, or of `--models DIR`, is started; the command that is run is printed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from fuzz import server

CONFIGURATION = """\
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 503, 504]
"""
"""A deadline of one millisecond is refused or missed, and says so: that is no failure."""
CHECKS = ",".join(
    (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "response_headers_conformance",
        "unsupported_method",
    )
)


def main() -> None:
    """Run schemathesis; its exit code is ours."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--path", help="only this path")
    parser.add_argument("--models", type=Path)
    given = parser.parse_args()
    program = str(Path(sys.executable).with_name("schemathesis"))
    command = [program, "--config-file", "schemathesis.toml", "run"]
    # Images make its data slow to generate on a busy machine, which says nothing of the service.
    command += ["--checks", CHECKS, "--suppress-health-check", "all", "--no-color"]
    command += ["--max-examples", str(given.examples), "--seed", str(given.seed)]
    if given.path:
        command += ["--include-path", given.path]
    with server(given.models) as (url, *_), tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "schemathesis.toml").write_text(CONFIGURATION)
        command.append(f"{url}/openapi.json")
        print(" ".join(command))
        sys.stdout.flush()
        code = subprocess.run(command, cwd=folder).returncode
    sys.exit(code)


if __name__ == "__main__":
    main()

"""`fastjepa doctor`: whether this machine, what is installed on it and a configuration go together."""

import argparse
import json
from dataclasses import asdict
from typing import Any


def add_to(commands: Any) -> None:
    what = (
        "look at this machine, what is installed, and what a configuration needs; each line says what to do"
    )
    parser = commands.add_parser(
        "doctor",
        help=what,
        description=f"{what[0].upper()}{what[1:]}. Exit status 1 if something prevents a run.",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file, see configs/; without one, the machine alone"
    )
    parser.add_argument("--json", action="store_true", help="for programs, all of it at the end")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.set_defaults(do=run)


def run(options: argparse.Namespace) -> int:
    from fastjepa.diagnosis.finding import is_fit
    from fastjepa.diagnosis.story import diagnose

    findings = []
    for finding in diagnose(options.config, options.overrides):
        findings.append(finding)
        if not options.json:
            print(finding.line(), flush=True)
    if options.json:
        print(json.dumps({"fit": is_fit(findings), "findings": [asdict(f) for f in findings]}, indent=1))
    else:
        counts = {level: sum(f.level == level for f in findings) for level in ("fail", "warn")}
        verdict = (
            f"Failures: {counts['fail']}, which prevent a run" if counts["fail"] else "Nothing prevents a run"
        )
        print(f"{verdict}. Warnings: {counts['warn']}")
    return 0 if is_fit(findings) else 1

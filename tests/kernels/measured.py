"""What GPUs measured: `python -m tests.kernels.measured` writes a section of kernels/README.md from kernels/results/.

A file of kernels/results/ is the results.json of one launch/gpu_check.sh: {"environment": ..., "machine": text of
nvidia-smi, and by step what `fp8train bench` wrote}, or was made by hand and says in "note" how. The section has what
the kernels must reach and what was measured of it (targets.py), the newest bench of each step of gpu_check, and a list
of all files. Nothing else may write into it; a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8train.units import bytes_text
from tests.kernels import targets

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
README = KERNELS / "README.md"
RESULTS = KERNELS / "results"
BEGIN = "<!-- measured figures: written by `python -m tests.kernels.measured` from results/ -->"
END = "<!-- end of measured figures -->"
NOTHING = "Not measured on hardware yet."
HEAD = "| case | contestant | median | time against the first (quartiles) | rate |"


def section(folder: Path) -> str:
    """The section between its marks, from the files of a folder; their names begin with their dates."""
    paths = sorted(folder.glob("*.json"), reverse=True)
    files = [(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    if not files:
        return "\n\n".join([BEGIN, NOTHING, END])
    shown: set[tuple[str, str]] = set()
    parts = ["### Wanted and reached on an H200", "\n".join(targets.table(files))]
    parts += [part for name, content in files if "note" not in content and (part := _part(name, content, shown))]
    parts += ["### All files", "\n".join(_entry(name, content) for name, content in files)]
    return "\n\n".join([BEGIN, *parts, END])


def section_in_readme() -> str:
    """What kernels/README.md has."""
    text = README.read_text(encoding="utf-8")
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def _part(name: str, content: Mapping[str, Any], shown: set[tuple[str, str]]) -> str:
    """The benches of a file that no newer file has of the same kind of device; adds them to `shown`."""
    device = content["environment"]["device"]["name"]
    lines = []
    for step, bench in content.items():
        if not isinstance(bench, dict) or "results" not in bench or (device, step) in shown:
            continue
        shown.add((device, step))
        rounds = f"{bench['arguments']['rounds']} interleaved rounds"
        lines += ["", f"`bench {bench['subject']}` ({step}, {rounds}):", ""]
        lines += _wide(bench["results"]) if _many(bench["results"]) else _long(bench["results"])
    if not lines:
        return ""
    machine = [f"nvidia-smi: `{line}`" for line in content.get("machine", "").splitlines()[1:]]
    return "\n".join([f"### {name}: {device}", "", f"{_made(content)}.", *machine, *lines])


def _entry(name: str, content: Mapping[str, Any]) -> str:
    """A file in the list of all."""
    note = f" {content['note']}" if "note" in content else ""
    return f"- [{name}](results/{name}.json): {content['environment']['device']['name']}. {_made(content)}.{note}"


def _made(content: Mapping[str, Any]) -> str:
    environment = content["environment"]
    versions = ", ".join(f"{key} {environment[key]}" for key in ("torch", "triton", "cuda", "python"))
    commit = str(environment["git_commit"])[:12] + (" with changes" if environment["git_dirty"] else "")
    return f"{'By hand' if 'note' in content else '`launch/gpu_check.sh`'} at {commit}; {versions}"


def _many(results: list[Mapping[str, Any]]) -> bool:
    contestants = max(len(result["timings"]) for result in results)
    return contestants > 3 or (contestants > 2 and "flops" in results[0])


def _long(results: list[Mapping[str, Any]]) -> list[str]:
    """A line for each contestant."""
    return [HEAD, "| --- | --- | --: | --: | --: |", *[row for result in results for row in _rows(result)]]


def _wide(results: list[Mapping[str, Any]]) -> list[str]:
    """Rates at the medians: a line for each case, a column for each contestant."""
    names = list(dict.fromkeys(name for result in results for name in result["timings"]))
    unit = "TFLOP/s" if "flops" in results[0] else "GB/s"
    lines = [f"| {unit} | {' | '.join(names)} |", f"| --- |{' --: |' * len(names)}"]
    for result in results:
        rates = {name: _rate(result, name, timing["median_seconds"]) for name, timing in result["timings"].items()}
        cells = [rates.get(name, "-").removesuffix(unit).strip() for name in names]
        lines.append(f"| {result['title']} | {' | '.join(cells)} |")
    return lines


def _rows(result: Mapping[str, Any]) -> list[str]:
    """A line for each contestant of one comparison."""
    rows = []
    for contestant, timing in result["timings"].items():
        median = f"{1e3 * timing['median_seconds']:.3f} ms"
        ratio = f"{timing['ratio']:.2f} ({timing['ratio_low']:.2f} ... {timing['ratio_high']:.2f})"
        rate = _rate(result, contestant, timing["median_seconds"])
        wrong = ", WRONG" if result.get("wrong", {}).get(contestant) else ""
        rows.append(f"| {result['title']} | {contestant}{wrong} | {median} | {ratio} | {rate} |")
    return rows


def _rate(result: Mapping[str, Any], contestant: str, seconds: float) -> str:
    """Arithmetic or bandwidth of a contestant, where the bench counted either."""
    if "flops" in result:
        return f"{result['flops'] / seconds / 1e12:.0f} TFLOP/s"
    if "bytes" in result:
        return f"{result['bytes'][contestant] / seconds / 1e9:.0f} GB/s"
    if "tokens" not in result:
        return "-"
    peak = result.get("peak_bytes", {}).get(contestant)
    return f"{result['tokens'] / seconds:,.0f} tok/s" + (f", peak {bytes_text(peak)}" if peak else "")


def main() -> None:
    """Write the section of kernels/README.md anew."""
    README.write_text(
        README.read_text(encoding="utf-8").replace(section_in_readme(), section(RESULTS)), encoding="utf-8"
    )


if __name__ == "__main__":
    main()

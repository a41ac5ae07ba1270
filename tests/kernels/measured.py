"""What GPUs measured: `python -m tests.kernels.measured` writes a section of kernels/README.md from kernels/results/.

A file of kernels/results/ is the results.json of one launch/gpu_check.sh: {"environment": ..., "machine": text of
nvidia-smi, and by step what `fp8train bench` wrote}. Nothing else may write into the section; a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8train.units import bytes_text

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
README = KERNELS / "README.md"
RESULTS = KERNELS / "results"
BEGIN = "<!-- measured figures: written by `python -m tests.kernels.measured` from results/ -->"
END = "<!-- end of measured figures -->"
NOTHING = "Not measured on hardware yet."
HEAD = "| case | contestant | median | time against the first (quartiles) | rate |"


def section(folder: Path) -> str:
    """The section between its marks: a part for each file of the folder, the newest first."""
    parts = [_part(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]
    return "\n\n".join([BEGIN, *(reversed(parts) if parts else [NOTHING]), END])


def section_in_readme() -> str:
    """What kernels/README.md has."""
    text = README.read_text(encoding="utf-8")
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def _part(name: str, content: Mapping[str, Any]) -> str:
    environment = content["environment"]
    versions = ", ".join(f"{key} {environment[key]}" for key in ("torch", "triton", "cuda", "python"))
    commit = str(environment["git_commit"])[:12] + (" with changes" if environment["git_dirty"] else "")
    made = "By hand" if "note" in content else "`launch/gpu_check.sh`"
    lines = [f"### {name}: {environment['device']['name']}", "", f"{made} at {commit}; {versions}."]
    lines += [f"nvidia-smi: `{line}`" for line in content.get("machine", "").splitlines()[1:]]
    lines += ["", content["note"]] if "note" in content else []
    benches = {step: bench for step, bench in content.items() if isinstance(bench, dict) and "results" in bench}
    for step, bench in benches.items():
        arguments = bench["arguments"]
        lines += ["", f"`bench {bench['subject']}` ({step}, {arguments['rounds']} interleaved rounds):", ""]
        lines += _wide(bench["results"]) if _many(bench["results"]) else _long(bench["results"])
    return "\n".join(lines)


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

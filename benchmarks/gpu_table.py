"""The results of ``gpu.py`` as Markdown."""

from collections.abc import Iterator, Mapping
from typing import Any


def to_markdown(machine: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """All that was measured; what was not stands at the end."""
    parts = result["parts"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"# {result['card']['name']}, {machine['cores']} cores, {machine['date']}, commit {machine['commit']}",
        "",
        f"{versions}; took {result['elapsed_s']:.0f} s. Rates are images/s, medians.",
        *(["", "**Tiny sizes, to try the script: no figure here means anything.**"] if result["smoke"] else []),
    ]
    for section in (_ceilings, _steps, _loop, _compiled, _kernels, _loader, _end_to_end, _two):
        found = list(section(parts))
        lines += ["", *found] if found else []
    if result["left_out"]:
        lines += ["", *(f"- left out: {name}: {why}" for name, why in result["left_out"].items())]
    return "\n".join(lines) + "\n"


def _of(parts: Mapping[str, Any], part: str) -> Iterator[tuple[str, Any]]:
    """Its cases, with their names."""
    for name, found in parts.items():
        head, _, case = name.partition(": ")
        if head == part:
            yield case, found


def _rate(row: Mapping[str, Any]) -> str:
    return f"{row['median']:,.0f}"


def _ceilings(parts: Mapping[str, Any]) -> Iterator[str]:
    for _, found in _of(parts, "ceilings"):
        rates = [f"{name} {found[name]:,.1f} TFLOP/s" for name in ("bf16", "tf32", "fp32")]
        rates.append(f"memory {found['copy_gb_per_s']:,.0f} GB/s")
        if "host_to_device_gb_per_s" in found:
            rates.append(f"from the host {found['host_to_device_gb_per_s']:,.0f} GB/s")
        yield "Ceilings: " + ", ".join(rates)


def _steps(parts: Mapping[str, Any]) -> Iterator[str]:
    for number, (batch, found) in enumerate(sorted(_of(parts, "step"), key=lambda case: int(case[0]))):
        if not number:
            yield "| step, batch |" + "".join(
                f" ours {p} | each kernel | plain {p} | times |" for p in ("bf16", "fp32")
            )
            yield "|---|" + 8 * "---:|"
        rates, times = found["images_per_s"], found["ours / plain"]
        names = {p: (f"ours {p}", f"ours {p}, kernel by kernel", f"plain {p}") for p in ("bf16", "fp32")}
        cells = [f"{' | '.join(_rate(rates[name]) for name in names[p])} | {times[p]:.2f}" for p in names]
        yield f"| {batch} | {' | '.join(cells)} |"


def _loop(parts: Mapping[str, Any]) -> Iterator[str]:
    for _, found in _of(parts, "loop"):
        rates = found["images_per_s"]
        yield f"| the trainer's loop, bf16 | {' | '.join(rates)} |"
        yield "|---|" + "---:|" * len(rates)
        yield f"| synthetic images | {' | '.join(_rate(row) for row in rates.values())} |"


def _compiled(parts: Mapping[str, Any]) -> Iterator[str]:
    for number, (case, found) in enumerate(_of(parts, "compile")):
        if not number:
            yield "| torch.compile of plain modules, bf16 | compiled | ours | times | compiling, s |"
            yield "|---|---:|---:|---:|---:|"
        rates = found["images_per_s"]
        compiled, ours = _rate(rates["compiled bf16"]), _rate(rates["ours bf16"])
        yield f"| {case} | {compiled} | {ours} | {found['ours / compiled']:.2f} | {found['compiling_s']:.0f} |"


def _kernels(parts: Mapping[str, Any]) -> Iterator[str]:
    for case, found in _of(parts, "kernels"):
        if "launches" in found:
            yield from (
                f"| {case}: {found['ms']:.3f} ms, {found['launches']:.0f} launches | ms | launches |",
                "|---|---:|---:|",
            )
            for row in found["kernels"]:
                yield f"| `{row['kernel'].replace('|', '/')}` | {row['ms']:.3f} | {row['launches']:.1f} |"
        else:
            yield f"| {case} | MB | floor, ms | ms | times the floor | registers | spilled bytes |"
            yield "|---|---:|---:|---:|---:|---:|---:|"
            for row in found["kernels"]:
                measured = f"{row['ms']:.3f} | {row['times_floor']:.2f}" if "ms" in row else "not measured | "
                yield (
                    f"| {row['kernel']} | {row['moved_mb']:,.0f} | {row['floor_ms']:.3f} | {measured} | "
                    f"{row['registers']} | {row['spilled_bytes']} |"
                )
        yield ""


def _loader(parts: Mapping[str, Any]) -> Iterator[str]:
    for case, found in _of(parts, "loader"):
        stages = found["stages"]
        names = [stage["name"] for stage in stages]
        yield f"| loader, {case} | {' | '.join(names)} | bare DALI | with a mean per channel | whole / bare |"
        yield "|---|" + "---:|" * (len(names) + 3)
        rates = " | ".join(f"{stage['images_per_s']:,.0f} ({stage['cores']:.1f} cores)" for stage in stages)
        bare = " | ".join(_rate(found["bare"][mean]) for mean in ("image", "channel"))
        yield f"| images/s | {rates} | {bare} | {found['whole / bare']:.3f} |"
        if shares := found["hw_decoder_images_per_s"]:
            yield ""
            yield "hw_decoder_load: " + ", ".join(f"{share}: {rate:,.0f}" for share, rate in shares.items())
        yield ""


def _end_to_end(parts: Mapping[str, Any]) -> Iterator[str]:
    ratios = ("end to end / min(loader, synthetic)", "end to end / loader")
    for number, (case, found) in enumerate(_of(parts, "end_to_end")):
        if not number:
            yield f"| training, batch {found['batch']} | loader | synthetic | end to end | {' | '.join(ratios)} |"
            yield "|---|---:|---:|---:|---:|---:|"
        rates = " | ".join(_rate(found["images_per_s"][name]) for name in ("loader", "synthetic", "end to end"))
        yield f"| {case} | {rates} | {' | '.join(format(found[name]['median'], '.3f') for name in ratios)} |"


def _two(parts: Mapping[str, Any]) -> Iterator[str]:
    for case, found in _of(parts, "two"):
        yield f"Two processes on one device, {case}, batch {found['batch']}: {_rate(found['images_per_s'])} images/s"

"""What an artifact is, and how it was judged, for people."""

from __future__ import annotations

from collections import Counter

from compress.precisions import name_of
from proto.manifest import GateReport, Manifest


def summarize(manifest: Manifest) -> str:
    """A readable page about an artifact."""
    lines = [
        f"{manifest.name}  ({manifest.digest[:12]}, format {manifest.format_version}, for {manifest.target})",
        f"  {shape(manifest)}",
        "  files",
        *(f"    {name:24} {entry.size_bytes:>12,}  {entry.sha256[:12]}" for name, entry in manifest.files.items()),
        f"  from checkpoint {manifest.lineage.checkpoint[:12]}, {manifest.lineage.created}",
        f"    {manifest.lineage.command}",
    ]
    if gate := manifest.gate:
        lines.append(f"  {verdict(gate)} on {gate.tokens:,} held-out tokens")
        for name, value in gate.metrics.items():
            lines.append(f"    {name:24} {value:>10.5g}  {_bounds(gate, name)}".rstrip())
        lines += [
            f"  {form}: {cost.decode_milliseconds:.2f} ms a token alone, {cost.tokens_per_second:.0f} tokens/s at "
            f"{cost.streams} streams, {cost.resident_bytes >> 20} MiB resident, on {gate.machine}"
            for form, cost in gate.serving.items()
        ]
    else:
        lines.append("  NOT judged by the gate")
    for product, p in sorted(manifest.recipe.products.items()):
        lines.append(f"    {product:24} {name_of(p)}")
    return "\n".join(lines)


def shape(manifest: Manifest) -> str:
    """Architecture, recipe and cache in a sentence."""
    a = manifest.architecture
    raised = Counter(name_of(p) for p in manifest.recipe.products.values())
    return (
        f"{a.family}: {a.num_layers} layers, hidden {a.hidden_size}, {a.num_heads} query and {a.num_kv_heads} KV "
        f"heads of {a.head_size}, vocabulary {a.vocab_size}, context {a.max_context}; "
        f"recipe {manifest.recipe.name}: products {name_of(manifest.recipe.default)}"
        + "".join(f", {count} of them {name}" for name, count in raised.items())
        + f"; KV cache {manifest.kv_cache}: {manifest.kv_bytes_per_token} bytes a token"
    )


def verdict(gate: GateReport) -> str:
    return f"gate {'passed' if gate.passed else 'FAILED'}{' (forced)' if gate.forced else ''}"


def limited_figures(gate: GateReport) -> str:
    """In one line: what was limited, for every form."""
    shown = [name for name in gate.metrics if _limit(gate, name) is not None]
    return ", ".join(f"{name} {gate.metrics[name]:.4g} ({_bounds(gate, name)})" for name in shown)


def _limit(gate: GateReport, name: str) -> float | None:
    """That of the form judged first holds for the others too."""
    return gate.thresholds.get(name, gate.thresholds.get(name.partition("_")[2]))


def _bounds(gate: GateReport, name: str) -> str:
    """Such as "0.0045 to 0.0053, limit 0.02"."""
    bounds, limit = gate.intervals.get(name), _limit(gate, name)
    parts = [f"{bounds.low:.4g} to {bounds.high:.4g}"] if bounds else []
    return ", ".join([*parts, f"limit {limit:g}"] if limit is not None else parts)

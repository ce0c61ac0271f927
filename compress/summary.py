"""`python -m compress inspect`: what an artifact is, for people."""

from __future__ import annotations

from collections import Counter

from compress.precisions import name_of
from proto.manifest import Manifest


def summarize(manifest: Manifest) -> str:
    """A readable page about an artifact."""
    a = manifest.architecture
    raised = Counter(name_of(p) for p in manifest.recipe.products.values())
    lines = [
        f"{manifest.name}  ({manifest.digest[:12]}, format {manifest.format_version}, for {manifest.target})",
        f"  {a.family}: {a.num_layers} layers, hidden {a.hidden_size}, {a.num_heads} query and {a.num_kv_heads} KV "
        f"heads of {a.head_size}, vocabulary {a.vocab_size}, context {a.max_context}",
        f"  recipe {manifest.recipe.name}: products {name_of(manifest.recipe.default)}"
        + "".join(f", {count} of them {name}" for name, count in raised.items()),
        f"  KV cache {manifest.kv_cache}: {manifest.kv_bytes_per_token} bytes a token",
        "  files",
        *(f"    {name:24} {entry.size_bytes:>12,}  {entry.sha256[:12]}" for name, entry in manifest.files.items()),
        f"  from checkpoint {manifest.lineage.checkpoint[:12]}, {manifest.lineage.created}",
        f"    {manifest.lineage.command}",
    ]
    if gate := manifest.gate:
        verdict = "passed" if gate.passed else "FAILED"
        lines.append(f"  gate {verdict}{' (forced)' if gate.forced else ''} on {gate.tokens:,} held-out tokens")
        for name, value in gate.metrics.items():
            limit = f"  limit {gate.thresholds[name]:g}" if name in gate.thresholds else ""
            lines.append(f"    {name:24} {value:>10.5g}{limit}")
    for product, p in sorted(manifest.recipe.products.items()):
        lines.append(f"    {product:24} {name_of(p)}")
    return "\n".join(lines)

"""The gate's figures for people: what they are called, and how they are written."""

from __future__ import annotations

NAMES = {  # in the order of tables
    "perplexity": "perplexity",
    "perplexity_ratio": "perplexity, change",
    "kl": "KL divergence, nats a token",
    "greedy_agreement": "most probable token agrees",
    "accuracy": "next token found",
    "accuracy_change": "next token found, change",
    "identical_length": "identical greedy tokens, mean",
    "identical_median": "identical greedy tokens, median",
    "identical_share": "greedy answers identical to their end",
}


def write(figure: str, value: float) -> str:
    """Changes and shares in percent."""
    match figure:
        case "perplexity_ratio":
            return f"{100 * (value - 1):+.2f} %"
        case "accuracy_change":
            return f"{100 * value:+.2f} %"
        case "greedy_agreement" | "accuracy":
            return f"{100 * value:.2f} %"
        case "identical_share":
            return f"{100 * value:.0f} %"
        case "kl":
            return f"{value:.5f}"
        case "perplexity":
            return f"{value:.3f}"
    return f"{value:.1f}"


def write_difference(figure: str, value: float) -> str:
    """Of two values of a figure; those of changes and shares in points of percent."""
    match figure:
        case "perplexity_ratio" | "accuracy_change" | "greedy_agreement" | "accuracy" | "identical_share":
            return f"{100 * value:+.2f} points"
        case "kl":
            return f"{value:+.5f}"
        case "perplexity":
            return f"{value:+.3f}"
    return f"{value:+.1f}"

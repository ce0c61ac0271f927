"""The engine: its batch, slots, KV cache, prefix cache, queue, and the drafts of speculation."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from monitoring.panels import BYTES, COUNT, RATE, SECONDS, SHARE, Rows, board, heat, lines, number, quantiles, rate


def ratio(part: str, whole: str) -> str:
    return f"sum({rate(part)}) / sum({rate(whole)})"


def engine_board() -> Dashboard:
    now = [
        number("Running", COUNT, "Requests that run.", {"running": "sum(vllm:num_requests_running{S})"}),
        number(
            "Waiting",
            COUNT,
            "Requests that wait; scale out on this one.",
            {"waiting": "sum(vllm:num_requests_waiting{S})"},
            good=(5, 20),
        ),
        number("Slots", COUNT, "Requests that can be decoded together.", {"slots": "sum(pawl_slots{S})"}),
        number(
            "KV cache",
            SHARE,
            "In use, of the fullest server.",
            {"in use": "max(vllm:kv_cache_usage_perc{S})"},
            good=(0.8, 0.95),
        ),
        number("KV memory", BYTES, "Of all servers.", {"bytes": "sum(pawl_kv_cache_bytes{S})"}),
        number(
            "KV tokens",
            COUNT,
            "What the KV cache holds, by its blocks.",
            {"tokens": "count by (block_size, num_gpu_blocks) (vllm:cache_config_info{S})"},
        ),
    ]
    batch = [
        lines(
            "Tokens per second",
            RATE,
            "Prompts computed or reused, as requests end, and tokens generated.",
            {
                "prompt": f"sum({rate('vllm:prompt_tokens_total')})",
                "generated": f"sum({rate('vllm:generation_tokens_total')})",
            },
        ),
        lines(
            "Steps per second", RATE, "Of all servers.", {"steps": f"sum({rate('vllm:iteration_tokens_total_count')})"}
        ),
        heat("Tokens per step", COUNT, "Prefill and decode together.", "vllm:iteration_tokens_total"),
        lines(
            "Requests",
            COUNT,
            "That run and that wait.",
            {
                "running": "sum(vllm:num_requests_running{S})",
                "waiting": "sum(vllm:num_requests_waiting{S})",
            },
        ),
        lines("Prompt lengths", COUNT, "Tokens.", quantiles("vllm:request_prompt_tokens")),
        lines("Answer lengths", COUNT, "Tokens.", quantiles("vllm:request_generation_tokens")),
    ]
    cache = [
        lines("KV cache in use", SHARE, "Of each server.", {"{{instance}}": "vllm:kv_cache_usage_perc{S}"}),
        lines(
            "Prefix cache hits",
            SHARE,
            "Prompt tokens that were found in the cache, of those looked up.",
            {
                "hits": ratio("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
            },
        ),
        lines(
            "Preemptions",
            RATE,
            "Requests put back into the queue because the KV cache was full.",
            {
                "preemptions": f"sum({rate('vllm:num_preemptions_total')})",
            },
        ),
    ]
    queue = [
        lines("Queue time", SECONDS, "Arrival to first scheduled.", quantiles("vllm:request_queue_time_seconds")),
        lines(
            "Prefill time", SECONDS, "First scheduled to first token.", quantiles("vllm:request_prefill_time_seconds")
        ),
        lines("Decode time", SECONDS, "First token to last token.", quantiles("vllm:request_decode_time_seconds")),
        lines(
            "Time per output token",
            SECONDS,
            "A request's mean, without its first token.",
            quantiles("vllm:request_time_per_output_token_seconds"),
        ),
        lines(
            "Inference time",
            SECONDS,
            "First scheduled to last token.",
            quantiles("vllm:request_inference_time_seconds"),
        ),
        lines(
            "Refused at the door",
            RATE,
            "By reason.",
            {"{{reason}}": f"sum by (reason) ({rate('vllm:admission_rejections_total')})"},
        ),
    ]
    speculation = [
        lines(
            "Drafts",
            RATE,
            "Tokens drafted from a request's own text, and those of them that were right.",
            {
                "drafted": f"sum({rate('vllm:spec_decode_num_draft_tokens_total')})",
                "accepted": f"sum({rate('vllm:spec_decode_num_accepted_tokens_total')})",
            },
            width=12,
        ),
        lines(
            "Drafts accepted",
            SHARE,
            "Of those drafted.",
            {
                "accepted": ratio(
                    "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_draft_tokens_total"
                ),
            },
            width=12,
        ),
    ]
    rows: Rows = {"Now": now, "Batch": batch, "Caches": cache, "A request's life": queue, "Speculation": speculation}
    return board("Pawl: engine", "pawl-engine", "Batch, slots, KV cache, queue and speculation.", rows)

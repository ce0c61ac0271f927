"""The server's process and its records, and the machine where a node_exporter tells of it."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from monitoring.panels import BYTES, COUNT, RATE, SECONDS, SHARE, WINDOW, Rows, board, lines, rate

DISK = '{fstype!~"tmpfs|ramfs|overlay"}'


def traffic(way: str) -> str:
    return f'sum by (instance) (rate(node_network_{way}_bytes_total{{device!="lo"}}[{WINDOW}]))'


def host_board() -> Dashboard:
    process = [
        lines("Processors", COUNT, "In use by each server.", {"{{instance}}": rate("process_cpu_seconds_total")}),
        lines("Memory", BYTES, "Resident, of each server.", {"{{instance}}": "process_resident_memory_bytes{S}"}),
        lines(
            "Open files",
            SHARE,
            "Of what a server may open.",
            {"{{instance}}": "process_open_fds{S} / process_max_fds{S}"},
        ),
        lines(
            "Up for", SECONDS, "Since each server started.", {"{{instance}}": "time() - process_start_time_seconds{S}"}
        ),
        lines(
            "Virtual memory",
            BYTES,
            "Of each server; it counts what is mapped and never touched.",
            {"{{instance}}": "process_virtual_memory_bytes{S}"},
        ),
    ]
    records = [
        lines("Records", BYTES, "What they take on the disk.", {"{{instance}}": "pawl_records_bytes{S}"}),
        lines(
            "Free disk",
            SHARE,
            "Of the disk that the records are on.",
            {"{{instance}}": "pawl_records_disk_free_bytes{S} / pawl_records_disk_bytes{S}"},
        ),
        lines(
            "Written",
            RATE,
            "Durable records, by kind.",
            {"{{kind}}": f"sum by (kind) ({rate('pawl_records_written_total')})"},
        ),
        lines("Waiting for the store", COUNT, "Records.", {"{{instance}}": "pawl_records_queue{S}"}),
        lines("Their size", BYTES, "Of the records that wait.", {"{{instance}}": "pawl_records_queue_bytes{S}"}),
        lines(
            "Since the last write",
            SECONDS,
            "Old is bad only while records wait.",
            {"{{instance}}": "time() - (pawl_records_last_write_seconds{S} > 0)"},
        ),
        lines(
            "Failures",
            RATE,
            "Batches that the store did not take.",
            {"{{instance}}": rate("pawl_records_failures_total")},
            width=12,
        ),
        lines(
            "Expired",
            RATE,
            "Rows deleted, or emptied of their text, because of their age.",
            {"{{instance}}": rate("pawl_records_expired_total")},
            width=12,
        ),
    ]
    machine = [
        lines(
            "Processors in use",
            SHARE,
            "Of each machine.",
            {"{{instance}}": f'1 - avg by (instance) (rate(node_cpu_seconds_total{{mode="idle"}}[{WINDOW}]))'},
        ),
        lines(
            "Memory available",
            SHARE,
            "Of each machine.",
            {"{{instance}}": "node_memory_MemAvailable_bytes / node_memory_MemTotal_bytes"},
        ),
        lines(
            "Load",
            COUNT,
            "Over one minute, for each processor.",
            {"{{instance}}": 'node_load1 / count by (instance, job) (node_cpu_seconds_total{mode="idle"})'},
        ),
        lines(
            "Disks free",
            SHARE,
            "Without memory that looks like a disk.",
            {"{{instance}} {{mountpoint}}": f"node_filesystem_avail_bytes{DISK} / node_filesystem_size_bytes{DISK}"},
            width=12,
        ),
        lines(
            "Network",
            "Bps",
            "Received and sent.",
            {
                "{{instance}} received": traffic("receive"),
                "{{instance}} sent": traffic("transmit"),
            },
            width=12,
        ),
    ]
    rows: Rows = {"The process": process, "The records": records, "The machine": machine}
    return board("Pawl: host", "pawl-host", "Process, records, and the machine where node_exporter runs.", rows)

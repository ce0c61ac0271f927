"""The server: engine, HTTP and gRPC adapters, metrics, records. Never imports torch or transformers."""

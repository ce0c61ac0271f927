"""The contracts that cross Pawl's doors: wire messages, the artifact manifest, records. Imports nothing of ours."""

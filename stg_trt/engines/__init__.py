"""The contract between building and running: engines, their keys, manifests and backends."""

"""The `stg-trt` command line."""

"""Storage of any kind: URIs and S3, artefacts and their manifests, locks, Parquet and weight files."""

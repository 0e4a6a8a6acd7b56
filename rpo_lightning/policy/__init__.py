"""The policy: loading, adapters, weights as a stream, export, its output head."""

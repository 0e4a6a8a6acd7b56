"""The policy: loading, adapters, its weights as a stream, export, its output head, several devices, shared rows."""

"""Benchmarks and measurements: machine code, quality, latency, throughput, peers."""

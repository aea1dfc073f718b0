"""How it is measured: benchmarks and tool metrics."""

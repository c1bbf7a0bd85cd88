"""The loops of the CPU engine, compiled once for each SIMD level."""

"""What a compressed encoder costs: parameters, bytes, operations, latency, memory, energy."""

"""What Paddle's CPU build lacks for several processes over gloo, one idea a file; `collectives_cpu.install` adds it."""
